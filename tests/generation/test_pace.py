"""How much other work goes between two tokens."""

from __future__ import annotations

from typing import Any

import pytest

from vilau.generation.pace import Pace
from vilau.generation.position import Networks


def test_room_is_what_the_limit_leaves() -> None:
    """At 1.5, half of a token's own work may be added; without texts there is no limit."""
    pace = Pace(1.5, language=80, head=20, depth=60, free_rows=10)
    assert pace.room(0) == float("inf")
    assert pace.room(1) == pytest.approx(0.5 * 100 * 1.1)
    assert pace.positions(5) == pytest.approx(40)
    assert pace.positions_in(pace.room(1), 100) == 6 and pace.positions_in(float("inf"), 100) == 100
    assert pace.positions(6) <= pace.room(1) < pace.positions(7)
    assert pace.depth_step(10) == pytest.approx(120)


def test_costs_are_those_of_the_networks(make_model: Any) -> None:
    """Weights are counted, so that a large language model with a small depth transformer hardly slices pictures."""
    model = make_model()
    pace = Pace.of(Networks.of(model), 7.0, float("inf"), 16.0)
    assert pace.language == sum(p.numel() for p in model.language_model.base_model.parameters())
    assert pace.depth == sum(p.numel() for p in model.depth_transformer.parameters())
    assert pace.room(1) == float("inf")
    with pytest.raises(ValueError, match="text_pace is 0.5"):
        Pace.of(Networks.of(model), 7.0, 0.5, 16.0)
    with pytest.raises(ValueError, match="text_pace is nan"):
        Pace.of(Networks.of(model), 7.0, float("nan"), 16.0)
