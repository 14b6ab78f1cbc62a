"""Filters and draws over code logits: pure functions, with noise that depends on (seed, position, depth) alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_COLDEST = 1e-6  # below it, quotients overflow; the draw is the most likely code long before


@dataclass(frozen=True)
class SamplingOptions:
    """How visual codes are drawn.

    Args:
        guidance_scale: classifier-free guidance `s`; 1 is none.
        temperature: divides the logits; 0 takes the most likely code.
        top_k: keep the k most likely codes; 0 keeps all.
        top_p: keep the smallest set of codes whose probability reaches p, the one that crosses it included.

    Raises:
        ValueError: a value out of its range.
    """

    guidance_scale: float = 3.0
    temperature: float = 1.0
    top_k: int = 900
    top_p: float = 0.96

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


def draw_codes(logits: torch.Tensor, seeds: torch.Tensor, position: int, depth: int) -> torch.Tensor:
    """Draw one code ``(N,)`` per row of filtered ``logits`` (N, K) by the Gumbel-max rule.

    The noise of a row is a function of its seed ``seeds`` (N,) int64, the position and the depth: the same request
    gives the same codes alone or in a batch, and nothing is copied to the host.
    """
    return (logits + gumbel_noise(seeds, position, depth, logits.shape[-1])).argmax(-1)


def gumbel_noise(seeds: torch.Tensor, position: int, depth: int, size: int) -> torch.Tensor:
    """Return standard Gumbel noise ``(N, size)`` float32 from a counter-based generator."""
    column = torch.arange(size, dtype=torch.int64, device=seeds.device)
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
    seed = (seed + (1 << 63)) % (1 << 64) - (1 << 63)
    return torch.arange(rows, dtype=torch.int64, device=device) * 0x5851F42D + seed
