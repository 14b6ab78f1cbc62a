"""What a drawn picture costs: pixel, perceptual and adversarial terms of eq. (1), over all processes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.grad import conv2d_weight

from vilau.modeling.pixel_decoder import PixelDecoder
from vilau.training import parallel
from vilau.training.config import TowerStageConfig
from vilau.training.discriminator import PatchDiscriminator, hinge_loss
from vilau.training.losses import pixel_loss

_EPSILON = 1e-4  # VQGAN's and RQ-VAE's


@dataclass(frozen=True)
class ReconstructionTerms:
    """`drawing` is the share of the loss that reaches the tower, `judging` the discriminator's; `sums` the figures."""

    drawing: torch.Tensor
    judging: torch.Tensor
    sums: Mapping[str, tuple[Any, Any]]


class ReconstructionLoss:
    """Pixel loss, perceptual loss and, from a set step on, the adversarial loss with adaptive weight (RQ-VAE).

    The adaptive weight is ``|gradient of pixel and perceptual loss| / (|gradient of adversarial loss| + 1e-4)``, both
    with respect to the pixel decoder's last layer and summed over all processes before their norms are taken.

    Each term runs once forward and once backward, down to the drawn picture; there the two gradients are put together
    with the adaptive weight and go on into the decoder as one. The last layer's gradients follow from the same two and
    from that layer's input, so no second pass through the decoder is needed, and none through a parameter that may be
    sharded.

    Args:
        config: weights, start and limit.
        decoder: whose last layer is balanced.
        perceptual: distances ``(I,)`` of pairs of pictures, or None.
        discriminator: or None for no adversarial loss.
    """

    def __init__(
        self,
        config: TowerStageConfig,
        decoder: PixelDecoder,
        perceptual: nn.Module | None,
        discriminator: PatchDiscriminator | None,
    ) -> None:
        self.config, self.perceptual, self.discriminator = config, perceptual, discriminator
        self.kernel, self.padding = decoder.conv_out.weight.shape, decoder.conv_out.padding
        self.last_input: torch.Tensor | None = None
        if discriminator is not None:
            decoder.conv_out.register_forward_pre_hook(self._keep_input)

    def _keep_input(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.last_input = inputs[0].detach()

    def __call__(self, drawn: torch.Tensor, target: torch.Tensor, portion: float, step: int) -> ReconstructionTerms:
        """Return the terms of pictures ``drawn`` and ``target`` (I, 3, S, S) at a 0-based step.

        Args:
            drawn, target: in [-1, 1]; the gradient flows into `drawn` only.
            portion: this process's part of the pictures of all processes.
            step: decides whether the adversarial loss has started.
        """
        drawn = drawn.float()
        if self.discriminator is None or step < self.config.adversarial_start:
            loss, sums = self._faithfulness(drawn, target, portion)
            return ReconstructionTerms(loss, drawn.new_zeros(()), sums)
        return self._with_judgement(self.discriminator, drawn, target, portion)

    def _faithfulness(
        self, drawn: torch.Tensor, target: torch.Tensor, portion: float
    ) -> tuple[torch.Tensor, dict[str, tuple[Any, Any]]]:
        pixel = pixel_loss(drawn, target, self.config.pixel_loss)
        loss = self.config.pixel_weight * (pixel * portion)
        sums = {"pixel": (pixel.detach() * portion, portion)}
        if self.perceptual is not None:
            distance = self.perceptual(drawn, target).mean()
            loss = loss + self.config.perceptual_weight * (distance * portion)
            sums["perceptual"] = (distance.detach() * portion, portion)
        return loss, sums

    def _with_judgement(
        self, discriminator: PatchDiscriminator, drawn: torch.Tensor, target: torch.Tensor, portion: float
    ) -> ReconstructionTerms:
        picture = drawn.detach().requires_grad_()
        faithful, sums = self._faithfulness(picture, target, portion)
        wanted = torch.autograd.grad(faithful, picture)[0]
        real, fake = discriminator(torch.cat([target, picture])).float().chunk(2)
        fooling = -fake.mean() * portion
        pull = torch.autograd.grad(fooling, picture, retain_graph=True)[0]
        weight = self._adaptive_weight(wanted, pull)
        scaled = self.config.adversarial_weight * weight
        value = faithful.detach() + scaled * fooling.detach()
        judging = hinge_loss(real, fake) * portion
        sums |= {
            "adversarial": (fooling.detach(), portion),
            "adversarial_weight": (weight * portion, portion),
            "discriminator": (judging.detach(), portion),
            "judged_real": (real.detach().mean() * portion, portion),
            "judged_drawn": (fake.detach().mean() * portion, portion),
        }
        drawing = _WithGradient.apply(drawn, value, wanted + scaled * pull)
        return ReconstructionTerms(drawing, judging, sums)

    def _adaptive_weight(self, wanted: torch.Tensor, pull: torch.Tensor) -> torch.Tensor:
        """Return the weight, a scalar, from both losses' gradients ``(I, 3, S, S)`` with respect to the picture."""
        assert self.last_input is not None
        with torch.no_grad(), torch.autocast(wanted.device.type, enabled=False):
            hidden = self.last_input.float()
            both = [conv2d_weight(hidden, self.kernel, g.float(), padding=self.padding) for g in (wanted, pull)]
            norms = parallel.sum_over_ranks(torch.stack(both)).flatten(1).norm(dim=1)
        self.last_input = None
        return (norms[0] / (norms[1] + _EPSILON)).clamp(0, self.config.adversarial_limit)


class _WithGradient(torch.autograd.Function):
    """A scalar of known value whose gradient with respect to a tensor is known too."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer[0] * gradient, None, None
