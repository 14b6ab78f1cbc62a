"""How codebooks start and learn, for every kind: averages, gradients, first batches, restarts, noise, processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from modeling.processes import in_two_processes
from vilau.modeling.codebook import CodebookOptions
from vilau.modeling.codebook_usage import codebook_usage
from vilau.modeling.quantizer import MultiCodebookQuantizer, Quantizer, ResidualQuantizer

KINDS = ("rq", "rq-separate", "mcq")
LEARNING = ("ema", "gradient")


def build(kind: str, size: int = 16, width: int = 6, depth: int = 3, **options: Any) -> Quantizer:
    """A small quantizer of one kind, not initialised, in training mode."""
    torch.manual_seed(3)
    if kind == "mcq":
        return MultiCodebookQuantizer(size, width, depth, CodebookOptions(**options))
    return ResidualQuantizer(size, width, depth, kind == "rq", CodebookOptions(**options))


def features(number: int = 400, width: int = 6, seed: int = 5) -> torch.Tensor:
    """Features of unequal spread, away from zero."""
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, width + 1) + 2


def error(quantizer: Quantizer, z_e: torch.Tensor) -> float:
    """Mean squared distance of features to what their codes say."""
    return float((z_e - quantizer.z_q(quantizer.encode(z_e))).square().mean())


@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("kind", KINDS)
def test_first_batch_sets_the_codes(kind: str, learning: str) -> None:
    """k-means is better than random features of the batch, which are better than random vectors that ignore it."""
    errors = []
    for init in ("kmeans", "data", "random"):
        quantizer = build(kind, learning=learning, init=init)
        before = quantizer.books().clone()
        assert int(quantizer.initialised) == 0
        quantizer.initialise(features())
        assert int(quantizer.initialised) == 1 and torch.equal(quantizer.books(), before) == (init == "random")
        errors.append(error(quantizer, features()))
    assert errors[0] < errors[1] < errors[2] / 2


def test_data_initialisation_takes_features_as_they_are() -> None:
    """With `codebook_init: data` the codes of the first depth are features of the batch."""
    quantizer = build("rq-separate", init="data")
    quantizer.initialise(features())
    assert all((code == features()).all(1).any() for code in quantizer.book(0))


def test_large_first_batches_are_sampled() -> None:
    """k-means sees at most so many vectors per code that its memory does not grow with the batch."""
    quantizer = build("rq", size=4, depth=1)
    z_e = features(5000)
    quantizer.initialise(z_e)
    assert error(quantizer, z_e) < float((z_e - z_e.mean(0)).square().mean()) / 1.5


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_codebook_loss(kind: str) -> None:
    """The loss is the mean squared distance of each chosen vector to what it stands for, and so is its gradient.

    Compared with autograd through the plain form; what a vector stands for is not moved, the codes are fixed.
    """
    quantizer = build(kind, learning="gradient")
    quantizer.initialise(features())
    torch.nn.init.normal_(quantizer.map, std=0.2)
    z_e = features(30, seed=6)
    out = quantizer(z_e)
    out.codebook_loss.backward()
    found = quantizer.map.grad.clone()
    quantizer.map.grad = None
    books = quantizer.basis + quantizer.basis @ quantizer.map
    terms = []
    for depth, book in enumerate(quantizer.book_of_depth):
        vectors = books[book][out.codes[:, depth]]
        terms.append((quantizer.asked_at(z_e, out.codes, depth) - vectors).square().mean())
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(out.codebook_loss, expected)
    expected.backward()
    torch.testing.assert_close(found, quantizer.map.grad, rtol=1e-4, atol=1e-5)
    assert float(found.abs().max()) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_codebooks_trained_by_gradients_follow_the_data(kind: str) -> None:
    """When the features move away, an optimizer on the codebook loss alone brings all code vectors after them."""
    quantizer = build(kind, learning="gradient")
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=0.03, weight_decay=0.0)
    quantizer(features())
    moved = features() * 3
    before, basis, unused = error(quantizer, moved), quantizer.basis.clone(), quantizer.books().clone()
    for _ in range(100):
        optimizer.zero_grad()
        quantizer(moved).codebook_loss.backward()
        optimizer.step()
    assert error(quantizer, moved) < before / 2
    assert torch.equal(quantizer.basis, basis)  # the basis is frozen
    assert (quantizer.books() != unused).any(-1).all()  # one map moves every vector


def test_mapped_codes_are_never_stale() -> None:
    """The product is kept between calls, but a step of the optimizer, a load or a move shows at once."""
    quantizer = build("rq", learning="gradient").eval()
    first = quantizer.books()
    assert quantizer.books() is first
    with torch.no_grad():
        quantizer.map += 0.1
    second = quantizer.books()
    torch.testing.assert_close(second, quantizer.basis + quantizer.basis @ quantizer.map)
    state = {name: value + 1 if value.is_floating_point() else value for name, value in quantizer.state_dict().items()}
    quantizer.load_state_dict(state)
    torch.testing.assert_close(quantizer.books(), quantizer.basis + quantizer.basis @ quantizer.map)
    quantizer.map.data = torch.zeros_like(quantizer.map)
    torch.testing.assert_close(quantizer.books(), quantizer.basis)
    with torch.inference_mode():
        codes = quantizer.train().encode(features(10))
    quantizer.eval()(features(10).requires_grad_()).z_q.sum().backward()
    assert codes.shape == (10, 3)


@pytest.mark.parametrize("learning", LEARNING)
def test_half_precision_never_reaches_codebooks(learning: str) -> None:
    """Casting the model leaves every float of the quantizer as it is, the learned map included."""
    quantizer = build("mcq", learning=learning)
    if learning == "gradient":
        torch.nn.init.normal_(quantizer.map)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer.to(torch.bfloat16).half().to(torch.float64)
    assert all(torch.equal(before[name], value) for name, value in quantizer.state_dict().items())
    assert all(value.dtype == torch.float32 for name, value in before.items() if name != "initialised")


def test_autocast_does_not_change_learning() -> None:
    """Mixed precision: codes, losses and moving averages of a training step are those of float32."""
    for learning in LEARNING:
        outs, states = [], []
        for enabled in (False, True):
            quantizer = build("rq", learning=learning)
            quantizer.initialise(features())
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                outs.append(quantizer(features(50, seed=6)))
            states.append(quantizer.state_dict())
        assert torch.equal(outs[0].codes, outs[1].codes) and torch.equal(outs[0].z_q, outs[1].z_q)
        assert torch.equal(outs[0].codebook_loss, outs[1].codebook_loss)
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("kind", KINDS)
def test_unused_codes_restart_from_what_their_depth_was_asked(kind: str) -> None:
    """Codes far away from everything come into use again, at every depth, from vectors of the batch."""
    quantizer = build(kind, decay=0.5)
    quantizer.initialise(features())
    quantizer.codebook[:, 8:] = 1000.0
    quantizer.ema_sum.copy_(quantizer.codebook)
    for _ in range(10):
        quantizer(features())
    assert float(quantizer.codebook.abs().max()) < 100
    usage = codebook_usage(quantizer.encode(features()), 16)
    assert int((usage.shared() if kind == "rq" else usage).used.min()) >= 14


def test_batches_smaller_than_the_codebook() -> None:
    """Too few vectors to set the codes is a warning with the remedy; too few to restart them all restarts some."""
    quantizer = build("rq", size=64, depth=1, decay=0.0)
    with pytest.warns(UserWarning, match="10 vectors cannot set 64 codes.*codebook_init 'random'"):
        quantizer(features(10))
    assert torch.isfinite(quantizer.codebook).all()
    quantizer = build("rq", size=64, depth=1, decay=0.001, init="random")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantizer(features(4) * 100)
    assert 1 <= int((quantizer.codebook.abs() > 10).any(-1).sum()) <= 8  # the chosen ones, and 4 restarted


@pytest.mark.parametrize("near", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_replaces_the_set_share_of_codes(kind: str, near: int) -> None:
    """`code_noise` replaces each code at its probability: by any code, or by one of its nearest neighbours."""
    quantizer = build(kind, noise=0.3, noise_neighbours=near)
    quantizer.initialise(features())
    codes = quantizer.encode(features(3000))
    changed = quantizer.noisy(codes) != codes
    expected = 0.3 if near else 0.3 * 15 / 16  # drawn among all, it may be the same one
    torch.testing.assert_close(changed.float().mean(0), torch.full((3,), expected), rtol=0, atol=0.04)
    if near:
        noisy = quantizer.noisy(codes)
        for depth in range(3):
            book = quantizer.book(depth)
            order = torch.cdist(book, book).argsort(1)[:, : near + 1]
            assert (order[codes[:, depth]] == noisy[:, depth : depth + 1]).any(1).all()


def test_noise_reaches_the_decoder_alone() -> None:
    """Codes, z_q, losses and the codebook's learning are those without noise; in evaluation there is none at all."""
    plain, noisy = build("rq"), build("rq", noise=0.5)
    for quantizer in (plain, noisy):
        quantizer.initialise(features())
    z_e = features(50, seed=6).requires_grad_()
    one, two = plain(z_e), noisy(z_e)
    assert one.noisy_z_q is one.z_q or torch.equal(one.noisy_z_q, one.z_q)
    assert torch.equal(one.codes, two.codes) and torch.equal(one.z_q, two.z_q)
    assert torch.equal(one.commitment, two.commitment) and torch.equal(plain.codebook, noisy.codebook)
    assert not torch.allclose(two.noisy_z_q, two.z_q)
    (gradient,) = torch.autograd.grad(two.noisy_z_q.sum(), z_e)
    assert torch.equal(gradient, torch.ones_like(gradient))
    still = noisy.eval()(z_e)
    assert torch.equal(still.noisy_z_q, still.z_q)


def _learn(kind: str, learning: str) -> Callable[[int | None], dict[str, torch.Tensor]]:
    def member(rank: int | None) -> dict[str, torch.Tensor]:
        quantizer = build(kind, size=12, learning=learning, decay=0.5)
        torch.manual_seed(11 if rank in (None, 0) else 99)  # processes need not agree on random numbers
        optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.01) if learning == "gradient" else None
        for step in range(4):
            batch = features(24, seed=step) * (1 if step < 2 else 30)  # a jump: codes fall out of use and restart
            share = batch if rank is None else batch[:12] if rank == 0 else batch[12:]
            loss = quantizer(share).codebook_loss
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                if rank is not None:
                    torch.distributed.all_reduce(quantizer.map.grad)
                    quantizer.map.grad /= 2
                optimizer.step()
        return {name: value.detach().clone() for name, value in quantizer.state_dict().items()}

    return member


@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:a first batch")
def test_two_processes_learn_what_one_does(kind: str, learning: str) -> None:
    """k-means, statistics, restarts and gradients over two halves of a batch: as one process on the whole batch.

    The two processes agree to the bit; sums in another order leave rounding between them and the one.
    """
    first, second = in_two_processes(_learn(kind, learning))
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = _learn(kind, learning)(None)
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-4)


def test_gradients_reach_all_that_should_learn() -> None:
    """Commitment moves the encoder and not the map; the codebook loss moves the map and not the encoder."""
    quantizer = build("rq", learning="gradient")
    quantizer.initialise(features())
    z_e = features(20).requires_grad_()
    out = quantizer(z_e)
    gradients = torch.autograd.grad(out.commitment, (z_e, quantizer.map), allow_unused=True, retain_graph=True)
    assert gradients[0] is not None and gradients[1] is None
    gradients = torch.autograd.grad(out.codebook_loss, (z_e, quantizer.map), allow_unused=True)
    assert gradients[0] is None and gradients[1] is not None


@pytest.mark.parametrize("kind", KINDS)
def test_held_batches_count_as_one(kind: str) -> None:
    """Gradient accumulation: two halves held for one update move the averages as the whole batch does."""
    whole, halves = build(kind, restart_unused=False), build(kind, restart_unused=False)
    for quantizer in (whole, halves):
        quantizer.initialise(features())
    halves.batches_per_update = 2
    for seed in (6, 7):
        z_e, before = features(40, seed=seed), halves.codebook.clone()
        whole(z_e)
        halves(z_e[:10])
        assert torch.equal(halves.codebook, before)
        halves(z_e[10:])
        torch.testing.assert_close(halves.codebook, whole.codebook, rtol=1e-5, atol=1e-5)
        assert not torch.equal(halves.codebook, before)
