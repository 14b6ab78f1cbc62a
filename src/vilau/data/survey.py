"""A walk over a source: how many samples, of which forms and sizes, and everything that is wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

from .mixture import SkipCounts
from .sample import Sample
from .sources.source import BadSample, Source

_EXAMPLES = 3
_CHUNK = 64


@dataclass
class Spread:
    """Smallest, largest and mean of some numbers."""

    count: int = 0
    total: float = 0.0
    low: float = float("inf")
    high: float = float("-inf")

    def add(self, value: float) -> None:
        """Take in a number."""
        self.merge(Spread(1, value, value, value))

    def merge(self, other: Spread) -> None:
        """Take in another spread's numbers."""
        self.count += other.count
        self.total += other.total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def __str__(self) -> str:
        if not self.count:
            return "none"
        if self.low == self.high:
            return f"{self.low:g}"
        return f"{self.low:g} to {self.high:g}, {self.total / self.count:.1f} on average"


@dataclass
class Survey:
    """What was found; surveys of parts of a source add up.

    bad: (source, kind, shard) -> how many samples; ``examples``: kind -> some messages.
    """

    read: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    widths: Spread = field(default_factory=Spread)
    heights: Spread = field(default_factory=Spread)
    frames: Spread = field(default_factory=Spread)
    characters: Spread = field(default_factory=Spread)
    bad: SkipCounts = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def good(self) -> int:
        """Samples that can be used."""
        return self.read - sum(self.bad.values())

    def add(self, sample: Sample) -> None:
        """Take in a sample that can be used."""
        self.forms[sample.form] += 1
        self.frames.add(len(sample.frames))
        for frame in sample.frames:
            if frame.ndim == 3:
                self.heights.add(frame.shape[0])
                self.widths.add(frame.shape[1])
        parts = (part for turn in sample.turns for part in turn.parts)
        self.characters.add(sum(len(part.text) for part in parts))

    def add_bad(self, source: str, shard: str, bad: BadSample) -> None:
        """Take in a sample that cannot be used."""
        self.bad[source, bad.kind, shard] += 1
        examples = self.examples.setdefault(bad.kind, [])
        if len(examples) < _EXAMPLES:
            examples.append(str(bad))

    def merge(self, other: Survey) -> None:
        """Take in what was found elsewhere."""
        self.read += other.read
        self.forms += other.forms
        self.bad += other.bad
        for name in ("widths", "heights", "frames", "characters"):
            getattr(self, name).merge(getattr(other, name))
        for kind, messages in other.examples.items():
            own = self.examples.setdefault(kind, [])
            own.extend(messages[: _EXAMPLES - len(own)])


def survey_part(source: Source, use: Callable[[Sample], object], indices: Iterable[int]) -> Survey:
    """Read some samples of a source and do with each what training would."""
    survey = Survey()
    for index in indices:
        survey.read += 1
        try:
            sample = source.read(index)
            use(sample)
        except BadSample as bad:
            survey.add_bad(source.name, source.shard(index), bad)
        except ValueError as error:  # does not fit the stage, where others may
            survey.add_bad(source.name, source.shard(index), BadSample("bad_record", str(error)))
        else:
            survey.add(sample)
    return survey


def survey_source(source: Source, use: Callable[[Sample], object], workers: int = 0) -> Iterator[Survey]:
    """Walk all of a source and yield what was found in one part of it after the other.

    workers: processes that read; 0 reads here.
    """
    size = len(source)
    parts = [range(first, min(size, first + _CHUNK)) for first in range(0, size, _CHUNK)]
    if not workers:
        yield from (survey_part(source, use, part) for part in parts)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _set_task, (source, use)) as pool:
        yield from pool.map(_survey_here, parts)


_task: tuple[Source, Callable[[Sample], object]]


def _set_task(source: Source, use: Callable[[Sample], object]) -> None:
    global _task
    _task = (source, use)


def _survey_here(part: range) -> Survey:
    return survey_part(*_task, part)
