"""Talk without pictures: answers right, and some questions kept out of training."""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache

from vilau.data.nano.dialogues import talk
from vilau.data.nano.draw import Draw
from vilau.data.nano.texts import NUMBERS
from vilau.data.nano.world import World

WORLD = World.load()


@lru_cache
def exchanges(split: str, number: int) -> list[tuple[str, str, str]]:
    """The first exchanges of a split."""
    return [talk(WORLD, Draw(21, index), split) for index in range(number)]


def test_splits_share_no_question() -> None:
    """Protects the text figures: a held-out question is never trained, and there are enough of them."""
    train = {question for _, question, _ in exchanges("train", 3000)}
    heldout = {question for _, question, _ in exchanges("heldout", 600)}
    assert not train & heldout
    assert len(heldout) > 120
    assert {kind for kind, _, _ in exchanges("heldout", 600)} >= {"group_check", "arithmetic", "more", "counting"}


def test_every_question_has_one_answer() -> None:
    """Protects learning: the same question never has two answers."""
    answers: dict[str, str] = {}
    for _, question, answer in exchanges("train", 3000) + exchanges("heldout", 600):
        assert answers.setdefault(question, answer) == answer, question


def test_arithmetic_and_counting_are_right() -> None:
    """Protects numbers: sums, differences and comparisons, worked out again here."""
    kinds: Counter[str] = Counter()
    for kind, question, answer in exchanges("train", 3000):
        numbers = [NUMBERS.index(word) for word in re.findall("|".join(NUMBERS), question)]
        kinds[kind] += 1
        if kind == "arithmetic":
            value = numbers[0] + numbers[1] if "plus" in question else numbers[0] - numbers[1]
            assert answer == NUMBERS[value], question
        elif kind == "counting":
            assert answer == NUMBERS[numbers[0] + numbers[1]], question
        elif kind == "more":
            assert answer == NUMBERS[max(numbers)], question
        elif kind == "after":
            assert answer == NUMBERS[numbers[0] + (1 if "after" in question else -1)], question
        elif kind == "odd_one":
            shown = re.split(": |, | or ", question.removesuffix("?"))[1:]
            group = re.sub(r"^which one is not (an? )?", "", question.split(":")[0])
            odd = [name for name in shown if WORLD.spec(name).group != group]
            assert len(odd) == 1 and answer.endswith(odd[0]), question
    assert len(kinds) == 10 and min(kinds.values()) > 40


def test_groups_are_right_and_balanced() -> None:
    """Protects facts: "is a dog an animal?" follows the groups, with as many yes as no."""
    said: Counter[str] = Counter()
    for kind, question, answer in exchanges("train", 3000):
        if kind == "group_check":
            name = next(name for name in WORLD.names if question.startswith((f"is a {name} ", f"is an {name} ")))
            assert (answer == "yes") == question.endswith(f"{WORLD.spec(name).group}?"), question
            said[answer] += 1
    assert 0.42 < said["yes"] / said.total() < 0.58
