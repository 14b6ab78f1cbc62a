"""Rows hold whole samples, within their length, always the same way."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vilau.data.packing import pack


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_every_sample_once_and_no_row_too_long(lengths: list[int], row_length: int) -> None:
    """No sample is lost, doubled or split; no row overflows; the result is a function of the arguments."""
    rows = pack(lengths, row_length)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in row) <= row_length for row in rows)
    assert rows == pack(lengths, row_length)
    assert sum(sum(lengths[index] for index in row) * 2 <= row_length for row in rows) <= 1, (
        "two half-empty rows fit in one"
    )


def test_first_fit_decreasing() -> None:
    """The rule itself: longest first, each into the first row with room, ties in the samples' order."""
    assert pack([2, 6, 4, 4, 2], 8) == [[1, 0], [2, 3], [4]]
    assert pack([], 8) == []


@pytest.mark.parametrize(("lengths", "words"), [([3, 9], ["sample 1", "9", "8", "skip"]), ([0], ["sample 0", "empty"])])
def test_impossible_samples_are_named(lengths: list[int], words: list[str]) -> None:
    """A sample that cannot be placed is an error with its index, both numbers and a remedy; never cut."""
    with pytest.raises(ValueError) as caught:
        pack(lengths, 8)
    assert all(word in str(caught.value) for word in words)


def test_row_length_must_be_positive() -> None:
    """A configuration slip is caught before any work."""
    with pytest.raises(ValueError, match="row_length is 0"):
        pack([1], 0)
