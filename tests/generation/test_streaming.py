"""Previews, frames and text while they are made: complete ones are exactly what `generate` returns."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vilau.generation.compiled import visual_step
from vilau.generation.streaming import due_rows, stream_text, stream_visual

EMPTY = torch.tensor([[1, 3, 36]])
PROMPT = torch.tensor([[1, 3, 11, 12, 36]])


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    """The very small model: 2x2 positions, 16 px."""
    return make_model()


def previews(model: Any, video: bool = False, **changes: Any) -> list[Any]:
    """All previews of two pictures or films."""
    mask = torch.ones_like(PROMPT)
    request = model.visual_request(
        model.embed(PROMPT), mask, video, unconditional_ids=EMPTY, num_images_per_prompt=2, seed=3, **changes
    )
    return list(stream_visual(visual_step(model, 4), request, model.vision_tower.decode))


def test_a_picture_grows(model: Any) -> None:
    """The first row is shown first; the last preview is the picture of `generate`, codes and pixels."""
    first, last = previews(model)
    whole = model.generate(PROMPT, generation_mode="image", unconditional_ids=EMPTY, num_images_per_prompt=2, seed=3)
    assert (first.done, first.total, first.complete, first.pixel_values.shape) == (2, 4, False, (2, 3, 8, 16))
    assert torch.equal(first.codes, whole.codes[:, :2])
    assert (last.done, last.complete) == (4, True)
    assert torch.equal(last.codes, whole.codes) and torch.equal(last.pixel_values, whole.pixel_values)


def test_frames_of_a_film_are_complete_one_by_one(model: Any) -> None:
    """Every frame is decoded when it is done and is that of the whole film."""
    seen = previews(model, video=True, num_frames=3)
    film = model.generate(
        PROMPT, generation_mode="video", unconditional_ids=EMPTY, num_images_per_prompt=2, seed=3, num_frames=3
    )
    assert [(p.done, p.frame, p.complete) for p in seen] == [
        (2, 0, False),
        (4, 0, True),
        (6, 1, False),
        (8, 1, True),
        (10, 2, False),
        (12, 2, True),
    ]
    for preview in seen:
        if preview.complete:
            torch.testing.assert_close(preview.pixel_values, film.pixel_values[:, preview.frame])


def test_the_first_preview_comes_within_a_tenth() -> None:
    """QUALITY: at 256 and 384 px the first row is below a tenth of the positions; the last one is not a preview."""
    for grid in (16, 27):
        rows = due_rows(grid)
        assert min(rows) / grid < 0.1 and max(rows) < grid and len(rows) >= 7
    assert due_rows(1) == set() and due_rows(4, 100) == {1} and due_rows(6, 2) == {1, 2, 4}


def test_upper_rows_where_the_map_is_resized(make_model: Callable[..., Any]) -> None:
    """A decoder with latents of another side than the grid draws as many rows of pixels as the rows given cover."""
    decoder = make_model().vision_tower.pixel_decoder
    side = decoder.latent_side
    wide = torch.randn(1, 8, 2 * side, 2 * side)
    whole = decoder(wide)
    upper = decoder(wide[:, :, :side])
    assert upper.shape[2:] == (whole.shape[2] // 2, whole.shape[3])
    assert decoder(wide[:, :, :1]).shape[2] == whole.shape[2] // side


def test_stopping_early(model: Any) -> None:
    """Whoever stops asking stops the work: no further position is made."""
    made: list[int] = []
    hook = model.depth_transformer.head.register_forward_hook(lambda *rest: made.append(1))
    mask = torch.ones_like(PROMPT)
    request = model.visual_request(model.embed(PROMPT), mask, False, unconditional_ids=EMPTY)
    stream = stream_visual(visual_step(model, 2), request, model.vision_tower.decode)
    next(stream)
    stream.close()
    hook.remove()
    assert len(made) == 2 * 3  # two of four positions, three depths each


class Letters:
    """A tokenizer of one letter per id."""

    def decode(self, ids: Any, **kwargs: Any) -> str:
        return "".join(chr(97 + int(i) % 26) + " " for i in ids)


def test_text_comes_in_pieces(model: Any) -> None:
    """Pieces joined are the text of the ids that `generate` returns, and there are several."""
    inputs = {"input_ids": PROMPT, "max_new_tokens": 8, "do_sample": False}
    ids = model.generate(**inputs)
    pieces = list(stream_text(model.generate, Letters(), **inputs))
    assert "".join(pieces) == Letters().decode(ids[0]) and len(pieces) > 2


def test_closing_a_text_stops_its_generation(model: Any) -> None:
    """The thread ends soon after the iterator is closed, long before its limit."""
    steps: list[int] = []
    hook = model.language_model.model.register_forward_hook(lambda *rest: steps.append(1))
    before = threading.active_count()
    inputs = {"input_ids": PROMPT, "max_new_tokens": 50, "min_new_tokens": 50, "do_sample": False}
    stream = stream_text(model.generate, Letters(), **inputs)
    next(stream)
    stream.close()
    hook.remove()
    assert threading.active_count() == before and len(steps) < 50


def test_an_error_in_the_thread_reaches_the_reader(model: Any) -> None:
    """A wrong argument is raised where the text is read, not lost in a thread."""
    with pytest.raises(ValueError, match="generation_mode is 'sound'"):
        list(stream_text(model.generate, Letters(), input_ids=PROMPT, generation_mode="sound"))
