"""Captions and prompts: one standard wording, others for a minority, and the grammar right in both."""

from __future__ import annotations

import itertools

from vilau.data.nano import scenes, texts
from vilau.data.nano.draw import Draw
from vilau.data.nano.scenes import MOTIONS, Film
from vilau.data.nano.world import BACKGROUNDS, World

WORLD = World.load()


def test_standard_captions() -> None:
    """Protects every figure that compares words: the standard wording of each kind of scene and film."""
    says = {
        "a red apple on a blue background": scenes.single("red apple", "blue"),
        "an owl on an orange background": scenes.single("owl", "orange"),
        "a small owl on a gray background": scenes.small("owl", "gray"),
        "three strawberries on a white background": scenes.count("strawberry", 3, "white"),
        "a dog left of an umbrella on a red background": scenes.relation("dog", "left of", "umbrella", "red"),
    }
    for words, scene in says.items():
        assert texts.caption(scene, WORLD) == words
    films = {"left": "moving left", "up": "moving up", "growing": "growing", "shrinking": "shrinking"}
    for motion, words in films.items():
        assert texts.film_caption(Film("blue", "dog", motion)) == f"a dog {words} on a blue background"
    assert [texts.film_answer(Film("blue", "dog", motion)) for motion in MOTIONS] == [
        "it moves left.",
        "it moves right.",
        "it moves up.",
        "it moves down.",
        "it grows.",
        "it shrinks.",
    ]


def test_captions_tell_scenes_apart() -> None:
    """Protects learning to draw: two different scenes never share a standard caption."""
    seen: set[str] = set()
    for name, colour in itertools.product(WORLD.names, WORLD.colours):
        todo = [scenes.single(name, colour), scenes.small(name, colour)]
        todo += [scenes.count(name, number, colour) for number in (2, 3, 4)]
        said = {texts.caption(scene, WORLD) for scene in todo}
        said |= {texts.film_caption(Film(colour, name, motion)) for motion in MOTIONS}
        assert len(said) == 11 and not said & seen
        seen |= said


def test_standard_wording_is_the_majority_and_all_name_object_and_colour() -> None:
    """Protects prompts: seven in ten are the standard wording, and each one names what is to be drawn."""
    draw, standard = Draw(3), 0
    for _ in range(1000):
        name, colour = draw.among(WORLD.combinations("train"))
        scene = scenes.single(name, colour)
        words = texts.prompt(scene, WORLD, draw)
        plain = words.lower().replace("grey", "gray").rstrip(".")
        assert name in plain and colour in plain
        standard += plain == texts.caption(scene, WORLD)
        film = Film(colour, name, draw.among(MOTIONS))
        plain = texts.film_prompt(film, draw).lower().replace("grey", "gray")
        assert name in plain and colour in plain
    assert 0.65 < standard / 1000 < 0.75


def test_articles_fit() -> None:
    """Protects the language: no "a orange", no "an red", in any wording."""
    for name, colour in itertools.product(WORLD.names, BACKGROUNDS):
        todo = [scenes.single(name, colour), scenes.small(name, colour), scenes.count(name, 2, colour)]
        said = [words for scene in todo for words in (texts.caption(scene, WORLD), *texts.other_wordings(scene, WORLD))]
        said += texts.other_film_wordings(Film(colour, name, "left"))
        for words in said:
            pieces = words.split()
            for one, other in itertools.pairwise(pieces):
                if one in ("a", "an"):
                    assert (one == "an") == (other[0] in "aeiou"), words
