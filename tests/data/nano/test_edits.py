"""Edits, animations and mixed answers of the nano world: one right answer each, told by the words alone."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

from vilau.data.nano.dataset import BEYOND_FORM_OF, FORM_OF, NanoDataset
from vilau.data.nano.draw import Draw
from vilau.data.nano.edits import EDITS, animation, edit, render_animation
from vilau.data.nano.scenes import count, render, single, small
from vilau.data.nano.texts import NUMBERS
from vilau.data.nano.world import SPLITS, World, is_heldout
from vilau.data.sample import Part, Sample, form_of

WORLD = World.load()
BY_PLURAL = {spec.plural: spec.name for spec in WORLD.objects}


@lru_cache
def samples(key: str, split: str, number: int = 150) -> tuple[Sample, ...]:
    dataset = NanoDataset(WORLD, {key: 1.0}, split, seed=1, size=number)
    return tuple(dataset[index] for index in range(number))


def told(words: str, start: str, end: str = "") -> str:
    """What stands between a start and an end, without its article."""
    assert words.startswith(start) and words.endswith(end), words
    found = words[len(start) : len(words) - len(end)]
    return found.removeprefix("an ").removeprefix("a ")


def follow(before: tuple[str, str], asked: str) -> np.ndarray:
    """The picture that an instruction calls for, worked out from its words and from what is on the picture."""
    name, background = before
    if "background" in asked:
        return render(single(name, asked.split()[-1]), WORLD, 32)
    if asked.startswith("replace"):
        return render(single(told(asked, f"replace the {name} by "), background), WORLD, 32)
    if asked.endswith("small") or "a small" in asked:
        return render(small(name, background), WORLD, 32)
    what = asked.removeprefix("show ").removeprefix("make it ")
    first, _, rest = what.partition(" ")
    if first in NUMBERS:
        assert BY_PLURAL[rest] == name
        return render(count(name, NUMBERS.index(first), background), WORLD, 32)
    return render(single(told(what, ""), background), WORLD, 32)


def pictures(parts: tuple[Part, ...]) -> list[np.ndarray]:
    return [part.frames[0] for part in parts if part.kind == "image"]


@pytest.mark.parametrize("split", SPLITS)
def test_edits_have_the_one_target_that_their_words_call_for(split: str) -> None:
    """An evaluation may compare pixels: the words and the given picture decide the result."""
    kinds = set()
    for sample in samples("edit", split):
        shown, said = sample.turns[0].parts
        name, background = sample.meta["before"].removesuffix(" background").rsplit(" on ", 1)
        before = (told(name, ""), told(background, ""))
        assert np.array_equal(shown.frames[0], render(single(*before), WORLD, 32))
        (result,) = pictures(sample.turns[1].parts)
        assert np.array_equal(result, follow(before, said.text)), said.text
        assert not np.array_equal(result, shown.frames[0])
        kinds.add(sample.meta["edit"])
    assert kinds == set(EDITS)


@pytest.mark.parametrize("split", SPLITS)
def test_animations_start_from_their_picture(split: str) -> None:
    """The first frame is the picture, and only the words tell which way it goes on."""
    starts: dict[tuple[str, str, bool], bytes] = {}
    for sample in samples("animate", split):
        shown, (film,) = sample.turns[0].parts[0].frames[0], sample.turns[1].parts
        assert np.array_equal(film.frames[0], shown) and len(film.frames) == 4
        assert not np.array_equal(film.frames[-1], shown)
        motion = sample.meta["motion"]
        assert {"growing": "grow", "shrinking": "shrink"}.get(motion, motion) in sample.meta["instruction"].split()
        key = (sample.meta["object"], sample.meta["background"], motion in ("growing", "shrinking"))
        assert starts.setdefault(key, shown.tobytes()) == shown.tobytes()


@pytest.mark.parametrize("split", SPLITS)
def test_mixed_answers_name_what_they_draw(split: str) -> None:
    """Words and pictures in turn, each picture the one that was asked for and is named before it."""
    kinds = set()
    for sample in samples("mixed", split):
        parts = sample.turns[1].parts
        assert [part.kind for part in parts] == ["text", "image"] * (len(parts) // 2)
        request = sample.turns[0].parts[-1].text
        for words, drawn, (name, background) in zip(parts[::2], parts[1::2], sample.meta["scenes"], strict=True):
            assert np.array_equal(drawn.frames[0], render(single(name, background), WORLD, 32))
            assert told(words.text, "", ".") in (name, background)
            assert background in request and (name in request or sample.meta["request_kind"] == "redraw")
        kinds.add(sample.meta["request_kind"])
    assert kinds == ({"objects", "colours", "redraw"} if split == "train" else {"objects", "redraw"})


@pytest.mark.parametrize("key", BEYOND_FORM_OF)
def test_splits_keep_what_is_drawn_apart(key: str) -> None:
    """Training draws no held-out combination; the held-out split draws nothing else."""
    for split in SPLITS:
        for sample in samples(key, split):
            drawn = sample.meta.get("scenes") or [[sample.meta["object"], sample.meta["background"]]]
            assert {is_heldout(name, colour) for name, colour in drawn} == {split == "heldout"}


def test_forms_follow_from_the_turns_and_defaults_are_untouched() -> None:
    """What sources tell from turns is what nano data says; shards and tokenizer are built from the paper's forms."""
    for key, form in BEYOND_FORM_OF.items():
        assert {sample.form for sample in samples(key, "train")} == {form}
        assert {form_of(sample.turns) for sample in samples(key, "train")} == {form}
    assert not set(BEYOND_FORM_OF) & set(FORM_OF)


def test_jitter_moves_both_sides_of_an_edit() -> None:
    """Where the object stands is kept by a change of background or of the object."""
    for number in range(40):
        change = edit(WORLD, Draw(number), "train", "noto", (2 / 32, -1 / 32))
        if change.kind in ("background", "replace"):
            assert (change.before.items[0].cx, change.before.items[0].cy) == (
                change.after.items[0].cx,
                change.after.items[0].cy,
            )
    film, _ = animation(WORLD, Draw(0), "train", "noto", (2 / 32, 0.0))
    assert film.shift == (2 / 32, 0.0) and len(render_animation(film, WORLD, 16, 1)) == 1
