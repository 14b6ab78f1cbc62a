"""Losses of stage 1, computed over the global batch of all processes (paper, eq. (1))."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from vilau.training import parallel

NO_CAPTION = -1
"""Label of a picture whose caption is missing or empty."""


def contrastive_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    kind: str,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return this process's share of the contrastive loss; the shares of all processes add up to the loss.

    It is computed in float32, under autocast too.

    Args:
        image_embeds, text_embeds: normalised ``(N, E)``, row i of one belonging to row i of the other.
        logit_scale: ``(1,)``, log of the inverse temperature.
        logit_bias: ``(1,)``, used by the sigmoid loss only.
        kind: `sigmoid` (SigLIP, the paper's) or `softmax` (InfoNCE).
        labels: ``(N,)`` int64 ids of the captions; pairs with equal captions count as matches (sigmoid) or are
            left out of the denominator (softmax), as nothing tells them apart. `NO_CAPTION` marks a picture without
            a caption, which takes no part.
    """
    with torch.autocast(image_embeds.device.type, enabled=False):
        return _contrast(image_embeds.float(), text_embeds.float(), logit_scale, logit_bias, kind, labels)


def _contrast(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    kind: str,
    labels: torch.Tensor | None,
) -> torch.Tensor:
    local = len(image_embeds)
    first = parallel.rank() * local
    texts, images = parallel.gather_rows(text_embeds), parallel.gather_rows(image_embeds)
    own = torch.arange(first, first + local, device=image_embeds.device)
    itself = own.unsqueeze(1) == torch.arange(len(texts), device=own.device)
    match, absent = itself, torch.zeros(len(texts), dtype=torch.bool, device=own.device)
    if labels is not None:
        everyone = _gather_labels(labels)
        match = match | (labels.unsqueeze(1) == everyone)
        absent = everyone == NO_CAPTION
    total = (~absent).sum().clamp_min(1)
    scale = logit_scale.exp()
    if kind == "sigmoid":
        logits = scale * image_embeds @ texts.t() + logit_bias
        pairs = F.logsigmoid(torch.where(match, logits, -logits)).masked_fill(absent | absent[own].unsqueeze(1), 0.0)
        return -pairs.sum() / total
    out = (match | absent) & ~itself
    targets = own.masked_fill(absent[own], -100)
    by_image = (scale * image_embeds @ texts.t()).masked_fill(out, float("-inf"))
    by_text = (scale * text_embeds @ images.t()).masked_fill(out, float("-inf"))
    both = F.cross_entropy(by_image, targets, reduction="sum") + F.cross_entropy(by_text, targets, reduction="sum")
    return both / (2 * total)


@torch.no_grad()
def finds_caption(image_embeds: torch.Tensor, text_embeds: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return for each of this process's pictures whether the nearest of all captions is its own: bool ``(N,)``.

    Args:
        image_embeds, text_embeds: normalised ``(N, E)``.
        labels: ``(N,)`` int64 ids of the captions; an equal one counts as its own. Pictures with `NO_CAPTION` find
            nothing, and nothing finds an empty caption.
    """
    texts, everyone = parallel.gather_rows(text_embeds.float()), _gather_labels(labels)
    likeness = (image_embeds.float() @ texts.t()).masked_fill(everyone == NO_CAPTION, float("-inf"))
    return (everyone[likeness.argmax(1)] == labels) & (labels != NO_CAPTION)


def pixel_loss(drawn: torch.Tensor, target: torch.Tensor, kind: str) -> torch.Tensor:
    """Return the mean `l1` or `l2` distance of pixels in [-1, 1] of this process's pictures."""
    difference = drawn - target
    distance = difference.abs() if kind == "l1" else difference.square()
    return distance.mean()


def _gather_labels(labels: torch.Tensor) -> torch.Tensor:
    if parallel.world_size() == 1:
        return labels
    parts = [torch.empty_like(labels) for _ in range(parallel.world_size())]
    torch.distributed.all_gather(parts, labels)
    return torch.cat(parts)
