"""The reconstruction terms: the adaptive weight and the gradients against plain automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vilau.modeling.vision_tower import VisionTower
from vilau.training.config import TowerStageConfig
from vilau.training.discriminator import PatchDiscriminator, hinge_loss
from vilau.training.perceptual import SiglipDistance
from vilau.training.reconstruction import ReconstructionLoss


@pytest.fixture
def parts(make_config: Callable[..., Any]) -> tuple[VisionTower, SiglipDistance, PatchDiscriminator]:
    """A tower of 16 px, its perceptual distance and a discriminator."""
    torch.manual_seed(0)
    tower = VisionTower(make_config().vision_config)
    return tower, SiglipDistance(tower), PatchDiscriminator(16, channels=8, layers=1)


def settings(**changes: Any) -> TowerStageConfig:
    """All terms on, with weights that differ."""
    given = {"pixel_weight": 2.0, "perceptual": "siglip", "perceptual_weight": 0.5, "adversarial_weight": 0.75}
    return TowerStageConfig(**({"steps": 5, "batch_size": 4} | given | changes))


def test_adaptive_weight_and_gradients(parts: Any) -> None:
    """One backward pass gives every decoder weight the gradient of the written-out loss, the discriminator its own."""
    tower, distance, judge = parts
    loss = ReconstructionLoss(settings(), tower.pixel_decoder, distance, judge)
    z_q, target = torch.randn(3, 4, 8), torch.rand(3, 3, 16, 16) * 2 - 1
    terms = loss(tower.decode_features(z_q), target, 1.0, 0)
    (terms.drawing + terms.judging).backward()
    found = {name: p.grad.clone() for name, p in tower.pixel_decoder.named_parameters()}
    judged = {name: p.grad.clone() for name, p in judge.named_parameters()}

    drawn = tower.decode_features(z_q)
    faithful = 2.0 * (drawn - target).square().mean() + 0.5 * distance(drawn, target).mean()
    fooling = -judge(drawn).mean()
    last = tower.pixel_decoder.last_layer
    norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (faithful, fooling)]
    weight = norms[0] / (norms[1] + 1e-4)
    plain = faithful + 0.75 * weight * fooling
    gradients = torch.autograd.grad(plain, list(tower.pixel_decoder.parameters()))
    value, count = terms.sums["adversarial_weight"]
    torch.testing.assert_close(value / count, weight)
    torch.testing.assert_close(terms.drawing, plain)
    for (name, gradient), expected in zip(found.items(), gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6, msg=name)
    own = hinge_loss(judge(target), judge(drawn.detach()))
    torch.testing.assert_close(terms.judging, own)
    for (name, gradient), expected in zip(judged.items(), torch.autograd.grad(own, [*judge.parameters()]), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_shares_of_processes_add_up(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures shared 1 : 2 between two processes: the same adaptive weight, loss and gradients as on one."""
    from vilau.training import parallel

    tower, distance, judge = parts
    loss = ReconstructionLoss(settings(), tower.pixel_decoder, distance, judge)
    z_q, target = torch.randn(3, 4, 8), torch.rand(3, 3, 16, 16) * 2 - 1
    whole = loss(tower.decode_features(z_q), target, 1.0, 0)
    whole.drawing.backward()
    expected = tower.pixel_decoder.conv_in.weight.grad.clone()
    sent: list[torch.Tensor] = []

    def send(values: torch.Tensor) -> torch.Tensor:
        sent.append(values)
        return values

    def receive(_: torch.Tensor) -> torch.Tensor:
        return sent[0] + sent[1]

    for talk in (send, receive):  # first what each process would send, then with the sum of it
        monkeypatch.setattr(parallel, "sum_over_ranks", talk)
        tower.pixel_decoder.zero_grad()
        total = torch.zeros(())
        for own, portion in ((slice(0, 1), 1 / 3), (slice(1, 3), 2 / 3)):
            part = loss(tower.decode_features(z_q[own]), target[own], portion, 0)
            part.drawing.backward()
            total = total + part.drawing.detach()
    torch.testing.assert_close(total, whole.drawing.detach())
    torch.testing.assert_close(tower.pixel_decoder.conv_in.weight.grad, expected, rtol=1e-4, atol=1e-6)


def test_the_adversarial_loss_starts_late_and_is_limited(parts: Any) -> None:
    """Before its step the discriminator is not even asked; the adaptive weight never passes its limit."""
    tower, _, judge = parts
    config = settings(perceptual="none", adversarial_start=3, adversarial_limit=1e-3)
    loss = ReconstructionLoss(config, tower.pixel_decoder, None, judge)
    z_q, target = torch.randn(2, 4, 8), torch.rand(2, 3, 16, 16)
    early = loss(tower.decode_features(z_q), target, 1.0, 2)
    assert set(early.sums) == {"pixel"} and float(early.judging) == 0
    late = loss(tower.decode_features(z_q), target, 1.0, 3)
    assert {"adversarial", "discriminator"} <= set(late.sums)
    assert float(late.sums["adversarial_weight"][0]) == pytest.approx(1e-3)
