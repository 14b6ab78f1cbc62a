"""Write a folder of captioned pictures in a style that the shipped model has never seen: things without colours.

    python examples/gray_pictures.py my-pictures

Every picture NAME.png has its caption in NAME.txt, which is all that `vilau train` needs. docs/finetune.md uses it; put
your own pictures in its place. Twelve of the 48 objects are left out, to see whether the style reaches them too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from vilau.data.nano.scenes import render, single
from vilau.data.nano.world import World

LEFT_OUT = 12
SHIFTS = (-2 / 32, 0.0, 2 / 32)
GRAY = (0.299, 0.587, 0.114)


def without_colours(pixels: np.ndarray) -> np.ndarray:
    """Return pixels ``(S, S, 3)`` without their colours."""
    return np.repeat((pixels @ np.array(GRAY)).round().astype(np.uint8)[..., None], 3, axis=2)


def main(folder: Path) -> None:
    """Write the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    world = World.load(None, objects=48, styles=("noto",))
    names = [thing.name for thing in world.objects]
    for name in names[:-LEFT_OUT]:
        for number, shift in enumerate((x, y) for x in SHIFTS for y in SHIFTS):
            scene = single(name, "white", "noto", shift=shift)
            article = "an" if name[0] in "aeiou" else "a"
            file = folder / f"{name.replace(' ', '-')}-{number}"
            Image.fromarray(without_colours(render(scene, world, 64))).save(file.with_suffix(".png"))
            file.with_suffix(".txt").write_text(f"a gray picture of {article} {name}\n")
    print(f"{len(list(folder.glob('*.png')))} pictures in {folder}; left out: {', '.join(names[-LEFT_OUT:])}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "my-pictures"))
