"""Results while they are being made: pictures row by row, films frame by frame, text piece by piece."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from vilau.generation.position import VisualStep
from vilau.generation.visual import VisualRequest, iterate_codes

_PREVIEWS = 8  # of one picture, if not told otherwise


@dataclass(frozen=True)
class VisualPreview:
    """The picture, or the frame of a film, that is being made.

    `pixel_values` (N, 3, rows, S) in [-1, 1]: of a picture that is not `complete` the upper rows alone, drawn without
    what will stand below, so only a preview; of a complete one all rows, as `generate` returns them.
    `codes` (N, P, D) of a complete picture, else those so far, whole rows of the grid. `done` and `total` count the
    positions of the whole request, `frame` the pictures of each film from 0.
    """

    done: int
    total: int
    frame: int
    complete: bool
    codes: torch.Tensor
    pixel_values: torch.Tensor


def due_rows(grid: int, every: int | None = None) -> set[int]:
    """Return after how many rows of a picture of ``grid`` rows it is shown: the first, every so many, never the last.

    The first row is a sixteenth of a 256 px picture, so a preview is there within a tenth of its time.
    """
    step = every or max(1, grid // _PREVIEWS)
    return ({1} | set(range(step, grid, step))) - {grid}


@torch.no_grad()
def stream_visual(
    step: VisualStep, request: VisualRequest, decode: Callable[[torch.Tensor], torch.Tensor], every: int | None = None
) -> Iterator[VisualPreview]:
    """Make the pictures of a request and yield them as they grow; to cancel, stop asking.

    Args:
        step, request: see `visual_step` and `VisualRequest`.
        decode: pixels ``(N, 3, rows, S)`` of codes ``(N, n, D)``, n whole rows of the grid.
        every: rows of the grid between two previews; absent, eight previews a picture. Beyond the grid: complete
            pictures only, and the first row.
    """
    grid = round(request.per_picture**0.5)
    due = due_rows(grid, every)
    for codes in iterate_codes(step, request):
        done = codes.shape[1]
        frame, inside = divmod(done - 1, request.per_picture)
        rows, rest = divmod(inside + 1, grid)
        if rest or (rows not in due and rows != grid):
            continue
        own = codes[:, frame * request.per_picture : done].clone()
        yield VisualPreview(done, request.positions, frame, rows == grid, own, decode(own))


class _Stopped(StoppingCriteria):
    """Stops the library's generation when an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


def stream_text(generate: Callable[..., Any], tokenizer: Any, **inputs: Any) -> Iterator[str]:
    """Yield the pieces of one answer as the library's streamer finds them; to cancel, close the iterator.

    Args:
        generate: a model's `generate`, which runs in a thread of its own.
        tokenizer: that turns its ids into text.
        inputs: what `generate` is given, one prompt.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            generate(streamer=streamer, stopping_criteria=StoppingCriteriaList([_Stopped(stop)]), **inputs)
        except BaseException as error:
            failures.append(error)
            streamer.text_queue.put(streamer.stop_signal)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]
