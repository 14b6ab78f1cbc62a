"""Stage 1 and its forerunner: `align` (contrast only) and `vision_tower` (contrast + reconstruction, eq. (1))."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from vilau.modeling.vision_tower import TowerOutput, VisionTower
from vilau.training import parallel
from vilau.training.config import TowerStageConfig
from vilau.training.discriminator import PatchDiscriminator
from vilau.training.flops import tower_flops
from vilau.training.losses import NO_CAPTION, contrastive_loss, finds_caption
from vilau.training.optimizers import build_optimizers, lr_share, set_lr
from vilau.training.perceptual import build_perceptual
from vilau.training.reconstruction import ReconstructionLoss
from vilau.training.stage import ClipGroup, Stage, StepResult
from vilau.training.weight_average import WeightAverage

Figures = dict[str, tuple[Any, Any]]


class ImageTextSource(Protocol):
    """Pictures with captions, reachable by number."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]: ...


@dataclass(frozen=True)
class TowerBatch:
    """`pixels` (N, S, S, 3) uint8; `text_ids` (N, T) padded; `captions` (N,), equal numbers for equal captions.

    `numbers` (N,) are the samples' places in the global order, which name epoch and sample.
    """

    pixels: torch.Tensor
    text_ids: torch.Tensor
    captions: torch.Tensor
    numbers: torch.Tensor


class TowerStage(Stage):
    """Train a vision tower. `reconstruct` adds quantizer and pixel decoder; without it only the contrast counts.

    Args:
        name: `align` or `vision_tower`.
        tower: with a text encoder, unless only pictures are reconstructed.
        source: pictures and captions.
        tokenizer: of the captions; any Hugging Face tokenizer.
        text_length: tokens that the text encoder reads; longer captions are cut.
        seed: of the choice of pictures to reconstruct, where not all are.

    Raises:
        ValueError: nothing is trained, the tower lacks what a loss needs, or a step brings fewer vectors than the
            codebook has codes.
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
        seed: int = 0,
    ) -> None:
        self.name, self.config, self.module = name, config, tower
        self.tower, self.source, self.tokenizer, self.text_length = tower, source, tokenizer, text_length
        self.seed = seed
        self.quantize = name == "vision_tower"
        self.reconstruct = self.quantize and config.reconstruction_weight > 0
        self.contrast = config.contrastive_weight > 0
        check_tower(name, config, tower)
        if tower.text_encoder is not None:
            learns = self.contrast and (not self.quantize or config.train_text_encoder)
            tower.text_encoder.requires_grad_(learns)
        if self.quantize:
            for part in tower.encoder_parts():
                part.requires_grad_(config.train_image_encoder)
        if not self.reconstruct:
            tower.pixel_decoder.requires_grad_(False)
        freeze(tower, config.freeze)
        self.weight_average: WeightAverage | None = None
        self.discriminator: PatchDiscriminator | None = None
        self.perceptual: torch.nn.Module | None = None
        if self.reconstruct:
            if config.adversarial_weight > 0:
                sizes, side = config.discriminator, tower.config.image_size
                self.discriminator = PatchDiscriminator(side, sizes.channels, sizes.layers, sizes.groups)
            self.perceptual = build_perceptual(config.perceptual, tower, config.perceptual_layers, config.lpips_weights)
        self.reconstruction = ReconstructionLoss(config, tower.pixel_decoder, self.perceptual, self.discriminator)

    @property
    def state_module(self) -> torch.nn.Module:
        """The tower, with discriminator and averaged weights where there are any."""
        more = {"discriminator": self.discriminator, "weight_average": self.weight_average}
        present = {name: part for name, part in more.items() if part is not None}
        return torch.nn.ModuleDict({"tower": self.tower, **present}) if present else self.tower

    def build_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the tower's optimizers, then the discriminator's; the average of the weights begins here."""
        optimizers = super().build_optimizers()
        if self.config.weight_ema > 0:
            self.weight_average = WeightAverage(self.tower, self.config.weight_ema)
        if self.discriminator is not None:
            self.discriminator.to(self.tower.device)
            optimizers += build_optimizers(self.discriminator, self.config.discriminator_optimizer)
        return optimizers

    def _split(
        self, optimizers: list[torch.optim.Optimizer]
    ) -> tuple[list[torch.optim.Optimizer], list[torch.optim.Optimizer]]:
        """Return the tower's optimizers and the discriminator's."""
        judging = {id(p) for p in self.discriminator.parameters()} if self.discriminator is not None else set()
        of_judge = [o for o in optimizers if id(o.param_groups[0]["params"][0]) in judging]
        return [o for o in optimizers if o not in of_judge], of_judge

    def set_learning_rates(self, optimizers: list[torch.optim.Optimizer], step: int) -> None:
        """Follow two schedules: the discriminator's begins with the adversarial loss."""
        drawing, judging = self._split(optimizers)
        super().set_learning_rates(drawing, step)
        start = self.config.adversarial_start
        since, left = max(0, step - start), max(1, self.config.num_steps - start)
        set_lr(judging, lr_share(since, left, self.config.discriminator_optimizer))

    def clip_groups(self, optimizers: list[torch.optim.Optimizer]) -> list[ClipGroup]:
        """Clip tower and discriminator apart."""
        drawing, judging = self._split(optimizers)
        groups = super().clip_groups(drawing)
        if self.discriminator is not None and judging:
            norm = self.config.discriminator_optimizer.clip_norm
            groups.append(ClipGroup("discriminator", list(self.discriminator.parameters()), norm))
        return groups

    def after_step(self, step: int) -> None:
        """Move the averaged weights."""
        if self.weight_average is not None:
            self.weight_average.update(step)

    def evaluation_weights(self) -> AbstractContextManager[None]:
        """Return a context with the averaged weights in the tower, where they are kept."""
        return self.weight_average.in_place() if self.weight_average is not None else nullcontext()

    def train_mode(self) -> None:
        self.tower.train()
        if self.tower.text_encoder is not None and self.quantize and not self.config.train_text_encoder:
            self.tower.text_encoder.eval()

    def prepare(self, batches: list[TowerBatch]) -> list[TowerBatch]:
        """Let the codebook's averages move once a step, for the statistics of all its micro-batches."""
        self.tower.quantizer.batches_per_update = len(batches)
        return batches

    @cached_property
    def _flops(self) -> float:
        each = tower_flops(self.tower.config)
        drawing = each.draw * self.config.reconstruction_share if self.reconstruct else 0.0
        reading = 3 * each.embed + each.text * (3 if not self.quantize or self.config.train_text_encoder else 1)
        seeing = each.features * (3 if not self.quantize or self.config.train_image_encoder else 1)
        searching = each.search if self.quantize else 0.0
        return seeing + searching + 3 * drawing + (reading if self.contrast else 0.0)

    def work(self, batch: TowerBatch) -> dict[str, float]:
        """Return pictures and operations of a micro-batch, without those of perceptual loss and discriminator."""
        return {"images": float(len(batch.pixels)), "flops": self._flops * len(batch.pixels)}

    def sharded_blocks(self) -> list[torch.nn.Module]:
        layers = self.tower.image_encoder.encoder.layers[:-1]  # the last one is left out where there is no contrast
        return [layer for layer in layers if any(p.requires_grad for p in layer.parameters())]

    def make_batch(self, step: int, rank: int, world_size: int) -> TowerBatch:
        share = local_numbers(step, self.config.batch_size, rank, world_size)
        items = [self.source[number] for number in share]
        captions = [caption for _, caption in items]
        return TowerBatch(
            torch.from_numpy(np.stack([pixels for pixels, _ in items])),
            encode_captions(self.tokenizer, captions, self.text_length),
            torch.tensor([caption_label(caption) for caption in captions]),
            torch.tensor(list(share)),
        )

    def compute(self, batch: TowerBatch, step: int) -> StepResult:
        pixels = to_pixel_values(batch.pixels.to(self.tower.device))
        output = self.tower(pixels, quantize=self.quantize)
        loss = pixels.new_zeros(())
        sums: Figures = {}
        if self.contrast:
            contrast, sums = self._contrast(output.image_embeds, batch)
            loss = loss + self.config.contrastive_weight * contrast
        if self.reconstruct:
            terms, figures = self._reconstruct(output, pixels, batch, step)
            loss = loss + terms
            sums |= figures
        if output.codes is not None:
            sums["codes_used"] = (count_used(output.codes, self.tower.config.codebook_size), 1)
        return StepResult(loss, sums)

    def _contrast(self, image_embeds: torch.Tensor, batch: TowerBatch) -> tuple[torch.Tensor, Figures]:
        labels = batch.captions.to(image_embeds.device)
        tower, size = self.tower, len(labels)
        texts = tower.text_embeds(batch.text_ids.to(image_embeds.device))
        kind = self.config.contrastive
        contrast = contrastive_loss(image_embeds, texts, tower.logit_scale, tower.logit_bias, kind, labels)
        said = labels != NO_CAPTION
        sums: Figures = {
            "contrast": (contrast * parallel.world_size() * size, size),
            "retrieval": (finds_caption(image_embeds, texts, labels).sum(), said.sum()),
        }
        if not said.all():
            sums["captions_empty"] = ((~said).sum(), 1)
        return contrast, sums

    def _reconstruct(
        self, output: TowerOutput, pixels: torch.Tensor, batch: TowerBatch, step: int
    ) -> tuple[torch.Tensor, Figures]:
        """Return the weighted reconstruction terms, discriminator's loss included, and their figures."""
        size, world = len(pixels), parallel.world_size()
        chosen, portion = self._choose(batch.numbers)
        if len(chosen) < size:
            pixels, z_q = pixels[chosen.to(pixels.device)], output.z_q[chosen.to(pixels.device)]
        else:
            z_q = output.z_q
        drawn = self.tower.decode_features(z_q)
        if self.perceptual is not None:
            self.perceptual.to(drawn.device)
        terms = self.reconstruction(drawn, pixels, portion, step)
        commitment = output.commitment / world
        recon = terms.drawing + self.tower.config.commitment_weight * commitment
        recon = recon + output.codebook_loss / world  # zero unless the codebook learns by gradient
        with torch.no_grad():
            squared = (drawn.clamp(-1, 1) - pixels).square().flatten(1).mean(1) / 4
            psnr = -10 * torch.log10(squared.clamp_min(1e-8))
        figures: Figures = {
            **terms.sums,
            "commitment": (output.commitment * size, size),
            "psnr": (psnr.mean() * portion, portion),
        }
        return self.config.reconstruction_weight * recon + terms.judging, figures

    def _choose(self, numbers: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return which samples (M,) of this process are reconstructed, and their part of those of all processes.

        Where none is, the first one is drawn nevertheless and counts nothing: all processes do the same work.
        """
        share = self.config.reconstruction_share
        if share >= 1:
            return torch.arange(len(numbers)), 1 / parallel.world_size()
        own = [i for i, number in enumerate(numbers.tolist()) if is_reconstructed(self.seed, number, share)]
        total = float(parallel.sum_over_ranks(torch.tensor(float(len(own)))))
        return torch.tensor(own or [0]), len(own) / total if own else 0.0

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
    """Return token ids ``(N, length)`` as SigLIP's text encoder was trained to read captions.

    Lower case, with the special tokens that the tokenizer adds by itself (SigLIP's: an end token, which a cut caption
    keeps), padded on the right with its pad token: the encoder looks at its last position, whatever stands there. A
    caption is plain text: one that spells a special token does not become that token.
    """
    said = [caption.lower() for caption in captions]
    ids = tokenizer(
        said, padding="max_length", truncation=True, max_length=length, padding_side="right", split_special_tokens=True
    )["input_ids"]
    return torch.tensor(ids, dtype=torch.long).reshape(len(said), length)


def caption_label(caption: str) -> int:
    """Return a number that is equal for equal captions, `NO_CAPTION` for an empty one."""
    said = caption.strip()
    return zlib.crc32(caption.encode()) if said else NO_CAPTION


def count_used(codes: torch.Tensor, codebook_size: int) -> torch.Tensor:
    """Return how many different codes there are in ``codes`` (any shape) of all processes: a scalar."""
    seen = torch.zeros(codebook_size, device=codes.device)
    seen[codes.flatten()] = 1
    return (parallel.sum_over_ranks(seen) > 0).sum()


def is_reconstructed(seed: int, number: int, share: float) -> bool:
    """Return whether a sample is reconstructed: the same answer on every process, in every epoch another."""
    return zlib.crc32(f"reconstruct/{seed}/{number}".encode()) < share * 2**32


def check_tower(name: str, config: TowerStageConfig, tower: VisionTower) -> None:
    """Raise ValueError where a stage cannot train such a tower."""
    reconstructs = name == "vision_tower" and config.reconstruction_weight > 0
    if config.contrastive_weight <= 0 and not reconstructs:
        either = "contrastive_weight" if name == "align" else "contrastive_weight or reconstruction_weight"
        raise ValueError(f"stages.{name} has no loss: set {either} above 0")
    if config.contrastive_weight > 0 and tower.text_encoder is None:
        raise ValueError(
            f"stages.{name} needs a vision tower with a text encoder for its contrastive loss: configure text_encoder, "
            "start from a tower or SigLIP checkpoint that has one, or set contrastive_weight to 0"
        )
    sizes = tower.config
    vectors = config.batch_size * sizes.num_positions * sizes.depth
    restarts = sizes.quantizer != "none" and sizes.codebook_learning == "ema" and sizes.restart_unused_codes
    if name == "vision_tower" and restarts and vectors < sizes.codebook_size:
        per_picture = sizes.num_positions * sizes.depth
        raise ValueError(
            f"stages.{name}.batch_size {config.batch_size} gives {vectors} vectors per step ({per_picture} per "
            f"picture), too few to start and restart {sizes.codebook_size} codes; use a batch_size of at least "
            f"{-(-sizes.codebook_size // per_picture)}, a smaller codebook_size, or restart_unused_codes: false"
        )


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
