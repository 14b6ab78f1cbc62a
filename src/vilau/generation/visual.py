"""The visual loop: one position after another, D codes each, with caches and guidance in one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from vilau.generation.guidance import guidance_table
from vilau.generation.position import (
    Language,
    Networks,
    Prompts,
    UnifiedModel,
    VisualState,
    VisualStep,
    read_prompts,
)
from vilau.generation.sampling import SamplingOptions, sampling_rows

Progress = Callable[[int, int], object]


class Cancelled(RuntimeError):
    """The progress callback returned ``False``."""


@dataclass(frozen=True)
class VisualRequest:
    """Pictures or films to be made in one batch.

    Args:
        prompts: what they continue.
        positions: visual positions of each, those of all frames together.
        per_picture: positions of one picture or frame, over which guidance schedules run.
        options: sampling of each of the B pictures; `guidance_scale` 1 goes with no unconditional prompt.
        seeds: ``(B,)`` int64.
    """

    prompts: Prompts
    positions: int
    per_picture: int
    options: Sequence[SamplingOptions]
    seeds: torch.Tensor

    def __post_init__(self) -> None:
        count = len(self.seeds)
        sizes = len(self.prompts.conditional), len(self.prompts.unconditional), len(self.options)
        assert sizes == (count, count, count), (count, sizes)
        for option, prompt in zip(self.options, self.prompts.unconditional, strict=True):
            if option.guidance_scale != 1 and prompt is None:
                raise ValueError(f"guidance_scale {option.guidance_scale:g} needs an unconditional prompt; 1 does not")

    def scales(self) -> torch.Tensor:
        """Return the guidance scale ``(positions, B)`` of every position, on the CPU."""
        columns = [
            guidance_table(
                [o.guidance_scale], self.positions, self.per_picture, o.guidance_schedule, o.guidance_interval
            )
            for o in self.options
        ]
        return torch.cat(columns, 1)


@dataclass(frozen=True)
class Begun:
    """A batch whose prompts have been read: `hidden` (R, H) predicts the first position."""

    state: VisualState
    language: Language
    hidden: torch.Tensor
    guided: list[bool]

    @property
    def last_guided(self) -> int:
        """The last position with guidance, -1 if there is none."""
        return max((number for number, guided in enumerate(self.guided) if guided), default=-1)


def begin(networks: Networks, request: VisualRequest, static: bool = False) -> Begun:
    """Read the prompts of a request, each once, and return what the first position starts from."""
    scales = request.scales()
    device = request.prompts.inputs_embeds.device
    sampling = sampling_rows(request.options, networks.quantizer.codebook_size, device)
    language, hidden = read_prompts(networks, request.prompts, request.positions, static)
    state = VisualState.start(networks, request.prompts, request.seeds, scales, sampling)
    return Begun(state, language, hidden, (scales != 1).any(1).tolist())


@torch.no_grad()
def iterate_codes(step: VisualStep, request: VisualRequest) -> Iterator[torch.Tensor]:
    """Make the pictures of a request; yield the codes so far, ``(B, done, D)``, after every position.

    What is yielded is a view that later positions do not change. To cancel, stop asking.
    """
    begun = begin(step.networks, request, step.static)
    state, language, hidden = begun.state, begun.language, begun.hidden
    count, last = len(request.seeds), begun.last_guided
    codes = state.codes.new_zeros((count, request.positions, state.codes.shape[1]))
    for position in range(request.positions):
        if position == last + 1 and not step.static:
            language.keep(count)  # no guidance from here on: the unconditional rows are done
            hidden = hidden[:count]
        guided = step.static or begun.guided[position]
        if position:
            codes[:, position] = step(state, language, guided)
        else:
            codes[:, position] = step.draw(hidden, state, guided)
        yield codes[:, : position + 1]


def run_codes(step: VisualStep, request: VisualRequest, progress: Progress | None = None) -> torch.Tensor:
    """Make the pictures of a request and return their codes ``(B, positions, D)``.

    Raises:
        Cancelled: `progress`, called with (done, total) after each position, returned ``False``.
    """
    codes = request.seeds.new_zeros((len(request.seeds), 0, step.networks.quantizer.depth))
    for codes in iterate_codes(step, request):
        done = codes.shape[1]
        if progress is not None and progress(done, request.positions) is False:
            raise Cancelled(f"cancelled after {done} of {request.positions} positions")
    return codes


def generate_codes(
    model: UnifiedModel,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    positions: int,
    options: SamplingOptions,
    seeds: torch.Tensor,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Return ``codes`` (B, positions, D) that continue left-padded prompts, one row of prompt for each.

    Args:
        model: the joined network.
        inputs_embeds: ``(R, L, H)`` ending with a visual start token. With guidance ``R = 2 B``, conditional rows
            first, unconditional second; with a guidance scale of 1 there are no unconditional rows and ``R = B``.
        attention_mask: ``(R, L)``, 0 at left padding.
        positions: visual positions to generate.
        seeds: ``(B,)`` int64, one per picture.
        progress: called with (done, total) after each position; returning ``False`` cancels.

    Raises:
        Cancelled: the callback asked for it.
    """
    count = len(seeds)
    guided = options.guidance_scale != 1
    rows = count * (2 if guided else 1)
    if len(inputs_embeds) != rows:
        raise ValueError(f"{len(inputs_embeds)} prompt rows for {count} pictures; {rows} were expected")
    unconditional = [count + number if guided else None for number in range(count)]
    prompts = Prompts(inputs_embeds, attention_mask, range(count), unconditional)
    request = VisualRequest(prompts, positions, positions, [options] * count, seeds)
    return run_codes(VisualStep(Networks.of(model)), request, progress)
