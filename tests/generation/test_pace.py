"""How much other work goes between two tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vilau.generation.pace import Cost, Pace, Steering, measured, weighed
from vilau.generation.position import Networks
from vilau.generation.slots import SlotStore, StoreLanguage


def test_room_is_what_the_limit_leaves() -> None:
    """At 1.5, half of a token's own work may be added; without texts there is no limit."""
    pace = Pace(1.5, language=Cost(80, 8), head=Cost(20, 2), depth=Cost(60, 6))
    assert pace.room(0) == float("inf")
    assert pace.room(1) == pytest.approx(0.5 * 110)
    assert pace.positions(5) == pytest.approx(40)
    assert pace.positions_in(pace.room(1), 100) == 6 and pace.positions_in(float("inf"), 100) == 100
    assert pace.positions(6) <= pace.room(1) < pace.positions(7) and pace.positions_in(-3.0, 100) == 0
    assert pace.depth_step(10) == pytest.approx(120)


def test_costs_by_weights_are_those_of_the_networks(make_model: Callable[..., Any]) -> None:
    """Weights are counted, so that a large language model with a small depth transformer hardly slices pictures."""
    model = make_model()
    pace = weighed(Networks.of(model), 7.0, float("inf"), 16.0)
    assert pace.language.base == sum(p.numel() for p in model.language_model.base_model.parameters())
    assert pace.depth.base == sum(p.numel() for p in model.depth_transformer.parameters())
    assert pace.language.of(16) == 2 * pace.language.base and pace.room(1) == float("inf")
    for wrong in (0.5, float("nan")):
        with pytest.raises(ValueError, match=f"text_pace is {wrong}"):
            weighed(Networks.of(model), 7.0, wrong, 16.0)


def test_costs_are_measured_and_leave_nothing(make_model: Callable[..., Any]) -> None:
    """The trial runs every piece, of a model that cannot draw too, gives finite positive costs, and frees its rows."""
    for model in (make_model(), make_model(quantizer="none")):
        store = SlotStore(model.config.text_config, torch.zeros(1), 64 * 16)
        networks = Networks.of(model)
        language = StoreLanguage(networks.language)
        pace = measured(networks, language, model.get_output_embeddings(), store, 1.5)
        assert store.positions == 0
        assert pace.language.row > 0 and pace.head.row > 0 and 0 < pace.room(1) < 60
        assert (pace.depth_step(2) > 0) == (model.depth_transformer is not None)


class World:
    """Tokens whose time is not what was estimated: ``base`` seconds alone, ``extra`` for each second of work beside."""

    def __init__(self, base: float, extra: float) -> None:
        self.base, self.extra = base, extra
        self.now = 0.0
        self.rng = random.Random(0)
        self.steering = Steering(Pace(1.5, Cost(0.9, 0.0), Cost(0.1, 0.0), Cost(0.1, 0.0)), lambda: self.now)

    def token(self, work: float, forced: bool = False) -> float:
        """One token with so much estimated work beside it, in a time that varies; return that time."""
        taken = (self.base + self.extra * work) * self.rng.uniform(0.95, 1.05)
        self.now += taken
        self.steering.written(1, work > 0, forced, True)
        return taken


@pytest.mark.parametrize("extra", [0.7, 1.0, 3.0])
def test_wrong_estimates_are_corrected(extra: float) -> None:
    """Whether work beside texts costs more or less than the trial said, and all twice as much: about one token of a
    hundred becomes late, and the room is used."""
    world = World(2.0, 2 * extra)
    for _ in range(300):
        world.token(0.0)
    assert 2.0 <= world.steering.alone <= 2.4
    for _ in range(1500):
        world.token(world.steering.room(1))
    taken = [world.token(world.steering.room(1)) for _ in range(2000)]
    late = sum(seconds > 1.5 * world.steering.alone for seconds in taken)
    assert late <= 0.03 * len(taken)
    assert sum(taken) / len(taken) > (1.2 if extra >= 1 else 1.1) * world.base


def test_what_cannot_be_helped_teaches_nothing() -> None:
    """The least that is always done, another set of texts, and times without text leave the room as it is; however late
    tokens are, some room remains."""
    world = World(1.0, 1.0)
    before = world.steering.share
    for _ in range(50):
        world.token(9.0, forced=True)
    assert world.steering.share == before and world.steering.room(0) == float("inf")
    world.now += 1000.0
    world.steering.written(1, True, False, False)
    world.steering.written(0, True, False, True)
    world.now += 1000.0
    world.steering.written(1, True, False, True)
    assert world.steering.share == before
    for _ in range(500):
        world.token(9.0)
    assert world.steering.room(1) == pytest.approx(0.1 * 0.5)
