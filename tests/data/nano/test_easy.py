"""easy-VQA: the real package, its answers as they are, its test part kept apart."""

from __future__ import annotations

import sys

import easy_vqa
import numpy as np
import pytest

from vilau.data.nano import easy
from vilau.data.nano.dataset import NanoDataset
from vilau.data.nano.easy import COLOURS, SHAPES, EasyVqa
from vilau.data.nano.world import World


def test_questions_are_those_of_the_package() -> None:
    """Protects comparison with others: every question, answer and picture number as published."""
    for split, original in (("train", easy_vqa.get_train_questions()), ("test", easy_vqa.get_test_questions())):
        read = EasyVqa(split, 32)
        assert [list(column) for column in zip(*read.questions, strict=True)] == [list(column) for column in original]
    assert {answer for _, answer, _ in EasyVqa("train", 32).questions} == {*easy_vqa.get_answers()}


def test_training_never_asks_of_test_pictures() -> None:
    """Protects the easy-VQA figures: training samples come of training questions, held-out ones of the test."""
    for split, name in (("train", "train"), ("heldout", "test")):
        dataset = NanoDataset(World.load(), {"easy_vqa": 1.0}, split, size=100)
        known = set(EasyVqa(name, 32).questions)
        for index in range(100):
            meta = dataset[index].meta
            assert (meta["question"], meta["answer"], meta["picture"]) in known
            assert (meta["question_kind"] == "easy_vqa_yes_no") == (meta["answer"] in ("yes", "no"))


def test_captions_are_true_of_the_pictures() -> None:
    """Protects the tower's captions: the colour said is the colour seen, on a pale ground."""
    names = {
        "black": (0, 0, 0),
        "blue": (0, 0, 255),
        "brown": (165, 42, 42),
        "gray": (128, 128, 128),
        "green": (0, 255, 0),
        "red": (255, 0, 0),
        "teal": (0, 128, 128),
        "yellow": (255, 255, 0),
    }
    assert set(names) == set(COLOURS)
    read, full = EasyVqa("train", 64), 0
    for number in read.pictures[:400]:
        words = read.caption(number).split()
        pixels = read.picture(number).astype(int)
        assert words[-2:] == ["pale", "background"] and pixels[[0, 0, -1, -1], [0, -1, 0, -1]].mean() > 180
        colour = next((word for word in words if word in COLOURS), "")
        full += bool(colour) and any(shape in words for shape in SHAPES)
        if colour:
            near = np.abs(pixels - np.array(names[colour])).max(axis=-1) < 40
            assert near.sum() > 20, (number, colour)
    assert full > 320


def test_pictures_are_squared_to_size() -> None:
    """Protects the mixture: pictures have the dataset's size and come out the same each time, read-only."""
    read = EasyVqa("train", 32)
    first = read.picture(read.pictures[0])
    assert first.shape == (32, 32, 3) and first.dtype == np.uint8 and not first.flags.writeable
    assert (EasyVqa("train", 32).picture(read.pictures[0]) == first).all()


def test_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects users who left it out: one line that names the remedy."""
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    easy._questions.cache_clear()
    try:
        with pytest.raises(ValueError, match="pip install easy-vqa"):
            NanoDataset(World.load(), {"easy_vqa": 1.0})
    finally:
        easy._questions.cache_clear()
