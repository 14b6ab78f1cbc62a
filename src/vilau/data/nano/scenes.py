"""Pictures and films of the nano world, drawn from a description: the same scene always gives the same pixels."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from vilau.data.nano.world import World

# Sizes are shares of the picture's side.
BIG, SMALL, SEVERAL, BESIDE, MOVING = 26 / 32, 14 / 32, 14 / 32, 15 / 32, 15 / 32
GROW_FROM, GROW_TO = 10 / 32, 28 / 32
TRAVEL = 0.48

MOTIONS: tuple[str, ...] = ("left", "right", "up", "down", "growing", "shrinking")
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
LAYOUTS: dict[int, tuple[tuple[float, float], ...]] = {
    2: ((0.27, 0.5), (0.73, 0.5)),
    3: ((0.5, 0.27), (0.27, 0.73), (0.73, 0.73)),
    4: ((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)),
}
_PLACES = {"left of": (0.26, 0.5), "right of": (0.74, 0.5), "above": (0.5, 0.26), "below": (0.5, 0.74)}
_STEPS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}


@dataclass(frozen=True)
class Item:
    """One object in a scene: size and centre are shares of the picture's side, y downwards."""

    object: str
    style: str = "noto"
    size: float = BIG
    cx: float = 0.5
    cy: float = 0.5


@dataclass(frozen=True)
class Scene:
    """A still: ``kind`` is ``single``, ``small``, ``count``, ``relation`` or ``film`` (a frame of one).

    In a relation the first item stands ``relation`` the second.
    """

    kind: str
    background: str
    items: tuple[Item, ...]
    relation: str = ""

    @property
    def object(self) -> str:
        """Name of the first object."""
        return self.items[0].object


@dataclass(frozen=True)
class Film:
    """One object that moves or changes its size from the first frame to the last."""

    background: str
    object: str
    motion: str
    style: str = "noto"
    shift: tuple[float, float] = (0.0, 0.0)


def single(
    name: str, background: str, style: str = "noto", *, shift: tuple[float, float] = (0.0, 0.0), size: float = BIG
) -> Scene:
    """One big object in the middle, moved by ``shift`` (shares of the side)."""
    return Scene("single", background, (Item(name, style, size, 0.5 + shift[0], 0.5 + shift[1]),))


def small(name: str, background: str, style: str = "noto", *, shift: tuple[float, float] = (0.0, 0.0)) -> Scene:
    """One small object near the middle."""
    return Scene("small", background, (Item(name, style, SMALL, 0.5 + shift[0], 0.5 + shift[1]),))


def count(name: str, number: int, background: str, style: str = "noto") -> Scene:
    """Two, three or four of the same object; ValueError for any other number."""
    if number not in LAYOUTS:
        raise ValueError(f"a count scene of {number} objects is not known: use one of {', '.join(map(str, LAYOUTS))}")
    return Scene("count", background, tuple(Item(name, style, SEVERAL, cx, cy) for cx, cy in LAYOUTS[number]))


def relation(first: str, how: str, second: str, background: str, style: str = "noto") -> Scene:
    """``first`` stands ``how`` (left of, right of, above, below) ``second``; ValueError for any other relation."""
    if how not in RELATIONS:
        raise ValueError(f"relation {how!r} is not one of {', '.join(RELATIONS)}")
    items = (Item(first, style, BESIDE, *_PLACES[how]), Item(second, style, BESIDE, *_PLACES[OPPOSITE[how]]))
    return Scene("relation", background, items, how)


def render(scene: Scene, world: World, image_size: int) -> np.ndarray:
    """Pixels ``(S, S, 3)`` uint8 RGB of a scene; objects are anti-aliased and cut at the border."""
    canvas = np.empty((image_size, image_size, 3), np.float32)
    canvas[:] = world.backgrounds[scene.background]
    for item in scene.items:
        side = max(1, round(item.size * image_size))
        colour, through = world.scaled(item.object, item.style, side)
        left, top = round(item.cx * image_size - side / 2), round(item.cy * image_size - side / 2)
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + side, image_size), min(top + side, image_size)
        if x0 >= x1 or y0 >= y1:
            continue
        inside = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
        spot = canvas[y0:y1, x0:x1]
        spot *= through[inside]
        spot += colour[inside]
    canvas += 0.5
    return np.minimum(canvas, 255.0, out=canvas).astype(np.uint8)


def film_scene(film: Film, progress: float) -> Scene:
    """The still at ``progress`` (0 the first frame, 1 the last); ValueError for an unknown motion."""
    if film.motion not in MOTIONS:
        raise ValueError(f"motion {film.motion!r} is not one of {', '.join(MOTIONS)}")
    cx, cy, size = 0.5 + film.shift[0], 0.5 + film.shift[1], MOVING
    if film.motion in _STEPS:
        dx, dy = _STEPS[film.motion]
        cx, cy = cx + dx * TRAVEL * (progress - 0.5), cy + dy * TRAVEL * (progress - 0.5)
    else:
        share = progress if film.motion == "growing" else 1.0 - progress
        size = GROW_FROM + (GROW_TO - GROW_FROM) * share
    return Scene("film", film.background, (Item(film.object, film.style, size, cx, cy),))


def render_film(film: Film, world: World, image_size: int, num_frames: int) -> tuple[np.ndarray, ...]:
    """Frames, each ``(S, S, 3)`` uint8 RGB, at even steps from the first to the last moment."""
    last = max(1, num_frames - 1)
    return tuple(render(film_scene(film, step / last), world, image_size) for step in range(num_frames))


def contact_sheet(
    images: Sequence[np.ndarray], captions: Sequence[str], *, columns: int = 8, scale: int = 4, width: int | None = None
) -> Image.Image:
    """Pictures ``(S, S, 3)`` uint8 side by side, enlarged ``scale`` times, each with its caption below (wrapped)."""
    cell = max(image.shape[1] for image in images) * scale
    width, line = width or max(cell, 128), 11
    letters = max(8, width // 6)
    lines = [textwrap.wrap(words, letters) for words in captions]
    height = cell + 4 + line * max(1, max((len(wrapped) for wrapped in lines), default=1))
    rows = (len(images) + columns - 1) // columns
    sheet = Image.new("RGB", (columns * (width + 6), rows * (height + 6)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (pixels, wrapped) in enumerate(zip(images, lines, strict=True)):
        x, y = (i % columns) * (width + 6) + 3, (i // columns) * (height + 6) + 3
        picture = Image.fromarray(pixels)
        sheet.paste(picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST), (x, y))
        for row, words in enumerate(wrapped):
            pen.text((x, y + cell + 2 + row * line), words, fill="black")
    return sheet
