"""Packing: several samples share a row so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """First-fit decreasing: put sample indices into as few rows as this simple rule finds.

    Returns one list of sample indices per row; the sum of a row's lengths is at most ``row_length``; no sample is
    split. The result depends on the arguments alone (ties keep the samples' order). ``ValueError`` for a sample that is
    empty or longer than a row: callers may leave it out and count it, or shorten it at a whole picture or turn.
    """
    if row_length < 1:
        raise ValueError(f"row_length is {row_length}: it must be at least 1")
    for index, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"sample {index} has {length} positions: leave empty samples out")
        if length > row_length:
            raise ValueError(
                f"sample {index} has {length} positions, more than a row of {row_length}: "
                "raise row_length, shorten the sample or skip it"
            )
    rows: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for row, room in enumerate(free):
            if room >= lengths[index]:
                rows[row].append(index)
                free[row] -= lengths[index]
                break
        else:
            rows.append([index])
            free.append(row_length - lengths[index])
    return rows
