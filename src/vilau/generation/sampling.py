"""Filters and draws over code logits: pure functions, with noise that depends on (seed, position, depth) alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vilau.generation.guidance import SCHEDULES

_TIES = 64  # candidates taken beyond top-k, so that codes that tie with the k-th are kept as `filter_logits` keeps them
_COLDEST = 1e-6  # below it, quotients overflow; the draw is the most likely code long before


@dataclass(frozen=True)
class SamplingOptions:
    """How visual codes are drawn.

    Args:
        guidance_scale: classifier-free guidance `s`; 1 is none.
        temperature: divides the logits; 0 takes the most likely code.
        top_k: keep the k most likely codes; 0 keeps all.
        top_p: keep the smallest set of codes whose probability reaches p, the one that crosses it included.
        guidance_schedule: `constant`, or a scale that grows from 1 to `s` over a picture's positions, in a straight
            line (`linear`) or slowly at both ends (`cosine`).
        guidance_interval: the part of each picture's positions, from 0 to 1, that is guided at all.

    Raises:
        ValueError: a value out of its range.
    """

    guidance_scale: float = 3.0
    temperature: float = 1.0
    top_k: int = 900
    top_p: float = 0.96
    guidance_schedule: str = "constant"
    guidance_interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("guidance_scale", self.guidance_scale, 0.0, 100.0),
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_k", self.top_k, 0, 1 << 31),
        ):
            if not low <= value <= high:
                raise ValueError(f"{name} is {value}; it must lie between {low:g} and {high:g}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}; it must lie above 0 and at most at 1")
        if self.guidance_schedule not in SCHEDULES:
            raise ValueError(
                f"guidance_schedule is {self.guidance_schedule!r}; it must be one of {', '.join(SCHEDULES)}"
            )
        low, high = self.guidance_interval
        if not 0.0 <= low < high <= 1.0:
            raise ValueError(f"guidance_interval is {low}, {high}; it must be two growing numbers from 0 to 1")


@dataclass(frozen=True)
class SamplingRows:
    """The filters of a batch in which every picture may have its own, as tensors on the model's device.

    `temperature`, `top_p` (B, 1) float32; `last` (B, 1) int64, the rank of the last code that top-k keeps; `greedy`
    (B,) bool; `width`, how many of the likeliest codes are looked at. `sampled`, `nucleus` and `mixed` say, on the
    host, whether any row is drawn at all, whether any has a top-p, and whether some rows are greedy beside drawn ones.
    """

    temperature: torch.Tensor
    top_p: torch.Tensor
    last: torch.Tensor
    greedy: torch.Tensor
    width: int
    sampled: bool
    nucleus: bool
    mixed: bool


def sampling_rows(options: Sequence[SamplingOptions], size: int, device: torch.device | str) -> SamplingRows:
    """Return the filters of one picture per entry of ``options``, for codebooks of ``size`` codes."""
    drawn = [o for o in options if o.temperature > 0]
    kept = [min(o.top_k or size, size) for o in options]
    needed = max((k for o, k in zip(options, kept, strict=True) if o.temperature > 0), default=1)
    kept = [min(k, needed) for k in kept]

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32).unsqueeze(1).to(device)

    return SamplingRows(
        temperature=column([max(o.temperature, _COLDEST) for o in options]),
        top_p=column([o.top_p if o.top_p < 1 else float("inf") for o in options]),
        last=torch.tensor(kept).unsqueeze(1).to(device) - 1,
        greedy=torch.tensor([o.temperature == 0 for o in options]).to(device),
        width=min(size, needed + _TIES),
        sampled=bool(drawn),
        nucleus=any(o.top_p < 1 for o in drawn),
        mixed=0 < len(drawn) < len(options),
    )


def sample_codes(
    logits: torch.Tensor, rows: SamplingRows, seeds: torch.Tensor, position: int | torch.Tensor, depth: int
) -> torch.Tensor:
    """Return codes ``(B,)`` as `draw_codes` of `filter_logits` would, at a fraction of the work.

    Only the likeliest codes are sorted, and only they get noise. Nothing is copied to the host.

    Args:
        logits: ``(B, K)``, guided.
        rows: filters of each row.
        seeds: ``(B,)`` int64.
        position: of all rows, or one per row ``(B,)``.
        depth: 0-based.
    """
    logits = logits.float()
    if not rows.sampled:
        return logits.argmax(-1)
    values, columns = logits.topk(rows.width, -1)
    values = values / rows.temperature
    values = values.masked_fill(values < values.gather(1, rows.last), float("-inf"))
    if rows.nucleus:
        probability = values.softmax(-1)
        before = probability.cumsum(-1) - probability
        values = values.masked_fill(before >= rows.top_p, float("-inf"))
    values = values + gumbel_noise(seeds, position, depth, columns)
    codes = columns.gather(1, values.argmax(-1, keepdim=True)).squeeze(1)
    return torch.where(rows.greedy, columns[:, 0], codes) if rows.mixed else codes


def filter_logits(logits: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    """Return ``logits`` (N, K) after temperature, top-k and top-p, in this order; dropped codes are ``-inf``."""
    logits = logits.float()
    if options.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, float("-inf")).scatter(-1, best, 0.0)
    logits = logits / max(options.temperature, _COLDEST)
    if 0 < options.top_k < logits.shape[-1]:
        lowest = logits.topk(options.top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    if options.top_p < 1:
        ordered, index = logits.softmax(-1).sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of everything more likely
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, index, before >= options.top_p)
        logits = logits.masked_fill(dropped, float("-inf"))
    return logits


def draw_codes(logits: torch.Tensor, seeds: torch.Tensor, position: int | torch.Tensor, depth: int) -> torch.Tensor:
    """Draw one code ``(N,)`` per row of filtered ``logits`` (N, K) by the Gumbel-max rule.

    The noise of a row is a function of its seed ``seeds`` (N,) int64, the position and the depth: the same request
    gives the same codes alone or in a batch, and nothing is copied to the host.
    """
    return (logits + gumbel_noise(seeds, position, depth, logits.shape[-1])).argmax(-1)


def gumbel_noise(
    seeds: torch.Tensor, position: int | torch.Tensor, depth: int, columns: int | torch.Tensor
) -> torch.Tensor:
    """Return standard Gumbel noise float32 from a counter-based generator.

    Args:
        seeds: ``(N,)`` int64.
        position: one for all rows, or ``(N,)`` int64.
        depth: 0-based.
        columns: the first so many codes, for noise ``(N, columns)``; or codes ``(N, k)``, for noise ``(N, k)``.
    """
    column = columns
    if isinstance(column, int):
        column = torch.arange(column, dtype=torch.int64, device=seeds.device)
    state = mix(mix(seeds + 0x632BE5AB) + (position << 8) + depth)
    bits = mix(state.unsqueeze(1) + column * -0x61C8864680B583EB)
    uniform = ((bits >> 41) & 0x7FFFFF).float().add(0.5).div(1 << 23)  # exact in float32, so never 0 or 1
    return -torch.log(-torch.log(uniform))


def mix(x: torch.Tensor) -> torch.Tensor:
    """Scramble 64-bit integers (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def row_seeds(seed: int, rows: int, device: torch.device | str) -> torch.Tensor:
    """Return one seed per row ``(rows,)``: row 0 of any batch has the request's own seed, any integer modulo 2^64."""
    seed = wrapped_seed(seed)
    return torch.arange(rows, dtype=torch.int64, device=device) * 0x5851F42D + seed


def wrapped_seed(seed: int) -> int:
    """Return any integer as the 64-bit one that it is modulo 2^64."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
