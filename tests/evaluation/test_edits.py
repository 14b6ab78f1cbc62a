"""The suite of edits, animations and mixed answers measures what it says, on a model that never learned them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vilau.evaluation.edits import run_edits


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """Four items of each kind, by the shipped model."""
    return run_edits(limit=4)


def test_right_answers_are_right_and_unchanged_pictures_are_not(result: dict[str, Any]) -> None:
    """The judge finds every true answer right; handing the picture back is never wholly right."""
    assert set(result["ceilings"].values()) == {1.0}
    assert result["baselines"]["edit_both_unchanged"] == 0.0
    assert result["samples"]["edit_both"] == result["samples"]["animate_motion"] == 4
    assert all(0.0 <= value <= 1.0 for value in result["metrics"].values())
    json.dumps(result, allow_nan=False)


def test_a_repeat_gives_the_same_figures(result: dict[str, Any]) -> None:
    """Seeds are fixed."""
    assert run_edits(limit=4) == result
