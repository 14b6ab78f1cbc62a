"""Rows of keys and values that come and go, and a forward pass over any mix of them.

A pass takes a flat list of positions: one new position for each of many rows, and pieces of prompts that are being
read. The linear layers run over all of them at once; attention runs segment by segment, each over its own rows up to
their own length. So a short text pays nothing for a long film beside it, and nothing is padded.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface

from vilau.generation.caches import unsupported

_ATTENTION = "vilau_slots"


@dataclass(eq=False)
class Row:
    """A sequence's place: row `index` of a slab, filled with `length` positions."""

    slab: Slab
    index: int
    length: int = 0


class Slab:
    """Rows of one capacity: keys and values ``(rows, heads, capacity, d)`` of every layer.

    The rows in use are the first ones; what no row has written is zero, so that a masked place is never NaN.
    """

    def __init__(self, layers: int, heads: int, width: int, capacity: int, like: torch.Tensor) -> None:
        self.capacity = capacity
        self.used: list[Row] = []
        shape = (0, heads, capacity, width)
        self.keys = [like.new_zeros(shape) for _ in range(layers)]
        self.values = [like.new_zeros(shape) for _ in range(layers)]

    @property
    def rows(self) -> int:
        """Rows that there is memory for."""
        return len(self.keys[0])

    def resize(self, rows: int) -> None:
        """Take or give back memory, one layer after the other, keeping the rows in use."""
        kept = len(self.used)
        assert rows >= kept
        for store in (self.keys, self.values):
            for layer, old in enumerate(store):
                new = old.new_zeros((rows, *old.shape[1:]))
                new[:kept] = old[:kept]
                store[layer] = new

    def take(self) -> Row:
        """Return an empty row."""
        assert len(self.used) < self.rows
        row = Row(self, len(self.used))
        self.used.append(row)
        return row

    def release(self, row: Row) -> None:
        """Free a row; the last one moves into its place."""
        last = self.used.pop()
        if last is not row:
            self.used[row.index] = last
            for store in (*self.keys, *self.values):
                store[row.index] = store[last.index]
            row.index, last.index = last.index, row.index
        for store in (*self.keys, *self.values):
            store[row.index] = 0


def copy_row(source: Row, target: Row, length: int) -> None:
    """Copy the first ``length`` positions of a row into an empty one."""
    for kind in ("keys", "values"):
        for old, new in zip(getattr(source.slab, kind), getattr(target.slab, kind), strict=True):
            new[target.index, :, :length] = old[source.index, :, :length]
    target.length = length


@dataclass(frozen=True)
class Prefix:
    """A prompt that was read and is kept: keys and values ``(heads, L, d)`` of every layer, and its last state (H,)."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    state: torch.Tensor

    @classmethod
    def of(cls, row: Row, length: int, state: torch.Tensor) -> Prefix:
        """Return a copy of the first ``length`` positions of a row."""
        keys, values = (
            [layer[row.index, :, :length].clone() for layer in store] for store in (row.slab.keys, row.slab.values)
        )
        return cls(keys, values, state)

    @property
    def length(self) -> int:
        """Positions."""
        return self.keys[0].shape[1]

    def fill(self, row: Row) -> None:
        """Copy the positions into an empty row."""
        for kept, store in ((self.keys, row.slab.keys), (self.values, row.slab.values)):
            for layer, new in zip(kept, store, strict=True):
                new[row.index, :, : self.length] = layer
        row.length = self.length


class SlotStore:
    """All slabs of a running batch, by capacity, within a limit of positions."""

    def __init__(self, config: Any, like: torch.Tensor, limit: int) -> None:
        self.layers = config.num_hidden_layers
        self.heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.like, self.limit = like, limit
        self.kept = 0  # positions of kept prefixes, which count too
        self.slabs: dict[int, Slab] = {}

    @property
    def positions(self) -> int:
        """Positions that memory is taken for."""
        return sum(slab.capacity * slab.rows for slab in self.slabs.values())

    def has_room(self, capacity: int) -> bool:
        """Whether a row can be had beside the kept prefixes."""
        used = sum(slab.capacity * len(slab.used) for slab in self.slabs.values())
        return used + self.kept + capacity <= self.limit

    def reserve(self, capacity: int) -> Row:
        """Return an empty row. Slabs double as long as there is room, so that few joins move memory."""
        if capacity not in self.slabs:
            self.slabs[capacity] = Slab(self.layers, self.heads, self.width, capacity, self.like)
        slab = self.slabs[capacity]
        if len(slab.used) == slab.rows:
            room = (self.limit - self.positions - self.kept) // capacity
            if room < 1:
                self._shrink()
                room = (self.limit - self.positions - self.kept) // capacity
            assert room >= 1, "the budget admitted more than there is"
            slab.resize(slab.rows + min(room, max(1, slab.rows)))
        return slab.take()

    def release(self, row: Row) -> None:
        """Free a row, and its slab with the last one."""
        row.slab.release(row)
        if not row.slab.used:
            del self.slabs[row.slab.capacity]

    def _shrink(self) -> None:
        for slab in self.slabs.values():
            if slab.rows > len(slab.used):
                slab.resize(len(slab.used))


@dataclass(frozen=True)
class Steps:
    """Neighbouring rows of a slab, from `first` on, each with one new position.

    `tokens` is their part of the flat list; `index` and `places` say where new keys go; `seen` places are attended to,
    and `mask` is added to scores.
    """

    slab: Slab
    first: int
    tokens: slice
    seen: int
    places: torch.Tensor
    index: torch.Tensor
    mask: torch.Tensor | None

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> Any:
        """Write keys and values ``(n, key heads, d)`` and return ``(n, heads, d)`` for queries of that shape."""
        keys, values = self.slab.keys[layer], self.slab.values[layer]
        keys[self.index, :, self.places], values[self.index, :, self.places] = k, v
        rows = slice(self.first, self.first + len(self.index))
        q = q.unflatten(1, (k.shape[1], -1))  # (n, key heads, heads per key head, d)
        past, held = keys[rows, :, : self.seen], values[rows, :, : self.seen]
        return F.scaled_dot_product_attention(q, past, held, self.mask, scale=scale).flatten(1, 2)


@dataclass(frozen=True)
class Beginnings:
    """The first `count` positions of rows of one slab, as many of each: prompts, which see nothing but themselves."""

    slab: Slab
    tokens: slice
    count: int
    index: torch.Tensor

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> Any:
        """As `Steps.attend`, the positions of one row after those of the other."""
        q, k, v = (x.unflatten(0, (-1, self.count)).transpose(1, 2) for x in (q, k, v))  # (rows, heads, count, d)
        self.slab.keys[layer][self.index, :, : self.count] = k
        self.slab.values[layer][self.index, :, : self.count] = v
        grouped = q.shape[1] != k.shape[1]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        return mixed.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class Piece:
    """Further positions of row `index`, up to the first `seen`."""

    slab: Slab
    index: int
    tokens: slice
    seen: int
    mask: torch.Tensor

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> Any:
        """As `Steps.attend`."""
        keys, values = self.slab.keys[layer][self.index], self.slab.values[layer][self.index]
        new = slice(self.seen - len(k), self.seen)
        keys[:, new], values[:, new] = k.transpose(0, 1), v.transpose(0, 1)
        q, past, held = q.transpose(0, 1), keys[:, : self.seen], values[:, : self.seen]
        grouped = len(q) != len(past)
        mixed = F.scaled_dot_product_attention(
            q.unsqueeze(0), past.unsqueeze(0), held.unsqueeze(0), self.mask, scale=scale, enable_gqa=grouped
        )
        return mixed[0].transpose(0, 1)


@dataclass(frozen=True)
class Pass:
    """The positions of one forward pass: rows that step, then pieces of prompts; build it with `plan`."""

    segments: list[Steps | Beginnings | Piece]
    positions: torch.Tensor


def plan(steps: Sequence[Row], pieces: Sequence[tuple[Row, int]], like: torch.Tensor) -> tuple[Pass, list[Row]]:
    """Return a pass that adds one position to each of the rows ``steps`` and so many to each row of ``pieces``.

    Also returns the rows in the order in which their positions stand in the flat list, `steps` sorted by place, before
    those of `pieces`. Lengths are the host's own, so nothing is asked of the device.
    """
    ordered = sorted(steps, key=lambda row: (row.slab.capacity, row.index))
    places = [row.length for row in ordered]
    for row, count in pieces:
        places.extend(range(row.length, row.length + count))
    positions = torch.tensor(places).to(like.device, non_blocking=True)
    segments: list[Steps | Beginnings | Piece] = []
    start = 0
    for end in range(1, len(ordered) + 1):
        joined = end < len(ordered) and ordered[end].slab is ordered[start].slab
        if joined and ordered[end].index == ordered[end - 1].index + 1:
            continue
        segments.append(_steps(ordered[start:end], start, positions, like))
        start = end
    for rows, count in _alike(pieces):
        tokens = slice(start, start + len(rows) * count)
        start = tokens.stop
        if rows[0].length:
            segments.append(_piece(rows[0], tokens, positions, like))
        else:
            index = torch.tensor([row.index for row in rows]).to(like.device, non_blocking=True)
            segments.append(Beginnings(rows[0].slab, tokens, count, index))
    return Pass(segments, positions), ordered


def _alike(pieces: Sequence[tuple[Row, int]]) -> list[tuple[list[Row], int]]:
    """Return the pieces with those together that begin rows of one slab, as many positions of each."""
    groups: list[tuple[list[Row], int]] = []
    for row, count in pieces:
        if groups and not row.length:
            (*_, last), same = groups[-1]
            if not last.length and last.slab is row.slab and same == count:
                groups[-1][0].append(row)
                continue
        groups.append(([row], count))
    return groups


def _steps(rows: list[Row], start: int, positions: torch.Tensor, like: torch.Tensor) -> Steps:
    lengths = [row.length for row in rows]
    seen, first = max(lengths) + 1, rows[0].index
    tokens = slice(start, start + len(rows))
    places = positions[tokens]
    index = torch.arange(first, first + len(rows), device=like.device)
    mask = None
    if min(lengths) + 1 < seen:
        mask = _hidden(torch.arange(seen, device=like.device) > places.unsqueeze(1), like)[:, None, None]
    return Steps(rows[0].slab, first, tokens, seen, places, index, mask)


def _piece(row: Row, tokens: slice, positions: torch.Tensor, like: torch.Tensor) -> Piece:
    seen = row.length + tokens.stop - tokens.start
    hidden = torch.arange(seen, device=like.device) > positions[tokens].unsqueeze(1)
    return Piece(row.slab, row.index, tokens, seen, _hidden(hidden, like)[None, None])


def _hidden(hidden: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill(hidden, float("-inf"))


def slot_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    slot_pass: Pass | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a flat list of positions ``(1, heads, N, d)``: write new keys and values, then segment by segment.

    Returns ``(1, N, heads, d)``, as the library's attention functions do.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"this language model's attention has {name}, which a running batch does not know")
    assert slot_pass is not None
    layer: Any = module.layer_idx
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, d)
    parts = slot_pass.segments
    if len(parts) == 1:
        return parts[0].attend(layer, q, k, v, scaling).unsqueeze(0), None
    outputs = [part.attend(layer, q[part.tokens], k[part.tokens], v[part.tokens], scaling) for part in parts]
    return torch.cat(outputs).unsqueeze(0), None


class StoreLanguage:
    """A language model without its text head, over rows of a `SlotStore`; its own modules stay as they are."""

    def __init__(self, language: nn.Module) -> None:
        AttentionInterface.register(_ATTENTION, slot_attention)
        config = copy.deepcopy(language.config)
        config._attn_implementation = _ATTENTION  # type: ignore[union-attr]
        self.language = _twin(language, language.config, config)

    def forward(self, embeds: torch.Tensor, work: Pass) -> torch.Tensor:
        """Return the states ``(N, H)`` of the positions ``embeds`` (N, H) of a pass, in its order."""
        return self.language(
            inputs_embeds=embeds.unsqueeze(0),
            position_ids=work.positions.unsqueeze(0),
            use_cache=False,
            slot_pass=work,
        ).last_hidden_state[0]


def _twin(module: nn.Module, old: Any, new: Any) -> Any:
    """Return a module that shares all parameters with ``module`` and has another configuration."""
    twin = copy.copy(module)
    if twin.__dict__.get("config") is old:
        twin.__dict__["config"] = new
    twin._modules = {
        name: child if child is None else _twin(child, old, new) for name, child in module._modules.items()
    }
    return twin


def check_language(config: Any, capacity: int) -> None:
    """Raise ValueError if a language model of this configuration cannot run in a batch whose rows come and go."""
    reason = unsupported(config, capacity)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if reason is None and rope in ("dynamic", "longrope"):
        reason = f"its {rope} positions depend on the longest row of a batch"
    if reason is not None:
        raise ValueError(f"this language model cannot run continuously: {reason}; generate in whole batches instead")
