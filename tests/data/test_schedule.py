"""Which source comes when: by arithmetic, in the shares that were asked for, and never forgetting a sample."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vilau.data.schedule import Schedule

WEIGHTS = st.lists(st.sampled_from([0.01, 0.1, 0.5, 1, 2, 3.7, 40]), min_size=1, max_size=7)


@settings(max_examples=80, deadline=None)
@given(WEIGHTS, st.integers(0, 9))
def test_shares_hold_at_every_moment(weights: list[float], seed: int) -> None:
    """After any number of whole blocks each source has had its share up to one sample per level of the tree."""
    schedule = Schedule(weights, [None] * len(weights), seed)
    seen: Counter[int] = Counter()
    for number in range(640):
        seen[schedule.place(number)[0]] += 1
        if (number + 1) % 64 == 0:
            for place, weight in enumerate(weights):
                assert abs(seen[place] - (number + 1) * weight / sum(weights)) <= 4


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(0, 9))
def test_every_sample_of_every_source_comes_once(data: st.DataObject, seed: int) -> None:
    """With limits, the mixture ends when all are used up, and each source's samples 0, 1, 2 ... came once each."""
    weights = data.draw(WEIGHTS)
    limits = data.draw(st.lists(st.integers(1, 90), min_size=len(weights), max_size=len(weights)))
    schedule = Schedule(weights, limits, seed)
    assert schedule.total == sum(limits)
    seen = sorted(schedule.place(number) for number in range(schedule.total))
    assert seen == [(source, count) for source, limit in enumerate(limits) for count in range(limit)]
    with pytest.raises(IndexError, match="the mixture has"):
        schedule.place(schedule.total)


def test_a_source_without_limit_goes_on_alone() -> None:
    """When limited sources are used up, the others share what follows, without end."""
    schedule = Schedule([1, 1, 2], [10, None, None], 0)
    assert schedule.total is None
    late = Counter(schedule.place(10**12 + number)[0] for number in range(640))
    assert set(late) == {1, 2}
    assert abs(late[2] - 427) < 5
    early = Counter(schedule.place(number)[0] for number in range(128))
    assert early[0] == 10


def test_streams_have_no_gaps_and_far_numbers_are_as_quick() -> None:
    """Without limits the samples of a source are 0, 1, 2 ... each once over any run of whole blocks."""
    schedule = Schedule([0.3, 0.7], [None, None], 5)
    for first in (0, 64 * 10**9):
        places = [schedule.place(number) for number in range(first, first + 640)]
        for source in (0, 1):
            counts = sorted(count for which, count in places if which == source)
            assert counts == list(range(counts[0], counts[0] + len(counts)))
