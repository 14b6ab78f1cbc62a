"""The order of an epoch is a permutation that is never written down."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vilau.data.permutation import hash64, permute, unit


@settings(max_examples=120, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**40), st.text(max_size=8))
def test_every_number_comes_exactly_once(size: int, seed: int, name: str) -> None:
    """For any size and key, what comes out is a rearrangement of what went in."""
    assert sorted(permute(number, size, seed, name) for number in range(size)) == list(range(size))


@given(st.integers(1, 2**62), st.integers(0), st.integers(0, 2**40))
def test_huge_sizes_stay_within_range(size: int, number: int, seed: int) -> None:
    """Sizes that no list could hold work the same: within range, and different numbers stay different."""
    number %= size
    place = permute(number, size, seed)
    assert 0 <= place < size
    if size > 1:
        other = (number + 1) % size
        assert permute(other, size, seed) != place


def test_keys_give_different_orders_that_look_random() -> None:
    """Two epochs differ, and an order keeps no more neighbours together than chance does."""
    size = 1000
    orders = [[permute(number, size, "seed", epoch) for number in range(size)] for epoch in range(2)]
    agreeing = sum(a == b for a, b in zip(*orders))
    neighbours = sum(abs(a - b) == 1 for a, b in zip(orders[0], orders[0][1:]))
    assert agreeing < 10  # 1 is expected
    assert neighbours < 12  # 2 are expected
    quarters = [sum(place < size // 4 for place in orders[0][start : start + 250]) for start in range(0, size, 250)]
    assert all(35 < count < 90 for count in quarters)  # 62 are expected in each


def test_orders_are_the_same_on_every_machine() -> None:
    """Stored values: a changed order would silently change what a resumed run reads."""
    assert [permute(number, 10, 1, "a", 0) for number in range(10)] == [1, 6, 9, 7, 4, 8, 5, 2, 0, 3]
    assert hash64("a", 1) == 13924241962069754241
    assert unit("a", 1) == 0.7548346692744925


def test_numbers_out_of_range_are_errors() -> None:
    """A number that is not among those permuted is a mistake of the caller."""
    for number in (-1, 5):
        with pytest.raises(ValueError, match="not among the 5"):
            permute(number, 5, "key")
