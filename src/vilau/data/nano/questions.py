"""Questions on scenes, on two scenes, and on films, each with its one right answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vilau.data.nano.draw import Draw
from vilau.data.nano.scenes import MOTIONS, OPPOSITE, RELATIONS, Film, Scene
from vilau.data.nano.texts import NUMBERS, caption, film_answer, film_caption
from vilau.data.nano.world import OTHER_GROUPS, World, article, group_words


@dataclass(frozen=True)
class Question:
    """What is asked and what is right; ``kind`` names the skill that it tests."""

    kind: str
    question: str
    answer: str
    facts: dict[str, Any] = field(default_factory=dict)


def yes_no(truth: bool) -> str:
    """The word for it."""
    return "yes" if truth else "no"


def listed(names: list[str]) -> str:
    """``"a dog and a cat"``."""
    return " and ".join(article(name) for name in names)


def distractor(present: tuple[str, ...], world: World, draw: Draw) -> str:
    """An object that is not there; two times in three of the same group as one that is."""
    near = [name for name in world.group(world.spec(draw.among(present)).group) if name not in present]
    if near and draw.chance(0.67):
        return draw.among(near)
    return draw.among([name for name in world.names if name not in present])


def _present(scene: Scene) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item.object for item in scene.items))


def _the(scene: Scene, world: World) -> str:
    spec = world.spec(scene.object)
    return f"the {spec.plural}" if scene.kind == "count" else f"the {spec.name}"


def _describe(scene: Scene, world: World, draw: Draw) -> Question:
    asked = draw.among(
        ("describe the picture.", "describe the picture.", "describe this image.", "what does the picture show?")
    )
    return Question("describe", asked, caption(scene, world))


def _object(scene: Scene, world: World, draw: Draw) -> Question:
    if scene.kind == "relation":
        asked = draw.among(("what are the objects?", "what is in the picture?"))
        return Question("object", asked, listed([item.object for item in scene.items]))
    if scene.kind == "count":
        return Question(
            "object", draw.among(("what are the objects?", "what are these?")), world.spec(scene.object).plural
        )
    asked = draw.among(("what is the object?", "what is this?", "what is in the picture?", "what do you see?"))
    return Question("object", asked, article(scene.object))


def _background(scene: Scene, world: World, draw: Draw) -> Question:
    asked = draw.among(
        (
            "what colour is the background?",
            "what color is the background?",
            "which colour is the background?",
            f"what colour is behind {_the(scene, world)}?",
        )
    )
    return Question("background", asked, scene.background)


def _background_check(scene: Scene, world: World, draw: Draw) -> Question:
    truth = draw.chance(0.5)
    colour = scene.background if truth else draw.among([name for name in world.colours if name != scene.background])
    return Question("background_check", f"is the background {colour}?", yes_no(truth))


def _exists(scene: Scene, world: World, draw: Draw) -> Question:
    present, truth = _present(scene), draw.chance(0.5)
    name = draw.among(present) if truth else distractor(present, world, draw)
    asked = [f"is there {article(name)}?", f"is there {article(name)} in the picture?", f"do you see {article(name)}?"]
    if scene.kind in ("single", "small"):
        asked.append(f"is this {article(name)}?")
    return Question("exists", draw.among(asked), yes_no(truth), {"asked": name})


def _number(scene: Scene, world: World, draw: Draw) -> Question:
    present = _present(scene)
    if draw.chance(0.3):
        return Question("count", "how many objects are there?", NUMBERS[len(scene.items)])
    absent = draw.chance(0.2)
    name = distractor(present, world, draw) if absent else draw.among(present)
    number = sum(item.object == name for item in scene.items)
    return Question("count", f"how many {world.spec(name).plural} are there?", NUMBERS[number], {"asked": name})


def _size(scene: Scene, world: World, draw: Draw) -> Question:
    answer = "small" if scene.kind == "small" else "big"
    if draw.chance(0.5):
        return Question("size", f"is the {scene.object} big or small?", answer)
    asked = draw.among(("big", "small"))
    return Question("size_check", f"is the {scene.object} {asked}?", yes_no(asked == answer))


def _group(scene: Scene, world: World, draw: Draw) -> Question:
    group = world.spec(scene.object).group
    if draw.chance(0.4):
        return Question("group", "what kind of thing is it?", group_words(group))
    truth = draw.chance(0.5)
    asked = group if truth else draw.among(OTHER_GROUPS[group])
    return Question("group_check", f"is it {group_words(asked)}?", yes_no(truth))


def _where(scene: Scene, world: World, draw: Draw) -> Question:
    first, second = (item.object for item in scene.items)
    how = scene.relation
    if draw.chance(0.5):
        first, second, how = second, first, OPPOSITE[how]
    choice = draw.below(3)
    if choice == 0:
        return Question("where", f"where is the {first}?", f"{how} the {second}")
    if choice == 1:
        return Question("neighbour", f"what is {how} the {second}?", article(first))
    truth = draw.chance(0.5)
    asked = (
        how
        if truth
        else (OPPOSITE[how] if draw.chance(0.7) else draw.among([word for word in RELATIONS if word != how]))
    )
    return Question("where_check", f"is the {first} {asked} the {second}?", yes_no(truth))


def _every(scene: Scene, world: World, draw: Draw) -> Question:
    present = _present(scene)
    groups = {world.spec(name).group for name in present}
    group = world.spec(draw.among(present)).group
    if draw.chance(0.3):
        group = draw.among(OTHER_GROUPS[group])
    clear = all(group == other or group in OTHER_GROUPS[other] for other in groups)
    if clear and draw.chance(0.5):
        return Question("every", f"is every object {group_words(group)}?", yes_no(groups == {group}))
    name = distractor(present, world, draw) if draw.chance(0.3) else draw.among(present)
    return Question("every", f"is every object {article(name)}?", yes_no(present == (name,)), {"asked": name})


Asker = Callable[[Scene, World, Draw], Question]
_ASKERS: dict[str, Asker] = {
    "describe": _describe,
    "object": _object,
    "background": _background,
    "background_check": _background_check,
    "exists": _exists,
    "count": _number,
    "size": _size,
    "group": _group,
    "where": _where,
    "every": _every,
}
_WEIGHTS: dict[str, dict[str, float]] = {
    "single": {
        "describe": 14,
        "object": 22,
        "background": 14,
        "background_check": 9,
        "exists": 26,
        "count": 6,
        "size": 4,
        "group": 5,
    },
    "small": {
        "describe": 12,
        "object": 18,
        "background": 10,
        "background_check": 6,
        "exists": 22,
        "count": 7,
        "size": 18,
        "group": 7,
    },
    "count": {
        "describe": 14,
        "object": 12,
        "background": 9,
        "background_check": 5,
        "exists": 14,
        "count": 38,
        "every": 8,
    },
    "relation": {
        "describe": 14,
        "object": 12,
        "background": 7,
        "background_check": 4,
        "exists": 14,
        "count": 8,
        "where": 34,
        "every": 7,
    },
}


def ask(scene: Scene, world: World, draw: Draw) -> Question:
    """One question on a scene."""
    return _ASKERS[draw.weighted(_WEIGHTS[scene.kind])](scene, world, draw)


def ask_several(scene: Scene, world: World, draw: Draw, number: int) -> list[Question]:
    """Different kinds of questions on one scene, ``number`` of them."""
    weights, out = dict(_WEIGHTS[scene.kind]), []
    for _ in range(min(number, len(weights))):
        kind = draw.weighted(weights)
        del weights[kind]
        out.append(_ASKERS[kind](scene, world, draw))
    return out


def ask_pair(first: Scene, second: Scene, world: World, draw: Draw) -> Question:
    """One question on two pictures of one object each."""
    names, colours = (first.object, second.object), (first.background, second.background)
    choices = ["exists", "describe", "same_object", "same_background"]
    if names[0] != names[1]:
        choices += ["which_object", "which_object"]
    if colours[0] != colours[1]:
        choices.append("which_background")
    choice, picked = draw.among(choices), draw.below(2)
    order = ("the first", "the second")
    if choice == "which_object":
        return Question("which_object", f"which picture shows {article(names[picked])}?", order[picked])
    if choice == "which_background":
        return Question("which_background", f"which picture has {article(colours[picked])} background?", order[picked])
    if choice == "same_object":
        return Question("same_object", "do both pictures show the same object?", yes_no(names[0] == names[1]))
    if choice == "same_background":
        return Question(
            "same_background", "do both pictures have the same background?", yes_no(colours[0] == colours[1])
        )
    if choice == "describe":
        return Question("describe_one", f"describe {order[picked]} picture.", caption((first, second)[picked], world))
    truth = draw.chance(0.5)
    name = names[picked] if truth else distractor(names, world, draw)
    return Question("exists_pair", f"does one of the pictures show {article(name)}?", yes_no(truth), {"asked": name})


def ask_film(film: Film, world: World, draw: Draw) -> Question:
    """One question on a film."""
    kind = draw.weighted(
        {"describe": 24, "motion": 28, "direction": 8, "object": 12, "background": 10, "motion_check": 12, "exists": 6}
    )
    if kind == "describe":
        asked = draw.among(("describe the film.", "describe the film.", "describe the video.", "describe this video."))
        return Question("describe", asked, film_caption(film))
    if kind == "motion":
        asked = draw.among(
            (f"what does the {film.object} do?", "what does it do?", "what does the object do?", "what happens?")
        )
        return Question("motion", asked, film_answer(film))
    if kind == "direction":
        if film.motion in ("growing", "shrinking"):
            return Question("direction", "does it grow or shrink?", film_answer(film))
        return Question("direction", "which way does it move?", film.motion)
    if kind == "object":
        return Question(
            "object", draw.among(("what is in the film?", "what is the object?", "what is this?")), article(film.object)
        )
    if kind == "background":
        return Question("background", "what colour is the background?", film.background)
    truth = draw.chance(0.5)
    if kind == "exists":
        name = film.object if truth else distractor((film.object,), world, draw)
        return Question("exists", f"is there {article(name)}?", yes_no(truth), {"asked": name})
    motion = film.motion if truth else draw.among([other for other in MOTIONS if other != film.motion])
    verb = {"growing": "grow", "shrinking": "shrink"}.get(motion, f"move {motion}")
    return Question("motion_check", f"does it {verb}?", yes_no(truth))
