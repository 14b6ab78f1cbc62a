"""Parameter groups, optimizers and the learning-rate schedule."""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from vilau.training.config import OptimizerConfig
from vilau.training.muon import Muon

_EMBEDDINGS = ("embed_tokens", "lm_head", "position_embedding", "token_embedding", "depth_transformer.head", "probe")


def build_optimizers(module: nn.Module, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Return the optimizers over the trainable parameters of `module`.

    With `muon`, two-dimensional hidden weights go to Muon and the rest to AdamW. Parameters whose name matches a key
    of `lr_scales` (the first that does) get the learning rate of their optimizer times its value.
    """
    adamw: dict[tuple[float, bool], list[nn.Parameter]] = {}
    muon: dict[float, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = next((s for pattern, s in config.lr_scales.items() if re.search(pattern, name)), 1.0)
        if config.name == "muon" and parameter.ndim == 2 and not any(part in name for part in _EMBEDDINGS):
            muon.setdefault(scale, []).append(parameter)
            continue
        adamw.setdefault((scale, parameter.ndim > 1), []).append(parameter)
    groups = [
        {
            "params": parameters,
            "lr": config.lr * scale,
            "peak_lr": config.lr * scale,
            "weight_decay": config.weight_decay if decayed else 0.0,
        }
        for (scale, decayed), parameters in adamw.items()
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, foreach=True))
    if muon:
        matrices = [
            {"params": parameters, "lr": config.muon_lr * scale, "peak_lr": config.muon_lr * scale}
            for scale, parameters in muon.items()
        ]
        optimizers.append(Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay))
    if not optimizers:
        raise ValueError("nothing to train: every parameter is frozen; loosen `freeze`")
    return optimizers


def lr_share(step: int, total: int, config: OptimizerConfig) -> float:
    """Return the share of the peak learning rate at a 0-based step: linear warm-up, then a cosine."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_lr(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    """Set every group's learning rate to its peak times `share`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
