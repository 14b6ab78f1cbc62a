"""Residual quantization against plain computations: codes, sums, gradients, moving averages, restarts, dtype."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from vilau.modeling.quantizer import CodebookOptions, ResidualQuantizer

SEED = 7


def build(shared: bool = True, depth: int = 4, size: int = 32, width: int = 6, **kwargs: object) -> ResidualQuantizer:
    """A small quantizer with a random codebook that is taken as initialised."""
    torch.manual_seed(SEED)
    quantizer = ResidualQuantizer(size, width, depth, shared, CodebookOptions(**kwargs))
    quantizer.initialised.fill_(1)
    return quantizer


def naive_codes(quantizer: ResidualQuantizer, z_e: torch.Tensor) -> torch.Tensor:
    """Eq. (3) word for word in double precision: every distance to every code, one vector after another."""
    rows = []
    for vector in z_e.reshape(-1, z_e.shape[-1]).double():
        residual, codes = vector, []
        for depth in range(quantizer.depth):
            book = quantizer.codebook[0 if quantizer.shared else depth].double()
            distances = [float((residual - code).square().sum()) for code in book]
            codes.append(min(range(len(distances)), key=distances.__getitem__))
            residual = residual - book[codes[-1]]
        rows.append(codes)
    return torch.tensor(rows).reshape(*z_e.shape[:-1], quantizer.depth)


@pytest.mark.parametrize("shared", [True, False])
def test_codes_equal_the_naive_search(shared: bool) -> None:
    """Eq. (3): the fast search must find the nearest code of the residual at every depth, in any batch shape."""
    quantizer = build(shared)
    z_e = torch.randn(3, 5, 6)
    codes = quantizer.encode(z_e)
    assert codes.shape == (3, 5, 4) and codes.dtype == torch.int64
    assert torch.equal(codes, naive_codes(quantizer, z_e))


def test_search_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by chunks: cutting a batch must not change a code."""
    quantizer = build()
    z_e = torch.randn(50, 6)
    whole = quantizer.encode(z_e)
    monkeypatch.setattr("vilau.modeling.codebook_search._CPU_TILE", (7, 5))
    assert torch.equal(quantizer.encode(z_e), whole)


def test_depth_one_is_vector_quantization() -> None:
    """The VQ baseline of Tables 1 and 8 is depth 1: the nearest code, and its vector as z_q."""
    quantizer = build(depth=1).eval()
    z_e = torch.randn(20, 6)
    nearest = torch.cdist(z_e.double(), quantizer.codebook[0].double()).argmin(1)
    out = quantizer(z_e)
    assert torch.equal(out.codes[:, 0], nearest)
    torch.testing.assert_close(out.z_q, quantizer.codebook[0][nearest])


def test_separate_codebooks_are_really_separate() -> None:
    """One codebook per depth (the released layout allows it): depth d reads book d and no other."""
    quantizer = build(shared=False)
    codes = torch.randint(32, (7, 4))
    expected = torch.stack([quantizer.codebook[d, codes[:, d]] for d in range(4)], 1)
    assert torch.equal(quantizer.embed(codes), expected)
    before = quantizer.embed(codes)
    quantizer.codebook[2] += 1
    changed = (quantizer.embed(codes) != before).flatten(2).any(-1)
    assert changed[:, 2].all() and not changed[:, [0, 1, 3]].any()


@pytest.mark.parametrize("shared", [True, False])
def test_partial_sums_are_cumulative(shared: bool) -> None:
    """Eq. (4): z_q^(d) adds the first d code vectors, and z_q is the last of them."""
    quantizer = build(shared)
    codes = torch.randint(32, (2, 3, 4))
    partial = quantizer.partial_z_q(codes)
    total = torch.zeros(2, 3, 6)
    for depth in range(4):
        total = total + quantizer.book(depth)[codes[..., depth]]
        torch.testing.assert_close(partial[..., depth, :], total)
    torch.testing.assert_close(quantizer.z_q(codes), total)


def test_deeper_codes_come_nearer() -> None:
    """What depth is for: on fitted codebooks the error falls from each depth to the next."""
    quantizer = build(size=64)
    z_e = torch.randn(500, 6)
    quantizer.initialise(z_e)
    partial = quantizer.partial_z_q(quantizer.encode(z_e))
    errors = (z_e.unsqueeze(1) - partial).square().sum(-1).mean(0).tolist()
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 2


def test_straight_through_gradient_is_identity() -> None:
    """Forward gives the quantised value, backward passes gradients to the encoder unchanged."""
    quantizer = build().eval()
    z_e = torch.randn(4, 6, requires_grad=True)
    out = quantizer(z_e)
    torch.testing.assert_close(out.z_q, quantizer.z_q(out.codes))
    weights = torch.randn(4, 6)
    (out.z_q * weights).sum().backward()
    torch.testing.assert_close(z_e.grad, weights)
    assert all(not buffer.requires_grad for buffer in quantizer.buffers())


def test_commitment_is_the_mean_over_depths() -> None:
    """RQ-VAE's commitment: mean over d of || z - sg(z_q^(d)) ||^2; its gradient reaches the encoder alone."""
    quantizer = build().eval()
    z_e = torch.randn(5, 6, requires_grad=True)
    out = quantizer(z_e)
    partial = quantizer.partial_z_q(out.codes)
    expected = sum((z_e.detach() - partial[:, d]).square().mean() for d in range(4)) / 4
    torch.testing.assert_close(out.commitment.detach(), expected)
    out.commitment.backward()
    gradient = sum(2 * (z_e.detach() - partial[:, d]) for d in range(4)) / (4 * z_e.numel())
    torch.testing.assert_close(z_e.grad, gradient)


@pytest.mark.parametrize("shared", [True, False])
def test_moving_averages_equal_a_one_hot_reference(shared: bool) -> None:
    """The codebook update (decay, Laplace smoothing) equals the textbook form with dense one-hot matrices."""
    quantizer = build(shared, decay=0.9, restart_unused=False).train()
    z_e = torch.randn(40, 6)
    count, total = quantizer.ema_count.double().clone(), quantizer.ema_sum.double().clone()
    book = quantizer.codebook.double().clone()
    codes = naive_codes(quantizer, z_e)
    quantizer(z_e)
    residual = z_e.double()
    seen, summed = torch.zeros_like(count), torch.zeros_like(total)
    for depth in range(4):
        own = 0 if shared else depth
        one_hot = torch.nn.functional.one_hot(codes[:, depth], 32).double()
        seen[own] += one_hot.sum(0)
        summed[own] += one_hot.t() @ residual
        residual = residual - book[own][codes[:, depth]]
    count, total = 0.9 * count + 0.1 * seen, 0.9 * total + 0.1 * summed
    mass = count.sum(1, keepdim=True)
    smooth = (count + 1e-5) / (mass + 32 * 1e-5) * mass
    torch.testing.assert_close(quantizer.ema_count.double(), count, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantizer.ema_sum.double(), total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(quantizer.codebook.double(), total / smooth.unsqueeze(-1), rtol=1e-4, atol=1e-5)


def test_unused_codes_restart_from_the_batch() -> None:
    """A code that nothing falls on is replaced by a residual of the batch and has an average count again."""
    quantizer = build(depth=1, size=8, decay=0.5).train()
    quantizer.codebook[0, 3:] = 100.0  # nothing will fall on these
    quantizer.ema_sum.copy_(quantizer.codebook)
    z_e = torch.randn(30, 6)
    for _ in range(12):
        quantizer(z_e)
    assert float(quantizer.codebook.abs().max()) < 10
    assert float(quantizer.ema_count.min()) > 0.02 * float(quantizer.ema_count.mean())
    assert len(torch.unique(quantizer.encode(z_e))) == 8


def test_without_restart_unused_codes_stay() -> None:
    """`restart_unused_codes: false` keeps an unused code where it was."""
    quantizer = build(depth=1, size=8, decay=0.9, restart_unused=False).train()
    quantizer.codebook[0, 7] = 100.0
    quantizer.ema_sum.copy_(quantizer.codebook)
    for _ in range(3):
        quantizer(torch.randn(30, 6))
    torch.testing.assert_close(quantizer.codebook[0, 7], torch.full((6,), 100.0), rtol=1e-2, atol=0)


def test_evaluation_changes_nothing() -> None:
    """In evaluation mode, and by `encode` in any mode, no buffer moves: precomputed codes stay valid."""
    quantizer = build()
    before = {name: buffer.clone() for name, buffer in quantizer.named_buffers()}
    quantizer.eval()(torch.randn(30, 6))
    quantizer.train().encode(torch.randn(30, 6))
    assert all(torch.equal(before[name], buffer) for name, buffer in quantizer.named_buffers())


@pytest.mark.parametrize("shared", [True, False])
def test_initialisation_from_data_lowers_the_error(shared: bool) -> None:
    """The first training batch sets the codebook by k-means, once; the error is far below a random codebook's."""
    torch.manual_seed(SEED)
    quantizer = ResidualQuantizer(32, 6, 4, shared)
    z_e = torch.randn(400, 6) * 3 + 5

    def error() -> float:
        return float((z_e - quantizer.z_q(quantizer.encode(z_e))).square().mean())

    before = error()
    assert int(quantizer.initialised) == 0
    quantizer.train()(z_e)
    assert int(quantizer.initialised) == 1
    assert error() < before / 10
    fitted = quantizer.codebook.clone()
    quantizer(z_e)
    assert float((quantizer.codebook - fitted).abs().max()) < 1  # moved by averages, not fitted again


def test_initialisation_with_fewer_vectors_than_codes() -> None:
    """A first batch smaller than the codebook must not fail or leave numbers that are not finite."""
    quantizer = ResidualQuantizer(64, 6, 2, shared=False).train()
    out = quantizer(torch.randn(10, 6))
    assert torch.isfinite(quantizer.codebook).all() and torch.isfinite(out.z_q).all()


def test_moving_to_half_precision_keeps_the_codebook_exactly() -> None:
    """In bfloat16 a large share of the codes would change: casts of the model leave the codebook as it is."""
    quantizer = build()
    before = quantizer.codebook.clone()
    z_e = torch.randn(100, 6)
    codes = quantizer.encode(z_e)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), quantizer).to(torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16
    for cast in (torch.bfloat16, torch.float16, torch.float64):
        model.to(cast)
        assert all(b.dtype == torch.float32 for b in quantizer.buffers() if b.is_floating_point())
        assert torch.equal(quantizer.codebook, before)
    model.half().to("cpu", torch.bfloat16)
    assert torch.equal(quantizer.codebook, before) and torch.equal(quantizer.encode(z_e), codes)
    assert quantizer(z_e.bfloat16()).z_q.dtype == torch.bfloat16


def test_built_under_half_precision_default_is_float32() -> None:
    """Libraries build models under `torch.set_default_dtype`: the buffers are float32 all the same."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        quantizer = ResidualQuantizer(8, 4, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {b.dtype for b in quantizer.buffers() if b.is_floating_point()} == {torch.float32}


def test_autocast_does_not_change_codes() -> None:
    """Mixed-precision training computes matrix products in bfloat16: the search must not take part."""
    quantizer = build(size=256)
    z_e = torch.randn(500, 6)
    codes = quantizer.encode(z_e)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.encode(z_e), codes)


def test_state_dict_round_trip(tmp_path: Path) -> None:
    """Everything that learning needs is in the state: after a reload the next update is the same, bit for bit."""
    one, two = build(restart_unused=False).train(), build(size=32, restart_unused=False).train()
    two.codebook.zero_()
    first, second = torch.randn(30, 6), torch.randn(30, 6)
    one(first)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    two.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    one(second), two(second)
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), two.buffers(), strict=True))


def test_scale_of_a_fresh_codebook() -> None:
    """A fresh codebook has vectors of length about one whatever its width, so any width starts alike."""
    for width in (4, 64, 1024):
        lengths = ResidualQuantizer(200, width, 1).codebook.norm(dim=-1)
        assert math.isclose(float(lengths.square().mean()), 1.0, rel_tol=0.2)
