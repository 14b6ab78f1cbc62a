"""How much work on pictures and prompts goes between two tokens of a text, so that text keeps its pace."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vilau.generation.position import Networks
from vilau.generation.sampling import SamplingOptions, sample_codes, sampling_rows
from vilau.generation.slots import SlotStore, StoreLanguage, plan

_MANY = 16  # rows that the cost of a row is measured with
_REPEAT = 3
_CAPACITY = 64
_STEP = 0.1  # by which a late token moves what is steered
_START = 0.6  # of the room that a trial leaves, until it is known how well it fits


@dataclass(frozen=True)
class Cost:
    """The cost of a step: `base`, and `row` for each of its rows."""

    base: float
    row: float

    def of(self, rows: int) -> float:
        """Return the cost of a step of so many rows."""
        return self.base + self.row * rows

    @classmethod
    def measured(cls, work: Callable[[int], Any], device: torch.device) -> Cost:
        """Return the seconds of a work that is called with its number of rows, the best of a few trials."""
        few, many = (min(_seconds(work, rows, device) for _ in range(_REPEAT)) for rows in (1, _MANY))
        row = max((many - few) / (_MANY - 1), few * 1e-3)
        return cls(max(few - row, 0.0), row)


@dataclass(frozen=True)
class Pace:
    """What the pieces of a running batch's work cost, in any unit.

    Args:
        limit: how many times longer than alone a token of text may take; infinite for no limit.
        language, head, depth: of a pass of the language model, of writing tokens, and of one depth step.

    Raises:
        ValueError: the limit is below 1 or not a number.
    """

    limit: float
    language: Cost
    head: Cost
    depth: Cost

    def __post_init__(self) -> None:
        if not self.limit >= 1:
            raise ValueError(f"text_pace is {self.limit}; it must be at least 1, the time that a token takes alone")

    def room(self, texts: int) -> float:
        """Return the work that may be added to a step of so many texts; without texts there is no limit."""
        if not texts:
            return float("inf")
        return (self.limit - 1) * (self.language.of(texts) + self.head.of(texts))

    def positions(self, count: int) -> float:
        """Return what so many further positions add to a pass of the language model."""
        return self.language.row * count

    def positions_in(self, room: float, most: int) -> int:
        """Return how many further positions fit into a room, at most ``most``."""
        return int(max(0, min(most, room / self.language.row)))

    def depth_step(self, rows: int) -> float:
        """Return the cost of one depth step of so many rows."""
        return self.depth.of(rows)


class Steering:
    """What corrects a `Pace` by the time that really passes between two tokens.

    Estimates miss what lies between the pieces of work, and other programs slow all of it. So two numbers are steered:
    `alone`, how many times its estimate a token with nothing beside it takes, but for one of ten; and `share`, how much
    of the estimated room is given out, so that of the tokens beside other work one of a hundred takes longer than the
    limit. A late token moves its number by a tenth, one in time the other way by as much less as it comes more often.
    Only when work is done depends on it.

    Args:
        clock: returns seconds; see `clock_of`.
    """

    def __init__(self, pace: Pace, clock: Callable[[], float]) -> None:
        self.pace, self.clock = pace, clock
        self.alone, self.share = 1.0, _START
        self._last: float | None = None

    def room(self, texts: int) -> float:
        """Return the work that may be added to a step of so many texts."""
        return self.share * self.pace.room(texts) if texts else float("inf")

    def written(self, texts: int, beside: bool, forced: bool, usual: bool) -> None:
        """Note that tokens of so many texts have been written just now.

        Args:
            beside: whether other work was done since the last ones.
            forced: whether that was the least that is always done; there is nothing to learn from it.
            usual: whether the last ones were of the same texts.
        """
        now = self.clock()
        taken = None if self._last is None or not usual else now - self._last
        self._last = now if texts else None
        if taken is None or not texts:
            return
        estimate = self.pace.language.of(texts) + self.pace.head.of(texts)
        if not beside:
            late = taken > self.alone * estimate
            self.alone = min(50.0, max(0.1, self.alone * (1 + _STEP if late else 1 - _STEP / 10)))
        elif not forced:
            late = taken > self.pace.limit * self.alone * estimate
            self.share = min(1.0, max(0.1, self.share * (1 - _STEP if late else 1 + _STEP / 100)))


def weighed(networks: Networks, head: float, limit: float, free_rows: float) -> Pace:
    """Return the pace by weights read: a step with n rows costs ``weights * (1 + n / free_rows)``.

    Args:
        head: weights of the text head.
        free_rows: rows whose products cost as much as reading the weights once.
    """

    def cost(weights: float) -> Cost:
        return Cost(weights, weights / free_rows)

    language, depth = (
        0 if network is None else sum(parameter.numel() for parameter in network.parameters())
        for network in (networks.language, networks.depth_transformer)
    )
    return Pace(limit, cost(language), cost(head), cost(depth))


@torch.no_grad()
def measured(networks: Networks, language: StoreLanguage, head: nn.Module, store: SlotStore, limit: float) -> Pace:
    """Return the pace by a short trial of every piece on this machine.

    Args:
        language, store: as the batch uses them; the store is left empty.
        head: the text head.
    """
    like, size = store.like, networks.language.config.hidden_size

    def language_pass(rows: int) -> None:
        taken = [store.reserve(_CAPACITY) for _ in range(rows)]
        for row in taken:
            row.length = _CAPACITY // 2
        work, _ = plan(taken, [], like)
        language.forward(like.new_zeros((rows, size)), work)
        for row in taken:
            store.release(row)

    def write(rows: int) -> None:
        head(like.new_zeros((rows, size))).float().argmax(-1).tolist()

    costs = [Cost.measured(work, like.device) for work in (language_pass, write)]
    if networks.depth_transformer is None:
        return Pace(limit, costs[0], costs[1], Cost(0.0, 0.0))
    return Pace(limit, costs[0], costs[1], Cost.measured(lambda rows: _depth_step(networks, rows, like), like.device))


def _depth_step(networks: Networks, rows: int, like: torch.Tensor) -> None:
    """Make one depth step as guided pictures make it, with one picture for two rows."""
    quantizer, count = networks.quantizer, -(-rows // 2)
    filters = sampling_rows([SamplingOptions()] * count, quantizer.codebook_size, like.device)
    seeds = torch.zeros(count, dtype=torch.int64, device=like.device)
    cache = networks.depth_transformer.new_cache(rows)
    logits = networks.depth_transformer.step(like.new_zeros((rows, networks.language.config.hidden_size)), 0, cache)
    quantizer.code_vectors(sample_codes(logits[:count], filters, seeds, 0, 0), 0)


def _seconds(work: Callable[[int], Any], rows: int, device: torch.device) -> float:
    """Return the time of one call."""
    clock = clock_of(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    work(rows)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return the clock: on one processor thread its own, which others disturb little."""
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
