"""Random choices as pure functions of a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


class Draw:
    """Choices from one stream: the same numbers give the same choices on every machine.

    Args:
        entropy: non-negative whole numbers that name the stream, such as (seed, split, index).
    """

    def __init__(self, *entropy: int) -> None:
        self.generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence(entropy)))

    def below(self, limit: int) -> int:
        """A whole number from 0 to ``limit - 1``."""
        return int(self.generator.integers(limit))

    def among(self, items: Sequence[T]) -> T:
        """One of the items, each as likely."""
        return items[int(self.generator.integers(len(items)))]

    def some(self, items: Sequence[T], number: int) -> list[T]:
        """``number`` different items in random order."""
        return [items[int(i)] for i in self.generator.permutation(len(items))[:number]]

    def chance(self, share: float) -> bool:
        """True with probability ``share``."""
        return float(self.generator.random()) < share

    def weighted(self, weights: Mapping[str, float]) -> str:
        """One of the keys, as likely as its weight says."""
        point = float(self.generator.random()) * sum(weights.values())
        for key, weight in weights.items():
            point -= weight
            if point < 0:
                return key
        return next(key for key, weight in reversed(tuple(weights.items())) if weight > 0)

    def shift(self, jitter: float) -> tuple[float, float]:
        """Two shares of a picture's side, in whole thirty-seconds, at most ``jitter`` thirty-seconds from zero."""
        steps = int(jitter)
        if steps <= 0:
            return (0.0, 0.0)
        x, y = self.generator.integers(-steps, steps + 1, size=2)
        return (int(x) / 32, int(y) / 32)
