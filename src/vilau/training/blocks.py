"""Repeated blocks of a network: recomputed in the backward pass or compiled, one by one, while they train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the outermost members of module lists that have parts of their own and something to learn.

    These are the layers of language model, encoders and depth transformer and the resolutions of the pixel decoder.
    """
    found: list[nn.Module] = []
    inside: set[int] = set()
    for part in module.modules():
        if not isinstance(part, nn.ModuleList) or id(part) in inside:
            continue
        members = [member for member in part if next(member.children(), None) is not None]
        inside.update(id(inner) for member in members for inner in member.modules())
        found += [member for member in members if any(p.requires_grad for p in member.parameters())]
    return found


def recompute_in_backward(blocks: list[nn.Module]) -> None:
    """Let blocks keep only their inputs for the backward pass, which computes the rest again: less memory, more time.

    Random numbers (dropout) come out the same the second time.
    """

    def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)

    for block in blocks:
        _change_in_training(block, recomputed)


def compile_blocks(blocks: list[nn.Module]) -> None:
    """Compile blocks for training; blocks of one kind share the compiled code. Sampling goes on uncompiled."""
    for block in blocks:
        _change_in_training(block, torch.compile)


def _change_in_training(block: nn.Module, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace a block's forward while it trains; names of weights stay as they are."""
    plain = block.forward
    changed = change(plain)

    def forward(*args: Any, **kwargs: Any) -> Any:
        chosen = changed if block.training and torch.is_grad_enabled() else plain
        return chosen(*args, **kwargs)

    block.forward = forward  # type: ignore[method-assign]
