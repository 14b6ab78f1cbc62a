"""An exponential moving average of the weights, validated and exported in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage(nn.Module):
    """The average of the trainable parameters of a module; frozen ones and buffers are the module's own.

    Args:
        module: made after it was placed (device, shards), as the averages lie where the parameters do.
        decay: of the average. The first steps use ``(1 + step) / (10 + step)`` if that is smaller, so that the first
            weights are soon forgotten.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.sources = {name: p for name, p in module.named_parameters() if p.requires_grad}
        for name, parameter in self.sources.items():
            self.register_buffer(_key(name), parameter.detach().clone())

    def averages(self) -> list[torch.Tensor]:
        """Return the averaged tensors in the order of the parameters."""
        return [self.get_buffer(_key(name)) for name in self.sources]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the parameters after the update of a 0-based step."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.averages(), [p.detach() for p in self.sources.values()], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the averages into the module, and its own weights back, bit for bit, at the end."""
        own = [p.detach().clone() for p in self.sources.values()]
        self._fill(self.averages())
        try:
            yield
        finally:
            self._fill(own)

    @torch.no_grad()
    def _fill(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.sources.values(), values, strict=True):
            parameter.copy_(value)


def _key(name: str) -> str:
    return name.replace(".", "/")  # a buffer's name may not hold a dot
