"""Losses of stage 1, computed over the global batch of all processes (paper, eq. (1))."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from vilau.training import parallel


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    kind: str,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return this process's share of the contrastive loss; the shares of all processes add up to the loss.

    Args:
        image_embeds, text_embeds: normalised ``(N, E)``, row i of one belonging to row i of the other.
        logit_scale: ``(1,)``, log of the inverse temperature.
        logit_bias: ``(1,)``, used by the sigmoid loss only.
        kind: `sigmoid` (SigLIP, the paper's) or `softmax` (InfoNCE).
        labels: ``(N,)`` int64 ids of the captions; pairs with equal captions count as matches (sigmoid) or are
            left out of the denominator (softmax), as nothing tells them apart.
    """
    local = len(image_embeds)
    first = parallel.rank() * local
    texts, images = parallel.gather_rows(text_embeds), parallel.gather_rows(image_embeds)
    total = len(texts)
    own = torch.arange(first, first + local, device=image_embeds.device)
    match = own.unsqueeze(1) == torch.arange(total, device=own.device)
    if labels is not None:
        everyone = _gather_labels(labels)
        match = match | (labels.unsqueeze(1) == everyone)
    scale = logit_scale.exp()
    if kind == "sigmoid":
        logits = scale * image_embeds @ texts.t() + logit_bias
        return -F.logsigmoid(torch.where(match, logits, -logits)).sum() / total
    twins = match & (own.unsqueeze(1) != torch.arange(total, device=own.device))
    by_image = (scale * image_embeds @ texts.t()).masked_fill(twins, float("-inf"))
    by_text = (scale * text_embeds @ images.t()).masked_fill(twins, float("-inf"))
    both = F.cross_entropy(by_image, own, reduction="sum") + F.cross_entropy(by_text, own, reduction="sum")
    return both / (2 * total)


def pixel_loss(drawn: torch.Tensor, target: torch.Tensor, kind: str) -> torch.Tensor:
    """Return this process's share of the mean `l1` or `l2` distance of pixels in [-1, 1]."""
    difference = drawn - target
    distance = difference.abs() if kind == "l1" else difference.square()
    return distance.mean() / parallel.world_size()


def _gather_labels(labels: torch.Tensor) -> torch.Tensor:
    if parallel.world_size() == 1:
        return labels
    parts = [torch.empty_like(labels) for _ in range(parallel.world_size())]
    torch.distributed.all_gather(parts, labels)
    return torch.cat(parts)
