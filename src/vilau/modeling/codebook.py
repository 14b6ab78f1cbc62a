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
            are a frozen basis times a learned square matrix, so that each step moves all of them, used or not (SimVQ,
            arXiv 2411.02038).
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
    buffer `basis` (books, K, width) and parameter `map` (books, width, width), ``codebook = basis (1 + map)``. The map
    is zero at first, so that the codebook starts as its basis and weight decay draws it back there, not to zero.

    Args:
        books: number of codebooks.
        codebook_size: `K`.
        width: of one code vector.
        options: how they start and learn.

    `batches_per_update` may be set for gradient accumulation: moving averages then move once for the statistics of so
    many batches, as if these had come as one; codes restart from the last of them.
    """

    batches_per_update: int = 1
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
            self.map = nn.Parameter(torch.zeros(books, width, width, dtype=torch.float32))
        else:
            self.register_buffer("codebook", fresh)
            self.register_buffer("ema_count", torch.ones(books, codebook_size, dtype=torch.float32))
            self.register_buffer("ema_sum", self.codebook.clone())
        self.register_buffer("initialised", torch.zeros(1, dtype=torch.long))
        self._mapped: tuple[tuple[int, ...], torch.Tensor] | None = None
        self._held: tuple[torch.Tensor, torch.Tensor] | None = None  # statistics of batches that wait for others
        self._batches_held = 0

    @property
    def by_gradient(self) -> bool:
        """Whether the code vectors are trained by the optimizer."""
        return self.options.learning == "gradient"

    def books(self) -> torch.Tensor:
        """Return all code vectors ``(books, K, width)``, without gradient."""
        if not self.by_gradient:
            return self.codebook
        if torch.compiler.is_compiling():  # a compiled step reads what was there before, or multiplies each time
            return self.mapped_books().detach() if self._mapped is None else self._mapped[1]
        state = (self.map._version, self.basis._version, self.map.data_ptr(), self.basis.data_ptr())
        if self._mapped is None or self._mapped[0] != state:
            with torch.inference_mode(False):
                self._mapped = (state, self.mapped_books().detach())
        return self._mapped[1]

    def mapped_books(self) -> torch.Tensor:
        """Return ``basis (1 + map)`` (books, K, width) with the gradient of the map."""
        with torch.autocast(self.basis.device.type, enabled=False):
            return torch.baddbmm(self.basis, self.basis, self.map)

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
            self.map[book].zero_()
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

        def choose(number: int) -> torch.Tensor:
            if number < k:
                warnings.warn(
                    f"a first batch of {number} vectors cannot set {k} codes: {k - number} of them repeat others. "
                    "Start with a larger batch (batch_size x positions), a smaller codebook_size, or codebook_init "
                    "'random'",
                    stacklevel=2,
                )
            limit = max(_ROWS_PER_CODE * k, 1 << 12)
            return torch.randperm(number, generator=generator)[:limit] if number > limit else torch.arange(number)

        rows = codebook_search.pick_rows(len(points), points.device, choose, lambda numbers: points[numbers])
        return codebook_search.k_means(rows, k, iterations, generator)[0]

    @torch.no_grad()
    def update_averages(
        self, count: torch.Tensor, total: torch.Tensor, sample: Callable[[int, int], torch.Tensor]
    ) -> None:
        """Move the averages towards this batch's statistics, summed over processes; restart what is no longer used.

        Args:
            count: ``(books, K)``, how often each code was chosen.
            total: ``(books, K, width)``, the sum of what it was chosen for.
            sample: given a codebook's number and how many codes want to restart, at most so many of the vectors
                ``(M, width)`` that the batch asked this codebook for, the same on every process.
        """
        if self._held is not None:
            count, total = count + self._held[0], total + self._held[1]
        self._batches_held += 1
        if self._batches_held < self.batches_per_update:
            self._held = (count, total)
            return
        self._held, self._batches_held = None, 0
        codebook_search.sum_over_processes(count, total)
        self.ema_count.lerp_(count, 1 - self.options.decay)
        self.ema_sum.lerp_(total, 1 - self.options.decay)
        if self.options.restart_unused:
            for book in range(len(self.ema_count)):
                self._restart(book, sample)
        mass = self.ema_count.sum(1, keepdim=True)
        smooth = (self.ema_count + _SMOOTHING) / (mass + self.codebook_size * _SMOOTHING) * mass
        torch.div(self.ema_sum, smooth.unsqueeze(-1), out=self.codebook)

    def _restart(self, book: int, sample: Callable[[int, int], torch.Tensor]) -> None:
        """Give unused codes random vectors of the batch; with fewer vectors than such codes, the others wait."""
        mean = self.ema_count[book].mean()
        unused = (self.ema_count[book] < 0.02 * mean).nonzero().squeeze(1)
        if not len(unused):
            return
        chosen = sample(book, len(unused))
        unused = unused[: len(chosen)]
        refill = mean.clamp_min(_SMOOTHING)
        self.ema_count[book, unused] = refill
        self.ema_sum[book, unused] = chosen * refill

    def pull(self, count: torch.Tensor, total: torch.Tensor, squared: torch.Tensor, number: int) -> torch.Tensor:
        """Return the codebook loss, with its gradient in the map.

        It is the mean of ``|asked - e(k)|^2`` over `number` components, whose sum is `squared`. Its gradient in the
        code vectors is ``2 (count e - total) / number``: the statistics of moving averages are all it needs.

        Args:
            count: ``(books, K)``.
            total: ``(books, K, width)``.
            squared: a scalar.
            number: components that were compared.
        """
        books = self.mapped_books()
        slope = torch.addcmul(-total, count.unsqueeze(-1), books.detach()) * (2 / number)
        return with_value((books * slope).sum(), squared / number)


def with_value(slope: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return a scalar with the gradient of one tensor and the value of another."""
    return slope + (value - slope).detach()
