"""Codebooks: how code vectors are kept, set from data, and learned - by moving averages or by gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from vilau.modeling import codebook_search

_SMOOTHING = 1e-5
_ROWS_PER_CODE = 16  # k-means looks at no more rows than this for each code, so that its memory does not grow


@dataclass(frozen=True)
class CodebookOptions:
    """How a codebook starts and learns.

    Args:
        learning: `ema`, moving averages of what falls on each code (VQ-VAE-2, RQ-VAE), or `gradient`: the code vectors
            are a frozen basis times a learned square matrix, ``codebook = basis @ map``, so that each step moves all
            of them, used or not (SimVQ, arXiv 2411.02038).
        init: `kmeans` of the first training batch, `data` (random features of that batch), or `random`.
        decay: of the moving averages.
        restart_unused: replace codes whose average count fell below 2 % of the mean by features of the current batch;
            with `ema` only: a gradient-trained basis is frozen, and its map takes unused codes along.
        noise: probability that a code is replaced by another one in what the pixel decoder sees while training.
        noise_neighbours: draw the replacement among so many nearest code vectors; 0 means among all.
    """

    learning: str = "ema"
    init: str = "kmeans"
    decay: float = 0.99
    restart_unused: bool = True
    noise: float = 0.0
    noise_neighbours: int = 0


DEFAULT_OPTIONS = CodebookOptions()


class Codebooks(nn.Module):
    """One or more codebooks of `K` vectors, float32 whatever the model's dtype: in bfloat16 many codes would change.

    Kept by moving averages: buffers `codebook`, `ema_sum` (books, K, width) and `ema_count` (books, K). By gradients:
    buffer `basis` (books, K, width) and parameter `map` (books, width, width), at first the identity.

    Args:
        books: number of codebooks.
        codebook_size: `K`.
        width: of one code vector.
        options: how they start and learn.
    """

    codebook: torch.Tensor
    ema_count: torch.Tensor
    ema_sum: torch.Tensor
    basis: torch.Tensor
    initialised: torch.Tensor

    def __init__(self, books: int, codebook_size: int, width: int, options: CodebookOptions) -> None:
        super().__init__()
        self.codebook_size, self.width, self.options = codebook_size, width, options
        fresh = torch.randn(books, codebook_size, width, dtype=torch.float32) * width**-0.5
        if options.learning == "gradient":
            self.register_buffer("basis", fresh)
            self.map = nn.Parameter(torch.eye(width, dtype=torch.float32).repeat(books, 1, 1))
        else:
            self.register_buffer("codebook", fresh)
            self.register_buffer("ema_count", torch.ones(books, codebook_size, dtype=torch.float32))
            self.register_buffer("ema_sum", self.codebook.clone())
        self.register_buffer("initialised", torch.zeros(1, dtype=torch.long))
        self._mapped: tuple[tuple[int, ...], torch.Tensor] | None = None

    @property
    def by_gradient(self) -> bool:
        """Whether the code vectors are trained by the optimizer."""
        return self.options.learning == "gradient"

    def books(self) -> torch.Tensor:
        """Return all code vectors ``(books, K, width)``, without gradient."""
        if not self.by_gradient:
            return self.codebook
        state = (self.map._version, self.basis._version, self.map.data_ptr(), self.basis.data_ptr())
        if self._mapped is None or self._mapped[0] != state:
            with torch.inference_mode(False):
                self._mapped = (state, self.mapped_books().detach())
        return self._mapped[1]

    def mapped_books(self) -> torch.Tensor:
        """Return ``basis @ map`` (books, K, width) with its gradient."""
        with torch.autocast(self.basis.device.type, enabled=False):
            return self.basis @ self.map

    def train(self, mode: bool = True) -> Codebooks:
        self._mapped = None  # whatever changed the map without the library noticing ends here
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Codebooks:
        """Move between devices but never leave float32."""

        def keep_float32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved.float() if moved.is_floating_point() and moved.dtype != torch.float32 else moved

        self._mapped = None
        buffers = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        weights = {name: weight.data for name, weight in self._parameters.items() if weight is not None}
        super()._apply(keep_float32, recurse)
        for name, before in buffers.items():  # a cast to half precision and back must not round the codebook
            if before.is_floating_point() and not before.is_meta:
                after = self._buffers[name]
                self._buffers[name] = before if after is None else before.to(after.device)
        for name, before in weights.items():
            weight = self._parameters[name]
            if weight is not None and not before.is_meta:
                weight.data = before.to(weight.device)
        return self

    @torch.no_grad()
    def set_book(self, book: int, low: int, centres: torch.Tensor) -> None:
        """Put ``centres`` (M, width) at the codes from `low` on."""
        part = slice(low, low + len(centres))
        if self.by_gradient:
            self.map[book].copy_(torch.eye(self.width, device=self.map.device))
            self.basis[book, part] = centres
        else:
            self.codebook[book, part] = centres

    @torch.no_grad()
    def finish_initialisation(self) -> None:
        """Agree with the other processes on the new code vectors and start the averages from them."""
        if self.by_gradient:
            codebook_search.copy_from_first(self.basis, self.map.data)
        else:
            codebook_search.copy_from_first(self.codebook)
            self.ema_sum.copy_(self.codebook)
            self.ema_count.fill_(1.0)
        self.initialised.fill_(1)

    @torch.no_grad()
    def fit(self, points: torch.Tensor, k: int, iterations: int, generator: torch.Generator) -> torch.Tensor:
        """Return ``k`` code vectors (k, width) for the ``points`` (N, width) of all processes.

        They are k-means centres, or, without iterations, random points. Warns where there are too few points for so
        many codes; the surplus codes then repeat others and stay unused until they are restarted.
        """
        total = codebook_search.total_rows(points)
        if total < k:
            warnings.warn(
                f"a first batch of {total} vectors cannot set {k} codes: {k - total} of them repeat others. Start with "
                "a larger batch (batch_size x positions), a smaller codebook_size, or codebook_init 'random'",
                stacklevel=2,
            )
        limit = max(_ROWS_PER_CODE * k, 1 << 12)
        if total > limit:
            rows = codebook_search.pick_rows(points, lambda number: torch.randperm(number, generator=generator)[:limit])
        else:
            rows = codebook_search.pick_rows(points, torch.arange)
        return codebook_search.k_means(rows, k, iterations, generator)[0]

    @torch.no_grad()
    def update_averages(self, book_of_depth: list[int], codes: torch.Tensor, asked: torch.Tensor) -> None:
        """Move the averages towards this batch's statistics, summed over processes; restart what is no longer used.

        Args:
            book_of_depth: which codebook each depth reads.
            codes: ``(N, D)``.
            asked: ``(N, D, width)``, what each depth was asked to quantize.
        """
        count, total = torch.zeros_like(self.ema_count), torch.zeros_like(self.ema_sum)
        for depth, book in enumerate(book_of_depth):
            count[book].index_add_(0, codes[:, depth], torch.ones_like(codes[:, depth], dtype=count.dtype))
            total[book].index_add_(0, codes[:, depth], asked[:, depth])
        codebook_search.sum_over_processes(count, total)
        self.ema_count.lerp_(count, 1 - self.options.decay)
        self.ema_sum.lerp_(total, 1 - self.options.decay)
        if self.options.restart_unused:
            for book in range(len(self.ema_count)):
                depths = [depth for depth, own in enumerate(book_of_depth) if own == book]
                self._restart(book, asked if len(depths) == asked.shape[1] else asked[:, depths])
        mass = self.ema_count.sum(1, keepdim=True)
        smooth = (self.ema_count + _SMOOTHING) / (mass + self.codebook_size * _SMOOTHING) * mass
        self.codebook.copy_(self.ema_sum / smooth.unsqueeze(-1))

    def _restart(self, book: int, asked: torch.Tensor) -> None:
        """Give unused codes random vectors of the batch, the same on every process.

        A batch with fewer vectors than unused codes restarts as many codes as it has vectors; the others wait.
        """
        mean = self.ema_count[book].mean()
        unused = (self.ema_count[book] < 0.02 * mean).nonzero().squeeze(1)
        rows = asked.reshape(-1, self.width)
        unused = unused[: codebook_search.total_rows(rows)]
        if not len(unused):
            return
        chosen = codebook_search.pick_rows(rows, lambda number: torch.randint(number, (len(unused),), device="cpu"))
        refill = mean.clamp_min(_SMOOTHING)
        self.ema_count[book, unused] = refill
        self.ema_sum[book, unused] = chosen * refill
