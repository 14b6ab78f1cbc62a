"""Fixtures of the parity tests."""

from __future__ import annotations

import pytest

from parity.golden_data import load
from vilau.evaluation.parity.subject import Subject


@pytest.fixture
def small() -> Subject:
    """The 256 px checkpoint."""
    return load("tiny256")
