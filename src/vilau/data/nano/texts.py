"""What people say to have a scene or film drawn, and what is said of one: one standard wording and a few others."""

from __future__ import annotations

from vilau.data.nano.draw import Draw
from vilau.data.nano.scenes import Film, Scene
from vilau.data.nano.world import World, article

NUMBERS: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_ANSWERS = {"left": "it moves left.", "right": "it moves right.", "up": "it moves up.", "down": "it moves down."}
_MOVES = {"left": "moving left", "right": "moving right", "up": "moving up", "down": "moving down"}


def subject(scene: Scene, world: World) -> str:
    """What stands in the scene: ``"a dog"``, ``"a small dog"``, ``"three dogs"``, ``"a dog left of a cat"``."""
    spec = world.spec(scene.object)
    if scene.kind == "count":
        return f"{NUMBERS[len(scene.items)]} {spec.plural}"
    if scene.kind == "relation":
        return f"{article(spec.name)} {scene.relation} {article(scene.items[1].object)}"
    return article(f"small {spec.name}" if scene.kind == "small" else spec.name)


def caption(scene: Scene, world: World) -> str:
    """The standard caption: ``"a red apple on a blue background"``."""
    return f"{subject(scene, world)} on {article(scene.background)} background"


def film_caption(film: Film) -> str:
    """The standard caption of a film: ``"a dog moving left on a blue background"``, ``"a dog growing on ..."``."""
    return f"{article(film.object)} {_MOVES.get(film.motion, film.motion)} on {article(film.background)} background"


def film_answer(film: Film) -> str:
    """What the object does: ``"it moves left."``, ``"it grows."``, ``"it shrinks."``."""
    return _ANSWERS.get(film.motion) or {"growing": "it grows.", "shrinking": "it shrinks."}[film.motion]


def other_wordings(scene: Scene, world: World) -> tuple[str, ...]:
    """Other ways to say the same: the first four may describe, all may ask for a picture."""
    what, colour = subject(scene, world), scene.background
    standard = caption(scene, world)
    wordings: tuple[str, ...] = (
        f"a picture of {standard}",
        f"{article(colour)} background with {what}",
        f"{colour} background with {what}",
        f"{what} in front of {article(colour)} background",
        f"{what}, {colour} background",
        f"{what} on {colour}",
        f"draw {standard}",
        f"show me {standard}",
    )
    if scene.kind == "single":
        wordings += (f"a big {scene.object} on {article(colour)} background",)
    return wordings


def other_film_wordings(film: Film) -> tuple[str, ...]:
    """Other ways to ask for the same film."""
    standard, colour = film_caption(film), film.background
    moving = f"{article(film.object)} {_MOVES.get(film.motion, film.motion)}"
    moves = f"{article(film.object)} {film_answer(film)[3:-1]}"
    return (
        f"a film of {standard}",
        f"{article(colour)} background with {moving}",
        f"{moving}, {colour} background",
        f"{moves} on {article(colour)} background",
        f"a video of {standard}",
        f"show me {standard}",
    )


def as_typed(words: str, draw: Draw) -> str:
    """The words as hurried or careful people type them: now and then a capital, a full stop, or British ``grey``."""
    if draw.chance(0.06):
        words = words[0].upper() + words[1:]
    if draw.chance(0.06) and words[-1] not in ".?!":
        words += "."
    if "gray" in words and draw.chance(0.15):
        words = words.replace("gray", "grey")
    return words


def prompt(scene: Scene, world: World, draw: Draw) -> str:
    """What a person types to have the scene drawn: the standard caption in 70 % of cases."""
    words = caption(scene, world) if draw.chance(0.7) else draw.among(other_wordings(scene, world))
    return as_typed(words, draw)


def film_prompt(film: Film, draw: Draw) -> str:
    """What a person types to have the film drawn: the standard caption in 70 % of cases."""
    words = film_caption(film) if draw.chance(0.7) else draw.among(other_film_wordings(film))
    return as_typed(words, draw)


def description(scene: Scene, world: World, draw: Draw) -> str:
    """A caption to learn to say: the standard one in 90 % of cases."""
    return caption(scene, world) if draw.chance(0.9) else draw.among(other_wordings(scene, world)[:4])
