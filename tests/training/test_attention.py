"""Attention of language stages: packed samples never see each other; what cannot run is said before the first step."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import BloomConfig, BloomForCausalLM, modeling_flash_attention_utils

from training.test_language import Plain
from vilau.configuration import PositionKind
from vilau.data.collate import Batch
from vilau.modeling import vila_u
from vilau.processing.processor import build_processor
from vilau.training import attention
from vilau.training.attention import refuse_leak, use_attention
from vilau.training.config import LanguageStageConfig, OptimizerConfig, ScaleConfig, TowerStageConfig
from vilau.training.language import LanguageStage
from vilau.training.spread import Spread

FAMILIES = {
    "llama": {"model_type": "llama"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
}
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(params=FAMILIES)
def stage(request: pytest.FixtureRequest, make_model: Callable[..., Any], tokenizer: Any) -> LanguageStage:
    """A stage whose rows hold several samples each, of a very small model of either family."""
    sizes = {"vocab_size": len(tokenizer), "initializer_range": 0.2, "max_position_embeddings": 128}
    model = make_model(text=FAMILIES[request.param] | sizes)
    config = LanguageStageConfig(steps=2, batch_size=10, row_length=96, text_dropout=0.0, optimizer=OptimizerConfig())
    return LanguageStage("pretrain", config, model, Plain(), build_processor(tokenizer, model.config), seed=3)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Flash attention's two functions, computed here sequence by sequence; the list counts the sequences of each call.

    The package needs a GPU. What is tried is all that is between it and the batch.
    """
    calls: list[int] = []

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float | None = None, causal: bool = False
    ) -> torch.Tensor:
        assert causal
        parts = [part.transpose(1, 2) for part in (q, k, v)]
        out = F.scaled_dot_product_attention(*parts, is_causal=True, scale=softmax_scale, enable_gqa=True)
        return out.transpose(1, 2)

    def attend_apart(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        softmax_scale: float | None = None,
        causal: bool = False,
    ) -> torch.Tensor:
        borders = cu_seqlens_q.tolist()
        assert borders == cu_seqlens_k.tolist() and borders[0] == 0 and borders[-1] == len(q)
        assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in zip(borders[:-1], borders[1:], strict=True))
        calls.append(len(borders) - 1)
        spans = [slice(a, b) for a, b in zip(borders[:-1], borders[1:], strict=True)]
        return torch.cat([attend(q[None, s], k[None, s], v[None, s], softmax_scale, causal)[0] for s in spans])

    functions = (attend, attend_apart, None, None, None)
    process = modeling_flash_attention_utils._lazy_define_process_function(attend_apart)
    monkeypatch.setattr(
        modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *a, **k: (functions, (process, dict))
    )
    return calls


def set_attention(stage: LanguageStage, name: str) -> None:
    """Set it without asking whether this machine can."""
    stage.model.language_model.config._attn_implementation = name


def with_codes(stage: LanguageStage) -> Batch:
    """The stage's first batch with the codes of its pictures."""
    batch = stage.make_batch(0, 0, 1)
    codes, _ = stage._pictures(batch)
    assert codes is not None
    return replace(batch, frames=batch.frames[:0], codes=codes)


def segments(batch: Batch) -> torch.Tensor:
    """The number of the sample in its row at each position ``(R, L)``, from 0."""
    return (batch.position_ids == 0).long().cumsum(1) - 1


def disturb(stage: LanguageStage, batch: Batch, at: torch.Tensor) -> Batch:
    """Other words and other pictures at bool positions ``(R, L)``."""
    ids = torch.where(at & (batch.kinds == PositionKind.TEXT), (batch.input_ids + 7) % 300, batch.input_ids)
    visual = at[batch.kinds == PositionKind.VISUAL].view(batch.codes.shape[:2])
    codes = torch.where(visual.unsqueeze(-1), (batch.codes + 5) % 16, batch.codes)
    return replace(batch, input_ids=ids, codes=codes)


@torch.no_grad()
def seen(stage: LanguageStage, batch: Batch, **masks: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """States ``(R, L, H)`` and the loss at each position ``(R, L)``, zero where nothing is supervised."""
    model, packed = stage.model.eval(), {"codes": batch.codes, "position_ids": batch.position_ids, **masks}
    losses = model.losses(batch.input_ids, batch.kinds, batch.text_targets, batch.visual_targets, **packed)
    each = torch.zeros(batch.kinds.numel())
    each[losses.text_at] = losses.text
    each[losses.visual_at] += losses.visual.sum(1)
    states = vila_u.VilaUModel.forward(model, batch.input_ids, batch.kinds, **packed)
    return states, each.view(batch.kinds.shape)


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2"])
def test_a_changed_sample_leaves_its_neighbours_in_the_row_as_they_were(
    stage: LanguageStage, name: str, flash: list[int]
) -> None:
    """Other words and pictures in one sample of each row: states and losses of all others are equal bit for bit.

    With a mask in the place of restarting positions they are not, so the test can tell.
    """
    set_attention(stage, name)
    batch = with_codes(stage)
    numbers, there = segments(batch), batch.form_ids >= 0
    assert len(batch.kinds) > 1 and int(numbers[there].max()) > 1
    for changed in (0, 1):
        at = there & (numbers == changed)
        others = there & ~at
        disturbed = disturb(stage, batch, at)
        (states, losses), (new_states, new_losses) = seen(stage, batch), seen(stage, disturbed)
        assert torch.equal(states[others], new_states[others]) and torch.equal(losses[others], new_losses[others])
        assert not torch.allclose(states[at], new_states[at]) and not torch.allclose(losses[at], new_losses[at])
    ones = torch.ones_like(batch.kinds)
    leaked = [seen(stage, b, attention_mask=ones)[1] for b in (batch, disturb(stage, batch, there & (numbers == 0)))]
    assert not torch.allclose(leaked[0][numbers > 0], leaked[1][numbers > 0])
    assert set(flash) == ({int(segments(batch).max(1).values.add(1).sum())} if name == "flash_attention_2" else set())


@pytest.mark.parametrize("name", ["eager", "flash_attention_2"])
def test_every_attention_has_the_losses_and_gradients_of_sdpa(
    stage: LanguageStage, name: str, flash: list[int]
) -> None:
    """The switch changes how fast and in how much memory, not what is trained."""
    found = []
    for which in ("sdpa", name):
        set_attention(stage, which)
        stage.model.zero_grad()
        result = stage.compute(stage.make_batch(0, 0, 1), 0)
        result.loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in stage.model.parameters() if p.grad is not None])
        found.append((result.loss.detach(), gradients))
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-3, atol=1e-5)


def test_a_leak_is_found_before_the_first_step(
    stage: LanguageStage, flash: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without lengths, the library's flash attention joins the samples of several rows; with them it does not. A family
    that takes no notice of positions is found too."""
    config = stage.model.language_model.config
    for name in ("sdpa", "eager", "flash_attention_2"):
        set_attention(stage, name)
        refuse_leak(config, CPU, False)
    monkeypatch.setattr(attention, "packed_lengths", lambda *_: {})
    with pytest.raises(ValueError, match="'flash_attention_2' samples of one row see each other"):
        refuse_leak(config, CPU, False)
    bloom = BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=40)
    bloom._attn_implementation = "eager"
    with pytest.raises(ValueError, match="see each other in a language model of type 'bloom'"):
        refuse_leak(bloom, CPU, False)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_blocks_of_flex_attention_keep_samples_apart(stage: LanguageStage) -> None:
    """Its forward pass runs on a CPU, compiled, and passes the trial; a GPU alone can train with it."""
    set_attention(stage, "flex_attention")
    refuse_leak(stage.model.language_model.config, CPU, False)


def test_the_trial_for_leaks_leaves_random_numbers_alone(stage: LanguageStage) -> None:
    """A run with the switch draws what it draws without."""
    before = torch.random.get_rng_state()
    refuse_leak(stage.model.language_model.config, CPU, False)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("name", "device", "bf16", "said"),
    [
        ("flash_attention_2", GPU, False, "but scale.precision is float32: set scale.precision to bf16"),
        ("flash_attention_2", CPU, True, "there is no GPU here: set scale.attention to sdpa"),
        ("flash_attention_2", GPU, True, "the package flash-attn is not installed"),
        ("flex_attention", CPU, False, "has no backward pass on a CPU: set scale.attention to sdpa"),
        ("flex_attention", GPU, False, "has no dropout, but the language model's attention_dropout is 0.1"),
    ],
)
def test_what_cannot_run_is_refused(
    stage: LanguageStage, name: str, device: torch.device, bf16: bool, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with its reason and a remedy, and the model as it was."""
    monkeypatch.setattr(attention, "find_spec", lambda _: None)
    model = stage.model.language_model
    before, model.config.attention_dropout = model.config._attn_implementation, 0.1
    with pytest.raises(ValueError, match=said):
        use_attention(model, name, device, bf16)
    assert model.config._attn_implementation == before


def test_a_family_that_cannot_switch_is_refused() -> None:
    """Models of the old kind would take no notice of the switch."""
    model = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=40))
    with pytest.raises(ValueError, match="BloomForCausalLM of transformers cannot switch to it"):
        use_attention(model, "sdpa", CPU, False)


def test_a_family_that_leaks_is_refused_without_the_switch(
    stage: LanguageStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A language model that anybody may name is tried before the first step; our own families need no trial."""
    bloom = BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=40)
    bloom._attn_implementation = "eager"
    monkeypatch.setattr(stage.model.language_model, "config", bloom)
    Spread(stage, ScaleConfig())
    monkeypatch.setattr(stage, "config", stage.config.model_copy(update={"init_language_model": "bloom"}))
    with pytest.raises(ValueError, match="see each other in a language model of type 'bloom'"):
        Spread(stage, ScaleConfig())


def test_the_switch_is_the_configurations(stage: LanguageStage) -> None:
    """`scale.attention` reaches the language model alone; pictures and results are made with its own attention."""
    tower = stage.model.vision_tower.config._attn_implementation
    Spread(stage, ScaleConfig(attention="eager"))
    config = stage.model.language_model.config
    assert config._attn_implementation == "eager"
    assert stage.model.vision_tower.config._attn_implementation == tower
    with stage.evaluation_weights():
        assert config._attn_implementation == "sdpa"
    assert config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="no backward pass on a CPU"):
        Spread(stage, ScaleConfig(attention="flex_attention"))
    with pytest.raises(ValueError, match="scale.attention sdpa is of the language model"):
        TowerStageConfig(steps=1, batch_size=2, scale=ScaleConfig(attention="sdpa"))


def test_lengths_are_given_to_flash_attention_only() -> None:
    """Other kinds find restarting positions by themselves in any number of rows."""
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]])
    assert vila_u.packed_lengths(SimpleNamespace(_attn_implementation="sdpa"), positions) == {}
    told = vila_u.packed_lengths(SimpleNamespace(_attn_implementation="flash_attention_2"), positions)
    assert told["cu_seq_lens_q"].tolist() == told["cu_seq_lens_k"].tolist() == [0, 3, 5, 7, 10]
    assert told["max_length_q"] == told["max_length_k"] == 3
