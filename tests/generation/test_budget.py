"""Memory that is computed beforehand: sizes of rows, what is refused for good, what waits."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from vilau.generation.budget import Budget, Demand, RequestTooLarge, Usage, position_bytes, row_capacity

LLAMA_2_7B = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32)


def test_a_position_of_llama_takes_half_a_mebibyte() -> None:
    """The figure that the budget rests on: 0.5 MiB per token, so 16 guided slots of 8,192 positions take 128 GiB."""
    each = position_bytes(LLAMA_2_7B, torch.bfloat16)
    assert each == 512 * 1024
    assert Budget(16, 0, 8192, 128 << 30, each).bytes_of(16 * 2 * 8192) == 128 << 30


def test_capacities_hold_what_is_asked_and_little_more() -> None:
    """A row is never too short, wastes at most a quarter beyond the smallest size, and never exceeds the largest."""
    for positions in range(1, 3000):
        capacity = row_capacity(positions, 4096)
        assert positions <= capacity <= max(64, positions * 5 // 4)
    assert len({row_capacity(positions, 4096) for positions in range(1, 4097)}) < 30
    assert row_capacity(3900, 4000) == 4000 and row_capacity(10, 40) == 40


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    """Too long a row, too many sequences, too much memory: each refusal says what was needed and what there is."""
    budget = Budget(4, 1, 1024, 9 * 1024 * 100, 100)
    with pytest.raises(RequestTooLarge, match=r"needs 1500 positions.* holds 1024"):
        budget.demand((1500,), 1)
    with pytest.raises(RequestTooLarge, match="5 sequences at once, but there are 4 slots"):
        budget.check(budget.demand((10,), 5), True)
    budget.check(budget.demand((10,), 5), False)
    small = Budget(4, 1, 1024, 2 * 1024 * 100, 100)
    with pytest.raises(RequestTooLarge, match=r"4 rows with 4096 positions of 100 bytes"):
        small.check(small.demand((1024, 1024), 2), True)


def test_limits_that_hold_nothing_are_refused() -> None:
    """A budget without room for one row would turn everything away later; it says so at once."""
    with pytest.raises(ValueError, match=r"memory_limit is 0\.1 MiB, but one row of 1024 positions takes 0\.5 MiB"):
        Budget(1, 0, 1024, 100_000, 512)
    with pytest.raises(ValueError, match="slots is 0"):
        Budget(0, 0, 16, 1 << 20, 1)


def test_pictures_leave_the_text_slots_and_their_memory_alone() -> None:
    """However many films run, texts find slots and memory; and what was taken is given back in full."""
    budget = Budget(2, 1, 100, 500, 1)
    usage, film, text = Usage(), Demand(1, (100, 100)), Demand(1, (100,))
    for _ in range(2):
        assert usage.fits(film, True, budget)
        usage.change(film, True, 1)
    assert not usage.fits(Demand(1, (1,)), True, budget)
    assert usage.fits(text, False, budget)
    usage.change(text, False, 1)
    assert not usage.fits(Demand(1, (1,)), False, budget)
    for demand, visual in ((film, True), (film, True), (text, False)):
        usage.change(demand, visual, -1)
    assert usage == Usage()
