"""The public class: modes, defaults, limits, batches, guidance, text generation, saving and loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vilau.generation.sampling import SamplingOptions, row_seeds
from vilau.generation.visual import Cancelled
from vilau.model import VilaUForConditionalGeneration
from vilau.modeling.vila_u import VilaUModel

T, V, PAD = 0, 1, 2
EMPTY = torch.tensor([[1, 3, 4, 36]])
PROMPT = torch.tensor([[1, 3, 11, 12, 13, 4, 36]])


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> VilaUForConditionalGeneration:
    """The very small model."""
    return make_model()


def draw(model: VilaUForConditionalGeneration, ids: torch.Tensor = PROMPT, **kwargs: Any) -> torch.Tensor:
    """Codes of pictures."""
    return model.generate(ids, generation_mode="image", **({"unconditional_ids": EMPTY} | kwargs)).codes


def left_padded(*rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts padded on the left and their attention mask."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def test_shapes_of_pictures_and_films(model: VilaUForConditionalGeneration) -> None:
    """Codes and pixels for every prompt and every picture of it; a film has a frame axis; pixels are the codes'."""
    ids, mask = left_padded([1, 5, 36], [1, 5, 6, 7, 36])
    out = model.generate(
        ids, attention_mask=mask, generation_mode="image", unconditional_ids=EMPTY, num_images_per_prompt=3
    )
    assert out.codes.shape == (6, 4, 3) and out.pixel_values.shape == (6, 3, 16, 16)
    torch.testing.assert_close(out.pixel_values, model.vision_tower.decode(out.codes))
    assert float(out.pixel_values.abs().max()) <= 1
    film = model.generate(ids, attention_mask=mask, generation_mode="video", unconditional_ids=EMPTY)
    assert film.codes.shape == (2, 2, 4, 3) and film.pixel_values.shape == (2, 2, 3, 16, 16)
    longer = model.generate(PROMPT, generation_mode="video", unconditional_ids=EMPTY, num_frames=5)
    assert longer.codes.shape == (1, 5, 4, 3)
    torch.testing.assert_close(longer.pixel_values[0], model.vision_tower.decode(longer.codes[0]))


def test_seed_decides(model: VilaUForConditionalGeneration) -> None:
    """Same seed, same codes; another seed, others; the global generator is neither read nor moved."""
    torch.manual_seed(3)
    state = torch.get_rng_state()
    one = draw(model, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    assert torch.equal(one, draw(model, seed=4))
    assert not torch.equal(one, draw(model, seed=5))
    assert draw(model, seed=-(2**70)).shape == one.shape


def test_first_of_several_pictures_is_the_single_one(model: VilaUForConditionalGeneration) -> None:
    """Asking for four pictures gives the one picture first, and three others."""
    four = draw(model, seed=8, num_images_per_prompt=4)
    assert torch.equal(four[:1], draw(model, seed=8))
    assert len({tuple(row.flatten().tolist()) for row in four}) == 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_alone_or_in_a_batch(model: VilaUForConditionalGeneration, temperature: float) -> None:
    """Prompts of different lengths, with guidance: row i is what the prompt alone gives with row i's seed."""
    rows = [[1, 3, 9, 4, 36], [1, 3, 11, 12, 13, 14, 15, 4, 36], [36]]
    ids, mask = left_padded(*rows)
    together = draw(model, ids, attention_mask=mask, temperature=temperature, seed=21)
    for number, row in enumerate(rows):
        seed = int(row_seeds(21, 3, "cpu")[number])
        assert torch.equal(draw(model, torch.tensor([row]), temperature=temperature, seed=seed)[0], together[number])


def test_guidance_one_equals_no_unconditional_prompt(model: VilaUForConditionalGeneration) -> None:
    """Scale 1 needs no unconditional prompt and runs no rows for one, even when the processor added it."""
    seen: list[int] = []
    layer = model.language_model.model.layers[0]
    hook = layer.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
    try:
        without = model.generate(PROMPT, generation_mode="image", guidance_scale=1.0, seed=2).codes
        assert torch.equal(without, draw(model, guidance_scale=1.0, seed=2))
        assert set(seen) == {1}
        seen.clear()
        guided = draw(model, guidance_scale=4.0, seed=2)
        assert set(seen) == {2}
    finally:
        hook.remove()
    assert not torch.equal(guided, without)


def test_guidance_needs_the_unconditional_prompt(model: VilaUForConditionalGeneration) -> None:
    """Without it the error says what is missing and how to go without."""
    with pytest.raises(ValueError, match="unconditional_ids.*guidance_scale=1"):
        model.generate(PROMPT, generation_mode="image")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"guidance_scale": -1.0}, "guidance_scale is -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"temperature": -0.5}, "temperature is -0.5"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -3}, "top_k is -3"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
    ],
)
def test_limits(model: VilaUForConditionalGeneration, bad: dict[str, float], words: str) -> None:
    """Values out of range are refused before any work, with name and value."""
    with pytest.raises(ValueError, match=words):
        draw(model, **bad)


def test_frames_and_context_limits(model: VilaUForConditionalGeneration) -> None:
    """A film that does not fit the context is refused with the numbers; 0 frames are no film."""
    with pytest.raises(ValueError, match="num_frames is 0"):
        model.generate(PROMPT, generation_mode="video", unconditional_ids=EMPTY, num_frames=0)
    with pytest.raises(ValueError, match="7 positions and the 60 to generate exceed the context of 64"):
        model.generate(PROMPT, generation_mode="video", unconditional_ids=EMPTY, num_frames=15)
    fits = model.generate(PROMPT, generation_mode="video", unconditional_ids=EMPTY, num_frames=14)
    assert fits.codes.shape == (1, 14, 4, 3)
    with pytest.raises(ValueError, match="'sound'; it must be one of text, image, video"):
        model.generate(PROMPT, generation_mode="sound")


def test_cancelling(model: VilaUForConditionalGeneration) -> None:
    """A progress callback that returns False ends the work after that position."""
    calls: list[int] = []

    def stop(done: int, total: int) -> bool:
        calls.append(done)
        return False

    with pytest.raises(Cancelled):
        draw(model, progress=stop)
    assert calls == [1]


def test_defaults_come_from_the_generation_config(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """Stored visual defaults are used and saved, and do not disturb text generation (which has settings of its own)."""
    model = make_model()
    assert model.visual_defaults() == SamplingOptions()
    greedy = draw(model, temperature=0.0, guidance_scale=2.0)
    text = model.generate(PROMPT, max_new_tokens=5, do_sample=False)
    model.generation_config.visual_temperature = 0.0
    model.generation_config.visual_guidance_scale = 2.0
    model.generation_config.visual_top_k = 5
    assert model.visual_defaults() == SamplingOptions(2.0, 0.0, 5, 0.96)
    model.save_pretrained(tmp_path)
    again = VilaUForConditionalGeneration.from_pretrained(tmp_path)
    assert again.visual_defaults() == SamplingOptions(2.0, 0.0, 5, 0.96)
    assert torch.equal(draw(again), greedy)
    assert torch.equal(again.generate(PROMPT, max_new_tokens=5, do_sample=False), text)


@torch.no_grad()
def test_greedy_text_equals_recomputation(model: VilaUForConditionalGeneration) -> None:
    """Text goes through the library's cache; every token is the argmax of a forward pass over everything before.

    Without kinds: text alone needs neither masks nor kinds.
    """
    out = model.generate(PROMPT, max_new_tokens=8, do_sample=False, eos_token_id=None)
    ids, expected = PROMPT, []
    for _ in range(8):
        token = model(ids).logits[0, -1].argmax()
        expected.append(int(token))
        ids = torch.cat([ids, token.reshape(1, 1)], 1)
    assert out.tolist() == [expected]


@torch.no_grad()
def test_text_in_a_left_padded_batch_equals_single(model: VilaUForConditionalGeneration) -> None:
    """Questions about pictures: a batch of different lengths, one without a picture, answers as each alone does."""
    codes = torch.randint(16, (2, 4, 3), generator=torch.Generator().manual_seed(0))
    rows = [
        ([1, 3, 36, 0, 0, 0, 0, 37, 9, 4], [T, T, T, V, V, V, V, T, T, T], codes[:1]),
        ([1, 3, 10, 4], [T] * 4, None),
        ([1, 3, 11, 12, 36, 0, 0, 0, 0, 37, 9, 8, 4], [T] * 5 + [V] * 4 + [T] * 4, codes[1:]),
    ]
    ids, mask = left_padded(*(row[0] for row in rows))
    kinds = torch.tensor([[PAD] * (13 - len(row[1])) + row[1] for row in rows])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(ids, kinds, mask, codes=codes, **settings)
    from_kinds = model.generate(ids, kinds, codes=codes, **settings)
    assert torch.equal(together, from_kinds)  # the mask follows from the kinds when it is absent
    for number, (row, kind, own) in enumerate(rows):
        alone = model.generate(torch.tensor([row]), torch.tensor([kind]), codes=own, **settings)
        assert alone[0].tolist() == together[number].tolist()
    other = model.generate(ids, kinds, mask, codes=(codes + 5) % 16, **settings)
    assert other[1].tolist() == together[1].tolist() and not torch.equal(other, together)


@torch.no_grad()
def test_pictures_condition_pictures(model: VilaUForConditionalGeneration) -> None:
    """A prompt that holds a picture reaches the drawn one: pixels and their codes are the same prompt."""
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    ids = torch.tensor([[1, 3, 36, 0, 0, 0, 0, 37, 4, 36]])
    kinds = torch.tensor([[T, T, T, V, V, V, V, T, T, T]])
    one = draw(model, ids, kinds=kinds, pixel_values=pixels, temperature=0.0)
    two = draw(model, ids, kinds=kinds, codes=model.vision_tower.encode(pixels), temperature=0.0)
    assert torch.equal(one, two)
    with pytest.raises(ValueError, match="4 visual positions but the pictures given bring 0"):
        draw(model, ids, kinds=kinds)


@torch.no_grad()
def test_forward_keeps_packed_samples_apart(model: VilaUForConditionalGeneration) -> None:
    """Restarting positions without a mask isolate samples by default: with a cache they would leak silently."""
    ids = torch.tensor([[1, 5, 6, 7, 1, 8, 9]])
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    logits = model(ids, position_ids=places).logits
    torch.testing.assert_close(logits[:, 4:], model(ids[:, 4:]).logits, rtol=1e-4, atol=1e-4)
    assert logits.shape == (1, 7, 40)
    torch.testing.assert_close(model(ids, position_ids=places, logits_to_keep=2).logits, logits[:, -2:])
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()


def test_trained_weights_load_into_the_public_class(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """Training saves a `VilaUModel`; users load `VilaUForConditionalGeneration`: the same names, nothing missing."""
    model = make_model()
    trained = VilaUModel(model.config)
    trained.load_state_dict(model.state_dict())
    trained.save_pretrained(tmp_path)
    again, info = VilaUForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(draw(again, seed=1), draw(model, seed=1))


def test_half_precision(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """`from_pretrained(dtype=bfloat16)`: weights in half precision, the codebook exact in float32, everything runs."""
    model = make_model()
    model.save_pretrained(tmp_path)
    half = VilaUForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.projector.fc1.weight.dtype == torch.bfloat16
    book = half.vision_tower.quantizer.codebook
    assert book.dtype == torch.float32 and torch.equal(book, model.vision_tower.quantizer.codebook)
    assert draw(half).shape == (1, 4, 3)
    assert half.generate(PROMPT, max_new_tokens=2).shape[0] == 1


def test_auto_classes(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """After `register()` the library's Auto classes load a saved folder without naming our class."""
    from transformers import AutoModelForImageTextToText

    from vilau.model import register

    register(), register()
    make_model().save_pretrained(tmp_path)
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is VilaUForConditionalGeneration


@torch.no_grad()
def test_continuous_tokens_answer_in_text_and_cannot_draw(make_model: Callable[..., Any], tmp_path: Path) -> None:
    """Quantizer `none`, saved and loaded again: a picture conditions text; asking for a picture is a clear error."""
    model = make_model(quantizer="none")
    model.save_pretrained(tmp_path)
    model = VilaUForConditionalGeneration.from_pretrained(tmp_path).eval()
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    ids = torch.tensor([[1, 3, 36, 0, 0, 0, 0, 37, 4]])
    kinds = torch.tensor([[T, T, T, V, V, V, V, T, T]])
    logits = model(ids, kinds, pixel_values=pixels).logits
    assert not torch.allclose(logits[:, -1], model(ids, kinds, pixel_values=-pixels).logits[:, -1])
    told = model.generate(ids, kinds, pixel_values=pixels, max_new_tokens=3, do_sample=False)
    assert told.shape[0] == 1 and int(told[0, 0]) == int(logits[0, -1].argmax())
    for mode in ("image", "video"):
        with pytest.raises(ValueError, match="continuous tokens.*cannot draw"):
            model.generate(ids, kinds, pixel_values=pixels, generation_mode=mode, guidance_scale=1)
