"""Plain metrics: shares, decibels, and what a description names."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch


def share(right: Iterable[bool]) -> float | None:
    """Return the share of true ones; None when there are none at all."""
    values = [bool(value) for value in right]
    return sum(values) / len(values) if values else None


def mean(values: Sequence[float]) -> float | None:
    """Return the mean; None of nothing."""
    return sum(values) / len(values) if values else None


def psnr(ours: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Return the peak signal-to-noise ratio ``(N,)`` in dB of pictures ``(N, 3, S, S)`` in [-1, 1].

    The peak is 1 on the [0, 1] scale; equal pictures count as 100 dB.
    """
    if ours.shape != real.shape:
        raise ValueError(f"pictures of the shapes {tuple(ours.shape)} and {tuple(real.shape)} cannot be compared")
    squared = ((ours.double() - real.double()) / 2).square().flatten(1).mean(1)
    return -10 * torch.log10(squared.clamp_min(1e-10))


def same_answer(said: str, wanted: str) -> bool:
    """Whether two answers are equal but for case, spaces and a final full stop."""
    return plain(said) == plain(wanted)


def plain(words: str) -> str:
    """Return the words in lower case, single spaces, without a final full stop."""
    return " ".join(words.lower().split()).rstrip(".").rstrip()


@dataclass(frozen=True)
class Named:
    """The objects and background colours that a description names."""

    objects: frozenset[str]
    backgrounds: frozenset[str]


def named(description: str, objects: Sequence[str], backgrounds: Sequence[str]) -> Named:
    """Find the objects and colours that a description names; ``grey`` is ``gray``.

    Longer names go first, so the red of a red apple is no background.
    """
    rest = plain(description).replace("grey", "gray")
    found = set()
    for name in sorted(objects, key=len, reverse=True):
        pattern = rf"\b{re.escape(name)}\b"
        if re.search(pattern, rest):
            found.add(name)
            rest = re.sub(pattern, " ", rest)
    colours = {colour for colour in backgrounds if re.search(rf"\b{re.escape(colour)}\b", rest)}
    return Named(frozenset(found), frozenset(colours))


@dataclass(frozen=True)
class BlindBaselines:
    """What is reached without looking: always the most frequent answer, and the most frequent one for each question."""

    majority: float | None
    question_only: float | None


def blind_baselines(train: Iterable[tuple[str, str]], test: Iterable[tuple[str, str]]) -> BlindBaselines:
    """Learn answers from (question, answer) pairs of `train` and count how many of `test` they get right."""
    overall: Counter[str] = Counter()
    by_question: Mapping[str, Counter[str]] = defaultdict(Counter)
    for question, answer in train:
        overall[answer] += 1
        by_question[question][answer] += 1
    likeliest = _most_common(overall)
    table = {question: _most_common(counts) for question, counts in by_question.items()}
    asked = list(test)
    return BlindBaselines(
        share(answer == likeliest for _, answer in asked),
        share(answer == table.get(question, likeliest) for question, answer in asked),
    )


def _most_common(counts: Counter[str]) -> str:
    """The most frequent one, the first in the alphabet among equals."""
    return min(counts, key=lambda answer: (-counts[answer], answer)) if counts else ""
