"""Muon: orthogonal steps, precise enough that process counts agree, equal to torch's where both can be compared."""

from __future__ import annotations

import pytest
import torch

from vilau.training.muon import Muon, orthogonalise

SHAPES = ((24, 24), (48, 24), (24, 48), (24, 24), (8, 40))


def train(kind: type, steps: int, noise: float = 0.0) -> list[torch.Tensor]:
    """Weights after `steps` random gradients, each off by a share `noise` of itself."""
    chance = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=chance)) for shape in SHAPES]
    optimizer = kind(weights, lr=0.02, weight_decay=0.1)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=chance)
            weight.grad += noise * weight.grad * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
        optimizer.step()
    return [weight.detach() for weight in weights]


def test_singular_values_come_close_to_one() -> None:
    """The published coefficients bring every direction of a matrix between 0.6 and 1.3, wide and tall ones alike."""
    for shape in ((3, 16, 40), (3, 40, 16), (1, 32, 32)):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        values = torch.linalg.svdvals(orthogonalise(matrices, 6))
        assert float(values.min()) > 0.6 and float(values.max()) < 1.3, shape


def test_equal_to_torch_up_to_its_bfloat16() -> None:
    """Same momentum, look-ahead, scale, decay: ten steps differ by what bfloat16 leaves of a step, no more."""
    start = train(Muon, 0)
    for own, other, first in zip(train(Muon, 10), train(torch.optim.Muon, 10), start, strict=True):
        assert float((own - other).norm() / (other - first).norm()) < 0.02


def test_a_gradient_off_by_rounding_changes_a_step_by_rounding() -> None:
    """R8 rests on this: sums in another order must not be blown up, as rounding to bfloat16 now and then does."""
    start = train(Muon, 0)
    for a, b, first in zip(train(Muon, 5), train(Muon, 5, noise=1e-7), start, strict=True):
        assert not torch.equal(a, b)
        assert float((a - b).norm() / (a - first).norm()) < 1e-5


def test_only_matrices() -> None:
    """A bias in Muon is a mistake, and said so with its shape."""
    with pytest.raises(ValueError, match=r"matrices only, got a parameter of shape \(3,\)"):
        Muon([torch.nn.Parameter(torch.zeros(3))])


def test_parameters_without_gradient_stay() -> None:
    """A part that a batch does not touch is neither moved nor decayed, and has no state."""
    touched, other = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    optimizer = Muon([touched, other], lr=0.1, weight_decay=0.5)
    touched.grad = torch.eye(4)
    optimizer.step()
    assert torch.equal(other, torch.ones(4, 4)) and not torch.equal(touched, torch.ones(4, 4))
    assert other not in optimizer.state
