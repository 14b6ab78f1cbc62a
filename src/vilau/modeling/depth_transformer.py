"""The depth transformer: one hidden state of the language model -> the `D` codes of one position (paper, eq. (6))."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from vilau.configuration import DepthTransformerConfig


@dataclass(frozen=True)
class DepthCache:
    """Keys and values of the depth steps of one position, in tensors that stay where they are.

    `keys` and `values` hold one tensor ``(N, heads, D, W / heads)`` per block; step `d` writes place `d` and reads the
    places up to it, so the next position starts by writing over the last one's.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    def first(self, rows: int) -> DepthCache:
        """Return the cache of the first rows, in the same memory."""
        return DepthCache(tuple(k[:rows] for k in self.keys), tuple(v[:rows] for v in self.values))


class DepthBlock(GradientCheckpointingLayer):
    """A pre-norm transformer block, causal over the depth steps; biases everywhere, exact GELU.

    With ``gradient_checkpointing_enable()`` its activations are computed again on the way back.
    """

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Advance ``x`` (N, T, W), all depth steps at once."""
        normed = self.norm1(x)
        q, k, v = (
            m(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.fc2(F.gelu(self.fc1(self.norm2(x)))))

    def step(self, x: torch.Tensor, depth: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Advance ``x`` (N, W) by one depth; `keys` and `values` (N, heads, D, W/heads) gain the place `depth`."""
        normed = self.norm1(x)
        key, value = (m(normed).unflatten(-1, (self.heads, -1)) for m in (self.key, self.value))  # (N, heads, W/heads)
        keys[:, :, depth], values[:, :, depth] = key, value
        if depth == 0:
            mixed = value  # one key: its softmax is 1 whatever the query
        else:
            query = self.query(normed).unflatten(-1, (self.heads, 1, -1))
            seen = slice(0, depth + 1)
            mixed = F.scaled_dot_product_attention(query, keys[:, :, seen], values[:, :, seen])
        x = x + self.out(mixed.flatten(1))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


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
        self.depth, self.heads = depth, config.num_attention_heads
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
            x = block(x)
        return self.norm(x)

    def forward(self, hidden_states: torch.Tensor, partial_z_q: torch.Tensor) -> torch.Tensor:
        """Return ``depth_logits`` (N, D, K) for teacher-forced codes; see `hidden` for the arguments."""
        return self.head(self.hidden(hidden_states, partial_z_q))

    def new_cache(self, rows: int) -> DepthCache:
        """Return an empty cache for ``rows`` rows, in the dtype and on the device of the weights."""
        weight = self.position_embedding
        shape = (rows, self.heads, self.depth, weight.shape[1] // self.heads)
        keys = tuple(weight.new_zeros(shape) for _ in self.blocks)
        return DepthCache(keys, tuple(torch.zeros_like(k) for k in keys))

    def step(self, x: torch.Tensor, depth: int, cache: DepthCache) -> torch.Tensor:
        """Return logits ``(N, K)`` of one depth; for evaluation only, as it leaves dropout out.

        Args:
            x: hidden states ``(N, H)`` at depth 0, the sum of the code vectors so far ``(N, C)`` after it.
            depth: 0-based depth; the steps of one position follow each other from 0 on.
            cache: of `new_cache` for N rows, changed in place.
        """
        projected = self.project_hidden(x) if depth == 0 else self.project_codes(x)
        x = projected + self.position_embedding[depth]
        for block, keys, values in zip(self.blocks, cache.keys, cache.values, strict=True):
            assert isinstance(block, DepthBlock)
            x = block.step(x, depth, keys, values)
        return self.head(self.norm(x))
