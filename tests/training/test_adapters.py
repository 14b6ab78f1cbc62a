"""LoRA in training: who learns, and that the merged weights and the saved adapters both are the trained function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from vilau.model import VilaUForConditionalGeneration
from vilau.training.adapters import Adapters
from vilau.training.config import LoraConfig


@pytest.fixture
def prompt() -> dict[str, torch.Tensor]:
    """Six text positions of two rows."""
    return {"input_ids": torch.arange(12).reshape(2, 6) + 3}


def outcome(model: Any, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    """Last hidden states of a text."""
    return model.hidden_states(model.embed(**prompt))


def shaken(make_model: Callable[..., Any], config: LoraConfig) -> tuple[Any, Adapters]:
    """A model with adapters that were trained, as far as anyone can tell: every trainable weight moved."""
    model = make_model()
    adapters = Adapters(model, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval(), adapters


def test_only_adapters_and_the_named_modules_learn(make_model: Callable[..., Any]) -> None:
    """Base weights are frozen, the depth transformer's too; `also` names modules that learn whole."""
    model = make_model()
    Adapters(model, LoraConfig(rank=2, also=["projector"]))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name or name.startswith("projector.modules_to_save") for name in learning)
    for part in ("language_model.", "depth_transformer.", "projector."):
        assert any(name.startswith(part) for name in learning), part


@torch.no_grad()
def test_merged_weights_are_the_trained_function(
    make_model: Callable[..., Any], prompt: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """A model saved with merged weights loads without PEFT and computes what the adapted one did."""
    model, adapters = shaken(make_model, LoraConfig(rank=2, also=["projector"]))
    expected = outcome(model, prompt)
    plain = make_model()
    assert not torch.allclose(outcome(plain.eval(), prompt), expected, atol=1e-3)
    merged = adapters.merged_state(model)
    assert set(merged) == set(plain.state_dict())
    model.save_pretrained(tmp_path, state_dict=merged)
    loaded = VilaUForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.allclose(outcome(loaded, prompt), expected, atol=1e-5)
    assert torch.equal(outcome(model, prompt), expected), "saving must not change the model that goes on training"
    codes = torch.zeros(1, 4, model.config.vision_config.depth, dtype=torch.long)
    assert torch.allclose(loaded.visual_embeds(codes), model.visual_embeds(codes), atol=1e-6)


@torch.no_grad()
def test_saved_adapters_load_onto_the_base(
    make_model: Callable[..., Any], prompt: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """What `adapter/` holds is PEFT's own format: it turns the untouched base into the trained model."""
    model, adapters = shaken(make_model, LoraConfig(rank=2))
    adapters.save(tmp_path)
    again = peft.PeftModel.from_pretrained(make_model(), tmp_path).get_base_model().eval()
    assert torch.allclose(outcome(again, prompt), outcome(model, prompt), atol=1e-6)


def test_a_pattern_that_matches_nothing_is_an_error(make_model: Callable[..., Any]) -> None:
    """A run never starts with nothing to train."""
    with pytest.raises(ValueError, match="lora: .*layers: 'nothing_like_it'"):
        Adapters(make_model(), LoraConfig(layers="nothing_like_it"))
