"""The depth transformer: one hidden state of the language model -> the `D` codes of one position (paper, eq. (6))."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from vilau.configuration import DepthTransformerConfig

DepthCache = list[tuple[torch.Tensor, torch.Tensor]]


class DepthBlock(nn.Module):
    """A pre-norm transformer block, causal over the depth steps; biases everywhere, exact GELU."""

    def __init__(self, config: DepthTransformerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.mlp_ratio * width)
        self.fc2 = nn.Linear(config.mlp_ratio * width, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Advance ``x`` (N, T, W); `past` holds keys and values ``(N, heads, t, W/heads)`` of earlier steps."""
        normed = self.norm1(x)
        q, k, v = (
            m(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.query, self.key, self.value)
        )
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=past is None and x.shape[1] > 1)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        x = x + self.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))))
        return x, (k, v)


class DepthTransformer(nn.Module):
    """Predict the codes of one position, depth by depth.

    It receives embeddings only - the hidden state and partial sums of code vectors - and never sees the quantizer.

    Args:
        config: sizes.
        input_size: width `H` of the language model's hidden state.
        code_dim: width `C` of the code vectors.
        depth: number of steps `D`.
        codebook_size: number of classes `K` of the head that all depths share.
    """

    def __init__(
        self, config: DepthTransformerConfig, input_size: int, code_dim: int, depth: int, codebook_size: int
    ) -> None:
        super().__init__()
        self.depth = depth
        self.project_hidden = nn.Linear(input_size, config.hidden_size)
        self.project_codes = nn.Linear(code_dim, config.hidden_size)
        self.position_embedding = nn.Parameter(torch.zeros(depth, config.hidden_size))
        self.blocks = nn.ModuleList(DepthBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.hidden_size, codebook_size)

    def hidden(self, hidden_states: torch.Tensor, partial_z_q: torch.Tensor) -> torch.Tensor:
        """Return normalised states ``(N, D, W)`` for teacher-forced codes, before the head.

        Args:
            hidden_states: language model states ``(N, H)`` that predict the positions.
            partial_z_q: cumulative sums ``(N, D, C)`` of the true codes; the last one is not used, eq. (6).
        """
        first = self.project_hidden(hidden_states).unsqueeze(1)
        rest = self.project_codes(partial_z_q[:, : self.depth - 1])
        x = torch.cat([first, rest], 1) + self.position_embedding
        for block in self.blocks:
            x, _ = block(x)
        return self.norm(x)

    def forward(self, hidden_states: torch.Tensor, partial_z_q: torch.Tensor) -> torch.Tensor:
        """Return ``depth_logits`` (N, D, K) for teacher-forced codes; see `hidden` for the arguments."""
        return self.head(self.hidden(hidden_states, partial_z_q))

    def step(self, x: torch.Tensor, depth: int, cache: DepthCache) -> torch.Tensor:
        """Return logits ``(N, K)`` of one depth and extend `cache` (start with an empty list).

        Args:
            x: hidden states ``(N, H)`` at depth 0, the sum of the code vectors so far ``(N, C)`` after it.
            depth: 0-based depth.
            cache: keys and values per block, changed in place.
        """
        projected = self.project_hidden(x) if depth == 0 else self.project_codes(x)
        x = (projected + self.position_embedding[depth]).unsqueeze(1)
        for i, block in enumerate(self.blocks):
            x, present = block(x, cache[i] if depth else None)
            if depth:
                cache[i] = present
            else:
                cache.append(present)
        return self.head(self.norm(x[:, 0]))
