"""Residual quantization of encoder features with a codebook learned by moving averages (paper, eq. (2)-(4))."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

_CHUNK_ENTRIES = 1 << 26  # distances computed at once; bounds the memory of the search
_SMOOTHING = 1e-5


@dataclass(frozen=True)
class Quantized:
    """Result of quantizing ``z_e`` (..., C).

    `codes` (..., D) int64 in [0, K); `z_q` (..., C) with the straight-through gradient; `commitment`, a scalar: mean
    over depths of the squared distance between `z_e` and the stopped partial sums.
    """

    codes: torch.Tensor
    z_q: torch.Tensor
    commitment: torch.Tensor


class ResidualQuantizer(nn.Module):
    """`D` rounds of nearest-neighbour search on what the rounds before left over.

    The codebook is a float32 buffer whatever the model's dtype: in bfloat16 a large share of the codes would change.

    Args:
        codebook_size: `K`.
        code_dim: `C`.
        depth: `D`; 1 is plain vector quantization.
        shared: one codebook for all depths (paper), or one per depth.
        decay: of the moving averages.
        restart_unused: replace codes whose average count fell below 2 % of the mean by features of the current batch.
    """

    codebook: torch.Tensor
    ema_count: torch.Tensor
    ema_sum: torch.Tensor
    initialised: torch.Tensor

    def __init__(
        self,
        codebook_size: int,
        code_dim: int,
        depth: int,
        shared: bool = True,
        decay: float = 0.99,
        restart_unused: bool = True,
    ) -> None:
        super().__init__()
        self.codebook_size, self.code_dim, self.depth = codebook_size, code_dim, depth
        self.shared, self.decay, self.restart_unused = shared, decay, restart_unused
        books = 1 if shared else depth
        codebook = torch.randn(books, codebook_size, code_dim, dtype=torch.float32) * code_dim**-0.5
        self.register_buffer("codebook", codebook)
        self.register_buffer("ema_count", torch.ones(books, codebook_size, dtype=torch.float32))
        self.register_buffer("ema_sum", self.codebook.clone())
        self.register_buffer("initialised", torch.zeros(1, dtype=torch.long))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ResidualQuantizer:
        """Move between devices but never leave float32."""

        def keep_float32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved.float() if moved.is_floating_point() and moved.dtype != torch.float32 else moved

        saved = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(keep_float32, recurse)
        for name, before in saved.items():  # a cast to half precision and back must not round the codebook
            if before.is_floating_point() and not before.is_meta:
                after = self._buffers[name]
                self._buffers[name] = before if after is None else before.to(after.device)
        return self

    def book(self, depth: int) -> torch.Tensor:
        """Return the codebook ``(K, C)`` used at a depth (0-based)."""
        return self.codebook[0 if self.shared else depth]

    def search(self, residual: torch.Tensor, depth: int) -> torch.Tensor:
        """Return the index ``(N,)`` of the nearest code for each row of ``residual`` (N, C), in float32."""
        rows = max(1, _CHUNK_ENTRIES // self.codebook_size)
        return torch.cat([_nearest(part, self.book(depth)) for part in residual.split(rows)])

    @torch.no_grad()
    def encode(self, z_e: torch.Tensor) -> torch.Tensor:
        """Return ``codes`` (..., D) of features ``z_e`` (..., C), eq. (3)."""
        residual = z_e.detach().reshape(-1, self.code_dim).float()
        codes = []
        for depth in range(self.depth):
            codes.append(self.search(residual, depth))
            residual = residual - self.book(depth)[codes[-1]]
        return torch.stack(codes, 1).reshape(*z_e.shape[:-1], self.depth)

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the code vectors ``(..., D, C)`` of ``codes`` (..., D)."""
        if self.shared:
            return nn.functional.embedding(codes, self.codebook[0])
        return torch.stack([self.codebook[d][codes[..., d]] for d in range(codes.shape[-1])], -2)

    def partial_z_q(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the cumulative sums ``z_q^(d)`` ``(..., D, C)``, eq. (4)."""
        return self.embed(codes).cumsum(-2)

    def z_q(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the quantised features ``(..., C)``: the sum of all `D` code vectors."""
        return self.embed(codes).sum(-2)

    def forward(self, z_e: torch.Tensor) -> Quantized:
        """Quantize ``z_e`` (..., C); in training mode also update the codebook from this batch."""
        if self.training and not bool(self.initialised):
            self.initialise(z_e)
        codes = self.encode(z_e)
        partial = self.partial_z_q(codes)  # (..., D, C)
        features = z_e.float()
        commitment = (features.unsqueeze(-2) - partial.detach()).square().mean()
        z_q = features + (partial[..., -1, :] - features).detach()
        if self.training:
            self._update(features.detach(), codes, partial)
        return Quantized(codes, z_q.to(z_e.dtype), commitment)

    @torch.no_grad()
    def initialise(self, z_e: torch.Tensor, iterations: int = 10) -> None:
        """Set the codebook by level-wise k-means on features ``z_e`` (..., C) of all ranks.

        A shared codebook gives each depth an equal share of its entries; separate ones are fitted whole.
        """
        residual = _gather_rows(z_e.detach().reshape(-1, self.code_dim).float())
        generator = torch.Generator().manual_seed(0)
        bounds = torch.linspace(0, self.codebook_size, self.depth + 1).round().long().tolist()
        for depth in range(self.depth):
            low, high = (bounds[depth], bounds[depth + 1]) if self.shared else (0, self.codebook_size)
            if high == low:
                continue
            centres, assigned = _k_means(residual, high - low, iterations, generator)
            self.book(depth)[low:high] = centres
            residual = residual - centres[assigned]
        self.ema_sum.copy_(self.codebook)
        self.ema_count.fill_(1.0)
        self.initialised.fill_(1)

    @torch.no_grad()
    def _update(self, features: torch.Tensor, codes: torch.Tensor, partial: torch.Tensor) -> None:
        """Move the averages towards this batch's statistics, summed over ranks; restart what is no longer used."""
        flat = features.reshape(-1, 1, self.code_dim)
        left_over = flat - partial.reshape(-1, self.depth, self.code_dim)
        residuals = torch.cat([flat, left_over[:, :-1]], 1)  # (N, D, C): what each depth was asked to quantize
        codes = codes.reshape(-1, self.depth)
        count, total = torch.zeros_like(self.ema_count), torch.zeros_like(self.ema_sum)
        for depth in range(self.depth):
            book = 0 if self.shared else depth
            count[book].index_add_(0, codes[:, depth], torch.ones_like(codes[:, depth], dtype=count.dtype))
            total[book].index_add_(0, codes[:, depth], residuals[:, depth])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(count)
            dist.all_reduce(total)
        self.ema_count.lerp_(count, 1 - self.decay)
        self.ema_sum.lerp_(total, 1 - self.decay)
        if self.restart_unused:
            self._restart(residuals)
        mass = self.ema_count.sum(1, keepdim=True)
        smooth = (self.ema_count + _SMOOTHING) / (mass + self.codebook_size * _SMOOTHING) * mass
        self.codebook.copy_(self.ema_sum / smooth.unsqueeze(-1))

    def _restart(self, residuals: torch.Tensor) -> None:
        """Give unused codes a random residual of the batch, chosen alike on every rank."""
        threshold = 0.02 * self.ema_count.mean(1, keepdim=True)
        for book in range(self.codebook.shape[0]):
            unused = (self.ema_count[book] < threshold[book]).nonzero().squeeze(1)
            if not len(unused):
                continue
            pool = residuals if self.shared else residuals[:, book : book + 1]
            rows = _gather_rows(pool.reshape(-1, self.code_dim))
            chosen = rows[torch.randint(len(rows), (len(unused),), device="cpu").to(rows.device)]
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.broadcast(chosen, 0)
            refill = self.ema_count[book].mean().clamp_min(_SMOOTHING)
            self.ema_count[book, unused] = refill
            self.ema_sum[book, unused] = chosen * refill


def _nearest(points: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """Return the index ``(N,)`` of the row of ``book`` (K, C) nearest to each of ``points`` (N, C), autocast or not."""
    with torch.autocast(points.device.type, enabled=False):
        return torch.addmm(book.square().sum(1) / 2, points, book.t(), alpha=-1).argmin(1)


def _gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """Concatenate equally many rows from every rank."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def _k_means(
    points: torch.Tensor, k: int, iterations: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``k`` centres (k, C) and the centre of each point (N,); empty centres restart at random points."""
    if len(points) >= k:
        start = torch.randperm(len(points), generator=generator)[:k]
    else:
        start = torch.randint(len(points), (k,), generator=generator)
    centres = points[start.to(points.device)].clone()
    assigned = torch.zeros(len(points), dtype=torch.long, device=points.device)
    for _ in range(iterations):
        assigned = _nearest(points, centres)
        count = torch.zeros(k, device=points.device).index_add_(0, assigned, torch.ones_like(points[:, 0]))
        total = torch.zeros_like(centres).index_add_(0, assigned, points)
        empty = (count == 0).nonzero().squeeze(1)
        centres = total / count.clamp_min(1).unsqueeze(1)
        if len(empty):
            pick = torch.randint(len(points), (len(empty),), generator=generator).to(points.device)
            centres[empty] = points[pick]
    assigned = _nearest(points, centres)
    return centres, assigned
