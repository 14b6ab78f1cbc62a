"""Quantizers against plain computations: codes, sums, gradients, moving averages, restarts, dtype, one interface."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vilau.modeling.quantizer import (
    CodebookOptions,
    MultiCodebookQuantizer,
    Quantizer,
    ResidualQuantizer,
    build_quantizer,
)

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
    with pytest.warns(UserWarning, match="10 vectors cannot set 64 codes"):
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


KINDS = {"rq": {}, "rq-separate": {"shared_codebook": False}, "vq": {"depth": 1}, "mcq": {"quantizer": "mcq"}}


def from_config(make_config: Callable[..., Any], kind: str, learning: str = "ema") -> Quantizer:
    """The quantizer that a configuration builds: codes of width 12, depth 3 unless the kind says otherwise."""
    torch.manual_seed(SEED)
    changes = {"code_dim": 12, "depth": 3, "codebook_learning": learning, **KINDS[kind]}
    quantizer = build_quantizer(make_config(**changes).vision_config)
    assert isinstance(quantizer, Quantizer)
    if learning == "gradient":
        torch.nn.init.normal_(quantizer.map, std=0.1)
    quantizer.initialised.fill_(1)
    return quantizer.eval()


@pytest.mark.parametrize("learning", ["ema", "gradient"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_interface(make_config: Callable[..., Any], kind: str, learning: str) -> None:
    """Nothing after the quantizer needs to know its kind: shapes, cumulative sums and their parts agree in each."""
    quantizer = from_config(make_config, kind, learning)
    z_e = torch.randn(2, 5, 12)
    codes = quantizer.encode(z_e)
    assert codes.shape == (2, 5, quantizer.depth) and int(codes.min()) >= 0 and int(codes.max()) < 16
    partial = quantizer.partial_z_q(codes)
    assert partial.shape == (2, 5, quantizer.depth, 12)
    total = torch.zeros(10, 12)
    for depth in range(quantizer.depth):
        vectors = quantizer.code_vectors(codes[..., depth].flatten(), depth)
        torch.testing.assert_close(quantizer.embed(codes)[..., depth, :].flatten(0, 1), vectors)
        total = total + vectors
        torch.testing.assert_close(partial[..., depth, :].flatten(0, 1), total)
    torch.testing.assert_close(quantizer.z_q(codes), partial[..., -1, :])
    torch.testing.assert_close(quantizer.partial_features(z_e), partial)
    out = quantizer(z_e)
    assert torch.equal(out.codes, codes)
    torch.testing.assert_close(out.z_q, quantizer.z_q(codes))


@settings(deadline=None, max_examples=30)
@given(kind=st.sampled_from(["rq", "mcq"]), depth=st.integers(1, 4), size=st.integers(1, 9), seed=st.integers(0, 99))
def test_round_trip(kind: str, depth: int, size: int, seed: int) -> None:
    """Codes -> z_q -> codes: with `mcq` any codes come back. The greedy search of `rq` may find another sum for a sum
    of code vectors, but its first code is the nearest one, and a single depth comes back too."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    width = 2 * depth
    quantizer = (MultiCodebookQuantizer if kind == "mcq" else ResidualQuantizer)(size, width, depth)
    codes = torch.randint(size, (6, depth), generator=generator)
    z_q = quantizer.z_q(codes)
    again = quantizer.encode(z_q)
    if kind == "mcq":
        assert torch.equal(again, codes)
    else:
        if depth == 1:
            assert torch.equal(again, codes)
        errors = (z_q.unsqueeze(1) - quantizer.partial_z_q(again)).square().sum(-1)
        best = torch.cdist(z_q, quantizer.book(0)).square().amin(1)
        torch.testing.assert_close(errors[:, 0], best, rtol=1e-4, atol=1e-5)


def test_multi_codebook_is_a_search_per_chunk() -> None:
    """`mcq`: chunk d of the channels is quantised by codebook d alone; its vector stands in its own channels."""
    torch.manual_seed(SEED)
    quantizer = MultiCodebookQuantizer(16, 12, 3).eval()
    z_e = torch.randn(40, 12)
    codes = quantizer.encode(z_e)
    for depth in range(3):
        part = slice(4 * depth, 4 * depth + 4)
        nearest = torch.cdist(z_e[:, part].double(), quantizer.book(depth).double()).argmin(1)
        assert torch.equal(codes[:, depth], nearest)
        vectors = quantizer.code_vectors(codes[:, depth], depth)
        assert torch.equal(vectors[:, part], quantizer.book(depth)[nearest])
        vectors[:, part] = 0
        assert not vectors.any()
    out = quantizer(z_e.requires_grad_())
    torch.testing.assert_close(out.commitment.detach(), (z_e - quantizer.z_q(codes)).square().mean().detach())
    out.commitment.backward()
    torch.testing.assert_close(z_e.grad, 2 * (z_e - quantizer.z_q(codes)).detach() / z_e.numel())
    with pytest.raises(ValueError, match="code_dim 10 does not divide into 4"):
        MultiCodebookQuantizer(16, 10, 4)


def test_multi_codebook_averages_are_those_of_each_chunk() -> None:
    """Each codebook of `mcq` learns as a plain vector quantizer of its chunk does."""
    torch.manual_seed(SEED)
    options = CodebookOptions(restart_unused=False)
    whole, z_e = MultiCodebookQuantizer(8, 12, 3, options).train(), torch.randn(60, 12)
    whole.initialised.fill_(1)
    before = whole.codebook.clone()
    whole(z_e)
    for depth in range(3):
        alone = ResidualQuantizer(8, 4, 1, options=options).train()
        alone.initialised.fill_(1)
        alone.codebook.copy_(before[depth : depth + 1])
        alone.ema_sum.copy_(alone.codebook)
        alone(z_e[:, 4 * depth : 4 * depth + 4])
        torch.testing.assert_close(whole.codebook[depth], alone.codebook[0])


def test_continuous_tokens_have_no_codes(make_config: Callable[..., Any]) -> None:
    """`none`: z_q is z_e, and whatever needs codes says what to do instead."""
    quantizer = build_quantizer(make_config(quantizer="none").vision_config)
    z_e = torch.randn(2, 5, 8, requires_grad=True)
    out = quantizer(z_e)
    assert out.z_q is z_e and out.codes is None and float(out.commitment) == float(out.codebook_loss) == 0
    assert torch.equal(quantizer.partial_features(z_e)[:, :, 0], z_e)
    assert not list(quantizer.state_dict())
    for method in (quantizer.encode, quantizer.z_q, quantizer.partial_z_q):
        with pytest.raises(ValueError, match="continuous tokens.*quantizer 'rq' or 'mcq'"):
            method(z_e)


def test_state_names_of_released_codebooks_stay() -> None:
    """Weights in the world name these tensors: shared residual quantization by moving averages keeps them."""
    shapes = {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    assert shapes == {"codebook": (1, 32, 6), "ema_count": (1, 32), "ema_sum": (1, 32, 6), "initialised": (1,)}


def test_training_memory_does_not_hold_every_depth() -> None:
    """What autograd keeps of a training step does not grow with the depth."""
    kept = []
    for depth in (2, 8):
        quantizer, sizes = build(depth=depth).train(), []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        z_e = torch.randn(50, 6, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            quantizer(z_e)
        kept.append(sum(sizes))
    assert kept[0] == kept[1] > 0
