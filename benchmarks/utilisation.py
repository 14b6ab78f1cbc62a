"""Model FLOPs utilisation of stage 2 on one device: what `benchmarks/train.py --preset` measures.

Random weights, random packed rows with codes in place of pictures, whole steps: forward, backward, clipping, AdamW.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vilau.configuration import PositionKind, VilaUConfig
from vilau.data.collate import Batch, collate
from vilau.evaluation.machine import machine_name, peak_memory, reset_peak_memory, time_once
from vilau.modeling.vila_u import VilaUModel
from vilau.processing.encode import EncodedSample
from vilau.training.config import LanguageStageConfig, ScaleConfig, load_config
from vilau.training.engine import clip
from vilau.training.flops import peak_flops
from vilau.training.language import LanguageStage
from vilau.training.spread import Spread, this_device

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
PRESETS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "tiny": ("nano/debug.yaml", 256, {"vocab_size": 512}),
    "1.3b": ("paper/vila-u-1.3b-256.yaml", 2048, {}),
}  # configuration whose `model` gives the sizes, positions of a row, fields of the language model to change
WORDS = 30  # tokens of a caption
STEPS_NOT_COUNTED = 2  # in which kernels are chosen and the optimizer's states are made


@dataclass(frozen=True)
class Setting:
    """What is measured; `dtype` is of the products, weights and optimizer are float32."""

    preset: str
    dtype: str = "float32"
    rows: int = 8
    row_length: int | None = None
    gradient_checkpointing: bool = False
    attention: str | None = None
    repeat: int = 5


@dataclass(frozen=True)
class Utilisation:
    """Medians of whole steps. `tokens` are positions without padding; `mfu` is operations of the model, without padding
    and recomputation, over the peak of the device, none where that is not known; `peak_mb` of memory."""

    machine: str
    parameters: int
    trained: int
    tokens: int
    padding: float
    step_s: float
    tokens_per_s: float
    tflops_per_s: float
    mfu: float | None
    peak_mb: float


def measure(setting: Setting) -> Utilisation:
    """Train some steps on one batch."""
    file, length, fields = PRESETS[setting.preset]
    sizes = load_config(CONFIGS / file).model
    config = VilaUConfig(**{**sizes, "text_config": {**sizes["text_config"], **fields}})
    row_length = setting.row_length or length
    torch.manual_seed(0)
    with this_device():
        model = VilaUModel(config)
    batch = random_batch(config, setting.rows, row_length)
    settings = LanguageStageConfig(steps=1000, batch_size=len(batch.sample_ids), row_length=row_length)
    stage = LanguageStage("pretrain", settings, model, None, None, seed=0)  # type: ignore[arg-type]
    bf16 = setting.dtype == "bfloat16"
    spread = Spread(
        stage,
        ScaleConfig(
            precision="bf16" if bf16 else "float32",
            allow_slow=True,
            gradient_checkpointing=setting.gradient_checkpointing,
            attention=setting.attention,  # type: ignore[arg-type]
        ),
    )
    optimizers = stage.build_optimizers()
    stage.train_mode()

    def step() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        (result,) = spread.forward_backward(stage.prepare([batch]), 0)
        if not torch.isfinite(result.loss):
            raise ValueError("the loss is not finite: take bfloat16 or float32")
        for group in stage.clip_groups(optimizers):
            clip(group)
        for optimizer in optimizers:
            optimizer.step()

    reset_peak_memory(spread.device)
    for _ in range(STEPS_NOT_COUNTED):
        step()
    seconds = statistics.median(time_once(step, spread.device).wall for _ in range(setting.repeat))
    memory = peak_memory(spread.device)
    held = stage.work(batch)
    rate, peak = held["flops"] / seconds, peak_flops(spread.device, bf16)
    parameters = list(model.parameters())
    return Utilisation(
        machine=machine_name(spread.device),
        parameters=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        tokens=int(held["tokens"]),
        padding=1 - held["tokens"] / batch.kinds.numel(),
        step_s=seconds,
        tokens_per_s=held["tokens"] / seconds,
        tflops_per_s=rate / 1e12,
        mfu=rate / peak if peak else None,
        peak_mb=memory / 2**20,
    )


def random_batch(config: VilaUConfig, rows: int, row_length: int) -> Batch:
    """Return rows filled with pictures of random codes and random captions, half of them each way round."""
    positions = config.vision_config.num_positions
    room = row_length // (WORDS + positions)
    if not room:
        raise ValueError(
            f"a row of {row_length} positions has no room for a picture of {positions} and its caption of {WORDS}: "
            "raise --row-length"
        )
    draw = np.random.default_rng(0)
    samples = [_random_sample(config, draw, number) for number in range(rows * room)]
    return collate(samples, row_length, pad_id=0)


def _random_sample(config: VilaUConfig, draw: np.random.Generator, number: int) -> EncodedSample:
    vision: Any = config.vision_config
    length = WORDS + vision.num_positions
    drawn = number % 2 == 0  # the caption first; otherwise the picture, after one token of text
    visual = np.zeros(length, dtype=bool)
    first = WORDS if drawn else 1
    visual[first : first + vision.num_positions] = True
    text = ~visual & (np.arange(length) > first)
    return EncodedSample(
        sample_id=f"sample-{number}",
        form="text_image" if drawn else "image_text",
        input_ids=np.where(visual, 0, draw.integers(3, config.text_config.vocab_size, length)),
        kinds=np.where(visual, int(PositionKind.VISUAL), int(PositionKind.TEXT)).astype(np.int8),
        text_targets=text if not drawn else np.zeros(length, dtype=bool),
        visual_targets=visual if drawn else np.zeros(length, dtype=bool),
        frames=np.zeros((0, 0, 0, 3), dtype=np.uint8),
        codes=draw.integers(0, vision.codebook_size, (1, vision.num_positions, vision.depth)),
    )


def describe(setting: Setting, found: Utilisation) -> str:
    """Return the figures as lines for people."""
    mfu = "unknown, as the peak of this device is not" if found.mfu is None else f"{found.mfu:.1%}"
    recomputed = ", blocks computed again in the backward pass" if setting.gradient_checkpointing else ""
    return "\n".join(
        [
            f"{setting.preset}, {setting.dtype}, attention {setting.attention or 'as the library chooses'}{recomputed}",
            f"on {found.machine}, torch {torch.__version__}",
            f"weights       {found.parameters:,}, of which {found.trained:,} are trained",
            f"batch         {found.tokens:,} tokens, {found.padding:.1%} padding",
            f"step          {found.step_s:.3f} s (median of {setting.repeat}), optimizer included",
            f"tokens/s      {found.tokens_per_s:,.0f}",
            f"TFLOP/s       {found.tflops_per_s:.2f}",
            f"utilisation   {mfu}",
            f"peak memory   {found.peak_mb:,.0f} MB",
        ]
    )
