"""The batches of every step: the same for any number of loader processes and micro-batches."""

from __future__ import annotations

from typing import Any

import pytest

from vilau.training.batches import step_batches


def numbers(stage: Any, first: int, parts: int, workers: int) -> list[list[int]]:
    """The sample numbers of every step from `first` on."""
    steps = step_batches(stage, first, parts, workers)
    return [[number for batch in batches for number in batch.tolist()] for batches, _ in steps]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("parts", [1, 2])
def test_loader_workers_do_not_change_the_order(tiny_stage: Any, workers: int, parts: int) -> None:
    """R10: the batches of every step are the same with 0, 1 and 3 loader processes, also after a resume."""
    for first in (0, 3):
        order = numbers(tiny_stage(), first, parts, 0)
        assert order == numbers(tiny_stage(), first, parts, workers)
        assert order == [list(range(4 * step, 4 * step + 4)) for step in range(first, 8)]
