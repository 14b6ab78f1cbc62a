"""A mixture's order is a function of the seed alone, and bad samples are counted and replaced."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from vilau.data.mixture import Entry, Mixture, describe_skips, share_skipped
from vilau.data.sample import Sample
from vilau.data.sources.source import BadSample, Source, image_text


class Numbers:
    """A source of numbered samples, some of them bad."""

    def __init__(self, name: str, size: int, bad: Sequence[int] = (), captions: int = 1) -> None:
        self.name, self.size, self.bad, self.captions = name, size, set(bad), captions

    def __len__(self) -> int:
        return self.size

    def read(self, index: int) -> Sample:
        if index in self.bad:
            raise BadSample("missing_file", f"{index} is bad")
        words = [f"{index} as {number}" for number in range(self.captions)]
        return image_text(f"{self.name}/{index}", np.zeros((2, 2, 3), np.uint8), words)

    def shard(self, index: int) -> str:
        return f"shard{index // 10}"


def ids(mixture: Mixture, numbers: range) -> list[str]:
    return [mixture[number].id for number in numbers]


def test_an_epoch_holds_every_sample_once() -> None:
    """One source, twice through: all samples in each epoch, in another order, told apart by their ids."""
    mixture = Mixture([Entry(Numbers("a", 640), epochs=2)], seed=3)
    assert mixture.total == 1280
    first, second = ids(mixture, range(640)), ids(mixture, range(640, 1280))
    assert sorted(first) == sorted(f"a/{index}#0" for index in range(640))
    assert sorted(second) == sorted(f"a/{index}#1" for index in range(640))
    assert [name.split("#")[0] for name in first] != [name.split("#")[0] for name in second]
    assert ids(Mixture([Entry(Numbers("a", 640), epochs=2)], seed=4), range(640)) != first
    with pytest.raises(IndexError, match="the mixture has 1280"):
        mixture[1280]


def test_the_order_is_a_pure_function() -> None:
    """Numbers asked for in any order, by a copy, or far ahead give the samples that a full run would."""
    entries = [Entry(Numbers("a", 50), 3.0), Entry(Numbers("b", 7), 1.0, epochs=2.5), Entry(Numbers("c", 9), 0.5)]
    mixture = Mixture(entries, seed=1)
    forward = ids(mixture, range(200))
    copy = pickle.loads(pickle.dumps(Mixture(entries, seed=1)))
    assert [copy[number].id for number in reversed(range(200))] == forward[::-1]
    counts = Counter(name.split("/")[0] for name in forward)
    assert counts["b"] == 18  # 2.5 epochs of 7 samples, rounded
    assert mixture.place(10**15).source in (0, 2)


def test_another_source_leaves_the_order_within_a_source() -> None:
    """A source's own order depends on its name and the seed, not on what else is in the mixture."""
    alone = ids(Mixture([Entry(Numbers("a", 64))], 1), range(64))
    mixed = Mixture([Entry(Numbers("b", 5)), Entry(Numbers("a", 64))], 1)
    beside = [mixed.place(number) for number in range(128)]
    assert {f"a/{place.index}#0" for place in beside if place.source == 1} == set(alone)


def test_weights_by_size() -> None:
    """`size` gives each source as many shares as it has samples: all are used up together."""
    mixture = Mixture([Entry(Numbers("a", 900), "size"), Entry(Numbers("b", 100), "size")], 0)
    counts = Counter(mixture.place(number).source for number in range(960))
    assert abs(counts[1] - 96) <= 1


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_weights_must_be_above_zero(weight: float) -> None:
    """A weight that reads nothing is a mistake: said with the source's name."""
    with pytest.raises(ValueError, match="source 'a' has weight .* must be above 0"):
        Mixture([Entry(Numbers("a", 3), weight)], 0)


def test_mistakes_of_mixtures() -> None:
    """No sources, or two of one name, are errors before anything is read."""
    with pytest.raises(ValueError, match="at least one source"):
        Mixture([], 0)
    with pytest.raises(ValueError, match="two sources have the name 'a'"):
        Mixture([Entry(Numbers("a", 3)), Entry(Numbers("a", 4))], 0)


def test_bad_samples_are_replaced_and_counted() -> None:
    """A bad sample is counted by source, kind and shard; another of its source takes its place, always the same."""
    bad = range(0, 100, 5)

    def build() -> Mixture:
        return Mixture([Entry(Numbers("a", 100, bad), epochs=1), Entry(Numbers("b", 100), epochs=1)], 9)

    mixture = build()
    seen = ids(mixture, range(200))
    assert not any(int(name.split("/")[1].split("#")[0]) in bad for name in seen if name.startswith("a"))
    skips = mixture.take_skips()
    assert set(skips) == {("a", "missing_file", f"shard{number}") for number in range(10)}
    assert sum(skips.values()) >= 20  # each bad sample once, and now and then one as a replacement
    assert mixture.take_skips() == Counter()
    backwards = build()
    assert [backwards[number].id for number in reversed(range(200))] == seen[::-1]
    assert backwards.take_skips() == skips


def test_what_use_refuses_is_replaced_too() -> None:
    """A sample that is read well but cannot be used (too long for a row) is skipped the same way."""
    mixture = Mixture([Entry(Numbers("a", 10))], 0)

    def use(sample: Sample) -> str:
        if sample.id.startswith("a/3#"):
            raise BadSample("too_long", "no room")
        return sample.id

    used = [mixture.draw(number, use) for number in range(10)]
    assert len(used) == 10 and "a/3#0" not in used
    assert mixture.take_skips() == {("a", "too_long", "shard0"): 1}


def test_a_source_that_is_all_bad_stops() -> None:
    """No endless search: the probe says it before the first step, drawing says it in any case."""
    mixture = Mixture([Entry(Numbers("good", 5)), Entry(Numbers("bad", 40, range(40)))], 0)
    with pytest.raises(
        ValueError, match=r"source 'bad': none of 32 samples tried .*missing_file 32.*the first: 0 is bad"
    ):
        mixture.probe()
    with pytest.raises(ValueError, match="source 'bad': 64 samples in a row"):
        ids(mixture, range(64))
    Mixture([Entry(Numbers("partly", 40, range(30)))], 0).probe()


def test_ways_round_and_captions_change_with_the_epoch() -> None:
    """Pairs are used each way round in their shares; every caption of a picture gets its turn."""
    entry = Entry(Numbers("a", 64, captions=3), forms={"image_text": 1.0, "text_image": 3.0})
    mixture = Mixture([entry], 0)
    samples = [mixture[number] for number in range(64 * 6)]
    drawn = [sample for sample in samples if sample.form == "text_image"]
    assert 0.65 < len(drawn) / len(samples) < 0.85
    assert [part.kind for turn in drawn[0].turns for part in turn.parts] == ["text", "image"]
    said = Counter(part.text for sample in samples for turn in sample.turns for part in turn.parts if part.text)
    assert len(said) == 64 * 3 and set(said.values()) == {2}
    plain = Mixture([Entry(Numbers("a", 64))], 0)
    assert {plain[number].form for number in range(64)} == {"image_text"}


def read_share(mixture: Mixture, first: int) -> tuple[list[str], Counter]:
    """What one of several processes reads: ids, and its skips."""
    return ids(mixture, range(first, first + 30)), mixture.take_skips()


def test_processes_together_read_what_one_does() -> None:
    """Runs of numbers read by other processes give the samples and the counts of one process."""
    entries = [Entry(Numbers("a", 40, (1, 2, 3))), Entry(Numbers("b", 8, (5,)), 0.2)]
    whole = Mixture(entries, 2)
    expected = ids(whole, range(90)), whole.take_skips()
    with ProcessPoolExecutor(2) as pool:
        parts = list(pool.map(read_share, [Mixture(entries, 2)] * 3, (0, 30, 60)))
    assert [name for part, _ in parts for name in part] == expected[0]
    assert sum((skips for _, skips in parts), Counter()) == expected[1]


def test_the_report_names_kinds_and_shards() -> None:
    """The lines at the end say how many, of which source and kind, and where most of them lie."""
    skips = Counter({("a", "missing_file", f"s{n}"): n for n in range(1, 8)} | {("b", "bad_json", "x.tar"): 2})
    assert share_skipped(skips, 970) == 0.03
    assert share_skipped(Counter(), 5) == 0
    assert describe_skips(skips, 970) == [
        "30 of 1000 samples read were skipped (3.00%):",
        "  a: missing_file 28 (in s7 7, s6 6, s5 5, s4 4, s3 3 and 2 more)",
        "  b: bad_json 2 (in x.tar 2)",
    ]
    assert describe_skips(Counter(), 5) == []


def test_numbers_is_a_source() -> None:
    """What these tests mix is what the library mixes."""
    source: Source = Numbers("a", 3)
    assert len(source) == 3
