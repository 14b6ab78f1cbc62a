from __future__ import annotations

import numpy as np
import pytest

from vilau.data.nano.draw import Draw
from vilau.data.nano.scenes import render, single
from vilau.data.nano.world import World
from vilau.evaluation.degradations import DEGRADATIONS, degrade


@pytest.fixture
def picture(world: World) -> np.ndarray:
    return render(single("dog", "blue"), world, 32)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_each_changes_the_picture_by_its_seed_alone(name: str, picture: np.ndarray) -> None:
    """The same stream gives the same bytes, another stream others, and the input stays as it was."""
    before = picture.copy()
    first, again, other = (DEGRADATIONS[name](picture, Draw(seed)) for seed in (1, 1, 2))
    assert first.shape == picture.shape and first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first, picture)
    assert np.array_equal(picture, before)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_the_picture_stays_recognisable(name: str, picture: np.ndarray) -> None:
    """A degradation is not a destruction: the mean error stays below a tenth of the range."""
    for seed in range(20):
        worse = DEGRADATIONS[name](picture, Draw(seed)).astype(float)
        assert np.abs(worse - picture).mean() < 25


def test_degrade_is_deterministic_and_obeys_its_share(picture: np.ndarray) -> None:
    """Share 0 leaves the picture alone, share 1 always changes it, and the stream decides how."""
    assert degrade(picture, Draw(1), share=0.0) is picture
    for seed in range(20):
        worse = degrade(picture, Draw(seed), share=1.0)
        assert np.array_equal(worse, degrade(picture, Draw(seed), share=1.0))
        assert not np.array_equal(worse, picture)
