"""The model card of a folder: what the model is, how it is used, what is known about its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vilau.configuration import VilaUConfig

_CARD = """---
library_name: vilau
pipeline_tag: any-to-any
license: {licence}
tags: [vila-u, text-to-image, text-to-video, image-text-to-text, video-text-to-text]
---

# {name}

A unified model that reads and makes text, pictures and films, after the paper VILA-U (arXiv 2409.04429).

| | |
| --- | --- |
| pictures | {size}x{size} px, {positions} positions of {depth} codes out of {codes} |
| films | {frames} frames |
| language model | {kind}, {layers} layers of width {width}, context {context} |
| tensors | {count:,} values, {dtype} |

## Use

```python
import vilau

model = vilau.load("PATH_OR_HUB_ID")
model.draw("a red apple on a table")[0].save("apple.png")
print(model.ask("apple.png", "What is in the picture?"))
```

## Origin

{origin}

## Limits

The model can be wrong, and it can draw what nobody asked for. Look at what it makes before you rely on it. What is
known about its training data, its biases and its licence belongs here.
"""


_TOWER_CARD = """---
library_name: vilau
license: other
tags: [vila-u, rq-vae]
---

# Vision tower from an RQ-VAE

Converted with `vilau convert`: {size}x{size} px, {side}x{side} positions of {depth} codes out of {codes}. The licence
of the RQ-VAE's weights holds here too.

```python
import torch
import vilau

tower = vilau.VisionTower.from_pretrained("FOLDER").eval()
codes = tower.encode(torch.zeros(1, 3, {size}, {size}))  # pictures in [-1, 1]
pixels = tower.decode(codes)
```

Encoder, quantizer and decoder are trained. An RQ-VAE knows no text, so these tensors are random until a stage
`vision_tower` has trained them:

{random}
"""


def tower_card(config: Any, random: Sequence[str]) -> str:
    """Return the text of the card of a converted RQ-VAE.

    Args:
        config: a `VisionTowerConfig`.
        random: names of the tensors that were not in its file.
    """
    return _TOWER_CARD.format(
        size=config.image_size,
        side=config.grid,
        depth=config.depth,
        codes=config.codebook_size,
        random="\n".join(f"- `{name}`" for name in random),
    )


def model_card(
    config: VilaUConfig,
    count: int,
    source: Path | None = None,
    licence: str = "other",
) -> str:
    """Return the text of a model card.

    Args:
        config: of the model.
        count: of values in its tensors.
        source: the released folder that it was converted from, if any.
        licence: its identifier on the hub; the licence of the weights stands with their source.
    """
    vision: Any = config.vision_config
    text: Any = config.text_config
    name = source.name if source is not None else "VILA-U"
    origin = "Trained with vilau."
    if source is not None:
        origin = f"Converted from the released checkpoint `{name}` with `vilau convert`; its licence holds here too."
    return _CARD.format(
        licence=licence,
        name=name,
        size=vision.image_size,
        positions=vision.num_positions,
        depth=vision.depth,
        codes=vision.codebook_size,
        frames=config.num_frames,
        kind=text.model_type,
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        context=config.context_length,
        count=count,
        dtype=str(config.dtype or "float32").removeprefix("torch."),
        origin=origin,
    )
