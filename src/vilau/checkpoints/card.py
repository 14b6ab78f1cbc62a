"""The model card of a folder: what the model is, how it is used, what is known about its weights."""

from __future__ import annotations

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
