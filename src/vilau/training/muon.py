"""Muon: steps of hidden matrices are orthogonalised momentum (Jordan et al. 2024), in float32 where that is faster.

torch's own Muon orthogonalises in bfloat16 on every device. Most CPUs have no fast matrix product for it, and a
gradient summed in another order then changes the step in its third digit: one and two processes would not train alike.
Here the dtype follows the device, matrices of one shape go through the iteration together, and matrices sharded by
FSDP2 are gathered for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: steepest at zero, singular values end between 0.7 and 1.2
_TINY = 1e-7
_STACK_ENTRIES = 1 << 24  # matrices of one shape are stacked up to so many entries


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is replaced by the nearest (semi-)orthogonal matrix, with decoupled weight decay.

    Args:
        params: two-dimensional parameters, or groups of them.
        lr: step size; a matrix of more rows than columns gets it times ``sqrt(rows / columns)``.
        weight_decay: share of the weight taken away per step, times `lr`.
        momentum: of the gradients' moving average, used with Nesterov's look-ahead.
        iterations: Newton-Schulz iterations.

    Raises:
        ValueError: a parameter is not a matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        iterations: int = 5,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "iterations": iterations}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim != 2:
                    raise ValueError(f"Muon steps matrices only, got a parameter of shape {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step; `closure`, if given, recomputes the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            known = [p for p in group["params"] if p.grad is not None]
            directions = [self._direction(p, group["momentum"]) for p in known]
            for p, step in zip(known, _orthogonalised(directions, group["iterations"]), strict=True):
                rows, columns = p.shape
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(step, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)
        return loss

    def _direction(self, parameter: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        gradient = parameter.grad
        assert gradient is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)


def orthogonalise(matrices: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Return matrices ``(N, R, C)`` with their singular values brought close to 1 by Newton-Schulz iterations.

    The work is done in bfloat16 on GPUs, as published, and in float32 elsewhere; the result has the input's dtype.
    """
    a, b, c = _QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x.bfloat16() if x.is_cuda else x.float()
    x = x / (x.flatten(1).norm(dim=1).view(-1, 1, 1) + _TINY)
    for _ in range(iterations):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def _orthogonalised(directions: list[torch.Tensor], iterations: int) -> list[torch.Tensor]:
    """Orthogonalise each matrix, those of one shape together; sharded ones are gathered and sharded again."""
    done: list[torch.Tensor | None] = [None] * len(directions)
    shapes: dict[torch.Size, list[int]] = {}
    for number, direction in enumerate(directions):
        shapes.setdefault(direction.shape, []).append(number)
    for shape, numbers in shapes.items():
        size = max(1, _STACK_ENTRIES // shape.numel())
        for first in range(0, len(numbers), size):
            part = numbers[first : first + size]
            steps = orthogonalise(torch.stack([_whole(directions[i]) for i in part]), iterations)
            for i, step in zip(part, steps, strict=True):
                done[i] = _like(step, directions[i])
    return [step for step in done if step is not None]


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(whole: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """Shard a matrix that every process has as `pattern` is sharded; without messages."""
    if not isinstance(pattern, DTensor):
        return whole
    return distribute_tensor(whole, pattern.device_mesh, pattern.placements, src_data_rank=None)
