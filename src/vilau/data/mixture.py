"""Several sources as one endless or finite row of samples, whose order is a pure function of the seed.

Number ``n`` of a mixture is (source, epoch, index within the source) by arithmetic alone: :class:`Schedule` picks the
source, a keyed permutation the index. Any process can therefore read any number, and resuming is starting at a number.
A bad sample is counted and replaced by a random one of the same source, which depends on the number alone too.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from .permutation import hash64, permute
from .sample import Sample
from .schedule import Schedule
from .sources.source import BadSample, Source
from .variation import vary

logger = logging.getLogger(__name__)

T = TypeVar("T")
SkipCounts = Counter  # of (source, kind, shard)

_ATTEMPTS = 64
_PROBES = 32
_SHOWN_SHARDS = 5


@dataclass(frozen=True)
class Entry:
    """A source's part in a mixture.

    weight: its share, or "size" for as many shares as it has samples.
    epochs: how often it is read at most; None for endlessly.
    forms: for pairs of picture and text: image_text, text_image -> share; as read if None.
    """

    source: Source
    weight: float | Literal["size"] = 1.0
    epochs: float | None = None
    forms: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Place:
    """Where a number of the global order lies: source by its number in the mixture, epoch, index within the source."""

    source: int
    epoch: int
    index: int


class Mixture:
    """Samples of several sources in one global order.

    Args:
        entries: the sources with their weights.
        seed: another seed, another order.

    Raises:
        ValueError: no sources, two of one name, a weight that is not above 0.
    """

    def __init__(self, entries: Sequence[Entry], seed: int) -> None:
        if not entries:
            raise ValueError("a mixture needs at least one source: add one under data.sources")
        names = [entry.source.name for entry in entries]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources have the name {name!r}: give one of them another `name`")
        self.entries = tuple(entries)
        self.seed = seed
        self.sizes = [len(entry.source) for entry in entries]
        weights = [_weight(entry, size) for entry, size in zip(entries, self.sizes, strict=True)]
        limits = [
            None if entry.epochs is None else max(1, round(entry.epochs * size))
            for entry, size in zip(entries, self.sizes, strict=True)
        ]
        self._schedule = Schedule(weights, limits, seed)
        self._skips: SkipCounts = Counter()

    @property
    def total(self) -> int | None:
        """How many samples there are; None when a source is read without end."""
        return self._schedule.total

    def place(self, number: int) -> Place:
        """Return where sample ``number`` lies: a function of (seed, number), in constant time and memory.

        An epoch of a source holds each of its samples once; at its border neighbours of two epochs may change places.

        Raises:
            IndexError: the mixture has ended.
        """
        source, count = self._schedule.place(number)
        size = self.sizes[source]
        epoch, position = divmod(count, size)
        name = self.entries[source].source.name
        return Place(source, epoch, permute(position, size, "epoch", self.seed, name, epoch))

    def __getitem__(self, number: int) -> Sample:
        return self.draw(number, lambda sample: sample)

    def draw(self, number: int, use: Callable[[Sample], T]) -> T:
        """Return ``use`` of sample ``number``, or of its first good replacement.

        ``use`` gets the sample, with its epoch added to its id (``name/key#epoch``), and may raise ``BadSample`` as
        reading does: such a sample is counted and another one of the same source takes its place.

        Raises:
            ValueError: very many replacements in a row are bad too.
        """
        place = self.place(number)
        entry = self.entries[place.source]
        source, index = entry.source, place.index
        for attempt in range(_ATTEMPTS):
            try:
                sample = vary(source.read(index), entry.forms, self.seed, place.epoch)
                return use(replace(sample, id=f"{sample.id}#{place.epoch}"))
            except BadSample as bad:
                last = bad
                self._skips[source.name, bad.kind, source.shard(index)] += 1
            index = hash64("instead", self.seed, source.name, number, attempt) % self.sizes[place.source]
        raise ValueError(
            f"source {source.name!r}: {_ATTEMPTS} samples in a row cannot be used, the last one because of "
            f"{last.kind} ({last}); run `vilau data check` on it"
        )

    def take_skips(self) -> SkipCounts:
        """Return what was skipped in this process since the last call, and count from nothing again."""
        skips, self._skips = self._skips, Counter()
        return skips

    def probe(self, use: Callable[[Sample], object] = lambda sample: sample) -> None:
        """Read some samples of each source, to find out before the first step when a whole source is wrong.

        Raises:
            ValueError: none of a source's probed samples can be used; its reasons are listed.
        """
        for entry in self.entries:
            probe_source(entry.source, use)


def probe_source(source: Source, use: Callable[[Sample], object], probes: int = _PROBES) -> None:
    """Read evenly spread samples of a source until one can be used.

    Raises:
        ValueError: none can; the reasons are listed.
    """
    size = len(source)
    reasons: Counter[str] = Counter()
    example = ""
    count = min(probes, size)
    for probe in range(count):
        try:
            use(source.read(probe * size // count))
            return
        except BadSample as bad:
            reasons[bad.kind] += 1
            example = example or str(bad)
    listed = ", ".join(f"{kind} {number}" for kind, number in reasons.most_common())
    raise ValueError(
        f"source {source.name!r}: none of {count} samples tried can be used ({listed}); the first: {example}"
    )


def _weight(entry: Entry, size: int) -> float:
    weight = size if entry.weight == "size" else entry.weight
    if not 0 < weight < float("inf"):
        raise ValueError(
            f"source {entry.source.name!r} has weight {weight}: it must be above 0; to read none of it, leave it out"
        )
    return weight


def share_skipped(skips: SkipCounts, used: int) -> float:
    """Return bad samples as a share of all that were read, the used ones included."""
    bad = sum(skips.values())
    return bad / (bad + used) if bad else 0.0


def describe_skips(skips: SkipCounts, used: int) -> list[str]:
    """Return lines for people: how many samples were skipped, by source and kind, with the shards that had most."""
    if not skips:
        return []
    bad = sum(skips.values())
    lines = [f"{bad} of {bad + used} samples read were skipped ({share_skipped(skips, used):.2%}):"]
    for (source, kind), count in _grouped(skips):
        shards = Counter({shard: n for (s, k, shard), n in skips.items() if (s, k) == (source, kind)})
        worst = ", ".join(f"{shard} {n}" for shard, n in sorted(shards.items(), key=lambda i: (-i[1], i[0]))[:5])
        more = f" and {len(shards) - _SHOWN_SHARDS} more" if len(shards) > _SHOWN_SHARDS else ""
        lines.append(f"  {source}: {kind} {count} (in {worst}{more})")
    return lines


def _grouped(skips: SkipCounts) -> Iterable[tuple[tuple[str, str], int]]:
    totals: Counter[tuple[str, str]] = Counter()
    for (source, kind, _), count in skips.items():
        totals[source, kind] += count
    return sorted(totals.items(), key=lambda item: (item[0][0], -item[1], item[0][1]))
