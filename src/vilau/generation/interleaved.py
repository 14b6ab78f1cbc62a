"""Answers that mix text with pictures and films: text until a start token, then visual positions, then text goes on.

Text is read and written through a cache of its own; each picture is drawn by the model's visual loop, with the whole
answer so far as its prompt, and then read into that cache. The number of a picture's positions is known beforehand, so
its end token follows it without being drawn from the text head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from transformers import DynamicCache

from vilau.generation.sampling import SamplingOptions, draw_codes, filter_logits, mix, row_seeds, wrapped_seed

TEXT_DEPTH = 255  # keeps the noise of text apart from that of codes, whose depths are far below

_PICTURES = 0x3C6EF372FE94F82B  # added before scrambling, which would leave a seed of 0 as it is
VisualKind = Literal["image", "video"]


@dataclass(frozen=True)
class GeneratedPart:
    """One piece of an answer.

    `token_ids` (T,) of a text; `codes` (F, P, D) and `pixel_values` (F, 3, S, S) in [-1, 1] of a picture (F = 1) or a
    film. What does not belong to the kind is None.
    """

    kind: Literal["text", "image", "video"]
    token_ids: torch.Tensor | None = None
    codes: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None


@dataclass(frozen=True)
class InterleavedOutput:
    """An answer: `parts` in order; `finished` says that the model ended it, and not a limit."""

    parts: tuple[GeneratedPart, ...]
    finished: bool


@dataclass(frozen=True)
class InterleavedOptions:
    """What an answer may be, and how its text is drawn.

    Args:
        max_new_tokens: of text, in all parts together.
        max_pictures: pictures and films; from there on the answer goes on with text alone.
        text: temperature, top-k and top-p of text tokens; temperature 0 takes the likeliest.
        seed: any integer; the same seed gives the same answer.

    Raises:
        ValueError: a limit out of its range.
    """

    max_new_tokens: int = 256
    max_pictures: int = 4
    text: SamplingOptions = field(default_factory=lambda: SamplingOptions(guidance_scale=1.0, temperature=0.0))
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if self.max_pictures < 0:
            raise ValueError(f"max_pictures is {self.max_pictures}; it must be at least 0")


class Drawing(Protocol):
    """A drawn picture or film of one prompt: `codes` and `pixel_values` as the visual loop gives them."""

    @property
    def codes(self) -> torch.Tensor: ...

    @property
    def pixel_values(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class AnswerRules:
    """What may follow what in a mixed answer, alone and in a running batch.

    Args:
        starts: the kind that a start token begins.
        ends: the end token of each kind, which follows its last position without being drawn.
        positions: of a picture, and of a film with all its frames.
        per_picture: positions of a picture or a frame.
        stops: tokens that end an answer.
        never: tokens that are not to be written anywhere.
        context: positions at which an answer ends, its prompt included; None for no limit.
        max_pictures: pictures and films; from there on an answer goes on with text alone.
    """

    starts: Mapping[int, VisualKind]
    ends: Mapping[VisualKind, int]
    positions: Mapping[VisualKind, int]
    per_picture: int
    stops: frozenset[int]
    never: tuple[int, ...]
    context: int | None
    max_pictures: int = 4

    def __post_init__(self) -> None:
        if self.max_pictures < 0:
            raise ValueError(f"max_pictures is {self.max_pictures}; it must be at least 0")
        for kind, positions in self.positions.items():
            if positions < 1 or positions % self.per_picture:
                raise ValueError(
                    f"a part of kind {kind} has {positions} positions; it must be whole pictures of {self.per_picture}"
                )

    @classmethod
    def of(cls, model: TextModel, video_positions: int, max_pictures: int = 4) -> AnswerRules:
        """Return the rules of a model whose films have ``video_positions`` positions, all frames together."""
        config = model.config
        picture, text = config.vision_config.num_positions, config.text_config
        stops = _ids(model.generation_config.eos_token_id) or _ids(text.eos_token_id)
        never = [config.image_end_id, config.video_end_id, *_ids(text.bos_token_id), *_ids(text.pad_token_id)]
        return cls(
            starts={config.image_start_id: "image", config.video_start_id: "video"},
            ends={"image": config.image_end_id, "video": config.video_end_id},
            positions={"image": picture, "video": video_positions},
            per_picture=picture,
            stops=frozenset(stops),
            never=tuple(token for token in never if token not in stops),
            context=config.context_length,
            max_pictures=max_pictures,
        )

    def check_prompt(self, length: int) -> None:
        """Raise ValueError if a prompt of so many positions leaves no room for an answer."""
        if self.context is not None and length >= self.context:
            raise ValueError(f"the prompt's {length} positions fill the context of {self.context}; shorten it")

    def full(self, length: int) -> bool:
        """Whether an answer ends at so many positions, its prompt included."""
        return self.context is not None and length >= self.context

    def forbidden(self, length: int, pictures: int) -> tuple[int, ...]:
        """Return the tokens that cannot follow ``length`` positions with so many pictures among them.

        They are those of `never`, and the starts of pictures and films that may not begin.
        """
        kinds = self.kinds(length, pictures)
        return (*self.never, *(token for token, kind in self.starts.items() if kind not in kinds))

    def kinds(self, length: int, pictures: int = 0) -> list[VisualKind]:
        """Return what may begin after ``length`` positions with so many pictures among them.

        The context must hold the start, all positions, the end, and one more.
        """
        if pictures >= self.max_pictures:
            return []
        room = float("inf") if self.context is None else self.context - length
        return [kind for kind, positions in self.positions.items() if positions + 3 <= room]


def picture_seed(seed: int, number: int) -> int:
    """Return the seed of picture ``number`` (from 0) of the answer with a seed.

    Answers of one request have seeds in equal steps, and so have the pictures of one: scrambling keeps these apart.
    """
    return int(row_seeds(int(mix(torch.tensor(wrapped_seed(seed + _PICTURES)))), number + 1, "cpu")[-1])


Draw = Callable[[torch.Tensor, bool, int], Drawing]
"""Draws for a prompt ``(1, L, H)`` that ends with a start token: a film or (False) a picture, from a seed."""


class TextModel(Protocol):
    """What the loop needs of the joined network."""

    config: Any
    generation_config: Any
    language_model: Any

    def get_input_embeddings(self) -> Any: ...

    def get_output_embeddings(self) -> Any: ...

    def visual_embeds(self, codes: torch.Tensor) -> torch.Tensor: ...


@torch.no_grad()
def generate_interleaved(
    model: TextModel,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    draw: Draw,
    video_positions: int,
    options: InterleavedOptions,
) -> list[InterleavedOutput]:
    """Answer each of the left-padded prompts ``inputs_embeds`` (B, L, H), one after the other.

    A row's answer does not depend on the others. ``video_positions`` is the length of a film, all frames together.

    Raises:
        ValueError: a prompt fills the context.
    """
    rules = AnswerRules.of(model, video_positions, options.max_pictures)
    seeds = row_seeds(options.seed, len(inputs_embeds), "cpu").tolist()
    answers = []
    for row, seed in enumerate(seeds):
        prompt = inputs_embeds[row : row + 1, attention_mask[row].bool()]
        answers.append(_Answer(model, prompt, draw, rules, options, seed).run())
    return answers


class _Answer:
    """One answer being made."""

    def __init__(
        self,
        model: TextModel,
        prompt: torch.Tensor,
        draw: Draw,
        rules: AnswerRules,
        options: InterleavedOptions,
        seed: int,
    ) -> None:
        rules.check_prompt(prompt.shape[1])
        self.model, self.draw, self.rules, self.options, self.seed = model, draw, rules, options, seed
        self.cache = DynamicCache(config=model.language_model.config)
        self.context = [prompt]
        self.length = prompt.shape[1]
        self.hidden = self._forward(prompt)
        self.pictures = 0

    def run(self) -> InterleavedOutput:
        """Make the answer."""
        parts: list[GeneratedPart] = []
        words: list[int] = []
        finished = False
        for step in range(self.options.max_new_tokens):
            token = self._next_token(step)
            if token in self.rules.stops:
                finished = True
                break
            if token in self.rules.starts:
                if words:
                    parts.append(_text(words, self.hidden))
                    words = []
                parts.append(self._draw(token))
            else:
                words.append(token)
                self._read(self._embed(token))
            if self.rules.full(self.length):
                break
        if words:
            parts.append(_text(words, self.hidden))
        return InterleavedOutput(tuple(parts), finished)

    def _next_token(self, step: int) -> int:
        """The next text token: never an end of a picture, nor a start for which there is no room."""
        logits = self.model.get_output_embeddings()(self.hidden).float()  # (1, vocabulary)
        logits[:, list(self.rules.forbidden(self.length, self.pictures))] = float("-inf")
        seeds = torch.tensor([self.seed], device=logits.device)
        return int(draw_codes(filter_logits(logits, self.options.text), seeds, step, TEXT_DEPTH))

    def _draw(self, token: int) -> GeneratedPart:
        kind = self.rules.starts[token]
        start = self._embed(token)
        seed = picture_seed(self.seed, self.pictures)
        drawn = self.draw(torch.cat([*self.context, start], 1), kind == "video", seed)
        self.pictures += 1
        one = (lambda made: made[0]) if kind == "video" else (lambda made: made[:1])  # (F, ...) of either kind
        codes, pixels = one(drawn.codes), one(drawn.pixel_values)
        embeds = self.model.visual_embeds(codes.flatten(0, 1)).unsqueeze(0).to(start.dtype)
        self._read(torch.cat([start, embeds, self._embed(self.rules.ends[kind])], 1))
        return GeneratedPart(kind, codes=codes, pixel_values=pixels)

    def _embed(self, token: int) -> torch.Tensor:
        return self.model.get_input_embeddings()(torch.tensor([[token]], device=self.context[0].device))

    def _read(self, embeds: torch.Tensor) -> None:
        self.context.append(embeds)
        self.length += embeds.shape[1]
        self.hidden = self._forward(embeds)

    def _forward(self, embeds: torch.Tensor) -> torch.Tensor:
        """Read ``embeds`` (1, T, H) into the cache and return the last state ``(1, H)``."""
        decoder = self.model.language_model.base_model
        return decoder(inputs_embeds=embeds, past_key_values=self.cache, use_cache=True).last_hidden_state[:, -1]


def _text(words: Sequence[int], like: torch.Tensor) -> GeneratedPart:
    return GeneratedPart("text", token_ids=torch.tensor(words, dtype=torch.int64, device=like.device))


def _ids(value: int | Sequence[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
