"""A cache of keys and values in memory that stays where it is: a row per sequence, each filled to its own length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotLayer(CacheLayerMixin):
    """Keys and values ``(R, heads, capacity, d)`` of one layer.

    A prompt is written from place 0 on; one new position of every row is written at the row's own length. What lies
    beyond a row's length is left over from others and must be masked (`SlotCache.mask`).
    """

    is_compileable = True
    is_sliding = False

    def __init__(self, rows: int, capacity: int) -> None:
        super().__init__()
        self.rows, self.capacity = rows, capacity
        self.seen = 0
        self.places: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take memory for the shape, dtype and device of the first keys and values."""
        shape = (self.rows, key_states.shape[1], self.capacity)
        self.keys = key_states.new_zeros((*shape, key_states.shape[3]))
        self.values = value_states.new_zeros((*shape, value_states.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``(R, heads, n, d)``, the prompt or one new position, and return what is to be attended to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self.places is None:
            new = key_states.shape[2]
            self.keys[: len(key_states), :, :new], self.values[: len(key_states), :, :new] = key_states, value_states
            return key_states, value_states
        row, place = self.places
        self.keys[row, :, place], self.values[row, :, place] = key_states[:, :, 0], value_states[:, :, 0]
        rows = len(key_states)
        return self.keys[:rows, :, : self.seen], self.values[:rows, :, : self.seen]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Asked for by the library while a prompt is read, when nothing lies before it."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Nothing lies before a prompt; of new positions the library is told the places and the mask."""
        return 0

    def get_max_length(self) -> int:
        """Places of each row."""
        return self.capacity


class SlotCache(Cache):
    """The cache of a language model with ``rows`` rows of ``capacity`` places.

    `lengths` (R,) int64 holds how many places of each row are filled. Rows do not depend on each other: a row can be
    filled with another prompt (`fill`) while the others go on.
    """

    def __init__(self, layers: int, rows: int, capacity: int, device: torch.device) -> None:
        self.slots = [SlotLayer(rows, capacity) for _ in range(layers)]
        super().__init__(layers=list(self.slots))
        self.capacity = capacity
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self.row = torch.arange(rows, device=device)
        self.place = torch.arange(capacity, device=device)

    def begin_step(self, seen: int, rows: int) -> None:
        """Make the next forward pass write one position at the end of each of the first ``rows`` rows.

        seen: the first so many places are attended to; at least the largest length plus one.
        """
        places = (self.row[:rows], self.lengths[:rows])
        for layer in self.slots:
            layer.places, layer.seen = places, seen

    def mask(self, seen: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """Return what is added to attention scores, ``(rows, 1, 1, seen)``: 0 up to and with the new position."""
        hidden = self.place[:seen] > self.lengths[:rows].unsqueeze(1)
        return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[:, None, None]

    def fill(self, rows: torch.Tensor, prompts: SlotCache, source: torch.Tensor) -> None:
        """Copy the prompts ``source`` (n,) of another cache into the rows ``rows`` (n,) of this one."""
        for mine, theirs in zip(self.slots, prompts.slots, strict=True):
            assert theirs.keys is not None and theirs.values is not None
            if not mine.is_initialized:
                mine.lazy_initialization(theirs.keys, theirs.values)
            assert mine.keys is not None and mine.values is not None
            length = theirs.keys.shape[2]
            mine.keys[rows, :, :length] = theirs.keys.index_select(0, source)
            mine.values[rows, :, :length] = theirs.values.index_select(0, source)
        self.lengths[rows] = prompts.lengths.index_select(0, source)


def cache_bytes(config: Any, rows: int, capacity: int, bytes_per_number: int) -> int:
    """Memory of a `SlotCache` for a language model of this configuration."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * rows * heads * capacity * width * bytes_per_number


def unsupported(config: Any, capacity: int) -> str | None:
    """Say why a language model of this configuration cannot use a `SlotCache` of this capacity; ``None`` if it can."""
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, "sdpa", "eager"):
        return f"its attention is {attention!r}, which takes no mask of scores"
    kinds: Sequence[str] = getattr(config, "layer_types", None) or ()
    window = getattr(config, "sliding_window", None)
    for kind in set(kinds):
        if kind == "sliding_attention" and (window is None or window >= capacity):
            continue
        if kind != "full_attention":
            return f"it has layers of {kind}"
    if not kinds and getattr(config, "use_sliding_window", True) and window is not None and window < capacity:
        return f"its attention slides over {window} positions"
    return None
