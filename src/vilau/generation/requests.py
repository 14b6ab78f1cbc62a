"""Requests to a running batch, what is heard of them while they run, and the handle that their sender keeps."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from vilau.generation.guidance import guidance_table
from vilau.generation.interleaved import AnswerRules, GeneratedPart, InterleavedOutput, VisualKind
from vilau.generation.sampling import SamplingOptions
from vilau.generation.visual import Cancelled

GREEDY_TEXT = SamplingOptions(guidance_scale=1.0, temperature=0.0, top_k=0, top_p=1.0)


class QueueFull(RuntimeError):
    """So many requests wait already that another one is turned away."""


class Closed(RuntimeError):
    """The batch finishes what it has and takes nothing new."""


class RequestFailed(RuntimeError):
    """A request ended with an error, which concerns no other one."""


@dataclass(frozen=True)
class Prompt:
    """What a request continues.

    Args:
        length: positions.
        embeds: returns the embeddings ``(length, H)``; called once, by the thread that runs the batch, when the
            request gets its slot. What it raises ends this request alone.
        key: prompts with the same key have the same embeddings; they are read once, and the reading is kept for
            later requests. For the prompt without text, which all guided requests have in common.
    """

    length: int
    embeds: Callable[[], torch.Tensor]
    key: Hashable | None = None

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError("a prompt is empty; it needs at least one position")

    @classmethod
    def of(cls, embeds: torch.Tensor, key: Hashable | None = None) -> Prompt:
        """Return the prompt of embeddings ``(L, H)``."""
        return cls(len(embeds), lambda: embeds, key)


@dataclass(frozen=True)
class TextRequest:
    """Text to be written.

    Args:
        prompt: what it continues.
        max_new_tokens: the most tokens of each answer.
        stop: token ids that end an answer; the one that does is part of it, as in the library's `generate`.
        sampling: temperature, top-k and top-p; the likeliest token by default. Text is not guided.
        seed: any integer; answer i has the i-th of its seeds (`row_seeds`).
        n: answers that share the reading of the prompt.
        never: token ids that are not to be written, as the start of a picture.
    """

    prompt: Prompt
    max_new_tokens: int
    stop: frozenset[int] = frozenset()
    sampling: SamplingOptions = GREEDY_TEXT
    seed: int = 0
    n: int = 1
    never: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _at_least_one(max_new_tokens=self.max_new_tokens, n=self.n)
        _not_guided(self.sampling)

    @property
    def visual(self) -> bool:
        """Texts do not draw."""
        return False

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Positions of the rows of one sequence."""
        return (self.prompt.length + self.max_new_tokens,)


@dataclass(frozen=True)
class VisualSequenceRequest:
    """Pictures or films to be drawn.

    Args:
        prompt: what they continue, ending with a visual start token.
        positions: of each, those of all frames together.
        per_picture: positions of one picture or frame, over which guidance schedules run.
        sampling: of codes, with the guidance scale; a scale of 1 takes no second row.
        seed: any integer; picture i has the i-th of its seeds (`row_seeds`).
        n: pictures that share the reading of the prompt.
        unconditional: the prompt without its text; needed with guidance.
    """

    prompt: Prompt
    positions: int
    per_picture: int
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    seed: int = 0
    n: int = 1
    unconditional: Prompt | None = None

    def __post_init__(self) -> None:
        _at_least_one(positions=self.positions, per_picture=self.per_picture, n=self.n)
        if self.sampling.guidance_scale != 1 and self.unconditional is None:
            raise ValueError(
                f"guidance_scale {self.sampling.guidance_scale:g} needs an unconditional prompt; 1 does not"
            )

    @property
    def visual(self) -> bool:
        """Pictures and films are drawn."""
        return True

    def scales(self) -> torch.Tensor:
        """Return the guidance scale ``(positions,)`` of every position, on the CPU."""
        return guidance_scales(self.sampling, self.positions, self.per_picture)

    @property
    def guided_positions(self) -> int:
        """Positions up to and with the last one that is guided; 0 without guidance."""
        return last_guided(self.scales())

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Positions of the rows of one sequence: with its prompt and, where it is guided, without."""
        guided = self.guided_positions
        own = (self.prompt.length + self.positions,)
        return own if not guided or self.unconditional is None else (*own, self.unconditional.length + guided)


@dataclass(frozen=True)
class InterleavedRequest:
    """Answers in which the model itself decides where pictures and films stand between texts.

    Args:
        prompt: what they continue, open for an answer.
        rules: start, end and stop tokens, lengths of pictures and films, how many, and the model's context.
        max_new_tokens: of text in each answer, start tokens included, all parts together.
        sampling: temperature, top-k and top-p of text tokens; the likeliest by default. Text is not guided.
        visual_sampling: how codes are drawn, with the guidance scale; a scale of 1 takes no second row.
        seed: any integer; answer i has the i-th of its seeds (`row_seeds`), and each of its pictures one from that.
        n: answers that share the reading of the prompt.
        unconditional: for each kind the prompt without its text, which ends with the start token of the kind; needed
            with guidance.
    """

    prompt: Prompt
    rules: AnswerRules
    max_new_tokens: int = 256
    sampling: SamplingOptions = GREEDY_TEXT
    visual_sampling: SamplingOptions = field(default_factory=SamplingOptions)
    seed: int = 0
    n: int = 1
    unconditional: Mapping[VisualKind, Prompt] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _at_least_one(max_new_tokens=self.max_new_tokens, n=self.n)
        self.rules.check_prompt(self.prompt.length)
        _not_guided(self.sampling)
        scale = self.visual_sampling.guidance_scale
        missing = [kind for kind in self.kinds if kind not in self.unconditional]
        if scale != 1 and missing:
            raise ValueError(
                f"guidance_scale {scale:g} needs an unconditional prompt for every kind, and there is none for "
                f"{' and '.join(missing)}; 1 does not"
            )

    @property
    def visual(self) -> bool:
        """Whether it may draw at all."""
        return bool(self.kinds)

    @property
    def kinds(self) -> list[VisualKind]:
        """What it may draw, for which there is room after the prompt."""
        return self.rules.kinds(self.prompt.length)

    def scales(self, kind: VisualKind) -> torch.Tensor:
        """Return the guidance scale ``(positions,)`` of every position of a picture or film, on the CPU."""
        return guidance_scales(self.visual_sampling, self.rules.positions[kind], self.rules.per_picture)

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """The most positions of the rows of one answer: its own and, if it may draw with guidance, the one without.

        As many of the longest kind as it may draw, each with its start and end, up to the context.
        """
        rules, kinds = self.rules, self.kinds
        pictures = min(rules.max_pictures, self.max_new_tokens)
        longest = max((rules.positions[kind] + 1 for kind in kinds), default=0)
        own = self.prompt.length + self.max_new_tokens + pictures * longest
        own = own if rules.context is None else min(own, rules.context)
        guided = {kind: last_guided(self.scales(kind)) for kind in kinds}
        empty = [self.unconditional[kind].length + count for kind, count in guided.items() if count]
        return (own, max(empty)) if empty else (own,)


Request = TextRequest | VisualSequenceRequest | InterleavedRequest


@functools.lru_cache(maxsize=64)
def guidance_scales(sampling: SamplingOptions, positions: int, per_picture: int) -> torch.Tensor:
    """Return the guidance scale ``(positions,)`` of every position of a picture or film, on the CPU; read only."""
    s = sampling
    return guidance_table([s.guidance_scale], positions, per_picture, s.guidance_schedule, s.guidance_interval)[:, 0]


def last_guided(scales: torch.Tensor) -> int:
    """Return the positions up to and with the last one that is guided; 0 without guidance."""
    guided = (scales != 1).nonzero()
    return int(guided[-1]) + 1 if len(guided) else 0


@dataclass(frozen=True)
class TextToken:
    """Token number `done` (from 1, start tokens of pictures counted) of answer `sequence`."""

    sequence: int
    token: int
    done: int


@dataclass(frozen=True)
class VisualPosition:
    """Position number `done` (from 1) of picture `sequence`: `codes` (D,) on the model's device.

    In an answer that mixes them with text, of its picture or film number `picture` (from 0).
    """

    sequence: int
    codes: torch.Tensor
    done: int
    picture: int = 0


@dataclass(frozen=True)
class PictureStart:
    """Answer `sequence` begins its picture or film number `picture` (from 0), of so many `positions`.

    It stands for the start token, which is no `TextToken`.
    """

    sequence: int
    picture: int
    kind: VisualKind
    positions: int


@dataclass(frozen=True)
class PictureEnd:
    """Picture or film number `picture` of answer `sequence` is complete; the answer goes on or ends."""

    sequence: int
    picture: int
    kind: VisualKind


@dataclass(frozen=True)
class SequenceEnd:
    """Answer or picture `sequence` is complete: it met a `stop` token, or its `length`."""

    sequence: int
    reason: Literal["stop", "length"]


@dataclass(frozen=True)
class RequestEnd:
    """The last event of every request."""

    reason: Literal["finished", "cancelled", "failed"]
    error: BaseException | None = None


Event = TextToken | VisualPosition | PictureStart | PictureEnd | SequenceEnd | RequestEnd


class _Parts:
    """The parts of one mixed answer, put together from its events."""

    def __init__(self, rules: AnswerRules) -> None:
        self.rules = rules
        self.parts: list[GeneratedPart] = []
        self.words: list[int] = []
        self.codes: list[torch.Tensor] = []
        self.finished = False

    def add(self, event: Event) -> None:
        """Take an event of the answer."""
        if isinstance(event, TextToken):
            self.finished = event.token in self.rules.stops
            if not self.finished:
                self.words.append(event.token)
        elif isinstance(event, VisualPosition):
            self.codes.append(event.codes)
        elif isinstance(event, PictureEnd):
            codes = torch.stack(self.codes).unflatten(0, (-1, self.rules.per_picture))  # (F, P, D)
            self.parts.append(GeneratedPart(event.kind, codes=codes))
            self.codes = []
        elif self.words:
            self.parts.append(GeneratedPart("text", token_ids=torch.tensor(self.words)))
            self.words = []


class Handle:
    """A request on its way: its events as they come, its result, and the way to cancel it. Safe between threads."""

    def __init__(self, request: Request, on_cancel: Callable[[Handle], object]) -> None:
        self.request = request
        self.end: RequestEnd | None = None
        self._on_cancel = on_cancel
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._tokens: list[list[int]] = [[] for _ in range(request.n)]
        self._codes: list[list[torch.Tensor]] = [[] for _ in range(request.n)]
        self._reasons: list[str | None] = [None] * request.n
        rules = request.rules if isinstance(request, InterleavedRequest) else None
        self._parts = [] if rules is None else [_Parts(rules) for _ in range(request.n)]

    @property
    def done(self) -> bool:
        """Whether the request has ended, in whatever way."""
        return self._ended.is_set()

    def cancel(self) -> None:
        """Give the request up: a waiting one at once, a running one before its next position. Harmless at any time."""
        self._on_cancel(self)

    def events(self, timeout: float | None = None) -> Iterator[Event]:
        """Yield every event once, up to and with the `RequestEnd`; for one listener.

        Raises:
            queue.Empty: nothing came for ``timeout`` seconds.
        """
        while True:
            event = self._events.get(timeout=timeout)
            yield event
            if isinstance(event, RequestEnd):
                return

    def poll(self) -> list[Event]:
        """Return the events that have come since the last call, without waiting."""
        found: list[Event] = []
        while True:
            try:
                found.append(self._events.get_nowait())
            except queue.Empty:
                return found

    def tokens(self, timeout: float | None = None) -> list[list[int]]:
        """Wait for the end and return the token ids of every answer; raises as `wait` does."""
        self.wait(timeout)
        return self._tokens

    def codes(self, timeout: float | None = None) -> torch.Tensor:
        """Wait for the end and return the codes ``(n, positions, D)``; raises as `wait` does."""
        self.wait(timeout)
        return torch.stack([torch.stack(codes) for codes in self._codes])

    def answers(self, timeout: float | None = None) -> list[InterleavedOutput]:
        """Wait for the end and return mixed answers as `generate_interleaved` does, `pixel_values` not decoded.

        Raises as `wait` does; of other requests there are none.
        """
        self.wait(timeout)
        return [InterleavedOutput(tuple(made.parts), made.finished) for made in self._parts]

    def reasons(self) -> list[str | None]:
        """Return why each sequence ended, `stop` or `length`; ``None`` while it has not."""
        return list(self._reasons)

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the end.

        Raises:
            TimeoutError: it did not come within ``timeout`` seconds.
            Cancelled: the request was cancelled.
            RequestFailed: it failed; the error is its cause.
        """
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the request has not ended within {timeout} seconds")
        assert self.end is not None
        if self.end.reason == "cancelled":
            raise Cancelled("the request was cancelled")
        if self.end.reason == "failed":
            raise RequestFailed(str(self.end.error)) from self.end.error

    def emit(self, event: Event) -> None:
        """Note an event and pass it on; for the batch that runs the request."""
        if self.end is not None:
            return
        if isinstance(event, RequestEnd):
            self.end = event
        elif self._parts:
            self._parts[event.sequence].add(event)
        if isinstance(event, TextToken):
            self._tokens[event.sequence].append(event.token)
        elif isinstance(event, VisualPosition):
            self._codes[event.sequence].append(event.codes)
        elif isinstance(event, SequenceEnd):
            self._reasons[event.sequence] = event.reason
        if self.end is not None:
            self._ended.set()  # before the event, so that who hears of the end finds the result
        self._events.put(event)


def _not_guided(text: SamplingOptions) -> None:
    if text.guidance_scale != 1:
        raise ValueError(f"guidance_scale is {text.guidance_scale:g}; text is not guided, so it must be 1")


def _at_least_one(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
