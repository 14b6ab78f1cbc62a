"""How fast positions are made, and how far from the machine's limit: the measurements of `vilau bench generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vilau.configuration import VilaUConfig
from vilau.evaluation.machine import (
    Clock,
    Probe,
    available_memory,
    measure,
    median,
    now,
    peak_memory,
    reset_peak_memory,
)
from vilau.generation.compiled import CompiledStep, visual_step
from vilau.generation.position import Language, Networks, VisualState, VisualStep
from vilau.generation.prepared import AUTO_LIMIT, kernel_of, packable, packed_bytes
from vilau.generation.visual import VisualRequest, begin
from vilau.model import VilaUForConditionalGeneration

_WARM_UP = 2  # positions that are not counted
_PROBES = 8  # how often the machine's limits are measured among the positions


def _midsize(depth: int) -> dict[str, Any]:
    encoder = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return {
        "vision_config": {"image_encoder_config": encoder | {"image_size": 256, "patch_size": 16}, "depth": depth},
        "text_config": {
            "vocab_size": 32004,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 4096,
        },
        "depth_config": {"hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12},
    }


_LLAMA_2_7B = {
    "vocab_size": 32004,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
}
_LARGE_256 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_SO400M_384 = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}

PRESETS: dict[str, dict[str, Any]] = {
    "midsize": _midsize(4),
    "midsize-d16": _midsize(16),
    "7b-256": {
        "vision_config": {"image_encoder_config": _LARGE_256 | {"image_size": 256, "patch_size": 16}, "depth": 4},
        "text_config": _LLAMA_2_7B,
        "depth_config": {"hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16},
    },
    "7b-384": {
        "vision_config": {
            "image_encoder_config": _SO400M_384 | {"image_size": 384, "patch_size": 14},
            "depth": 16,
            "latent_size": 24,
            "decoder_attention": [24],
        },
        "text_config": _LLAMA_2_7B,
        "depth_config": {"hidden_size": 2560, "num_hidden_layers": 6, "num_attention_heads": 40},
    },
}
"""Sizes with random weights; `nano` is the shipped model."""


def preset_model(name: str, device: torch.device, dtype: torch.dtype) -> VilaUForConditionalGeneration:
    """Return a model of a preset's sizes with random weights.

    Raises:
        ValueError: an unknown preset, or one that the device's memory cannot hold.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; it must be one of {', '.join(PRESETS)}")
    config = VilaUConfig(**PRESETS[name])
    with torch.device("meta"):
        empty = VilaUForConditionalGeneration(config)
    needed = sum(p.numel() for p in empty.parameters()) * dtype.itemsize
    needed += sum(b.numel() * b.element_size() for b in empty.buffers())
    free = available_memory(device)
    if free is not None and needed > 0.7 * free:
        raise ValueError(
            f"preset {name} needs {needed / 1e9:.0f} GB for its weights in {str(dtype).removeprefix('torch.')}, but "
            f"{free / 1e9:.0f} GB are free on {device}; take a larger machine, a smaller dtype or preset midsize"
        )
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            model = VilaUForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


class TimedStep(VisualStep):
    """A step that notes what its language model, depth transformer and draws take."""

    def __init__(self, networks: Networks, device: torch.device) -> None:
        super().__init__(networks)
        self.device = device
        self.spent: dict[str, Clock] = {}

    def _timed(self, part: str, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        start = now(self.device)
        out = work()
        self.spent[part] = self.spent.get(part, Clock(0, 0)) + (now(self.device) - start)
        return out

    def advance(self, state: VisualState, language: Language) -> torch.Tensor:
        """As `VisualStep`; counted as `lm`, with the projector."""
        return self._timed("lm", lambda: VisualStep.advance(self, state, language))

    def depth_logits(self, x: torch.Tensor, depth: int, cache: Any) -> torch.Tensor:
        """As `VisualStep`; counted as `depth`."""
        return self._timed("depth", lambda: VisualStep.depth_logits(self, x, depth, cache))

    def choose(self, logits: torch.Tensor, scale: torch.Tensor | None, state: VisualState, depth: int) -> torch.Tensor:
        """As `VisualStep`; counted as `sampling`, with guidance."""
        return self._timed("sampling", lambda: VisualStep.choose(self, logits, scale, state, depth))


@dataclass(frozen=True)
class Work:
    """What one position cannot do without: `bytes_read` of weights and caches, and `operations`."""

    bytes_read: float
    operations: float


def work_per_position(model: Any, rows: int, length: float) -> Work:
    """Return what one position of ``rows`` rows at a mean context ``length`` reads and computes.

    The language model's body and D steps of the depth transformer with its head; no embedding table, no text head.
    """
    config, depth_model = model.config.text_config, model.depth_transformer
    tables = {id(p) for p in model.get_input_embeddings().parameters()}
    body = [p for p in model.language_model.base_model.parameters() if id(p) not in tables]
    steps = model.config.vision_config.depth
    inner = [p for part in (depth_model.blocks, depth_model.norm, depth_model.head) for p in part.parameters()]
    first, rest = ([*part.parameters()] for part in (depth_model.project_hidden, depth_model.project_codes))
    read = [(1, body), (steps, inner), (1, first), (steps - 1, rest)]
    weights = sum(times * sum(p.numel() for p in part) for times, part in read)
    size = sum(times * sum(p.numel() * p.element_size() for p in part) for times, part in read)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * head_dim * length * rows
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * head_dim * length * rows
    return Work(size + cache * model.dtype.itemsize, 2 * weights * rows + attention)


@dataclass(frozen=True)
class Timing:
    """Medians over the positions of one batch, in seconds; `parts` only where the step was not one function."""

    position: Clock
    parts: dict[str, Clock]
    prefill: Clock


@torch.no_grad()
def time_positions(step: VisualStep, request: VisualRequest, count: int, probe: Probe | None) -> Timing:
    """Time ``count`` positions of a request after the first two, the machine's limits measured between them.

    step: with `TimedStep` the parts are told apart.
    """
    device = request.seeds.device
    start = now(device)
    begun = begin(step.networks, request, step.static)
    prefill = now(device) - start
    step.draw(begun.hidden, begun.state)
    whole: list[Clock] = []
    parts: dict[str, list[Clock]] = {}
    for number in range(min(count + _WARM_UP, request.positions - 1)):
        if isinstance(step, TimedStep):
            step.spent.clear()
        start = now(device)
        step(begun.state, begun.language, step.static or begun.guided[number + 1])
        spent = now(device) - start
        if number < _WARM_UP:
            continue
        whole.append(spent)
        if isinstance(step, TimedStep):
            for name, value in step.spent.items():
                parts.setdefault(name, []).append(value)
        if probe is not None and (number - _WARM_UP) % max(1, count // _PROBES) == 0:
            probe.sample()
    return Timing(median(whole), {name: median(values) for name, values in parts.items()}, prefill)


def bench_request(
    model: Any, pictures: int, prompt_length: int, scale: float, positions: int | None = None
) -> VisualRequest:
    """Return a request for ``pictures`` pictures of as many random prompts, with the model's default sampling."""
    generator = torch.Generator().manual_seed(1)
    high = model.config.text_config.vocab_size - 4
    ids = torch.randint(3, high, (pictures, prompt_length), generator=generator).to(model.device)
    empty = torch.randint(3, high, (1, max(1, prompt_length // 2)), generator=generator).to(model.device)
    frames = -(-(positions or 1) // model.config.vision_config.num_positions)
    return model.visual_request(
        model.embed(ids), torch.ones_like(ids), True, frames, unconditional_ids=empty, guidance_scale=scale
    )


def bench_batch(
    model: Any,
    preset: str,
    pictures: int,
    probe: Probe,
    positions: int = 32,
    scale: float = 3.0,
    prompt_length: int = 32,
    kernel: str | None = None,
    compile: bool = False,
) -> dict[str, Any]:
    """Measure one batch size and return a row of the table; times are milliseconds, medians over positions."""
    device = model.device
    reset_peak_memory(device)
    probe.clear()
    request = bench_request(model, pictures, prompt_length, scale, positions + _WARM_UP + 1)
    rows = len(request.prompts.rows)
    start = now(device)
    with torch.no_grad():
        step = visual_step(model, rows, kernel, compile)
    prepared = now(device) - start
    compiled = isinstance(step, CompiledStep) or step.static
    if not compiled:
        step = TimedStep(step.networks, device)
    timing = time_positions(step, request, positions, probe)
    memory = peak_memory(device) - probe.host_bytes
    work = work_per_position(model, rows, prompt_length + positions / 2)
    clock = "wall" if device.type == "cuda" else "cpu"
    reading, computing = probe.limits(clock)
    floor = max(work.bytes_read / reading, work.operations / computing)
    spent = getattr(timing.position, clock)
    row: dict[str, Any] = {
        "preset": preset,
        "batch": pictures,
        "rows": rows,
        "cpu_ms_per_position": timing.position.cpu * 1e3,
        "wall_ms_per_position": timing.position.wall * 1e3,
        "floor_ms_per_position": floor * 1e3,
        "floor_ratio": floor / spent,
        "peak_memory_mb": memory / 1e6,
        "read_gb_per_s": reading / 1e9,
        "gflop_per_s": computing / 1e9,
        "prefill_ms": getattr(timing.prefill, clock) * 1e3,
        "prepare_ms": getattr(prepared, clock) * 1e3,
        "mb_read_per_position": work.bytes_read / 1e6,
        "gflop_per_position": work.operations / 1e9,
        "positions": positions,
        "depth": model.config.vision_config.depth,
        "prompt_length": prompt_length,
        "guidance_scale": scale,
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "kernel": "compiled" if compiled else kernel_of(step.networks),
        "copy_mb": packed_bytes(model) / 1e6 if compiled or kernel_of(step.networks) != "plain" else 0.0,
        "clock": clock,
    }
    known = {name: getattr(value, clock) * 1e3 for name, value in timing.parts.items()}
    for name in ("lm", "depth", "sampling"):
        row[f"{name}_ms"] = known.get(name)
    row["other_ms"] = max(0.0, spent * 1e3 - sum(known.values())) if known else None
    return row


@torch.no_grad()
def bench_tower(model: Any, probe: Probe, repeat: int = 3) -> dict[str, float]:
    """Return milliseconds per picture of encoding to codes and decoding to pixels, and the share of the floor."""
    config, device = model.config.vision_config, model.device
    clock = "wall" if device.type == "cuda" else "cpu"
    pixels = torch.rand((1, 3, config.image_size, config.image_size), device=device, dtype=model.dtype) * 2 - 1
    codes = model.vision_tower.encode(pixels)
    operations = [0.0]

    def count(module: torch.nn.Module, given: Any, out: torch.Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        operations[0] += 2 * out.numel() * weight[0].numel()

    layers = [m for m in model.vision_tower.pixel_decoder.modules() if isinstance(m, torch.nn.Conv2d)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    model.vision_tower.decode(codes)
    for hook in hooks:
        hook.remove()
    probe.sample()
    times = {
        "encode_ms": getattr(measure(lambda: model.vision_tower.encode(pixels), repeat, device), clock) * 1e3,
        "decode_ms": getattr(measure(lambda: model.vision_tower.decode(codes), repeat, device), clock) * 1e3,
    }
    probe.sample()
    floor = operations[0] / probe.limits(clock)[1] * 1e3
    return times | {"decode_floor_ms": floor, "decode_floor_ratio": floor / times["decode_ms"]}


def bench_generation(
    model: Any,
    preset: str,
    batches: Sequence[int],
    probe: Probe,
    pixels: bool = True,
    on_row: Callable[[dict[str, Any]], None] | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Return a row for every batch size; `settings` are those of `bench_batch`."""
    tower = bench_tower(model, probe) if pixels else {}
    rows = []
    for pictures in batches:
        rows.append(bench_batch(model, preset, pictures, probe, **settings) | tower)
        if on_row is not None:
            on_row(rows[-1])
    return rows


def copy_note(model: Any) -> str | None:
    """Say why no copy of the weights is made although one would be possible; ``None`` if nothing needs saying."""
    if packable(model) is None and packed_bytes(model) > AUTO_LIMIT:
        size = packed_bytes(model) / 1e9
        return (
            f"weights are not laid out anew: the copy would take {size:.1f} GB; --kernel mkldnn makes it all the same"
        )
    return None
