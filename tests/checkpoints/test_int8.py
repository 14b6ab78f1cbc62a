"""Quantised models: in memory, while loading, saved and loaded again; and against float on the shipped model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vilau.checkpoints.int8 import METHOD, Int8Config
from vilau.model import VilaUForConditionalGeneration
from vilau.modeling.int8 import is_int8
from vilau.modeling.vila_u import VilaUModel
from vilau.modeling.vision_tower import VisionTower


def equal(one: Any, other: Any) -> bool:
    """Whether two models hold the same tensors bit for bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def quantised(tiny_model_dir: Path) -> VilaUForConditionalGeneration:
    """The tiny model, quantised in memory."""
    return VilaUForConditionalGeneration.from_pretrained(tiny_model_dir).quantize()


@pytest.fixture(scope="module")
def saved(quantised: VilaUForConditionalGeneration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder."""
    folder = tmp_path_factory.mktemp("int8") / "model"
    quantised.save_pretrained(folder)
    return folder


def test_in_memory_while_loading_and_saved_are_the_same_bits(
    quantised: VilaUForConditionalGeneration, saved: Path, tiny_model_dir: Path
) -> None:
    """Whichever way a model became int8, it is the same model."""
    assert equal(VilaUForConditionalGeneration.from_pretrained(tiny_model_dir, quantize="int8"), quantised)
    again = VilaUForConditionalGeneration.from_pretrained(saved)
    assert equal(again, quantised)
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    stored = json.loads((saved / "config.json").read_text())
    assert stored["quantization_config"] == {"quant_method": METHOD, "version": 1}


def test_a_saved_model_draws_what_it_drew(quantised: VilaUForConditionalGeneration, saved: Path) -> None:
    """Codes for a seed are those from before saving."""
    again = VilaUForConditionalGeneration.from_pretrained(saved)
    start = quantised.config.image_start_id
    ids = torch.tensor([[5, 6, 7, start]])
    empty = torch.tensor([[5, start]])
    drawn = [
        m.generate(ids, generation_mode="image", unconditional_ids=empty, seed=3).codes for m in (quantised, again)
    ]
    assert torch.equal(*drawn)


def test_pictures_of_a_batch_are_those_made_alone(quantised: VilaUForConditionalGeneration) -> None:
    """Rows of int8 layers do not see each other, so that company changes no code."""
    start = quantised.config.image_start_id
    ids = torch.tensor([[5, 6, 7, start], [9, 8, 4, start], [3, 3, 11, start]])
    empty = torch.tensor([[5, start]])
    options: dict[str, Any] = {"generation_mode": "image", "unconditional_ids": empty, "guidance_scale": 2.0}
    together = quantised.generate(ids, seed=[1, 2, 3], **options).codes
    alone = [quantised.generate(ids[i : i + 1], seed=[i + 1], **options).codes for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_a_quantised_model_is_neither_cast_trained_nor_quantised_again(
    quantised: VilaUForConditionalGeneration, saved: Path
) -> None:
    """Each refusal comes before anything has changed, and says what to do."""
    for change in (lambda: quantised.to(torch.bfloat16), lambda: quantised.double(), lambda: quantised.half()):
        with pytest.raises(ValueError, match="cast|not supported"):
            change()
    with pytest.raises(ValueError, match="train the float model"):
        quantised.train()
    assert not any(part.training for part in quantised.modules())
    with pytest.raises(ValueError, match="quantised already"):
        quantised.quantize()
    assert equal(quantised, VilaUForConditionalGeneration.from_pretrained(saved))
    quantised.to("cpu")
    with pytest.raises(ValueError, match="'int3'; it must be int8"):
        VilaUForConditionalGeneration.from_pretrained(saved, quantize="int3")
    with pytest.raises(ValueError, match="layout version 2"):
        Int8Config(version=2)
    with pytest.raises(ValueError, match="cannot be trained"):
        VilaUModel.from_pretrained(saved).train()


def test_adapters_and_int8_do_not_mix(saved: Path, tiny_model_dir: Path) -> None:
    """LoRA neither goes onto int8 layers nor is quantised with the model; both say so."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="Int8Linear"):
        peft.get_peft_model(VilaUForConditionalGeneration.from_pretrained(saved), settings)
    model = VilaUForConditionalGeneration.from_pretrained(tiny_model_dir)
    peft.get_peft_model(model, settings)
    with pytest.raises(ValueError, match="merge"):
        model.quantize()
    assert not is_int8(model)


def test_the_tower_comes_out_of_a_quantised_folder(saved: Path, tiny_model_dir: Path) -> None:
    """The tower is float in both, so it may be taken out of either."""
    assert equal(VisionTower.from_pretrained(saved), VisionTower.from_pretrained(tiny_model_dir))


def test_a_missing_scale_is_named(saved: Path, tmp_path: Path) -> None:
    """A damaged quantised folder is an error, not a model with scales of one."""
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "model.safetensors")
    weights.pop("depth_transformer.head.scale")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    with pytest.raises(ValueError, match="depth_transformer.head.scale"):
        VilaUForConditionalGeneration.from_pretrained(tmp_path)


def test_greedy_codes_and_logits_of_the_shipped_model_stay_close(shipped_model_dir: Path) -> None:
    """Teacher-forced on random codes and text, int8 keeps nearly every likeliest code and token of float32."""
    plain = VilaUForConditionalGeneration.from_pretrained(shipped_model_dir, dtype=torch.float32).eval()
    small = VilaUForConditionalGeneration.from_pretrained(shipped_model_dir, dtype=torch.float32, quantize="int8")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, plain.config.text_config.vocab_size - 4, (8, 24), generator=generator)
    vision = plain.config.vision_config
    codes = torch.randint(0, vision.codebook_size, (8, 24, vision.depth), generator=generator)
    with torch.no_grad():
        hidden = [m.hidden_states(m.embed(ids)).flatten(0, 1) for m in (plain, small)]
        text = [m.get_output_embeddings()(h) for m, h in zip((plain, small), hidden, strict=True)]
        partial = plain.vision_tower.quantizer.partial_z_q(codes).flatten(0, 1)
        visual = [m.depth_transformer(h, partial) for m, h in zip((plain, small), hidden, strict=True)]
    for exact, near in (text, visual):
        assert (exact.argmax(-1) == near.argmax(-1)).float().mean() > 0.85
        assert (exact - near).pow(2).mean() < 0.01 * exact.var()


def test_vilau_convert_writes_a_folder_that_loads_and_draws(tiny_model_dir: Path, tmp_path: Path) -> None:
    """`vilau convert SRC DST --quantize int8` gives a whole model folder: weights, configuration, processor."""
    import vilau
    from vilau.cli.convert import convert

    target = tmp_path / "small"
    options: dict[str, Any] = dict.fromkeys(("dtype", "guidance_scale", "temperature", "card"))
    convert(tiny_model_dir, target, to="ours", ema=False, force=False, quantize="int8", **options)
    loaded = vilau.load(target, device="cpu")
    assert equal(loaded.model, VilaUForConditionalGeneration.from_pretrained(tiny_model_dir, quantize="int8"))
    assert len(loaded.draw("a cat", seed=1)) == 1
    with pytest.raises(ValueError, match="--quantize goes with"):
        convert(tiny_model_dir, target, to="released", ema=False, force=True, quantize="int8", **options)
