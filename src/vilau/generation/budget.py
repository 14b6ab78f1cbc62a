"""The memory of a running batch: what a request will need is known, and refused or made to wait, before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vilau.generation.caches import cache_bytes

_SMALLEST = 64  # positions; rows shorter than this are not worth a size of their own


class RequestTooLarge(ValueError):
    """A request that would not fit even if it were the only one."""


def position_bytes(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes of one position of one row in the language model's cache (LLaMA-2-7B in bfloat16: 512 KiB)."""
    return cache_bytes(config, 1, 1, dtype.itemsize)


def row_capacity(positions: int, largest: int = 1 << 62) -> int:
    """Return the places to take for a row of so many positions: the next of four sizes per octave, at most `largest`.

    Rows of like lengths so share one block of memory, at the price of at most a quarter more than they need.
    """
    if positions <= _SMALLEST:
        return min(_SMALLEST, largest)
    octave = 1 << ((positions - 1).bit_length() - 1)  # octave < positions <= 2 * octave
    quarter = octave // 4
    return min(largest, -(-positions // quarter) * quarter)


@dataclass(frozen=True)
class Demand:
    """What a request takes: so many `sequences` (texts, pictures or films), and the capacity of each of their rows."""

    sequences: int
    capacities: tuple[int, ...]

    @property
    def positions(self) -> int:
        """Places of all rows."""
        return sum(self.capacities)


@dataclass(frozen=True)
class Budget:
    """The limits of a running batch.

    Args:
        slots: sequences of any kind at once.
        text_slots: sequences at once beyond these that only text may be.
        max_positions: of one row, prompt and answer.
        memory_limit: bytes of the cache.
        position_bytes: of one position of one row.
    """

    slots: int
    text_slots: int
    max_positions: int
    memory_limit: int
    position_bytes: int

    def __post_init__(self) -> None:
        for name, value, low in (
            ("slots", self.slots, 1),
            ("text_slots", self.text_slots, 0),
            ("max_positions", self.max_positions, 2),
        ):
            if value < low:
                raise ValueError(f"{name} is {value}; it must be at least {low}")
        if self.memory_limit < self.bytes_of(self.max_positions):
            raise ValueError(
                f"memory_limit is {mib(self.memory_limit)}, but one row of {self.max_positions} positions takes "
                f"{mib(self.bytes_of(self.max_positions))} ({self.position_bytes:,} bytes a position); raise "
                "memory_limit or lower max_positions"
            )

    @property
    def visual_limit(self) -> int:
        """Bytes that pictures and films may take together, with two rows to a slot; the rest is kept for text."""
        return self.memory_limit * 2 * self.slots // (2 * self.slots + self.text_slots)

    def bytes_of(self, positions: int) -> int:
        """Return the memory of so many positions."""
        return positions * self.position_bytes

    def demand(self, lengths: Sequence[int], copies: int) -> Demand:
        """Return what ``copies`` sequences take, each with one row for each of ``lengths`` positions.

        Raises:
            RequestTooLarge: a row is longer than `max_positions`.
        """
        longest = max(lengths)
        if longest > self.max_positions:
            raise RequestTooLarge(
                f"the request needs {longest} positions, its prompt included, but a row holds {self.max_positions}; "
                "shorten the prompt or ask for less"
            )
        capacities = _alike([row_capacity(length, self.max_positions) for length in lengths])
        return Demand(copies, capacities * copies)

    def check(self, demand: Demand, visual: bool) -> None:
        """Raise RequestTooLarge if a request could not run even alone."""
        slots = self.slots if visual else self.slots + self.text_slots
        if demand.sequences > slots:
            raise RequestTooLarge(
                f"the request is for {demand.sequences} sequences at once, but there are {slots} slots; ask for fewer"
            )
        limit = self.visual_limit if visual else self.memory_limit
        needed = self.bytes_of(demand.positions)
        if needed > limit:
            raise RequestTooLarge(
                f"the request needs {mib(needed)} of cache ({len(demand.capacities)} rows with {demand.positions} "
                f"positions of {self.position_bytes:,} bytes), but {mib(limit)} are all there is"
                f"{' for pictures and films' if visual else ''}; ask for fewer or shorter ones, or raise memory_limit"
            )


def _alike(capacities: Sequence[int]) -> tuple[int, ...]:
    """Return the capacities of a sequence's rows, those next below the largest raised to it.

    The rows of a picture then lie in one block and are attended to in one go.
    """
    largest = max(capacities)
    return tuple(largest if 4 * largest <= 5 * capacity else capacity for capacity in capacities)


@dataclass
class Usage:
    """What the requests in a batch take together."""

    sequences: int = 0
    positions: int = 0
    visual_sequences: int = 0
    visual_positions: int = 0

    def change(self, demand: Demand, visual: bool, sign: int) -> None:
        """Add a request's demand, or with ``sign`` -1 take it away."""
        self.sequences += sign * demand.sequences
        self.positions += sign * demand.positions
        if visual:
            self.visual_sequences += sign * demand.sequences
            self.visual_positions += sign * demand.positions

    def fits(self, demand: Demand, visual: bool, budget: Budget) -> bool:
        """Whether a request can join now."""
        if self.sequences + demand.sequences > budget.slots + budget.text_slots:
            return False
        if budget.bytes_of(self.positions + demand.positions) > budget.memory_limit:
            return False
        if not visual:
            return True
        if self.visual_sequences + demand.sequences > budget.slots:
            return False
        return budget.bytes_of(self.visual_positions + demand.positions) <= budget.visual_limit


def mib(size: int) -> str:
    """Return a size in MiB for messages."""
    return f"{size / 2**20:,.1f} MiB"
