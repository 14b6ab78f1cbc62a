"""Quantizers: features -> codes -> quantised features (paper, eq. (2)-(4)), three kinds behind one interface.

Whatever the kind, ``codes`` are (..., D), ``partial_z_q`` are the cumulative sums (..., D, C) of the code vectors, and
``z_q`` (..., C) is the last of them, so the depth transformer and everything after it need not know which it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from vilau.configuration import VisionTowerConfig
from vilau.modeling import codebook_search
from vilau.modeling.codebook import DEFAULT_OPTIONS, CodebookOptions, Codebooks


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


class Quantizer(Codebooks):
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

    def encode(self, z_e: torch.Tensor) -> torch.Tensor:
        """Return ``codes`` (..., D) of features ``z_e`` (..., C), eq. (3)."""
        raise NotImplementedError

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the code vectors ``(..., D, C)`` of ``codes`` (..., D), in the full width of ``z_q``."""
        raise NotImplementedError

    def code_vectors(self, codes: torch.Tensor, depth: int) -> torch.Tensor:
        """Return what ``codes`` (N,) of one depth add to ``z_q``: ``(N, C)``."""
        raise NotImplementedError

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
        """Quantize ``z_e`` (..., C), in float32 also under autocast; in training mode the codebook learns from it."""
        with torch.autocast(z_e.device.type, enabled=False):
            features = z_e.float()
            if self.training and not bool(self.initialised):
                self.initialise(features)
            codes = self.encode(features)
            partial = self.partial_z_q(codes)  # (..., D, C)
            z_q = noisy = _straight_through(features, partial[..., -1, :])
            if self.training and self.options.noise:
                noisy = _straight_through(features, self.z_q(self.noisy(codes)))
            commitment, loss = self._commitment(features, partial), features.new_zeros(())
            if self.training:
                flat = features.detach().reshape(-1, self.code_dim)
                rows = codes.reshape(-1, self.depth)
                asked = self._asked(flat, partial.reshape(-1, self.depth, self.code_dim))
                if self.by_gradient:
                    loss = self._codebook_loss(rows, asked)
                else:
                    self.update_averages(self.book_of_depth, rows, asked)
        return Quantized(codes, z_q.to(z_e.dtype), noisy.to(z_e.dtype), commitment, loss)

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

    def _codebook_loss(self, codes: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """Mean squared distance of each code vector to what it was to stand for, with the gradient of the vectors.

        The gradient counterpart of the moving average: code ``e(k_d)`` is drawn to ``r_{d-1}``, which is not moved.
        """
        books = self.mapped_books()
        distances = [
            (asked[:, depth] - F.embedding(codes[:, depth], books[book])).square().mean()
            for depth, book in enumerate(self.book_of_depth)
        ]
        return torch.stack(distances).mean()

    def _commitment(self, features: torch.Tensor, partial: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _asked(self, features: torch.Tensor, partial: torch.Tensor) -> torch.Tensor:
        """Return what each depth was asked to quantize, ``(N, D, width)``, of features (N, C) and sums (N, D, C)."""
        raise NotImplementedError

    def _initialise(self, features: torch.Tensor, iterations: int) -> None:
        raise NotImplementedError


class ResidualQuantizer(Quantizer):
    """`D` rounds of nearest-neighbour search on what the rounds before left over (`rq`, the paper's).

    Args:
        codebook_size: `K`.
        code_dim: `C`.
        depth: `D`; 1 is plain vector quantization.
        shared: one codebook for all depths (paper), or one per depth.
        options: how the codebook starts and learns.
    """

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

    @torch.no_grad()
    def encode(self, z_e: torch.Tensor) -> torch.Tensor:
        residual = z_e.detach().reshape(-1, self.code_dim).float()
        codes = []
        for depth in range(self.depth):
            codes.append(self.search(residual, depth))
            residual = residual - self.book(depth)[codes[-1]]
        return torch.stack(codes, 1).reshape(*z_e.shape[:-1], self.depth)

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        books = self.books()
        if self.shared:
            return F.embedding(codes, books[0])
        return torch.stack([books[d][codes[..., d]] for d in range(codes.shape[-1])], -2)

    def code_vectors(self, codes: torch.Tensor, depth: int) -> torch.Tensor:
        return self.book(depth)[codes]

    def _commitment(self, features: torch.Tensor, partial: torch.Tensor) -> torch.Tensor:
        """RQ-VAE's: the mean over depths of the squared distance between `z_e` and the partial sums."""
        return (features.unsqueeze(-2) - partial.detach()).square().mean()

    def _asked(self, features: torch.Tensor, partial: torch.Tensor) -> torch.Tensor:
        flat = features.unsqueeze(1)
        return torch.cat([flat, (flat - partial)[:, :-1]], 1)

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
    """

    def __init__(
        self, codebook_size: int, code_dim: int, depth: int, options: CodebookOptions = DEFAULT_OPTIONS
    ) -> None:
        if code_dim % depth:
            raise ValueError(f"code_dim {code_dim} does not divide into {depth} equal chunks of channels")
        super().__init__(codebook_size, code_dim, depth, depth, code_dim // depth, options)

    def _chunks(self, z_e: torch.Tensor) -> torch.Tensor:
        """Return features ``(..., C)`` as ``(N, D, C/D)`` in float32."""
        return z_e.detach().reshape(-1, self.depth, self.width).float()

    @torch.no_grad()
    def encode(self, z_e: torch.Tensor) -> torch.Tensor:
        chunks = self._chunks(z_e)
        codes = [self.search(chunks[:, depth], depth) for depth in range(self.depth)]
        return torch.stack(codes, 1).reshape(*z_e.shape[:-1], self.depth)

    def embed(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.code_vectors(codes[..., depth], depth) for depth in range(codes.shape[-1])], -2)

    def code_vectors(self, codes: torch.Tensor, depth: int) -> torch.Tensor:
        before = depth * self.width
        return F.pad(self.book(depth)[codes], (before, self.code_dim - before - self.width))

    def z_q(self, codes: torch.Tensor) -> torch.Tensor:
        books = self.books()
        return torch.cat([books[depth][codes[..., depth]] for depth in range(self.depth)], -1)

    def _commitment(self, features: torch.Tensor, partial: torch.Tensor) -> torch.Tensor:
        """The mean squared distance between `z_e` and `z_q`: a partial sum says nothing of the chunks after it."""
        return (features - partial[..., -1, :].detach()).square().mean()

    def _asked(self, features: torch.Tensor, partial: torch.Tensor) -> torch.Tensor:
        return self._chunks(features)

    def _initialise(self, features: torch.Tensor, iterations: int) -> None:
        generator, chunks = torch.Generator().manual_seed(0), self._chunks(features)
        for depth in range(self.depth):
            centres = self.fit(chunks[:, depth], self.codebook_size, iterations, generator)
            self.set_book(depth, 0, centres)


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
