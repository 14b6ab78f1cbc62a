"""What a vision tower can do: reconstruct, recognise, retrieve, and use its codes (paper, section 3.1, Tables 1 and 8).

The same figures while training (`validation.py`), on a finished tower (`vilau eval --suite tower`) and in the
experiments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch.nn import functional as F

from vilau.evaluation.features import FeatureExtractor
from vilau.evaluation.metrics import psnr
from vilau.evaluation.reconstruction import Moments, frechet_distance, ssim
from vilau.modeling.codebook_usage import CodebookUsage, codebook_usage
from vilau.modeling.quantizer import Quantizer
from vilau.modeling.vision_tower import VisionTower
from vilau.processing.images import normalise

EncodeTexts = Callable[[Sequence[str]], torch.Tensor]
SSIM_WINDOW = 11


@dataclass(frozen=True)
class ZeroShot:
    """One classification by text: `frames` (N, S, S, 3) uint8, `wanted` class of each, and for each class its prompts.

    A class's embedding is the normalised mean of its prompts' embeddings.
    """

    name: str
    frames: np.ndarray
    wanted: tuple[int, ...]
    prompts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ValidationSet:
    """Pictures that training never shows: `frames` (N, S, S, 3) uint8, a caption of each or none, classifications."""

    name: str
    frames: np.ndarray
    captions: tuple[str, ...]
    tasks: tuple[ZeroShot, ...] = ()

    def chance(self) -> dict[str, float]:
        """Return what guessing reaches, beside each share."""
        found = {f"zero_shot_{task.name}": 1 / len(task.prompts) for task in self.tasks}
        if self.captions:
            same = sum(self.captions.count(caption) for caption in self.captions) / len(self.captions) ** 2
            found |= {"retrieval_image_to_text": same, "retrieval_text_to_image": same}
        return found


@dataclass(frozen=True)
class TowerFigures:
    """`metrics` by name and `items`, the number of pictures behind each."""

    metrics: dict[str, float] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)

    def add(self, values: dict[str, float], items: int) -> None:
        """Keep figures."""
        self.metrics.update(values)
        self.items.update(dict.fromkeys(values, items))


@torch.no_grad()
def measure_tower(
    tower: VisionTower,
    data: ValidationSet,
    encode_texts: EncodeTexts | None = None,
    extractor: FeatureExtractor | None = None,
    *,
    quantize: bool = True,
    reconstruct: bool = True,
    chunk: int = 64,
) -> TowerFigures:
    """Measure a tower on pictures it never saw; the tower is left in the mode it was in.

    Args:
        tower: with its text encoder for the zero-shot and retrieval figures.
        data: pictures, captions, classifications.
        encode_texts: texts -> token ids ``(N, T)`` of the tower's text encoder; None leaves those figures out.
        extractor: of the features for ``rfid_<its name>``; None leaves it out.
        quantize: measure through the quantizer; False for the stage `align`, whose features are continuous.
        reconstruct: also decode.

    Returns:
        ``psnr`` (dB), ``ssim``, ``rfid_*``; ``zero_shot_*`` and ``retrieval_*``, shares of right ones at rank 1 (equal
        captions count as one); ``code_usage`` and ``usage_depth_d``, shares of the codebook that occur;
        ``perplexity_depth_d``, e to the entropy of the codes at depth d; ``quantization_error``, the squared distance
        from ``z_e`` to ``z_q`` relative to the variance of ``z_e``.
    """
    figures = TowerFigures()
    was_training = tower.training
    tower.eval()
    try:
        seen = _Seen(tower, reconstruct, extractor)
        embeds = torch.cat([seen.take(pixels, quantize) for pixels in _batches(data.frames, chunk, tower)])
        figures.add(seen.figures(), len(data.frames))
        if encode_texts is not None and tower.text_encoder is not None:
            if data.captions:
                texts = _embed(tower, encode_texts, data.captions)
                figures.add(retrieval(embeds, texts, data.captions), len(data.frames))
            for task in data.tasks:
                figures.add(_zero_shot(tower, task, encode_texts, quantize, chunk), len(task.frames))
    finally:
        tower.train(was_training)
    return figures


def retrieval(image_embeds: torch.Tensor, text_embeds: torch.Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Return the shares found at rank 1 both ways; rows ``(N, E)`` belong together, equal captions count as one."""
    scores = image_embeds @ text_embeds.t()
    numbers = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    labels = torch.tensor([numbers[caption] for caption in captions], device=scores.device)
    return {
        "retrieval_image_to_text": float((labels[scores.argmax(1)] == labels).float().mean()),
        "retrieval_text_to_image": float((labels[scores.argmax(0)] == labels).float().mean()),
    }


class _Seen:
    """Figures of reconstruction and codes, gathered batch by batch."""

    def __init__(self, tower: VisionTower, reconstruct: bool, extractor: FeatureExtractor | None) -> None:
        self.tower, self.reconstruct, self.extractor = tower, reconstruct, extractor
        self.psnr: list[torch.Tensor] = []
        self.ssim: list[torch.Tensor] = []
        self.real, self.ours = Moments(), Moments()
        self.codes: list[torch.Tensor] = []
        self.error, self.power, self.features = 0.0, 0.0, Moments()

    def take(self, pixels: torch.Tensor, quantize: bool) -> torch.Tensor:
        """Take in pictures ``(N, 3, S, S)`` and return their embeddings ``(N, E)``."""
        output = self.tower(pixels, quantize=quantize)
        if output.codes is not None:
            self.codes.append(output.codes.cpu())
            z_e = output.z_e.double()
            self.error += float((output.z_q.double() - z_e).square().sum())
            self.power += float(z_e.square().sum())
            self.features.count += z_e[..., 0].numel()
            self.features.total = self.features.total + z_e.flatten(0, 1).sum(0).cpu()
        if self.reconstruct:
            drawn = self.tower.decode_features(output.z_q).float().clamp(-1, 1)
            self.psnr.append(psnr(drawn, pixels).cpu())
            if min(pixels.shape[-2:]) >= SSIM_WINDOW:
                self.ssim.append(ssim(drawn, pixels).cpu())
            if self.extractor is not None:
                self.real.add(self.extractor(pixels))
                self.ours.add(self.extractor(drawn))
        return output.image_embeds

    def figures(self) -> dict[str, float]:
        """Return the figures of everything taken in."""
        found: dict[str, float] = {}
        if self.psnr:
            found["psnr"] = float(torch.cat(self.psnr).mean())
        if self.ssim:
            found["ssim"] = float(torch.cat(self.ssim).mean())
        if self.ours.count > 1 and self.extractor is not None:
            found[f"rfid_{self.extractor.name}"] = frechet_distance(self.ours, self.real)
        if self.codes:
            usage = codebook_usage(torch.cat(self.codes), self.tower.config.codebook_size)
            found |= code_figures(usage, len(cast(Quantizer, self.tower.quantizer).books()) == 1)
            variance = self.power - float(self.features.total.square().sum()) / self.features.count
            found["quantization_error"] = self.error / max(variance, 1e-12)
        return found


def code_figures(usage: CodebookUsage, shared: bool) -> dict[str, float]:
    """Return usage and perplexity of codes: per depth, and of the one codebook for all depths or of all codebooks."""
    found = {"code_usage": float((usage.shared() if shared else usage).share.mean())}
    for depth, (share, perplexity) in enumerate(zip(usage.share, usage.perplexity, strict=True), 1):
        found |= {f"usage_depth_{depth}": float(share), f"perplexity_depth_{depth}": float(perplexity)}
    return found


def _zero_shot(
    tower: VisionTower, task: ZeroShot, encode_texts: EncodeTexts, quantize: bool, chunk: int
) -> dict[str, float]:
    every = [prompt for prompts in task.prompts for prompt in prompts]
    embeds = _embed(tower, encode_texts, every).split([len(prompts) for prompts in task.prompts])
    classes = F.normalize(torch.stack([part.mean(0) for part in embeds]), dim=-1)
    images = [tower(pixels, quantize=quantize).image_embeds for pixels in _batches(task.frames, chunk, tower)]
    chosen = (torch.cat(images) @ classes.t()).argmax(1).cpu()
    return {f"zero_shot_{task.name}": float((chosen == torch.tensor(task.wanted)).float().mean())}


def _embed(tower: VisionTower, encode_texts: EncodeTexts, texts: Sequence[str], chunk: int = 256) -> torch.Tensor:
    """Return normalised embeddings ``(N, E)``; equal texts are computed once."""
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    ids = encode_texts(list(rows)).to(tower.device)
    embeds = torch.cat([tower.text_embeds(part) for part in ids.split(chunk)])
    return embeds[torch.tensor([rows[text] for text in texts], device=embeds.device)]


def _batches(frames: np.ndarray, chunk: int, tower: VisionTower) -> Iterator[torch.Tensor]:
    for start in range(0, len(frames), chunk):
        yield torch.from_numpy(normalise(frames[start : start + chunk])).to(tower.device, tower.dtype)
