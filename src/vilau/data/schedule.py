"""Which source gives sample number ``n`` of a mixture, and its how-manieth sample it is, without counting up to ``n``.

The sources stand at the leaves of a binary tree. Of the first ``n`` samples that reach a node, ``floor(n p)`` go left
and the rest right, so that at every moment each source has had its share up to less than one sample per level. A
source that may be read a limited number of times leaves the tree when it is used up, which starts a new segment.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from .permutation import permute

_BLOCK = 64  # neighbouring numbers are shuffled in blocks, lest equal weights alternate in step with a batch


@dataclass(frozen=True)
class _Node:
    """Sources ``first ... last - 1`` of a segment; ``share`` goes to those before ``middle``."""

    first: int
    middle: int
    last: int
    share: Fraction
    left: _Node | None
    right: _Node | None


@dataclass(frozen=True)
class _Segment:
    """From number ``start`` on these sources take part; ``given`` counts what each had had before."""

    start: int
    members: tuple[int, ...]
    given: tuple[int, ...]
    root: _Node


class Schedule:
    """The order of sources.

    Args:
        weights: of the sources, each above 0.
        limits: how many samples a source may give; None for endless.
        seed: of the shuffling of neighbours.

    ``total`` is how many samples there are in all, None for endless.
    """

    def __init__(self, weights: Sequence[float], limits: Sequence[int | None], seed: int) -> None:
        assert weights and len(weights) == len(limits) and min(weights) > 0
        self.seed = seed
        exact = [Fraction(str(weight)) for weight in weights]
        left = list(limits)
        given, start = [0] * len(weights), 0
        self._segments: list[_Segment] = []
        self.total: int | None = None
        while True:
            members = tuple(number for number, rest in enumerate(left) if rest != 0)
            if not members:
                self.total = start
                break
            root = _tree([exact[number] for number in members], 0, len(members))
            self._segments.append(_Segment(start, members, tuple(given), root))
            ends = [
                _first(root, place, rest) for place, number in enumerate(members) if (rest := left[number]) is not None
            ]
            if not ends:
                break
            length = min(ends)
            for place, number in enumerate(members):
                count = _count(root, place, length)
                given[number] += count
                rest = left[number]
                left[number] = None if rest is None else rest - count
            start += length
        self._starts = [segment.start for segment in self._segments]

    def place(self, number: int) -> tuple[int, int]:
        """Return the source of a number and which of the source's own samples it is, counted from 0 over all epochs.

        Raises:
            IndexError: the mixture has ended.
        """
        number = self._shuffled(number)
        segment = self._segments[bisect_right(self._starts, number) - 1]
        node: _Node | None = segment.root
        rest, member = number - segment.start, 0
        while node is not None:
            before, after = _floor(rest, node.share), _floor(rest + 1, node.share)
            if after > before:
                rest, member, node = before, node.first, node.left
            else:
                rest, member, node = rest - before, node.middle, node.right
        source = segment.members[member]
        return source, segment.given[source] + rest

    def _shuffled(self, number: int) -> int:
        if number < 0 or (self.total is not None and number >= self.total):
            raise IndexError(f"sample {number} is out of range: the mixture has {self.total}")
        block, within = divmod(number, _BLOCK)
        size = _BLOCK if self.total is None else min(_BLOCK, self.total - block * _BLOCK)
        return block * _BLOCK + permute(within, size, "order", self.seed, block)


def _tree(weights: Sequence[Fraction], first: int, last: int) -> _Node:
    if last - first == 1:  # a leaf, written as a node that sends everything left
        return _Node(first, last, last, Fraction(1), None, None)
    middle = (first + last) // 2
    share = sum(weights[first:middle], Fraction(0)) / sum(weights[first:last], Fraction(0))
    left = _tree(weights, first, middle) if middle - first > 1 else None
    right = _tree(weights, middle, last) if last - middle > 1 else None
    return _Node(first, middle, last, share, left, right)


def _floor(number: int, share: Fraction) -> int:
    return number * share.numerator // share.denominator


def _count(root: _Node, place: int, number: int) -> int:
    """How many of the first ``number`` samples the source at ``place`` gets."""
    node: _Node | None = root
    while node is not None:
        before = _floor(number, node.share)
        if place < node.middle:
            number, node = before, node.left
        else:
            number, node = number - before, node.right
    return number


def _first(root: _Node, place: int, count: int) -> int:
    """The smallest number of samples of which the source at ``place`` gets ``count``."""
    high = max(1, count)
    while _count(root, place, high) < count:
        high *= 2
    low = 0
    while low < high:
        middle = (low + high) // 2
        if _count(root, place, middle) < count:
            low = middle + 1
        else:
            high = middle
    return low
