"""easy-VQA: pictures of one shape with questions, by Victor Zhou (MIT), read from the package ``easy-vqa``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from vilau.data.nano.world import article

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def _package() -> Any:
    """The installed package; ValueError with the remedy when it is missing."""
    try:
        import easy_vqa
    except ImportError:
        raise ValueError(
            "the easy-VQA questions need the package easy-vqa, which is not installed: `pip install easy-vqa`"
        ) from None
    return easy_vqa


@lru_cache(maxsize=2)
def _questions(split: str) -> tuple[tuple[str, str, int], ...]:
    package = _package()
    asked = package.get_train_questions() if split == "train" else package.get_test_questions()
    return tuple((question, answer, int(number)) for question, answer, number in zip(*asked, strict=True))


@lru_cache(maxsize=2)
def _paths(split: str) -> Mapping[int, str]:
    package = _package()
    paths = package.get_train_image_paths() if split == "train" else package.get_test_image_paths()
    return {int(number): str(path) for number, path in paths.items()}


def _caption(asked: list[tuple[str, str]]) -> str:
    """What the questions of one picture tell of its shape and colour."""
    facts: set[str] = set()
    for question, answer in asked:
        if answer not in ("yes", "no"):
            facts.update((answer, *question.rstrip("?").split()))
        elif (answer == "yes") != (" not " in question or " no " in question):
            facts.update(question.rstrip("?").split())
    shape = next((word for word in SHAPES if word in facts), "shape")
    colour = next((word for word in COLOURS if word in facts), "")
    return f"{article(f'{colour} {shape}'.strip())} on a pale background"


class EasyVqa:
    """One split of easy-VQA, its pictures squared to ``image_size`` at first use.

    Args:
        split: ``train`` (38,575 questions) or ``test``.
        image_size: side of the pictures in pixels (the originals have 64).

    Raises:
        ValueError: the package is missing.
    """

    def __init__(self, split: str, image_size: int) -> None:
        self.split, self.image_size = split, image_size
        self.questions = _questions(split)
        self.pictures = tuple(sorted(_paths(split)))
        self._kept: dict[int, np.ndarray] = {}

    def picture(self, number: int) -> np.ndarray:
        """Pixels ``(S, S, 3)`` uint8 RGB of a picture; read-only."""
        found = self._kept.get(number)
        if found is None:
            with Image.open(_paths(self.split)[number]) as opened:
                picture = opened.convert("RGB")
            if picture.size != (self.image_size, self.image_size):
                picture = picture.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
            found = np.array(picture)
            found.setflags(write=False)
            self._kept[number] = found
        return found

    def caption(self, number: int) -> str:
        """A caption derived from the picture's questions: ``"a blue circle on a pale background"``."""
        return _captions(self.split)[number]


@lru_cache(maxsize=2)
def _captions(split: str) -> Mapping[int, str]:
    asked: dict[int, list[tuple[str, str]]] = {number: [] for number in _paths(split)}
    for question, answer, number in _questions(split):
        asked[number].append((question, answer))
    return {number: _caption(pairs) for number, pairs in asked.items()}
