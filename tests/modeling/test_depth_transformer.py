"""The depth transformer: eq. (6) written out, cached steps against teacher forcing, causality over depth."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vilau.configuration import DepthTransformerConfig
from vilau.modeling.depth_transformer import DepthTransformer

H, C, D, K = 12, 6, 4, 20


def build(depth: int = D, **changes: Any) -> DepthTransformer:
    """A small depth transformer with large weights in evaluation mode."""
    torch.manual_seed(0)
    config = DepthTransformerConfig(
        **({"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "dropout": 0.0} | changes)
    )
    model = DepthTransformer(config, H, C, depth, K).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def partial_sums(number: int = 5, depth: int = D) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states (N, H), code vectors (N, D, C) and their cumulative sums."""
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(number, depth, C, generator=generator)
    return torch.randn(number, H, generator=generator), vectors, vectors.cumsum(1)


@pytest.mark.parametrize("depth", [1, 2, D])
@torch.no_grad()
def test_cached_steps_equal_teacher_forcing(depth: int) -> None:
    """Generation goes step by step with a cache; its logits are those of training to 1e-5."""
    model = build(depth)
    hidden, _, partial = partial_sums(depth=depth)
    expected = model(hidden, partial)
    assert expected.shape == (5, depth, K)
    cache = model.new_cache(len(hidden))
    for d in range(depth):
        logits = model.step(hidden if d == 0 else partial[:, d - 1], d, cache)
        torch.testing.assert_close(logits, expected[:, d], rtol=1e-5, atol=1e-5)
    assert len(cache.keys) == 2 and cache.keys[0].shape == (5, 2, depth, 8)


@torch.no_grad()
def test_causality_over_depth() -> None:
    """Changing code d moves the logits of depths after d and of no depth up to d (0-based: code d is seen at d + 1)."""
    model = build()
    hidden, vectors, partial = partial_sums()
    before = model(hidden, partial)
    for d in range(D):
        other = vectors.clone()
        other[:, d] += 1.0
        moved = (model(hidden, other.cumsum(1)) - before).abs().amax((0, 2))
        assert torch.equal(moved[: d + 1], torch.zeros(d + 1))
        assert (moved[d + 1 :] > 1e-3).all()


@torch.no_grad()
def test_inputs_are_those_of_equation_6() -> None:
    """v_1 = W_h h, v_d = W_e (sum of the codes before d), plus a learned depth position; checked with no blocks."""
    model = build(num_hidden_layers=0)
    hidden, vectors, partial = partial_sums()
    steps = [model.project_hidden(hidden)]
    steps += [model.project_codes(vectors[:, :d].sum(1)) for d in range(1, D)]
    v = torch.stack(steps, 1) + model.position_embedding
    torch.testing.assert_close(model(hidden, partial), model.head(model.norm(v)), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_positions_and_hidden_states_matter() -> None:
    """The hidden state reaches every depth, and equal inputs at two depths differ by the position alone."""
    model = build()
    hidden, _, partial = partial_sums()
    moved = (model(hidden + 1, partial) - model(hidden, partial)).abs().amax((0, 2))
    assert (moved > 1e-3).all()
    same = torch.zeros_like(partial)
    logits = model(hidden, same)
    assert (logits[:, 1] - logits[:, 2]).abs().max() > 1e-3


@torch.no_grad()
def test_rows_do_not_mix() -> None:
    """Positions are independent rows: one alone gives the same logits."""
    model = build()
    hidden, _, partial = partial_sums()
    torch.testing.assert_close(model(hidden[2:3], partial[2:3]), model(hidden, partial)[2:3], rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_only() -> None:
    """Dropout belongs to training: evaluation is a function of its inputs."""
    model = build(dropout=0.5)
    hidden, _, partial = partial_sums()
    assert torch.equal(model(hidden, partial), model(hidden, partial))
    model.train()
    assert not torch.equal(model(hidden, partial), model(hidden, partial))


def test_the_last_partial_sum_is_not_used() -> None:
    """Eq. (6) never reads the last code: it may be anything."""
    model = build()
    hidden, _, partial = partial_sums()
    other = partial.clone()
    other[:, -1] = float("nan")
    assert torch.equal(model(hidden, other), model(hidden, partial))
