"""What a running batch holds: sequences with their rows, prompts being read, and the position being drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vilau.generation.budget import Demand
from vilau.generation.position import Networks, VisualState, VisualStep
from vilau.generation.requests import Handle, Prompt, TextRequest, VisualSequenceRequest
from vilau.generation.sampling import SamplingRows, sample_codes, sampling_rows
from vilau.generation.slots import Row

TEXT_DEPTH = 255  # the noise of text, apart from that of codes, whose depths are far below; as in mixed answers


@dataclass(eq=False)
class Job:
    """A request that has its rows: `each` is what one of its sequences takes, `left` how many are not complete."""

    handle: Handle
    each: Demand
    left: int
    sequences: list[Text | Picture] = field(default_factory=list)

    @property
    def visual(self) -> bool:
        """Whether it draws."""
        return isinstance(self.handle.request, VisualSequenceRequest)


@dataclass(eq=False)
class Text:
    """An answer being written: `state` (H,) predicts the first token, `token` is the last one."""

    job: Job
    request: TextRequest
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

    def place(self, empty: bool, state: torch.Tensor) -> bool:
        """Note that the prompt is read; return whether the sequence can start."""
        self.state = state
        return True


@dataclass(eq=False)
class Picture:
    """A picture or film being drawn: `codes` (D,) are the last ones; `state`, `empty_state` predict the next ones.

    The states are there after the prompts have been read, before the first position; from then on they come from
    feeding the codes. `scales` is the guidance of each position. `row` has the prompt, `empty` the one without text
    until the last guided position. `sound` () stays true while the states are finite.
    """

    job: Job
    request: VisualSequenceRequest
    number: int
    seed: int
    scales: list[float]
    row: Row
    empty: Row | None
    sound: torch.Tensor
    done: int = 0
    codes: torch.Tensor | None = None
    state: torch.Tensor | None = None
    empty_state: torch.Tensor | None = None
    gone: bool = False

    @property
    def guided_still(self) -> bool:
        """Whether any position to come is guided."""
        return any(scale != 1 for scale in self.scales[self.done :])

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
    """A prompt being read into the row of the first target; the others get a copy."""

    prompt: Prompt
    embeds: torch.Tensor
    targets: list[Target]

    @property
    def row(self) -> Row:
        """The row that is being filled."""
        return self.targets[0].row

    @property
    def left(self) -> int:
        """Positions not read yet."""
        return self.prompt.length - self.row.length


class TextSampling:
    """The filters, seeds and forbidden tokens of some texts, as tensors."""

    def __init__(self, texts: Sequence[Text], vocabulary: int, device: torch.device) -> None:
        self.texts = list(texts)
        self.filters: SamplingRows = sampling_rows([text.request.sampling for text in texts], vocabulary, device)
        self.seeds = torch.tensor([text.seed for text in texts]).to(device)
        never = [(row, token) for row, text in enumerate(texts) for token in text.request.never]
        self.never = torch.tensor(never).T.to(device) if never else None

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
        self.guided = [number for number, picture in enumerate(pictures) if picture.empty is not None]
        count, depth = len(pictures), networks.quantizer.depth
        longest = max(len(picture.scales) for picture in pictures)
        scales = torch.ones((longest, count))
        for number, picture in enumerate(pictures):
            scales[: len(picture.scales), number] = torch.tensor(picture.scales)
        rows = list(range(count))
        for row, number in enumerate(self.guided):
            rows[number] = count + row
        nothing = torch.zeros(depth, dtype=torch.int64, device=device)
        options = [picture.request.sampling for picture in pictures]
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
        same = len(pictures) == len(self.pictures) and all(a is b for a, b in zip(pictures, self.pictures, strict=True))
        return same and guided == self.guided


class Drawing:
    """One position of a cohort, depth step by depth step.

    Args:
        step: how the depth transformer is run and codes are chosen.
        hidden: states ``(R, H)``, those with the prompts first.
    """

    def __init__(self, step: VisualStep, cohort: Cohort, hidden: torch.Tensor) -> None:
        self.step, self.cohort, self.state = step, cohort, cohort.state
        count = len(cohort.pictures)
        guided = any(p.scales[p.done] != 1 for p in cohort.pictures)
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
