"""Quantizers: features -> codes -> quantised features (paper, eq. (2)-(4)), three kinds behind one interface.

Whatever the kind, ``codes`` are (..., D), ``partial_z_q`` are the cumulative sums (..., D, C) of the code vectors, and
``z_q`` (..., C) is the last of them, so the depth transformer and everything after it need not know which it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from vilau.configuration import VisionTowerConfig
from vilau.modeling import codebook_search
from vilau.modeling.codebook import DEFAULT_OPTIONS, CodebookOptions, Codebooks, with_value


@dataclass(frozen=True)
class Quantized:
    """Result of quantizing ``z_e`` (..., C).

    `codes` (..., D) int64 in [0, K), `None` for continuous tokens; `z_q` (..., C) with the straight-through gradient;
    `noisy_z_q` (..., C), the same with some codes replaced, for the pixel decoder in training (`z_q` itself where
    nothing was); `commitment`, a scalar that draws `z_e` to the codes; `codebook_loss`, a scalar that draws the code
    vectors to `z_e`, zero unless they are trained by gradients.
    """

    codes: torch.Tensor | None
    z_q: torch.Tensor
    noisy_z_q: torch.Tensor
    commitment: torch.Tensor
    codebook_loss: torch.Tensor


@dataclass(frozen=True)
class DepthStep:
    """One depth of a search: it was `asked` (N, width) for, it gave `codes` (N,) and their `vectors` (N, width), and
    the sum of code vectors so far is `partial` (N, C). The next step overwrites these tensors."""

    asked: torch.Tensor
    codes: torch.Tensor
    vectors: torch.Tensor
    partial: torch.Tensor


@dataclass(frozen=True)
class Comparison:
    """Features ``(N, C)`` and what they were quantised to: `codes` (N, D), `z_q` (N, C), the `anchor` (N, C) that the
    commitment loss draws them to, the sum of all `squared` distances, and, in training, how often each code was chosen,
    `count` (books, K), and the sum of what it was chosen for, `total` (books, K, width)."""

    codes: torch.Tensor
    z_q: torch.Tensor
    anchor: torch.Tensor
    squared: torch.Tensor
    count: torch.Tensor
    total: torch.Tensor


class Quantizer(Codebooks, ABC):
    """What residual and multi-codebook quantization have in common.

    Args:
        codebook_size: `K`.
        code_dim: `C`.
        depth: `D`, codes per position.
        books: number of codebooks: one for all depths, or one per depth.
        width: of a code vector.
        options: how the codebooks start and learn.
    """

    discrete = True
    residual = False  # a depth quantises what those before left over: `z_e` is committed to the mean partial sum

    def __init__(
        self, codebook_size: int, code_dim: int, depth: int, books: int, width: int, options: CodebookOptions
    ) -> None:
        super().__init__(books, codebook_size, width, options)
        self.code_dim, self.depth = code_dim, depth
        self.book_of_depth = [book if books > 1 else 0 for book in range(depth)]

    def book(self, depth: int) -> torch.Tensor:
        """Return the codebook ``(K, width)`` used at a depth (0-based), without gradient."""
        return self.books()[self.book_of_depth[depth]]

    def search(self, points: torch.Tensor, depth: int) -> torch.Tensor:
        """Return the index ``(N,)`` of the code of `depth` nearest to each row of ``points`` (N, width), float32."""
        return codebook_search.nearest_codes(points, self.book(depth))

    @torch.no_grad()
    def encode(self, z_e: torch.Tensor) -> torch.Tensor:
        """Return ``codes`` (..., D) of features ``z_e`` (..., C), eq. (3)."""
        features = z_e.detach().reshape(-1, self.code_dim).float()
        codes = torch.stack([step.codes for step in self.steps(features)], 1)
        return codes.reshape(*z_e.shape[:-1], self.depth)

    @abstractmethod
    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the code vectors ``(..., D, C)`` of ``codes`` (..., D), in the full width of ``z_q``."""

    @abstractmethod
    def code_vectors(self, codes: torch.Tensor, depth: int) -> torch.Tensor:
        """Return what ``codes`` (N,) of one depth add to ``z_q``: ``(N, C)``."""

    def partial_z_q(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the cumulative sums ``z_q^(d)`` ``(..., D, C)``, eq. (4)."""
        return self.embed(codes).cumsum(-2)

    def z_q(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the quantised features ``(..., C)``: the sum of all `D` code vectors."""
        return self.embed(codes).sum(-2)

    def partial_features(self, z_e: torch.Tensor) -> torch.Tensor:
        """Return what the first 1, 2 ... D codes of features ``z_e`` (..., C) keep of them: ``(..., D, C)``."""
        return self.partial_z_q(self.encode(z_e))

    def forward(self, z_e: torch.Tensor) -> Quantized:
        """Quantize ``z_e`` (..., C), in float32 also under autocast; in training mode the codebook learns from it.

        Depth by depth, so that memory grows with N and C but not with N D C.
        """
        with torch.autocast(z_e.device.type, enabled=False):
            features = z_e.float().reshape(-1, self.code_dim)
            if self.training and not bool(self.initialised):
                self.initialise(features)
            found = self._compare(features.detach())
            z_q = noisy = _straight_through(features, found.z_q)
            if self.training and self.options.noise:
                noisy = _straight_through(features, self.z_q(self.noisy(found.codes)))
            number = max(1, len(features)) * self.depth * self.width
            commitment = with_value((features - found.anchor).square().mean(), found.squared / number)
            loss = features.new_zeros(())
            if self.training and self.by_gradient:
                loss = self.pull(found.count, found.total, found.squared, number)
            elif self.training:
                self.update_averages(found.count, found.total, self._sampler(features.detach(), found.codes))
        z_q, noisy = (part.reshape(z_e.shape).to(z_e.dtype) for part in (z_q, noisy))
        return Quantized(found.codes.reshape(*z_e.shape[:-1], self.depth), z_q, noisy, commitment, loss)

    @torch.no_grad()
    def _compare(self, features: torch.Tensor) -> Comparison:
        """Search for features ``(N, C)`` and gather, in training, the statistics of what was found."""
        kept = self.books()
        shape = kept.shape if self.training else kept[:, :0].shape
        count, total = kept.new_zeros(shape[:2]), kept.new_zeros(shape)
        squared, codes, anchor, partial = features.new_zeros(()), [], torch.zeros_like(features), features
        for depth, step in enumerate(self.steps(features)):
            partial = step.partial
            codes.append(step.codes)
            squared += (step.asked - step.vectors).square().sum()
            if self.residual:
                anchor += partial / self.depth
            if self.training:
                book = self.book_of_depth[depth]
                count[book].index_add_(0, step.codes, torch.ones_like(step.asked[:, 0]))
                total[book].index_add_(0, step.codes, step.asked)
        return Comparison(torch.stack(codes, 1), partial, anchor if self.residual else partial, squared, count, total)

    def initialise(self, z_e: torch.Tensor, iterations: int = 10) -> None:
        """Set the codebooks from features ``z_e`` (..., C) of all processes, alike on each of them, as `init` says."""
        if self.options.init != "random":
            flat = z_e.detach().reshape(-1, self.code_dim).float()
            self._initialise(flat, iterations if self.options.init == "kmeans" else 0)
        self.finish_initialisation()

    @torch.no_grad()
    def noisy(self, codes: torch.Tensor) -> torch.Tensor:
        """Return ``codes`` (..., D) with each one, independently, replaced at the configured probability.

        The replacement is drawn evenly among all `K` codes (it can be the same one), or among the
        `noise_neighbours` code vectors nearest to the replaced one at its depth.
        """
        chosen = torch.rand(codes.shape, device=codes.device) < self.options.noise
        near = min(self.options.noise_neighbours, self.codebook_size - 1)
        if not near:
            return torch.where(chosen, torch.randint_like(codes, self.codebook_size), codes)
        codes = codes.clone()
        for depth in range(self.depth):
            own = codes[..., depth][chosen[..., depth]]
            around = codebook_search.neighbours(self.book(depth)[own], self.book(depth), near + 1)
            pick = torch.randint(1, near + 1, (len(own), 1), device=codes.device)
            codes[..., depth][chosen[..., depth]] = around.gather(1, pick).squeeze(1)
        return codes

    def _sampler(self, features: torch.Tensor, codes: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
        """Return a function that draws, alike on all processes, vectors that a codebook was asked for.

        Drawn evenly, with repetition, from features ``(N, C)`` with codes ``(N, D)`` at all depths of that codebook.
        """

        def sample(book: int, wanted: int) -> torch.Tensor:
            depths = [depth for depth, own in enumerate(self.book_of_depth) if own == book]

            def choose(number: int) -> torch.Tensor:
                return torch.randint(number, (min(wanted, number),), device="cpu")

            def read(numbers: torch.Tensor) -> torch.Tensor:
                rows, places = numbers // len(depths), numbers % len(depths)
                asked = features.new_empty((len(numbers), self.width))
                for place, depth in enumerate(depths):
                    own = places == place
                    asked[own] = self.asked_at(features[rows[own]], codes[rows[own]], depth)
                return asked

            return codebook_search.pick_rows(len(features) * len(depths), features.device, choose, read)

        return sample

    @abstractmethod
    def steps(self, features: torch.Tensor) -> Iterator[DepthStep]:
        """Go through the depths for features ``(N, C)``."""

    @abstractmethod
    def asked_at(self, features: torch.Tensor, codes: torch.Tensor, depth: int) -> torch.Tensor:
        """Return what a depth is asked to quantize, ``(N, width)``, of features (N, C) with ``codes`` (N, D)."""

    @abstractmethod
    def _initialise(self, features: torch.Tensor, iterations: int) -> None:
        """Set the codebooks from features ``(N, C)`` of all processes."""


class ResidualQuantizer(Quantizer):
    """`D` rounds of nearest-neighbour search on what the rounds before left over (`rq`, the paper's).

    Args:
        codebook_size: `K`.
        code_dim: `C`.
        depth: `D`; 1 is plain vector quantization.
        shared: one codebook for all depths (paper), or one per depth.
        options: how the codebook starts and learns.

    The commitment loss is RQ-VAE's: the mean over depths of ``|z_e - sg(z_q^(d))|^2``, whose gradient is that of the
    distance to the mean of the partial sums.
    """

    residual = True

    def __init__(
        self,
        codebook_size: int,
        code_dim: int,
        depth: int,
        shared: bool = True,
        options: CodebookOptions = DEFAULT_OPTIONS,
    ) -> None:
        super().__init__(codebook_size, code_dim, depth, 1 if shared else depth, code_dim, options)
        self.shared = shared

    def steps(self, features: torch.Tensor) -> Iterator[DepthStep]:
        residual, partial = features.clone(), torch.zeros_like(features)
        for depth in range(self.depth):
            codes = self.search(residual, depth)
            vectors = self.book(depth)[codes]
            partial += vectors
            yield DepthStep(residual, codes, vectors, partial)
            residual -= vectors

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        books = self.books()
        if self.shared:
            return F.embedding(codes, books[0])
        return torch.stack([books[d][codes[..., d]] for d in range(codes.shape[-1])], -2)

    def code_vectors(self, codes: torch.Tensor, depth: int) -> torch.Tensor:
        return self.book(depth)[codes]

    def asked_at(self, features: torch.Tensor, codes: torch.Tensor, depth: int) -> torch.Tensor:
        for before in range(depth):
            features = features - self.book(before)[codes[:, before]]
        return features

    def _initialise(self, features: torch.Tensor, iterations: int) -> None:
        """Depth by depth on the residuals; a shared codebook gives each depth an equal share of its codes."""
        residual, generator = features, torch.Generator().manual_seed(0)
        bounds = torch.linspace(0, self.codebook_size, self.depth + 1).round().long().tolist()
        for depth in range(self.depth):
            low, high = (bounds[depth], bounds[depth + 1]) if self.shared else (0, self.codebook_size)
            if high == low:
                continue
            centres = self.fit(residual, high - low, iterations, generator)
            self.set_book(self.book_of_depth[depth], low, centres)
            residual = residual - centres[codebook_search.nearest_codes(residual, centres)]


class MultiCodebookQuantizer(Quantizer):
    """`D` chunks of channels, each with a codebook of its own (`mcq`).

    Channels ``[d C/D, (d + 1) C/D)`` are quantised by the d-th codebook of width ``C/D``. A chunk's vector, padded with
    zeros to `C`, is what its code adds to ``z_q``: the cumulative sums mean what they do for residual quantization.

    Args:
        codebook_size: `K` of each codebook.
        code_dim: `C`, a multiple of `depth`.
        depth: `D`, the number of chunks.
        options: how the codebooks start and learn.

    The commitment loss is the mean of ``|z_e - sg(z_q)|^2``: a partial sum says nothing of the chunks after it.
    """

    def __init__(
        self, codebook_size: int, code_dim: int, depth: int, options: CodebookOptions = DEFAULT_OPTIONS
    ) -> None:
        if code_dim % depth:
            raise ValueError(f"code_dim {code_dim} does not divide into {depth} equal chunks of channels")
        super().__init__(codebook_size, code_dim, depth, depth, code_dim // depth, options)

    def _chunk(self, depth: int) -> slice:
        return slice(depth * self.width, (depth + 1) * self.width)

    def steps(self, features: torch.Tensor) -> Iterator[DepthStep]:
        partial = torch.zeros_like(features)
        for depth in range(self.depth):
            asked = features[:, self._chunk(depth)].contiguous()
            codes = self.search(asked, depth)
            vectors = self.book(depth)[codes]
            partial[:, self._chunk(depth)] = vectors
            yield DepthStep(asked, codes, vectors, partial)

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.code_vectors(codes[..., depth], depth) for depth in range(codes.shape[-1])], -2)

    def code_vectors(self, codes: torch.Tensor, depth: int) -> torch.Tensor:
        before = depth * self.width
        return F.pad(self.book(depth)[codes], (before, self.code_dim - before - self.width))

    def z_q(self, codes: torch.Tensor) -> torch.Tensor:
        books = self.books()
        return torch.cat([books[depth][codes[..., depth]] for depth in range(self.depth)], -1)

    def asked_at(self, features: torch.Tensor, codes: torch.Tensor, depth: int) -> torch.Tensor:
        return features[:, self._chunk(depth)]

    def _initialise(self, features: torch.Tensor, iterations: int) -> None:
        generator = torch.Generator().manual_seed(0)
        for depth in range(self.depth):
            asked = features[:, self._chunk(depth)].contiguous()
            self.set_book(depth, 0, self.fit(asked, self.codebook_size, iterations, generator))


class ContinuousTokens(nn.Module):
    """No quantization (`none`): the paper's point of comparison, for understanding only.

    ``z_q`` is ``z_e``; there are no codes, so nothing can be drawn, tokenized or supervised at visual positions.
    """

    discrete = False

    def __init__(self, code_dim: int) -> None:
        super().__init__()
        self.code_dim = code_dim

    def forward(self, z_e: torch.Tensor) -> Quantized:
        """Return ``z_e`` (..., C) as it is."""
        nothing = z_e.new_zeros((), dtype=torch.float32)
        return Quantized(None, z_e, z_e, nothing, nothing)

    def partial_features(self, z_e: torch.Tensor) -> torch.Tensor:
        """Return ``z_e`` as the only sum: ``(..., 1, C)``."""
        return z_e.unsqueeze(-2)

    def initialise(self, z_e: torch.Tensor) -> None:
        """Nothing is to be set."""

    def encode(self, z_e: torch.Tensor) -> torch.Tensor:
        """Raise ValueError: there are no codes."""
        raise ValueError(NO_CODES)

    def z_q(self, codes: torch.Tensor) -> torch.Tensor:
        """Raise ValueError: there are no codes."""
        raise ValueError(NO_CODES)

    def partial_z_q(self, codes: torch.Tensor) -> torch.Tensor:
        """Raise ValueError: there are no codes."""
        raise ValueError(NO_CODES)


NO_CODES = (
    "this model reads continuous tokens (quantizer 'none') and has no codes: it cannot draw, tokenize, or be trained "
    "or scored on visual positions. Give pixel_values and ask for text, or use a tower with quantizer 'rq' or 'mcq'"
)


def build_quantizer(config: VisionTowerConfig) -> Quantizer | ContinuousTokens:
    """Return the quantizer that a vision tower's configuration describes."""
    if config.quantizer == "none":
        return ContinuousTokens(config.code_width)
    options = CodebookOptions(
        config.codebook_learning,
        config.codebook_init,
        config.ema_decay,
        config.restart_unused_codes,
        config.code_noise,
        config.code_noise_neighbours,
    )
    if config.quantizer == "mcq":
        return MultiCodebookQuantizer(config.codebook_size, config.code_width, config.depth, options)
    return ResidualQuantizer(config.codebook_size, config.code_width, config.depth, config.shared_codebook, options)


def _straight_through(features: torch.Tensor, quantised: torch.Tensor) -> torch.Tensor:
    return features + (quantised - features).detach()


__all__ = [
    "NO_CODES",
    "CodebookOptions",
    "ContinuousTokens",
    "MultiCodebookQuantizer",
    "Quantized",
    "Quantizer",
    "ResidualQuantizer",
    "build_quantizer",
]
