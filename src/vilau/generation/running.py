"""What a running batch holds: sequences with their rows, prompts being read, and the position being drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from vilau.generation.budget import Demand
from vilau.generation.interleaved import TEXT_DEPTH, VisualKind, picture_seed
from vilau.generation.position import Networks, VisualState, VisualStep
from vilau.generation.requests import Handle, InterleavedRequest, Prompt, TextRequest, last_guided
from vilau.generation.sampling import SamplingOptions, SamplingRows, sample_codes, sampling_rows
from vilau.generation.slots import Row


@dataclass(eq=False)
class Job:
    """A request that has its rows: `each` is what one of its sequences takes, `left` how many are not complete."""

    handle: Handle
    each: Demand
    left: int
    sequences: list[Text | Picture] = field(default_factory=list)

    @property
    def visual(self) -> bool:
        """Whether it may draw."""
        return self.handle.request.visual


@dataclass(eq=False)
class Text:
    """An answer being written: `state` (H,) predicts the first token, `token` is the last one."""

    job: Job
    request: TextRequest | InterleavedRequest
    number: int
    seed: int
    row: Row
    done: int = 0
    token: int = 0
    state: torch.Tensor | None = None
    gone: bool = False

    @property
    def rows(self) -> list[Row]:
        """The row, while it has one."""
        return [] if self.gone else [self.row]

    @property
    def never(self) -> tuple[int, ...]:
        """Tokens that must not follow."""
        assert isinstance(self.request, TextRequest)
        return self.request.never

    @property
    def ending(self) -> Literal["stop", "length"] | None:
        """Why the last token is the last; ``None`` if it is not."""
        assert isinstance(self.request, TextRequest)
        if self.token in self.request.stop:
            return "stop"
        return "length" if self.done == self.request.max_new_tokens else None

    def place(self, empty: bool, state: torch.Tensor) -> bool:
        """Note that the prompt is read; return whether the sequence can start."""
        self.state = state
        return True


@dataclass(eq=False)
class Answer(Text):
    """An answer that draws as well: `drawing` while it does, then none; `pictures` have been begun.

    Its row is its picture's row with the prompt, so what was drawn stays before the text that goes on.
    """

    drawing: Picture | None = None
    pictures: int = 0

    @property
    def mixed(self) -> InterleavedRequest:
        """The request."""
        assert isinstance(self.request, InterleavedRequest)
        return self.request

    @property
    def rows(self) -> list[Row]:
        """The row, and while a picture is guided its row without the prompt."""
        return [] if self.gone else [self.row] if self.drawing is None else self.drawing.rows

    @property
    def never(self) -> tuple[int, ...]:
        """Tokens that must not follow what was read."""
        return self.mixed.rules.forbidden(self.row.length, self.pictures)

    @property
    def begun(self) -> VisualKind | None:
        """What the last token begins."""
        return self.mixed.rules.starts.get(self.token)

    @property
    def ending(self) -> Literal["stop", "length"] | None:
        """Why the last token, or picture, is the last; both are still to be read."""
        rules = self.mixed.rules
        if self.token in rules.stops:
            return "stop"
        unread = 1 if self.begun is None else 2
        ended = self.done == self.request.max_new_tokens or rules.full(self.row.length + unread)
        return "length" if ended else None

    def begin(self, kind: VisualKind, empty: Row | None, sound: torch.Tensor) -> Picture:
        """Return the picture or film that the answer draws from now on."""
        scales, seed = self.mixed.scales(kind), picture_seed(self.seed, self.pictures)
        options = self.mixed.visual_sampling
        self.drawing = Picture(
            self.job, options, self.number, seed, scales, self.row, empty, sound, self, kind, self.pictures
        )
        self.pictures += 1
        return self.drawing


@dataclass(eq=False)
class Picture:
    """A picture or film being drawn: `codes` (D,) are the last ones; `state`, `empty_state` predict the next ones.

    The states are there after the prompts have been read, before the first position; from then on they come from
    feeding the codes. `scales` (positions,) is the guidance. `row` has the prompt, `empty` the one without text
    until the last guided position. `sound` () stays true while the states are finite. One that an `answer` draws has
    its `kind`, and its `index` among the answer's.
    """

    job: Job
    sampling: SamplingOptions
    number: int
    seed: int
    scales: torch.Tensor
    row: Row
    empty: Row | None
    sound: torch.Tensor
    answer: Answer | None = None
    kind: VisualKind = "image"
    index: int = 0
    done: int = 0
    codes: torch.Tensor | None = None
    state: torch.Tensor | None = None
    empty_state: torch.Tensor | None = None
    gone: bool = False

    def __post_init__(self) -> None:
        self.guided = last_guided(self.scales)
        self.constant = bool((self.scales != 1).all())

    @property
    def guided_now(self) -> bool:
        """Whether the next position is guided."""
        return self.done < self.guided and (self.constant or bool(self.scales[self.done] != 1))

    @property
    def guided_still(self) -> bool:
        """Whether any position to come is guided."""
        return self.done < self.guided

    @property
    def rows(self) -> list[Row]:
        """The rows in use, the one with the prompt first."""
        own = [self.row] if self.empty is None else [self.row, self.empty]
        return [] if self.gone else own

    def place(self, empty: bool, state: torch.Tensor) -> bool:
        """Note that one of the prompts is read; return whether the sequence can start."""
        if empty:
            self.empty_state = state
        else:
            self.state = state
        return self.state is not None and (self.empty is None or self.empty_state is not None)


@dataclass(frozen=True, eq=False)
class Target:
    """A row that a prompt is read for; `empty` if it is the prompt without text."""

    sequence: Text | Picture
    row: Row
    empty: bool


@dataclass(eq=False)
class Reading:
    """A prompt being read into the row of the first target; the others get a copy.

    In an answer also what follows the `begin` first positions of its row: a start token, or a picture's end.
    """

    prompt: Prompt
    embeds: torch.Tensor
    targets: list[Target]
    begin: int = 0

    @property
    def row(self) -> Row:
        """The row that is being filled."""
        return self.targets[0].row

    @property
    def left(self) -> int:
        """Positions not read yet."""
        return self.begin + self.prompt.length - self.row.length

    def next(self, count: int) -> torch.Tensor:
        """Return the next embeddings ``(count, H)`` to be read."""
        start = self.row.length - self.begin
        return self.embeds[start : start + count]


class TextSampling:
    """The filters, seeds and forbidden tokens of some texts, as tensors."""

    def __init__(self, texts: Sequence[Text], vocabulary: int, device: torch.device) -> None:
        self.texts = list(texts)
        self.filters: SamplingRows = sampling_rows([text.request.sampling for text in texts], vocabulary, device)
        self.seeds = torch.tensor([text.seed for text in texts]).to(device)
        self.forbidden = [text.never for text in texts]
        never = [(row, token) for row, tokens in enumerate(self.forbidden) for token in tokens]
        self.never = torch.tensor(never).T.to(device) if never else None

    def serves(self, texts: Sequence[Text]) -> bool:
        """Whether it is of these texts, with the tokens that must not follow now."""
        return self.texts == texts and all(
            text.never == never for text, never in zip(texts, self.forbidden, strict=True)
        )

    def draw(self, logits: torch.Tensor) -> torch.Tensor:
        """Return tokens ``(T,)`` of logits ``(T, vocabulary)``."""
        if self.never is not None:
            logits = logits.index_put((self.never[0], self.never[1]), logits.new_tensor(float("-inf")))
        done = torch.tensor([text.done for text in self.texts]).to(logits.device)
        return sample_codes(logits, self.filters, self.seeds, done, TEXT_DEPTH)


class Cohort:
    """Pictures that are drawn together, and the state of their position."""

    def __init__(self, networks: Networks, pictures: Sequence[Picture], device: torch.device) -> None:
        self.pictures = list(pictures)
        self.done = [picture.done for picture in pictures]
        self.guided = [number for number, picture in enumerate(pictures) if picture.empty is not None]
        count, depth = len(pictures), networks.quantizer.depth
        scales = nn.utils.rnn.pad_sequence([picture.scales for picture in pictures], padding_value=1.0)
        rows = list(range(count))
        for row, number in enumerate(self.guided):
            rows[number] = count + row
        nothing = torch.zeros(depth, dtype=torch.int64, device=device)
        options = [picture.sampling for picture in pictures]
        self.sound = torch.stack([picture.sound for picture in pictures])
        self.state = VisualState(
            position=torch.tensor([picture.done for picture in pictures]).to(device),
            codes=torch.stack([nothing if p.codes is None else p.codes for p in pictures]),
            seeds=torch.tensor([picture.seed for picture in pictures]).to(device),
            scales=scales.to(device),
            picture=torch.tensor([*range(count), *self.guided]).to(device),
            unconditional=torch.tensor(rows).to(device),
            sampling=sampling_rows(options, networks.quantizer.codebook_size, device),
            depth_cache=networks.depth_transformer.new_cache(count + len(self.guided)),
        )

    def serves(self, pictures: Sequence[Picture]) -> bool:
        """Whether it is of these pictures, with the rows that they have now."""
        guided = [number for number, picture in enumerate(pictures) if picture.empty is not None]
        return list(pictures) == self.pictures and guided == self.guided and self.done == [p.done for p in pictures]


class Drawing:
    """One position of a cohort, depth step by depth step.

    Args:
        step: how the depth transformer is run and codes are chosen.
        hidden: states ``(R, H)``, those with the prompts first.
    """

    def __init__(self, step: VisualStep, cohort: Cohort, hidden: torch.Tensor) -> None:
        self.step, self.cohort, self.state = step, cohort, cohort.state
        count = len(cohort.pictures)
        guided = any(picture.guided_now for picture in cohort.pictures)
        rows = len(hidden) if guided else count
        cohort.sound &= torch.isfinite(hidden[:count]).all(1)
        self.x = hidden[:rows]
        self.dtype = hidden.dtype
        whole = rows == len(self.state.picture)
        self.cache: Any = self.state.depth_cache if whole else self.state.depth_cache.first(rows)
        self.owner = self.state.picture[:rows]
        self.scale = self.state.scales.gather(0, self.state.position.unsqueeze(0))[0].unsqueeze(1) if guided else None
        self.partial = torch.zeros((), device=hidden.device)
        self.depth = 0

    @property
    def rows(self) -> int:
        """Rows of a depth step."""
        return len(self.owner)

    @property
    def complete(self) -> bool:
        """Whether all codes of the position are drawn."""
        return self.depth == self.step.networks.quantizer.depth

    def advance(self) -> None:
        """Draw the code of the next depth."""
        quantizer = self.step.networks.quantizer
        logits = self.step.depth_logits(self.x, self.depth, self.cache)
        code = self.step.choose(logits, self.scale, self.state, self.depth)
        self.state.codes[:, self.depth] = code
        if self.depth + 1 < quantizer.depth:
            self.partial = self.partial + quantizer.code_vectors(code, self.depth)
            self.x = self.partial.to(self.dtype).index_select(0, self.owner)
        self.depth += 1
        if self.complete:
            self.state.position += 1
            self.cohort.done = [done + 1 for done in self.cohort.done]
