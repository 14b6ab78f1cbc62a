"""Cut golden folders to the size of a repository: `python tests/golden/trim.py SRC DST`.

`SRC` holds `media` and golden folders. Checkpoints, media, prompts, numbers and readmes are copied byte for byte; of
the large tensors in `inputs.safetensors` and `outputs.safetensors` slices are kept. `crops.json` names these
slices, one `[start, stop]` per axis, and `vilau parity` applies them to what it recomputes. Codes, ids, losses and
gradients stay whole.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Slices = list[list[int]]


def centre(shape: torch.Size, side: int) -> Slices:
    """The central square of pictures `(..., S, S)`."""
    start = [(size - side) // 2 for size in shape[-2:]]
    return [[0, size] for size in shape[:-2]] + [[at, at + side] for at in start]


def along(shape: torch.Size, axis: int, start: int, stop: int) -> Slices:
    """A range of one axis."""
    return [[start, min(stop, size)] if i == axis else [0, size] for i, size in enumerate(shape)]


RULES = (  # tensor, what is kept of it
    (r"b\.pixel_values(_a)?|b\.\w+_mode_u8|e\.decode_fp32(_center256)?|j\..*_u8floor", lambda s: centre(s, 64)),
    (r"c\.(hidden|z_q)", lambda s: along(s, 1, 0, 8)),  # rows of the map
    (r"c\.projector", lambda s: along(s, 1, 0, 64)),  # positions
    (r"d\.depth_(embed|cumsum)", lambda s: along(s, 1, 0, 8)),  # positions
    (r"f\.logits", lambda s: along(s, 1, 0, 4)),  # positions
    (r"g\.logits_row0", lambda s: along(s, 0, 40, 104)),  # positions: text, then the first ones of the picture
    (r"h\.mixed\.expanded_labels", lambda s: along(s, 2, 0, 4)),  # depths
    (r"j\..*mixed_logits_first4", lambda s: along(s, 1, 0, 2)),  # positions
)


def trim(source: Path, target: Path) -> None:
    """Write the trimmed copy of one golden folder."""
    target.mkdir(parents=True)
    shutil.copytree(source / "ckpt", target / "ckpt", copy_function=shutil.copyfile)
    for path in [*source.glob("*.json"), *source.glob("*.md")]:
        shutil.copyfile(path, target / path.name)
    crops: dict[str, Slices] = {}
    for name in ("inputs.safetensors", "outputs.safetensors"):
        tensors = load_file(source / name)
        for key, tensor in tensors.items():
            for pattern, rule in RULES:
                if re.fullmatch(pattern, key):
                    crops[key] = rule(tensor.shape)
                    tensors[key] = tensor[tuple(slice(*ends) for ends in crops[key])].contiguous()
        save_file(tensors, target / name)
    lines = [f"{json.dumps(key)}: {json.dumps(crops[key])}" for key in sorted(crops)]
    (target / "crops.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def main(source: Path, target: Path) -> None:
    """Write `media` and every golden folder of `source` into `target`."""
    shutil.copytree(source / "media", target / "media", copy_function=shutil.copyfile, dirs_exist_ok=True)
    for folder in sorted(path.parent for path in source.glob("*/outputs.safetensors")):
        trim(folder, target / folder.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
