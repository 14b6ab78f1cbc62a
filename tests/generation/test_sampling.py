"""Filters against a plain reference, draws against their probabilities, noise as a function of its counters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vilau.generation import sampling
from vilau.generation.sampling import SamplingOptions, draw_codes, filter_logits, gumbel_noise, row_seeds


def reference(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> tuple[set[int], bool]:
    """Which codes survive temperature -> top-k -> softmax -> top-p, by sorting and adding up; and whether the answer
    hangs on rounding, because a running sum comes within 1e-5 of p or two logits at a border nearly tie."""
    scaled = logits.astype(np.float64) / temperature
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    close = False
    if 0 < top_k < len(order):
        close |= abs(scaled[order[top_k - 1]] - scaled[order[top_k]]) < 1e-5
        order = order[:top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    probabilities = weights / weights.sum()
    kept, mass = set(), 0.0
    for index, probability in zip(order, probabilities, strict=True):
        if top_p < 1 and mass >= top_p:
            break
        kept.add(index)  # the code that crosses p is kept
        mass += probability
        close |= top_p < 1 and abs(mass - top_p) < 1e-5
    if len(kept) < len(order):
        following = order[len(kept)]
        close |= abs(scaled[order[len(kept) - 1]] - scaled[following]) < 1e-5
    return kept, close


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=30),
    temperature=st.floats(0.1, 5),
    top_k=st.integers(0, 35),
    top_p=st.floats(0.01, 1),
)
def test_filters_equal_the_reference(logits: list[float], temperature: float, top_k: int, top_p: float) -> None:
    """Property: order of the filters, who survives, and the survivors' relative probabilities."""
    kept, close = reference(np.array(logits), temperature, top_k, top_p)
    options = SamplingOptions(1.0, temperature, top_k, top_p)
    out = filter_logits(torch.tensor([logits]), options)[0]
    survivors = set((out > float("-inf")).nonzero().flatten().tolist())
    assert int(np.argmax(logits)) in survivors or logits.count(max(logits)) > 1
    if not close:
        assert survivors == kept
        scaled = torch.tensor(logits) / temperature
        index = sorted(survivors)
        torch.testing.assert_close(out[index] - out[index[0]], scaled[index] - scaled[index[0]], rtol=1e-4, atol=1e-4)


def test_top_p_keeps_the_code_that_crosses() -> None:
    """Probabilities 0.5, 0.3, 0.2: p = 0.6 keeps two, p = 0.5 one, p = 0.81 all."""
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
    for top_p, expected in ((0.6, [1, 2]), (0.4, [1]), (0.81, [0, 1, 2]), (1.0, [0, 1, 2])):
        out = filter_logits(logits, SamplingOptions(1.0, 1.0, 0, top_p))[0]
        assert (out > float("-inf")).nonzero().flatten().tolist() == expected


def test_top_k_comes_before_top_p() -> None:
    """The mass of top-p is counted after top-k: 0.4, 0.3, 0.3 cut to two is 0.57, 0.43, and p = 0.5 keeps one."""
    logits = torch.tensor([[0.4, 0.3, 0.25, 0.05]]).log()
    out = filter_logits(logits, SamplingOptions(1.0, 1.0, 2, 0.5))[0]
    assert (out > float("-inf")).tolist() == [True, False, False, False]


def test_temperature_zero_takes_the_most_likely() -> None:
    """Temperature 0 is greedy whatever the noise, the seed and the other filters."""
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    for seed in range(5):
        drawn = draw_codes(filter_logits(logits, SamplingOptions(temperature=0)), row_seeds(seed, 6, "cpu"), 3, 1)
        assert torch.equal(drawn, logits.argmax(1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-40, 1e-300])
def test_tiny_temperatures_do_not_overflow(temperature: float) -> None:
    """Nearly zero acts as zero: quotients that overflow would tie all positive logits."""
    logits = torch.tensor([[-50.0, 3.0, 49.0, 50.0, 1.0]])
    for top_p in (0.9, 1.0):
        filtered = filter_logits(logits, SamplingOptions(1.0, temperature, 0, top_p))
        assert not filtered.isnan().any()
        assert draw_codes(filtered, torch.tensor([11]), 0, 0).tolist() == [3]


def test_half_precision_logits_are_filtered_in_float32() -> None:
    """Sums of bfloat16 probabilities over many codes would be far off."""
    logits = torch.zeros(1, 1000, dtype=torch.bfloat16)
    out = filter_logits(logits, SamplingOptions(1.0, 1.0, 0, 0.5))
    assert out.dtype == torch.float32 and abs(int((out > float("-inf")).sum()) - 500) <= 1


@pytest.mark.parametrize("guess", range(3))
def test_draws_follow_the_probabilities(guess: int) -> None:
    """Gumbel-max draws over many seeds pass a chi-square test against the softmax (fixed seeds, 7 degrees)."""
    generator = torch.Generator().manual_seed(guess)
    logits = torch.randn(8, generator=generator) * 1.5
    draws = 20_000
    seeds = torch.arange(draws) * 7919 + guess
    drawn = draw_codes(logits.expand(draws, 8), seeds, guess * 31, guess)
    seen = torch.bincount(drawn, minlength=8).double()
    expected = logits.double().softmax(0) * draws
    assert float(((seen - expected).square() / expected).sum()) < 24.3  # p = 0.001


def test_draws_over_positions_and_depths_follow_the_probabilities() -> None:
    """The same for one seed over positions and depths, as one picture draws them: no visible pattern."""
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    seed = torch.tensor([5])
    drawn = [int(draw_codes(logits, seed, position, depth)) for position in range(300) for depth in range(4)]
    seen = np.bincount(drawn, minlength=4)
    expected = np.array([0.1, 0.2, 0.3, 0.4]) * len(drawn)
    assert float(((seen - expected) ** 2 / expected).sum()) < 16.3  # p = 0.001, 3 degrees
    pairs = np.bincount([a * 4 + b for a, b in zip(drawn[:-1], drawn[1:], strict=True)], minlength=16)
    expected = np.outer([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]).flatten() * (len(drawn) - 1)
    assert float(((pairs - expected) ** 2 / expected).sum()) < 37.7  # p = 0.001, 15 degrees


def test_dropped_codes_are_never_drawn() -> None:
    """Noise cannot bring back what a filter took out."""
    logits = torch.full((2000, 40), float("-inf"))
    logits[:, 17], logits[:, 4] = 0.0, -3.0
    drawn = draw_codes(logits, torch.arange(2000), 0, 0)
    assert set(drawn.tolist()) == {4, 17}


def test_noise_depends_on_seed_position_and_depth_alone() -> None:
    """The same counters give the same row in any batch and after any other draw; each counter changes it."""
    torch.manual_seed(1)
    alone = gumbel_noise(torch.tensor([9]), 5, 2, 100)
    torch.manual_seed(2)
    among = gumbel_noise(torch.tensor([1, 9, 3]), 5, 2, 100)
    assert torch.equal(alone[0], among[1])
    assert torch.equal(alone[0, :40], gumbel_noise(torch.tensor([9]), 5, 2, 40)[0])
    for seed, position, depth in ((10, 5, 2), (9, 6, 2), (9, 5, 3), (9, 2, 5), (-9, 5, 2)):
        assert not torch.equal(alone, gumbel_noise(torch.tensor([seed]), position, depth, 100))


def test_noise_does_not_collide() -> None:
    """Rows of different seeds, positions and depths never share their noise, neighbouring request seeds included."""
    seeds = torch.cat([row_seeds(seed, 8, "cpu") for seed in range(8)])
    first = [gumbel_noise(seeds, position, depth, 1) for position in range(20) for depth in range(4)]
    rows = [gumbel_noise(seeds, position, depth, 3) for position in range(20) for depth in range(4)]
    assert len(first) == len(rows)
    seen = {tuple(row) for block in rows for row in block.tolist()}
    assert len(seen) == 64 * 80


@pytest.mark.parametrize("bits", [0, -1])
def test_noise_is_finite_at_the_ends_of_its_range(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """All bits zero and all bits one: an infinity would draw its code whatever the logits, a NaN a dropped one."""
    monkeypatch.setattr(sampling, "mix", lambda x: torch.full_like(x, bits))
    noise = gumbel_noise(torch.tensor([0]), 0, 0, 4)
    assert torch.isfinite(noise).all()


def test_noise_has_gumbel_moments() -> None:
    """Mean 0.5772 and variance pi^2 / 6 over 200,000 values."""
    noise = gumbel_noise(torch.arange(200), 0, 0, 1000).double()
    assert abs(float(noise.mean()) - 0.5772) < 0.01
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.03


def test_row_seeds() -> None:
    """Row 0 has the request's own seed, all rows differ, and any integer is a seed."""
    for seed in (0, 7, -3, 2**63, 2**64 + 7, -(2**80)):
        rows = row_seeds(seed, 5, "cpu")
        assert rows.dtype == torch.int64 and len(set(rows.tolist())) == 5
        assert int(rows[0]) % 2**64 == seed % 2**64
    assert int(row_seeds(7, 3, "cpu")[0]) == 7


@pytest.mark.parametrize(
    "bad",
    [
        {"guidance_scale": -0.1},
        {"guidance_scale": 1e9},
        {"guidance_scale": float("nan")},
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_k": 1 << 40},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": float("nan")},
    ],
)
def test_values_out_of_range_are_refused(bad: dict[str, float]) -> None:
    """The error names the setting, its value and its limits."""
    name = next(iter(bad))
    with pytest.raises(ValueError, match=f"{name} is .*must lie"):
        SamplingOptions(**bad)


def test_defaults_are_the_references() -> None:
    """METHOD, section 2: guidance 3, temperature 1, top-k 900, top-p 0.96."""
    assert SamplingOptions() == SamplingOptions(3.0, 1.0, 900, 0.96)
