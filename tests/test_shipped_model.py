"""The weights that ship: their promised size, and that they know their world."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import vilau


def test_size_and_types(shipped_model_dir: Path) -> None:
    """Protects the promise: at most 16 MB on disk and 8 M parameters, computing in float32 on a CPU."""
    assert sum(file.stat().st_size for file in shipped_model_dir.iterdir()) <= 16_000_000
    model = vilau.load(device="cpu").model
    assert model.num_parameters() <= 8_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.vision_tower.quantizer.codebook.dtype == torch.float32


def test_it_draws_what_it_then_describes(shipped_model_dir: Path) -> None:
    """Protects the main job with the real weights, on combinations that training never showed.

    Nine of these twelve drawings are described word for word; half is far from chance (one in 384) and leaves room for
    another machine's rounding.
    """
    model = vilau.load(device="cpu")
    prompts = [
        f"a {thing} background" for thing in ("dog on a purple", "cat on a red", "penguin on a blue", "car on a gray")
    ]
    said = [(prompt, model.ask(picture)) for prompt in prompts for picture in model.draw(prompt, n=3, seed=0)]
    assert sum(prompt == answer for prompt, answer in said) >= 6, said
    assert all(answer.split()[-2] == prompt.split()[-2] for prompt, answer in said), said


def test_a_conversation_goes_on_with_its_own_pictures(shipped_model_dir: Path) -> None:
    """What `converse` gives is a message's content. The model never learnt mixed answers: it draws, and no more."""
    model = vilau.load(device="cpu")
    messages = [{"role": "user", "content": "a red apple on a blue background"}]
    content = model.converse(messages, max_new_tokens=8, max_pictures=1)
    assert [part["type"] for part in content].count("image") == 1
    messages += [{"role": "assistant", "content": content}, {"role": "user", "content": "what is this?"}]
    assert "apple" in model.chat(messages)


def test_prompts_in_a_list_give_what_each_gives_alone(shipped_model_dir: Path) -> None:
    """Pictures and films of several prompts are made in one batch, in order, each with its own seed."""
    model = vilau.load(shipped_model_dir)
    seeds = {"a dog on a green background": 5, "three bananas on a white background": 6}
    together = model.draw(list(seeds), n=2, seed=list(seeds.values()))
    alone = [picture for prompt, seed in seeds.items() for picture in model.draw(prompt, n=2, seed=seed)]
    assert len(together) == 4
    for one, other in zip(together, alone, strict=True):
        assert np.abs(np.asarray(one, dtype=float) - np.asarray(other)).mean() < 1
    films = model.film(["a car moving right on a white background"] * 2, seed=[1, 1])
    assert [len(film) for film in films] == [4, 4]
