"""What a step of stages 2 and 3 costs, and what each short cut saves: ratios within one run.

    python benchmarks/train.py [--threads N] [--repeat N] [--json]
    python benchmarks/train.py --out docs/results/train-benchmark.md
    python benchmarks/train.py --preset 1.3b --device cuda --dtype bfloat16 [--gradient-checkpointing] [--json]

README.md beside this file says how to read the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin would be counted as work

import torch
from utilisation import PRESETS, Setting, describe, measure

from vilau.data.collate import Batch, collate, collate_padded
from vilau.data.nano.dataset import NanoDataset
from vilau.data.nano.world import World
from vilau.evaluation.machine import Probe, machine_name, peak_memory, reset_peak_memory, time_once
from vilau.modeling.vila_u import VilaUModel, head_losses
from vilau.processing.encode import EncodedSample
from vilau.processing.processor import VilaUProcessor
from vilau.shipped import find_model
from vilau.training.config import LanguageStageConfig
from vilau.training.language import LanguageStage
from vilau.training.vision_tower import to_pixel_values

MIXTURE = {"text_image": 0.32, "text_video": 0.14, "image_text": 0.24, "question": 0.2, "text": 0.1}
SAMPLES, ROW = 96, 192
HEADS = {
    "text head, 7B's vocabulary": (1024, 768, 32004),
    "depth head, K 16384": (2048, 768, 16384),
}  # rows, width, classes


@dataclass(frozen=True)
class Step:
    """One way of making a step: median CPU seconds, positions with padding, share of them that is padding, and the
    operations' floor: seconds that they take at the matrix rate measured between the repetitions."""

    cpu_s: float
    positions: int
    padding: float
    floor_s: float

    @property
    def floor_ratio(self) -> float:
        """Floor / measured."""
        return self.floor_s / self.cpu_s


@dataclass(frozen=True)
class Head:
    """Losses of one head, forward and backward: CPU seconds and megabytes added, logits whole and in pieces."""

    plain_s: float
    fused_s: float
    plain_mb: float
    fused_mb: float


def steps(repeat: int) -> dict[str, Step]:
    """Measure a step on the same samples: padded from pixels, packed from pixels, packed from codes."""
    folder = find_model(None)
    model, processor = VilaUModel.from_pretrained(folder), VilaUProcessor.from_pretrained(folder)
    data = NanoDataset(
        World.load(None), MIXTURE, "train", 0, processor.image_size, model.config.num_frames, 2.0, SAMPLES
    )
    config = LanguageStageConfig(steps=1, batch_size=SAMPLES, row_length=ROW, text_dropout=0.0)
    stage = LanguageStage("sft", config, model, data, processor, seed=0)
    stage.train_mode()
    encoded: list[EncodedSample] = [processor.encode_sample(data[number]) for number in range(SAMPLES)]
    pad = int(processor.tokenizer.pad_token_id)
    packed = collate(encoded, ROW, pad)
    codes = model.vision_tower.encode(to_pixel_values(packed.frames))
    batches = {
        "padded rows, pixels": collate_padded(encoded, pad),
        "packed rows, pixels": packed,
        "packed rows, codes": replace(packed, frames=packed.frames[:0], codes=codes),
    }
    probe = Probe(torch.device("cpu"), torch.float32, 64)
    times: dict[str, list[float]] = {name: [] for name in batches}
    for turn in range(repeat + 1):
        for name, batch in batches.items():  # in turn, so that a busy minute falls on all
            taken = time_once(lambda batch=batch: one_step(stage, batch), probe.device).cpu  # type: ignore[misc]
            if turn:
                times[name].append(taken)
            probe.sample()
    rate = probe.limits("cpu")[1]
    return {
        name: Step(
            statistics.median(times[name]),
            batch.kinds.numel(),
            float((batch.form_ids < 0).float().mean()),
            stage.work(batch)["flops"] / rate,
        )
        for name, batch in batches.items()
    }


def one_step(stage: LanguageStage, batch: Batch) -> None:
    """Forward and backward, without the optimizer."""
    stage.module.zero_grad(set_to_none=True)
    (counted,) = stage.prepare([batch])
    stage.compute(counted, 0).loss.backward()


def measure_head(rows: int, width: int, classes: int, fused: bool) -> tuple[float, float]:
    """Return CPU seconds and megabytes added by the losses of a head and their backward pass; in a process of its own,
    as memory once taken is not given back."""
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(width, classes)
    hidden = torch.randn(rows, width, generator=generator, requires_grad=True)
    targets = torch.randint(classes, (rows,), generator=generator)
    for parameter in (hidden, *head.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    device = torch.device("cpu")
    reset_peak_memory(device)
    before = peak_memory(device)
    taken = time_once(lambda: head_losses(head, hidden, targets, fused).mean().backward(), device).cpu
    return taken, (peak_memory(device) - before) / 2**20


def heads(threads: int) -> dict[str, Head]:
    """Measure every head both ways."""
    found = {}
    for name in HEADS:
        (plain_s, plain_mb), (fused_s, fused_mb) = (
            json.loads(
                subprocess.run(
                    [
                        sys.executable,
                        __file__,
                        "--threads",
                        str(threads),
                        "--head",
                        name,
                        *(["--fused"] if fused else []),
                    ],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
            )
            for fused in (False, True)
        )
        found[name] = Head(plain_s, fused_s, plain_mb, fused_mb)
    return found


def page(threads: int, found: dict[str, Step], losses: dict[str, Head]) -> str:
    """Return the figures as Markdown."""
    first = next(iter(found.values())).cpu_s
    lines = [
        "# What a training step of stages 2 and 3 costs",
        "",
        f"`python benchmarks/train.py --threads {threads}` on {machine_name(torch.device('cpu'))}, "
        f"torch {torch.__version__}, Python {platform.python_version()}. The shipped model, {SAMPLES} nano samples, "
        "forward and backward; medians of CPU time, the three ways in turn within one run.",
        "",
        "| step | CPU s | against the first | positions | padding | floor s | floor / measured |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {s.cpu_s:.2f} | {s.cpu_s / first:.2f} | {s.positions} | {s.padding:.0%} | {s.floor_s:.2f} | "
            f"{s.floor_ratio:.0%} |"
            for name, s in found.items()
        ),
        "",
        "The floor counts the operations of positions that hold something, at the rate of a square float32 product "
        "measured between the repetitions; padding is not in it.",
        "",
        "Losses with the logits whole, and in pieces that are never in memory together (`fused_loss`):",
        "",
        "| head | whole, s | in pieces, s | whole, MB | in pieces, MB |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {name} ({' x '.join(map(str, HEADS[name]))}) | {h.plain_s:.2f} | {h.fused_s:.2f} | {h.plain_mb:.0f} | "
            f"{h.fused_mb:.0f} |"
            for name, h in losses.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def utilisation(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """Return tokens per second, utilisation and memory of whole steps, as JSON or for people."""
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # training takes a GPU where it sees one
    elif not torch.cuda.is_available():
        parser.error("--device is cuda, but there is no GPU here: leave it out, or take --device cpu --preset tiny")
    setting = Setting(
        options.preset,
        options.dtype,
        options.rows,
        options.row_length,
        options.gradient_checkpointing,
        options.attention,
        options.repeat,
    )
    try:
        found = measure(setting)
    except ValueError as error:
        parser.error(str(error))
    return json.dumps({**asdict(setting), **asdict(found)}, indent=1) if options.json else describe(setting, found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Cost of a training step of stages 2 and 3.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5, help="counted steps per way")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="write the page here")
    parser.add_argument("--head", choices=HEADS, help=argparse.SUPPRESS)
    parser.add_argument("--fused", action="store_true", help=argparse.SUPPRESS)
    whole = parser.add_argument_group("utilisation of whole steps of stage 2, in place of the above")
    whole.add_argument("--preset", choices=PRESETS, help="sizes with random weights")
    whole.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    whole.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the products")
    whole.add_argument("--rows", type=int, default=8, help="packed rows of a step")
    whole.add_argument("--row-length", type=int, help="positions of a row")
    whole.add_argument(
        "--gradient-checkpointing", action="store_true", help="compute blocks again in the backward pass"
    )
    whole.add_argument("--attention", choices=("sdpa", "flash_attention_2", "flex_attention", "eager"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.preset:
        print(utilisation(parser, options))
        return
    if options.head:
        print(json.dumps(measure_head(*HEADS[options.head], options.fused)))
        return
    found, losses = steps(options.repeat), heads(options.threads)
    if options.json:
        rows: dict[str, Any] = {name: {**asdict(s), "floor_ratio": s.floor_ratio} for name, s in found.items()}
        print(json.dumps({"steps": rows, "heads": {name: asdict(h) for name, h in losses.items()}}, indent=1))
        return
    text = page(options.threads, found, losses)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
