"""Stage 1 and its forerunner: `align` (contrast only) and `vision_tower` (contrast + reconstruction, eq. (1))."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from vilau.modeling.vision_tower import VisionTower
from vilau.training import parallel
from vilau.training.config import TowerStageConfig
from vilau.training.losses import contrastive_loss, pixel_loss
from vilau.training.stage import Stage, StepResult


class ImageTextSource(Protocol):
    """Pictures with captions, reachable by number."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]: ...


@dataclass(frozen=True)
class TowerBatch:
    """`pixels` (N, S, S, 3) uint8; `text_ids` (N, T) padded; `captions` (N,), equal numbers for equal captions."""

    pixels: torch.Tensor
    text_ids: torch.Tensor
    captions: torch.Tensor


class TowerStage(Stage):
    """Train a vision tower. `reconstruct` adds quantizer and pixel decoder; without it only the contrast counts.

    Args:
        name: `align` or `vision_tower`.
        tower: with a text encoder.
        source: pictures and captions.
        tokenizer: of the captions; any Hugging Face tokenizer.
        text_length: tokens that the text encoder reads; longer captions are cut.
    """

    config: TowerStageConfig

    def __init__(
        self,
        name: str,
        config: TowerStageConfig,
        tower: VisionTower,
        source: ImageTextSource,
        tokenizer: Any,
        text_length: int,
    ) -> None:
        self.name, self.config, self.module = name, config, tower
        self.tower, self.source, self.tokenizer, self.text_length = tower, source, tokenizer, text_length
        self.reconstruct = name == "vision_tower"
        if tower.text_encoder is None:
            raise ValueError("stage 1 needs a vision tower with a text encoder")
        tower.text_encoder.requires_grad_(not self.reconstruct or config.train_text_encoder)
        if self.reconstruct:
            for part in tower.encoder_parts():
                part.requires_grad_(config.train_image_encoder)
        else:
            tower.pixel_decoder.requires_grad_(False)
        freeze(tower, config.freeze)

    def train_mode(self) -> None:
        self.tower.train()
        if self.tower.text_encoder is not None and self.reconstruct and not self.config.train_text_encoder:
            self.tower.text_encoder.eval()

    def make_batch(self, step: int, rank: int, world_size: int) -> TowerBatch:
        share = local_numbers(step, self.config.batch_size, rank, world_size)
        items = [self.source[number] for number in share]
        captions = [caption for _, caption in items]
        return TowerBatch(
            torch.from_numpy(np.stack([pixels for pixels, _ in items])),
            encode_captions(self.tokenizer, captions, self.text_length),
            torch.tensor([zlib.crc32(caption.encode()) for caption in captions]),
        )

    def compute(self, batch: TowerBatch, step: int) -> StepResult:
        device = self.tower.device
        pixels = to_pixel_values(batch.pixels.to(device))
        output = self.tower(pixels, quantize=self.reconstruct)
        texts = self.tower.text_embeds(batch.text_ids.to(device))
        contrast = contrastive_loss(
            output.image_embeds,
            texts,
            self.tower.logit_scale,
            self.tower.logit_bias,
            self.config.contrastive,
            batch.captions.to(device),
        )
        loss = self.config.contrastive_weight * contrast
        size = len(pixels)
        with torch.no_grad():
            nearest = (output.image_embeds @ texts.t()).argmax(1)
            found = batch.captions[nearest.cpu()] == batch.captions
        sums: dict[str, Any] = {
            "contrast": (contrast * parallel.world_size() * size, size),
            "retrieval": (found.sum(), size),
        }
        if self.reconstruct:
            drawn = self.tower.decode_features(output.z_q)
            pixel = pixel_loss(drawn, pixels, self.config.pixel_loss)
            commitment = output.commitment / parallel.world_size()
            recon = self.config.pixel_weight * pixel + self.tower.config.commitment_weight * commitment
            recon = recon + output.codebook_loss / parallel.world_size()  # zero unless the codebook learns by gradient
            loss = loss + self.config.reconstruction_weight * recon
            with torch.no_grad():
                squared = (drawn.clamp(-1, 1) - pixels).square().flatten(1).mean(1) / 4
                psnr = -10 * torch.log10(squared.clamp_min(1e-8))
            sums |= {
                "pixel": (pixel * parallel.world_size() * size, size),
                "commitment": (output.commitment * size, size),
                "psnr": (psnr.sum(), size),
                "codes_used": (len(torch.unique(output.codes)), 1) if output.codes is not None else (0, 1),
            }
        return StepResult(loss, sums)

    def save_result(self, folder: Path) -> None:
        self.tower.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def local_numbers(step: int, batch_size: int, rank: int, world_size: int) -> range:
    """Return the sample numbers of one process at a 0-based step: the batch in equal runs, in rank order.

    Rows gathered from all processes in rank order thus stand in the order that one process would have.

    Raises:
        ValueError: the batch does not divide by the number of processes.
    """
    if batch_size % world_size:
        raise ValueError(
            f"batch_size {batch_size} does not divide by {world_size} processes; choose a multiple of {world_size}"
        )
    share = batch_size // world_size
    first = step * batch_size + rank * share
    return range(first, first + share)


def encode_captions(tokenizer: Any, captions: Sequence[str], length: int) -> torch.Tensor:
    """Return token ids ``(N, length)``, cut or padded on the right, as the SigLIP text encoder reads them."""
    ids = torch.full((len(captions), length), int(tokenizer.pad_token_id))
    for row, caption in enumerate(captions):
        tokens = tokenizer(caption, add_special_tokens=False)["input_ids"][:length]
        ids[row, : len(tokens)] = torch.tensor(tokens)
    return ids


def to_pixel_values(frames: torch.Tensor) -> torch.Tensor:
    """Return float ``(I, 3, S, S)`` in [-1, 1] of uint8 frames ``(I, S, S, 3)``."""
    return frames.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def freeze(module: torch.nn.Module, patterns: Sequence[str]) -> None:
    """Stop the gradients of all parameters whose name matches one of the regular expressions.

    Raises:
        ValueError: a pattern matches nothing.
    """
    for pattern in patterns:
        hit = [p for name, p in module.named_parameters() if re.search(pattern, name)]
        if not hit:
            raise ValueError(f"freeze pattern {pattern!r} matches no parameter")
        for parameter in hit:
            parameter.requires_grad_(False)
