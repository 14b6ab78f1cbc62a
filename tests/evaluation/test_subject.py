from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vilau.data.nano.dataset import NanoDataset
from vilau.data.nano.world import World
from vilau.evaluation.subject import Sampling, Subject, question_and_answer, weights_digest
from vilau.pipeline import load


@pytest.fixture(scope="module")
def subject(tiny_model_dir: Path) -> Subject:
    return Subject(load(tiny_model_dir, "cpu"), Sampling(guidance_scale=2.0), text_batch=3, picture_batch=2)


def test_answers_come_in_the_order_of_the_questions(subject: Subject, world: World) -> None:
    """Batching by length and left padding change no answer and no order; known codes stand in for pictures."""
    data = NanoDataset(world, {"question": 0.5, "text": 0.3, "video_text": 0.2}, "heldout", 1)
    asked = [question_and_answer(data[i])[0] for i in range(7)]
    alone = [subject.answer([conversation], 6)[0] for conversation in asked]
    assert subject.answer(asked, 6) == alone
    pictures = NanoDataset(world, {"question": 1.0}, "heldout", 1)
    samples = [pictures[i] for i in range(4)]
    asked = [question_and_answer(sample)[0] for sample in samples]
    codes = [subject.encode(sample.frames[0][None]) for sample in samples]
    assert subject.answer(asked, 6, codes) == subject.answer(asked, 6)


def test_drawings_differ_between_prompts_and_batches_but_not_between_calls(subject: Subject) -> None:
    """The same seed draws the same; the same prompt in another batch is another drawing; films have frames."""
    prompts = ["a dog on a blue background"] * 3
    first, again = subject.draw(prompts, 5), subject.draw(prompts, 5)
    assert first.shape == (3, 3, 32, 32) and torch.equal(first, again)
    assert not torch.equal(first[0], first[2])
    assert not torch.equal(subject.draw(prompts[:1], 6), first[:1])
    assert subject.film(prompts[:1], 5).shape == (1, 4, 3, 32, 32)


def test_settings_name_what_is_in_force(subject: Subject) -> None:
    """What was asked for wins, the model's own settings fill the rest."""
    settings = subject.settings()
    assert settings["guidance_scale"] == 2.0
    assert settings["top_k"] == subject.model.visual_defaults().top_k


def test_digest_is_of_the_file(tiny_model_dir: Path, subject: Subject, tmp_path: Path) -> None:
    """The protocol names the very weights: the file's SHA-256, or one over all tensors when there is no such file."""
    import hashlib

    expected = hashlib.sha256((tiny_model_dir / "model.safetensors").read_bytes()).hexdigest()
    assert weights_digest(tiny_model_dir, subject.model) == expected
    assert len(weights_digest(tmp_path, subject.model)) == 64
