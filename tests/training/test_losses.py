"""Losses of stage 1 against explicit loops, on one process and shared between several."""

from __future__ import annotations

import math

import pytest
import torch

from modeling.processes import in_two_processes
from vilau.training import losses, parallel
from vilau.training.losses import NO_CAPTION, contrastive_loss, finds_caption, pixel_loss

N, E = 6, 5
SCALE, BIAS = torch.tensor([1.3]), torch.tensor([-2.0])
TWINS = torch.tensor([4, 9, 4, 7, 9, 4])  # captions 0, 2 and 5 are equal, and so are 1 and 4
SINGLE = torch.arange(N)


def embeds(seed: int) -> torch.Tensor:
    """Normalised random embeddings (N, E)."""
    rows = torch.randn(N, E, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


def sigmoid_loop(images: torch.Tensor, texts: torch.Tensor, labels: torch.Tensor) -> float:
    """SigLIP: -1/N sum_ij log sigmoid(z_ij (t x_i.y_j + b)), z = 1 where the captions are equal and -1 elsewhere."""
    total = 0.0
    for i in range(N):
        for j in range(N):
            logit = math.exp(float(SCALE)) * float(images[i] @ texts[j]) + float(BIAS)
            sign = 1 if labels[i] == labels[j] else -1
            total += math.log1p(math.exp(-sign * logit))
    return total / N


def softmax_loop(images: torch.Tensor, texts: torch.Tensor, labels: torch.Tensor) -> float:
    """InfoNCE both ways, where other pairs of an equal caption are in no denominator."""
    scale, total = math.exp(float(SCALE)), 0.0
    for i in range(N):
        rivals = [j for j in range(N) if j == i or labels[j] != labels[i]]
        own = scale * float(images[i] @ texts[i])
        total += math.log(sum(math.exp(scale * float(images[i] @ texts[j])) for j in rivals)) - own
        total += math.log(sum(math.exp(scale * float(texts[i] @ images[j])) for j in rivals)) - own
    return total / (2 * N)


@pytest.mark.parametrize("labels", [None, SINGLE, TWINS])
@pytest.mark.parametrize(("kind", "loop"), [("sigmoid", sigmoid_loop), ("softmax", softmax_loop)])
def test_contrastive_loss_equals_the_double_loop(kind: str, loop: object, labels: torch.Tensor | None) -> None:
    """Both variants, with and without captions that occur twice."""
    images, texts = embeds(0), embeds(1)
    loss = contrastive_loss(images, texts, SCALE, BIAS, kind, labels)
    expected = loop(images, texts, SINGLE if labels is None else labels)
    assert math.isclose(float(loss), expected, rel_tol=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_matching_pairs_have_the_lower_loss(kind: str) -> None:
    """The loss asks for what it should: aligned pairs beat shuffled ones, and its gradient reaches all parts."""
    images, texts = embeds(0), embeds(0)
    aligned = contrastive_loss(images, texts, SCALE, BIAS, kind)
    assert float(aligned) < float(contrastive_loss(images, texts.roll(1, 0), SCALE, BIAS, kind))
    parts = [images.clone().requires_grad_(), texts.clone().requires_grad_(), SCALE.clone().requires_grad_()]
    contrastive_loss(*parts, BIAS, kind, TWINS).backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0 for p in parts)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@pytest.mark.parametrize("labels", [None, TWINS])
def test_shares_of_processes_add_up(monkeypatch: pytest.MonkeyPatch, kind: str, labels: torch.Tensor | None) -> None:
    """Three processes with two rows each: their shares sum to the loss of the whole batch, own rows matched right."""
    images, texts = embeds(0), embeds(1)
    whole = float(contrastive_loss(images, texts, SCALE, BIAS, kind, labels))
    everyone = {"images": images, "texts": texts}
    shares = 0.0
    for rank in range(3):
        own = slice(2 * rank, 2 * rank + 2)
        mine = {"images": images[own], "texts": texts[own]}

        def gather(rows: torch.Tensor, mine: dict[str, torch.Tensor] = mine) -> torch.Tensor:
            return next(everyone[name] for name, part in mine.items() if part is rows)

        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(parallel, "world_size", lambda: 3)
        monkeypatch.setattr(parallel, "gather_rows", gather)
        monkeypatch.setattr(losses, "_gather_labels", lambda _: TWINS)
        share = None if labels is None else labels[own]
        shares += float(contrastive_loss(mine["images"], mine["texts"], SCALE, BIAS, kind, share))
    assert math.isclose(shares, whole, rel_tol=1e-5)


def test_retrieval_is_the_same_for_one_process_and_two() -> None:
    """A picture looks for its caption among those of all processes; equal captions are its own, empty ones nobody's."""
    noise = 0.9 * torch.nn.functional.normalize(torch.randn(N, E, generator=torch.Generator().manual_seed(3)), dim=-1)
    texts = embeds(1)
    images = torch.nn.functional.normalize(texts + noise, dim=-1)
    labels = torch.tensor([4, 9, 4, NO_CAPTION, 9, 7])
    expected = []
    for i in range(N):
        rivals = [j for j in range(N) if labels[j] != NO_CAPTION]
        nearest = max(rivals, key=lambda j: float(images[i] @ texts[j]))
        expected.append(bool(labels[i] == labels[nearest]))
    assert 0 < sum(expected) < N - 1, "some find their caption, some do not"
    assert finds_caption(images, texts, labels).tolist() == expected

    def member(rank: int) -> torch.Tensor:
        own = slice(3 * rank, 3 * rank + 3)
        return finds_caption(images[own], texts[own], labels[own])

    assert torch.cat(in_two_processes(member)).tolist() == expected
    alone = [finds_caption(images[own], texts[own], labels[own]) for own in (slice(0, 3), slice(3, 6))]
    assert torch.cat(alone).tolist() != expected, "captions of other processes matter here"


def test_pixel_loss() -> None:
    """Mean absolute or squared distance."""
    drawn, target = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, -1.0]])
    assert float(pixel_loss(drawn, target, "l1")) == pytest.approx(1.25)
    assert float(pixel_loss(drawn, target, "l2")) == pytest.approx((0.25 + 4) / 2)
