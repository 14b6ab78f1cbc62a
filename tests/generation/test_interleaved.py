"""Answers that mix text and pictures: a model that has learnt some by heart must say and draw exactly them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from vilau.configuration import PositionKind
from vilau.data.collate import collate_padded
from vilau.data.nano.world import ASSETS
from vilau.data.sample import Sample, Turn, image, text, video
from vilau.generation.interleaved import InterleavedOptions, picture_seed
from vilau.generation.sampling import row_seeds
from vilau.processing.encode import encode_sample
from vilau.processing.processor import build_processor

RED, BLUE = (np.full((16, 16, 3), colour, np.uint8) for colour in ((230, 20, 20), (20, 20, 230)))
BLUE[:8] = 255
ANSWERS = {
    "a dog, then a cat": (text("a dog."), image(RED), text("a cat."), image(BLUE)),
    "draw a cat": (image(BLUE),),
    "move a dog": (text("a dog moves."), video((RED, BLUE)), text("it moves left.")),
    "a dog?": (text("a dog."),),
}


@pytest.fixture(scope="module")
def learnt(make_model: Callable[..., Any]) -> tuple[Any, Any]:
    """The very small model after it has learnt the answers by heart, and its processor."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tokenizer")
    sizes = {"vocab_size": len(tokenizer), "initializer_range": 0.05, "max_position_embeddings": 64}
    model = make_model(text=sizes, num_frames=2)
    processor = build_processor(tokenizer, model.config)
    samples = [
        Sample(asked, "mixed", (Turn("user", (text(asked),)), Turn("assistant", answer)))
        for asked, answer in ANSWERS.items()
    ]
    encoded = [encode_sample(s, tokenizer, processor.template, processor.positions_per_frame) for s in samples]
    batch = collate_padded(encoded, int(tokenizer.pad_token_id))
    pixels = torch.from_numpy(batch.frames.numpy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    codes = model.vision_tower.encode(pixels)
    parts = [p for n, p in model.named_parameters() if not n.startswith("vision_tower")]
    optimizer = torch.optim.AdamW(parts, lr=1e-2)
    for _ in range(60):
        losses = model.losses(
            batch.input_ids,
            batch.kinds,
            batch.text_targets,
            batch.visual_targets,
            codes=codes,
            attention_mask=(batch.kinds != PositionKind.PAD).long(),
        )
        optimizer.zero_grad()
        losses.total().backward()
        optimizer.step()
    assert float(losses.total().detach()) < 0.05
    return model.eval(), processor


def ask(learnt: tuple[Any, Any], *questions: str, **options: Any) -> list[Any]:
    """Answers of one batch, with pictures at temperature 0 and without guidance unless said otherwise."""
    model, processor = learnt
    inputs = processor(text=list(questions), generation_mode="interleaved")
    return list(
        model.generate(**inputs, generation_mode="interleaved", **{"temperature": 0, "guidance_scale": 1, **options})
    )


def told(learnt: tuple[Any, Any], answer: Any) -> list[Any]:
    """Texts as they are, pictures as the codes of their frames."""
    processor = learnt[1]
    return [
        processor.decode(part.token_ids).strip() if part.kind == "text" else (part.kind, part.codes.tolist())
        for part in answer.parts
    ]


def wanted(learnt: tuple[Any, Any], asked: str) -> list[Any]:
    """The same of an answer that was learnt."""
    model, _ = learnt
    out: list[Any] = []
    for part in ANSWERS[asked]:
        if part.kind == "text":
            out.append(part.text)
            continue
        pixels = torch.from_numpy(np.stack(part.frames)).permute(0, 3, 1, 2).float() / 127.5 - 1
        out.append((part.kind, model.vision_tower.encode(pixels).tolist()))
    return out


@pytest.mark.parametrize("asked", ANSWERS)
def test_learnt_answers_come_back_exactly(learnt: tuple[Any, Any], asked: str) -> None:
    """Text, start token, every code, end token, text again, and the end: all as trained, so both sides agree."""
    (answer,) = ask(learnt, asked)
    assert told(learnt, answer) == wanted(learnt, asked)
    assert answer.finished
    for part in answer.parts:
        if part.kind != "text":
            assert part.pixel_values.shape == (len(part.codes), 3, 16, 16)


def test_rows_do_not_depend_on_each_other(learnt: tuple[Any, Any]) -> None:
    """Left-padded prompts of other lengths beside it change nothing."""
    answers = ask(learnt, *ANSWERS)
    assert [told(learnt, answer) for answer in answers] == [wanted(learnt, asked) for asked in ANSWERS]


def test_answers_can_stand_in_the_conversation_that_goes_on(learnt: tuple[Any, Any]) -> None:
    """Parts become a message's content that the processor takes again: texts, pictures and films."""
    _, processor = learnt
    answers = ask(learnt, "a dog, then a cat", "move a dog")
    contents = [processor.to_content(answer.parts) for answer in answers]
    assert [[part["type"] for part in content] for content in contents] == [
        ["text", "image", "text", "image"],
        ["text", "video", "text"],
    ]
    assert len(contents[1][1]["video"]) == 2
    messages = [
        {"role": "user", "content": "a dog, then a cat"},
        {"role": "assistant", "content": contents[0]},
        {"role": "user", "content": "again"},
    ]
    inputs = processor.apply_chat_template(messages, "interleaved")
    assert int((inputs["kinds"] == PositionKind.VISUAL).sum()) == 2 * processor.positions_per_frame


def test_limits_end_an_answer_between_its_parts(learnt: tuple[Any, Any]) -> None:
    """Neither limit cuts a picture; what is left unsaid shows as not finished."""
    whole = wanted(learnt, "a dog, then a cat")
    (words,) = ask(learnt, "a dog, then a cat", max_new_tokens=2)
    assert not words.finished and len(words.parts) == 1 and words.parts[0].kind == "text"
    (one,) = ask(learnt, "a dog, then a cat", max_pictures=1)
    assert told(learnt, one)[:2] == whole[:2] and [part.kind for part in one.parts].count("image") == 1
    (none,) = ask(learnt, "a dog, then a cat", max_pictures=0)
    assert {part.kind for part in none.parts} == {"text"}


def test_the_context_is_never_exceeded(learnt: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture for which there is no room is not begun, and the answer ends at the model's limit."""
    model, processor = learnt
    used = int(processor(text="a dog, then a cat", generation_mode="interleaved")["input_ids"].shape[1])
    text_length = len(processor.tokenizer("a dog.", add_special_tokens=False)["input_ids"])
    for room in range(1, 16):
        monkeypatch.setattr(type(model.config), "context_length", used + room, raising=False)
        (answer,) = ask(learnt, "a dog, then a cat")
        taken = sum(
            len(part.token_ids) if part.kind == "text" else 2 + model.config.vision_config.num_positions
            for part in answer.parts
        )
        assert taken <= room
        pictures = sum(part.kind == "image" for part in answer.parts)
        assert pictures >= int(room >= text_length + 2 + model.config.vision_config.num_positions + 1)
    monkeypatch.setattr(type(model.config), "context_length", used, raising=False)
    with pytest.raises(ValueError, match=f"context of {used}"):
        ask(learnt, "a dog, then a cat")


def test_guidance_is_given_the_prompt_of_each_kind(learnt: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and films are guided by the empty prompt that ends with their own start token."""
    model, processor = learnt
    seen: list[tuple[bool, list[int]]] = []
    real = type(model).generate_visual

    def watching(self: Any, embeds: Any, mask: Any, video: bool, *rest: Any, **more: Any) -> Any:
        seen.append((video, more["unconditional_ids"][0].tolist()))
        return real(self, embeds, mask, video, *rest, **more)

    monkeypatch.setattr(type(model), "generate_visual", watching)
    ask(learnt, "draw a cat", "move a dog", guidance_scale=1.5)
    expected = [processor.unconditional(mode)["input_ids"][0].tolist() for mode in ("image", "video")]
    assert seen == [(False, expected[0]), (True, expected[1])]
    inputs = processor(text="draw a cat", generation_mode="interleaved")
    inputs.pop("unconditional_ids")
    with pytest.raises(ValueError, match="unconditional_ids"):
        model.generate(**inputs, generation_mode="interleaved")


def test_the_seed_decides(learnt: tuple[Any, Any]) -> None:
    """Equal seeds give equal answers; another seed draws another picture; two pictures of one answer differ."""
    hot = {"temperature": 20.0, "top_k": 0, "top_p": 1.0}
    one, same, other = (ask(learnt, "a dog, then a cat", seed=seed, **hot)[0] for seed in (3, 3, 4))
    pictures = [[part.codes.tolist() for part in answer.parts if part.kind == "image"] for answer in (one, same, other)]
    assert pictures[0] == pictures[1] and pictures[0] != pictures[2]
    assert pictures[0][0] != pictures[0][1]
    said = [told(learnt, ask(learnt, "a dog?", seed=5, text_temperature=30.0, max_new_tokens=6)[0]) for _ in range(2)]
    assert said[0] == said[1] != ["a dog."]


def test_limits_are_checked() -> None:
    """Wrong limits are refused with their value."""
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        InterleavedOptions(max_new_tokens=0)
    with pytest.raises(ValueError, match="max_pictures is -1"):
        InterleavedOptions(max_pictures=-1)


def test_pictures_of_all_answers_have_seeds_of_their_own() -> None:
    """Answers of one request and the pictures in them never share their noise, nor with the answers' texts."""
    texts = [seed for request in (0, 7, -3) for seed in row_seeds(request, 16, "cpu").tolist()]
    pictures = [picture_seed(seed, number) for seed in texts for number in range(8)]
    assert len({*texts, *pictures}) == len(texts) + len(pictures)
    assert picture_seed(7, 1) == picture_seed(7 + (1 << 64), 1)
