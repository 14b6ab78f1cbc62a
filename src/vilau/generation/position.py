"""One visual position: a step of the language model, D steps of the depth transformer, D draws.

Everything that changes lives in tensors that stay where they are (`VisualState`, `SlotCache`), nothing is copied to
the host, and rows do not depend on each other: so a step can be compiled or captured, and pictures at different
positions can share a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from vilau.generation.budget import row_capacity
from vilau.generation.caches import SlotCache, unsupported
from vilau.generation.guidance import guided_rows
from vilau.generation.sampling import SamplingRows, sample_codes


class UnifiedModel(Protocol):
    """What the loop needs of the joined network."""

    vision_tower: Any
    projector: Any
    language_model: Any
    depth_transformer: Any


@dataclass(frozen=True)
class Networks:
    """The parts of a model that a position runs through; `language` is the decoder without its text head."""

    language: Any
    depth_transformer: Any
    projector: Any
    quantizer: Any

    @classmethod
    def of(cls, model: UnifiedModel) -> Networks:
        """Return the parts of a model as they are."""
        return cls(
            model.language_model.base_model, model.depth_transformer, model.projector, model.vision_tower.quantizer
        )


@dataclass(frozen=True)
class Prompts:
    """Prompts of a batch, each read once however many pictures it is for.

    Args:
        inputs_embeds: ``(U, L, H)``, left-padded, each ending with a visual start token.
        attention_mask: ``(U, L)``, 0 at padding.
        conditional: the prompt of each of the B pictures, an index into U.
        unconditional: the prompt without its text for each picture, or ``None`` for one that is not guided.
    """

    inputs_embeds: torch.Tensor
    attention_mask: torch.Tensor
    conditional: Sequence[int]
    unconditional: Sequence[int | None]

    @property
    def rows(self) -> list[int]:
        """The prompt of every row: those of the pictures first, then the unconditional ones."""
        return [*self.conditional, *(prompt for prompt in self.unconditional if prompt is not None)]


class SlotLanguage:
    """The language model over a `SlotCache`: every row at its own length."""

    def __init__(self, language: Any, cache: SlotCache, rows: int, filled: int, static: bool = False) -> None:
        self.language, self.cache, self.rows = language, cache, rows
        self.filled = filled  # the largest length of any row, known on the host
        self.static = static  # attend to the whole capacity, so that shapes never change

    @classmethod
    def read(
        cls, language: Any, prompts: Prompts, positions: int, static: bool = False
    ) -> tuple[SlotLanguage, torch.Tensor]:
        """Read each prompt once; return the rows ready for ``positions`` steps, and their last states ``(R, H)``."""
        embeds, lengths = left_aligned(prompts.inputs_embeds, prompts.attention_mask)
        count, longest = embeds.shape[:2]
        layers = language.config.num_hidden_layers
        read = SlotCache(layers, count, longest, embeds.device)
        places = torch.arange(longest, device=embeds.device).expand(count, -1)
        states = language(
            inputs_embeds=embeds, position_ids=places, past_key_values=read, use_cache=True
        ).last_hidden_state
        read.lengths.copy_(lengths)
        source = torch.tensor(prompts.rows, device=embeds.device)
        needed = longest + positions
        capacity = row_capacity(needed) if static else needed  # prompts of many lengths share few shapes
        cache = SlotCache(layers, len(source), capacity, embeds.device)
        cache.fill(cache.row, read, source)
        last = states[torch.arange(count, device=embeds.device), lengths - 1]
        return cls(language, cache, len(source), longest, static), last.index_select(0, source)

    def advance(self, embeds: torch.Tensor) -> torch.Tensor:
        """Read one more position ``(R, H)`` and return the states ``(R, H)``."""
        seen = self.cache.capacity if self.static else self.filled + 1
        self.cache.begin_step(seen, self.rows)
        states = self.language(
            inputs_embeds=embeds.unsqueeze(1),
            attention_mask=self.cache.mask(seen, self.rows, embeds.dtype),
            position_ids=self.cache.lengths[: self.rows].unsqueeze(1),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.cache.lengths[: self.rows] += 1
        if not self.static:
            self.filled += 1
        return states[:, 0]

    def keep(self, rows: int) -> None:
        """Go on with the first ``rows`` rows alone."""
        self.rows = rows


class DynamicLanguage:
    """The language model over the library's own growing cache: for attention that a `SlotCache` cannot serve."""

    def __init__(self, language: Any, cache: DynamicCache, mask: torch.Tensor, places: torch.Tensor) -> None:
        self.language, self.cache, self.mask, self.places = language, cache, mask, places

    @property
    def rows(self) -> int:
        """Rows that go on."""
        return len(self.mask)

    @classmethod
    def read(cls, language: Any, prompts: Prompts) -> tuple[DynamicLanguage, torch.Tensor]:
        """Read the prompt of every row; return the rows and their last states ``(R, H)``."""
        rows = torch.tensor(prompts.rows, device=prompts.inputs_embeds.device)
        mask = prompts.attention_mask.index_select(0, rows)
        places = (mask.long().cumsum(1) - 1).clamp_min(0)
        self = cls(language, DynamicCache(config=language.config), mask, places)
        return self, self._forward(prompts.inputs_embeds.index_select(0, rows))

    def advance(self, embeds: torch.Tensor) -> torch.Tensor:
        """Read one more position ``(R, H)`` and return the states ``(R, H)``."""
        self.mask = torch.cat([self.mask, self.mask.new_ones((len(self.mask), 1))], 1)
        self.places = self.places[:, -1:] + 1
        return self._forward(embeds.unsqueeze(1))

    def _forward(self, embeds: torch.Tensor) -> torch.Tensor:
        states = self.language(
            inputs_embeds=embeds,
            attention_mask=self.mask,
            position_ids=self.places,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return states[:, -1]

    def keep(self, rows: int) -> None:
        """Go on with the first ``rows`` rows alone."""
        if rows < len(self.mask):
            self.cache.batch_select_indices(torch.arange(rows, device=self.mask.device))
            self.mask, self.places = self.mask[:rows], self.places[:rows]


Language = SlotLanguage | DynamicLanguage


def read_prompts(
    networks: Networks, prompts: Prompts, positions: int, static: bool = False
) -> tuple[Language, torch.Tensor]:
    """Read the prompts with the cache that fits the language model; return it and the last states ``(R, H)``.

    Raises:
        ValueError: `static` shapes were asked for and the language model has attention that cannot have them.
    """
    reason = unsupported(networks.language.config, prompts.inputs_embeds.shape[1] + positions)
    if reason is None:
        return SlotLanguage.read(networks.language, prompts, positions, static)
    if static:
        raise ValueError(f"this language model cannot run with static shapes: {reason}; leave compile off")
    return DynamicLanguage.read(networks.language, prompts)


@dataclass
class VisualState:
    """What one batch of pictures carries from position to position.

    `position` (B,) int64, the next one of each picture; `codes` (B, D), the last ones drawn; `seeds` (B,) int64;
    `scales` (T, B) float32, the guidance of every position; `picture` (R,) int64, the picture of each row; and
    `unconditional` (B,) int64, the row without the prompt of each picture, its own where it has none.
    """

    position: torch.Tensor
    codes: torch.Tensor
    seeds: torch.Tensor
    scales: torch.Tensor
    picture: torch.Tensor
    unconditional: torch.Tensor
    sampling: SamplingRows
    depth_cache: Any

    @classmethod
    def start(
        cls, networks: Networks, prompts: Prompts, seeds: torch.Tensor, scales: torch.Tensor, sampling: SamplingRows
    ) -> VisualState:
        """Return the state before the first position."""
        count, device = len(seeds), seeds.device
        guided = [number for number, prompt in enumerate(prompts.unconditional) if prompt is not None]
        own = list(range(count))
        for row, number in enumerate(guided):
            own[number] = count + row
        return cls(
            position=torch.zeros(count, dtype=torch.int64, device=device),
            codes=torch.zeros((count, networks.quantizer.depth), dtype=torch.int64, device=device),
            seeds=seeds,
            scales=scales.to(device),
            picture=torch.tensor([*range(count), *guided], device=device),
            unconditional=torch.tensor(own, device=device),
            sampling=sampling,
            depth_cache=networks.depth_transformer.new_cache(count + len(guided)),
        )


class VisualStep:
    """The work of one position over a `VisualState`, which it changes in place.

    `static`: every position has the same shapes, and all rows run whether they are guided or not.
    """

    static = False

    def __init__(self, networks: Networks) -> None:
        self.networks = networks

    def __call__(self, state: VisualState, language: Language, guided: bool = True) -> torch.Tensor:
        """Feed the last codes to the language model and draw the next ones, ``(B, D)``; see `draw`."""
        return self.draw(self.advance(state, language), state, guided)

    def advance(self, state: VisualState, language: Language) -> torch.Tensor:
        """Feed the last codes to the language model; return the states ``(R, H)`` that predict the next ones."""
        embeds = self.networks.projector(self.networks.quantizer.z_q(state.codes))
        return language.advance(embeds.index_select(0, state.picture[: language.rows]))

    def draw(self, hidden: torch.Tensor, state: VisualState, guided: bool = True) -> torch.Tensor:
        """Draw the codes ``(B, D)`` of one position from states ``(R, H)``, and count the position.

        guided: whether any picture has guidance at its position; if not, only the rows with prompts are run.
        """
        count = len(state.seeds)
        rows = len(hidden) if guided else count
        cache = state.depth_cache if rows == len(state.picture) else state.depth_cache.first(rows)
        scale = state.scales.gather(0, state.position.unsqueeze(0)).squeeze(0).unsqueeze(1) if guided else None
        x = hidden[:rows]
        partial = torch.zeros((), device=hidden.device)
        for depth in range(self.networks.quantizer.depth):
            logits = self.depth_logits(x, depth, cache)
            code = self.choose(logits, scale, state, depth)
            state.codes[:, depth] = code
            if depth + 1 < self.networks.quantizer.depth:
                partial = partial + self.networks.quantizer.code_vectors(code, depth)
                x = partial.to(hidden.dtype).index_select(0, state.picture[:rows])
        state.position += 1
        return state.codes

    def depth_logits(self, x: torch.Tensor, depth: int, cache: Any) -> torch.Tensor:
        """Return the logits ``(rows, K)`` of one depth."""
        return self.networks.depth_transformer.step(x, depth, cache)

    def choose(self, logits: torch.Tensor, scale: torch.Tensor | None, state: VisualState, depth: int) -> torch.Tensor:
        """Draw one code ``(B,)`` per picture from the logits of its rows."""
        if scale is not None:
            logits = guided_rows(logits, state.unconditional, scale)
        return sample_codes(logits, state.sampling, state.seeds, state.position, depth)


def left_aligned(embeds: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the padding of rows ``(U, L, H)`` from the left to the right; return them and their lengths ``(U,)``."""
    lengths = mask.long().sum(1)
    longest = embeds.shape[1]
    place = torch.arange(longest, device=embeds.device)
    moved = (place + (longest - lengths).unsqueeze(1)) % longest  # (U, L)
    return embeds.gather(1, moved.unsqueeze(-1).expand_as(embeds)), lengths
