"""Questions and answers: each answer is checked against the scene by rules written apart from those that made it."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from vilau.data.nano import scenes
from vilau.data.nano.dataset import ASKED_SCENES, pick_film, pick_scene
from vilau.data.nano.draw import Draw
from vilau.data.nano.questions import Question, ask, ask_film, ask_pair, ask_several
from vilau.data.nano.scenes import Scene
from vilau.data.nano.texts import NUMBERS
from vilau.data.nano.world import World

WORLD = World.load()
SINGULAR = {spec.plural: spec.name for spec in WORLD.objects}


def named(words: str) -> str:
    """The one object that the words name; the longest where names nest (``fish``)."""
    found = [name for name in WORLD.names if re.search(rf"\b{name}\b", words)]
    assert len(found) == 1, words
    return found[0]


def right(asked: Question, scene: Scene) -> bool:
    """Whether the answer is true of the scene, judged from the words of the question alone."""
    words, answer, objects = asked.question, asked.answer, [item.object for item in scene.items]
    if asked.kind == "background":
        return answer == scene.background
    if asked.kind == "background_check":
        return (answer == "yes") == (words.removesuffix("?").split()[-1] == scene.background)
    if asked.kind == "exists":
        return (answer == "yes") == (named(words) in objects)
    if asked.kind == "count":
        counted = re.fullmatch(r"how many (.*) are there\?", words)
        assert counted
        name = SINGULAR.get(counted[1])
        return answer == NUMBERS[sum(item == name for item in objects) if name else len(objects)]
    if asked.kind == "object":
        if scene.kind == "count":
            return SINGULAR[answer] == objects[0]
        return [re.sub(r"^an? ", "", name) for name in answer.split(" and ")] == objects
    if asked.kind in ("size", "size_check"):
        size = "small" if scene.items[0].size < 0.6 else "big"
        return answer == size if asked.kind == "size" else (answer == "yes") == (size in words)
    if asked.kind in ("group", "group_check"):
        group = WORLD.spec(scene.object).group
        return group in answer if asked.kind == "group" else (answer == "yes") == (group in words)
    if asked.kind == "every":
        subject = re.sub(r"^an? ", "", words.removeprefix("is every object ").removesuffix("?"))
        return (answer == "yes") == all(subject in (name, WORLD.spec(name).group) for name in objects)
    if asked.kind == "where_check":
        first, how, second = re.fullmatch(r"is the (.*) (left of|right of|above|below) the (.*)\?", words).groups()  # type: ignore[union-attr]
        return (answer == "yes") == stands(scene, first, how, second)
    if asked.kind == "where":
        first = words.removeprefix("where is the ").removesuffix("?")
        how, second = re.fullmatch(r"(left of|right of|above|below) the (.*)", answer).groups()  # type: ignore[union-attr]
        return stands(scene, first, how, second)
    if asked.kind == "neighbour":
        how, second = re.fullmatch(r"what is (left of|right of|above|below) the (.*)\?", words).groups()  # type: ignore[union-attr]
        return stands(scene, re.sub(r"^an? ", "", answer), how, second)
    assert asked.kind == "describe"
    return scene.background in answer and all(name in answer or WORLD.spec(name).plural in answer for name in objects)


def stands(scene: Scene, first: str, how: str, second: str) -> bool:
    """Whether the first object stands so towards the second, by their places."""
    places = {item.object: item for item in scene.items}
    dx, dy = places[second].cx - places[first].cx, places[second].cy - places[first].cy
    return {"left of": dx > 0.2, "right of": dx < -0.2, "above": dy > 0.2, "below": dy < -0.2}[how]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_are_true(split: str) -> None:
    """Protects understanding: of thousands of questions on all kinds of scenes, every answer is right."""
    kinds: Counter[str] = Counter()
    for index in range(1000):
        draw = Draw(11, index)
        scene = pick_scene(WORLD, draw, split, ASKED_SCENES)
        asked = ask(scene, WORLD, draw)
        assert right(asked, scene), (asked, scene)
        kinds[asked.kind] += 1
    assert len(kinds) == 14 and min(kinds.values()) >= 5, kinds


def test_yes_and_no_are_balanced() -> None:
    """Protects from answering without looking: about half of the yes-or-no questions of a kind are true."""
    said: dict[str, Counter[str]] = {}
    near = 0
    for index in range(3000):
        draw = Draw(12, index)
        scene = pick_scene(WORLD, draw, "train", ASKED_SCENES)
        asked = ask(scene, WORLD, draw)
        if asked.answer in ("yes", "no"):
            said.setdefault(asked.kind, Counter())[asked.answer] += 1
        if asked.kind == "exists" and asked.answer == "no":
            groups = {WORLD.spec(item.object).group for item in scene.items}
            near += WORLD.spec(asked.facts["asked"]).group in groups
    for kind, answers in said.items():
        assert 0.35 < answers["yes"] / answers.total() < 0.65, (kind, answers)
    assert near / said["exists"]["no"] > 0.6, "two in three absent objects are of the same group as one that is there"


def test_several_questions_on_a_scene_differ_in_kind() -> None:
    """Protects dialogues: no question of a dialogue repeats the skill of another."""
    for index in range(300):
        draw = Draw(13, index)
        scene = pick_scene(WORLD, draw, "train", ASKED_SCENES)
        asked = ask_several(scene, WORLD, draw, 3)
        assert len(asked) == 3 == len({one.question for one in asked})
        assert all(right(one, scene) for one in asked)


def test_questions_on_two_pictures_are_true() -> None:
    """Protects comparing pictures: first and second, same and different, are right."""
    kinds: Counter[str] = Counter()
    order = ("the first", "the second")
    for index in range(1000):
        draw = Draw(14, index)
        names, colours = (
            (draw.among(("dog", "cat")), draw.among(("dog", "cat", "car"))),
            ("red", draw.among(("red", "blue"))),
        )
        pair = [scenes.single(name, colour) for name, colour in zip(names, colours, strict=True)]
        asked = ask_pair(pair[0], pair[1], WORLD, draw)
        kinds[asked.kind] += 1
        if asked.kind == "which_object":
            assert names[order.index(asked.answer)] == named(asked.question) and names[0] != names[1]
        elif asked.kind == "which_background":
            assert colours[order.index(asked.answer)] in asked.question and colours[0] != colours[1]
        elif asked.kind == "same_object":
            assert (asked.answer == "yes") == (names[0] == names[1])
        elif asked.kind == "same_background":
            assert (asked.answer == "yes") == (colours[0] == colours[1])
        elif asked.kind == "exists_pair":
            assert (asked.answer == "yes") == (named(asked.question) in names)
        else:
            place = 0 if "first" in asked.question else 1
            assert names[place] in asked.answer and colours[place] in asked.answer
    assert len(kinds) == 6


def test_questions_on_films_are_true() -> None:
    """Protects understanding films: motion, direction and checks are right."""
    verbs = {"growing": "grow", "shrinking": "shrink"}
    kinds: Counter[str] = Counter()
    for index in range(1000):
        draw = Draw(15, index)
        film = pick_film(WORLD, draw, "train")
        asked = ask_film(film, WORLD, draw)
        kinds[asked.kind] += 1
        verb = verbs.get(film.motion, film.motion)
        if asked.kind in ("motion", "direction"):
            assert verb in asked.answer
        elif asked.kind == "motion_check":
            assert (asked.answer == "yes") == (asked.question.removesuffix("?").split()[-1] == verb)
        elif asked.kind == "exists":
            assert (asked.answer == "yes") == (named(asked.question) == film.object)
        elif asked.kind == "background":
            assert asked.answer == film.background
        else:
            assert film.object in asked.answer
    assert len(kinds) == 7
