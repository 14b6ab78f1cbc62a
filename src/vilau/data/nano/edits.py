"""Beyond the paper: pictures to be changed, pictures to be set in motion, and answers that mix words and pictures.

Each has one right answer, drawn from the same scenes as everything else. In the held-out split what is drawn is a
combination that training never shows, while what is given may be one that it does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vilau.data.nano import scenes as drawn
from vilau.data.nano.draw import Draw
from vilau.data.nano.scenes import MOTIONS, Film, Scene, film_scene, render
from vilau.data.nano.texts import NUMBERS
from vilau.data.nano.world import HELDOUT, TRAIN, World, article

EDITS: tuple[str, ...] = ("background", "replace", "several", "small")
_TELL = {
    "left": ("move it to the left", "make it move left"),
    "right": ("move it to the right", "make it move right"),
    "up": ("move it up", "make it move up"),
    "down": ("move it down", "make it move down"),
    "growing": ("make it grow", "let it grow"),
    "shrinking": ("make it shrink", "let it shrink"),
}


@dataclass(frozen=True)
class Edit:
    """A picture, what shall be done to it, and what it is then."""

    kind: str
    before: Scene
    instruction: str
    after: Scene


@dataclass(frozen=True)
class Mixed:
    """A request, perhaps about a picture, and an answer of words and pictures in turn."""

    kind: str
    shown: Scene | None
    request: str
    answer: tuple[str | Scene, ...]


def edit(world: World, draw: Draw, split: str, style: str, shift: tuple[float, float] = (0.0, 0.0)) -> Edit:
    """One change: of the background, of the object, of its number or its size. All else stays where it is."""
    kind = draw.among(EDITS)
    name, background = draw.among(world.combinations(split))
    after = drawn.single(name, background, style, shift=shift)
    given = world.combinations(TRAIN)
    spec = world.spec(name)
    if kind == "background":
        before = replace(after, background=draw.among([c for n, c in given if n == name and c != background]))
        asked = draw.among((f"make the background {background}", f"change the background to {background}"))
        return Edit(kind, before, asked, after)
    if kind == "replace":
        others = [n for n, c in given if c == background and n != name]
        if others:
            other = draw.among(others)
            before = drawn.single(other, background, style, shift=shift)
            asked = draw.among((f"replace the {other} by {article(name)}", f"make it {article(name)}"))
            return Edit(kind, before, asked, after)
        kind = "small"
    if kind == "several":
        number = 2 + draw.below(3)
        asked = draw.among((f"show {NUMBERS[number]} {spec.plural}", f"make it {NUMBERS[number]} {spec.plural}"))
        return Edit(kind, after, asked, drawn.count(name, number, background, style))
    asked = draw.among((f"make the {name} small", f"show a small {name}"))
    return Edit("small", after, asked, drawn.small(name, background, style, shift=shift))


def animation(
    world: World, draw: Draw, split: str, style: str, shift: tuple[float, float] = (0.0, 0.0)
) -> tuple[Film, str]:
    """A film and the words that ask for it; its picture does not tell which way it goes."""
    name, background = draw.among(world.combinations(split))
    film = Film(background, name, draw.among(MOTIONS), style, shift)
    return film, draw.among(_TELL[film.motion])


def render_animation(film: Film, world: World, image_size: int, num_frames: int) -> tuple[np.ndarray, ...]:
    """Frames ``(S, S, 3)`` uint8 of the second half of a film: the first is the picture that it starts from."""
    last = max(1, num_frames - 1)
    moments = [0.5 + 0.5 * step / last for step in range(num_frames)]
    return tuple(render(film_scene(film, moment), world, image_size) for moment in moments)


def mixed(world: World, draw: Draw, split: str, style: str) -> Mixed:
    """A request whose answer names and draws: two objects, one object on two colours, or what is seen, drawn anew."""
    kind = draw.among(("objects", "colours", "redraw") if split != HELDOUT else ("objects", "redraw"))
    combinations = world.combinations(split)
    name, background = draw.among(combinations)
    if kind == "objects":
        others = [n for n, c in combinations if c == background and n != name]
        if others:
            other = draw.among(others)
            request = f"draw {article(name)}, then {article(other)}, on {article(background)} background"
            return Mixed(kind, None, request, _named([name, other], [background] * 2, style))
        kind = "redraw"
    if kind == "colours":
        second = draw.among([c for n, c in combinations if n == name and c != background])
        request = f"draw {article(name)} on {background}, then on {second}"
        scenes = [drawn.single(name, colour, style) for colour in (background, second)]
        return Mixed(kind, None, request, (f"{background}.", scenes[0], f"{second}.", scenes[1]))
    first = draw.among([c for n, c in world.combinations(TRAIN) if n == name and c != background])
    shown = drawn.single(name, first, style)
    request = f"what is it? draw it on {article(background)} background"
    return Mixed(kind, shown, request, _named([name], [background], style))


def _named(names: list[str], backgrounds: list[str], style: str) -> tuple[str | Scene, ...]:
    answer: list[str | Scene] = []
    for name, background in zip(names, backgrounds, strict=True):
        answer += [f"{article(name)}.", drawn.single(name, background, style)]
    return tuple(answer)
