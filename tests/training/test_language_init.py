"""What a language stage starts from, and that nothing of it is silently left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from training.test_language_model import CONFIGS, save_pretrained
from vilau.modeling import vila_u
from vilau.modeling.vision_tower import VisionTower
from vilau.shipped import SHIPPED_MODEL
from vilau.training import language_model
from vilau.training.config import TrainConfig, load_config
from vilau.training.language_init import starting_folder, starting_model
from vilau.training.run import build_stage

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "nano" / "debug.yaml"


@pytest.fixture
def config() -> TrainConfig:
    """The debug configuration."""
    return load_config(CONFIG)


def test_a_joined_model_brings_everything(config: TrainConfig) -> None:
    """Sizes, weights, tokenizer and template are the model's; the configuration's own sizes do not matter."""
    settings = config.stages["sft"]
    start = starting_model(config, settings, starting_folder("shipped"))
    assert start.model.config.hidden_size != config.model["text_config"]["hidden_size"]
    assert len(start.processor.tokenizer) == start.model.config.text_config.vocab_size
    assert start.processor.image_size == start.model.config.vision_config.image_size
    with pytest.raises(ValueError, match="which has a language model"):
        starting_model(config, settings.model_copy(update={"init_language_model": "x"}), SHIPPED_MODEL)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("template", ["vilau", "vicuna_v1"])
def test_a_tower_and_a_language_model_are_joined(
    config: TrainConfig, family: str, template: str, tmp_path: Path
) -> None:
    """Stage 2 as the paper has it: both parts keep their weights, the sequence's tokens are the tokenizer's, and a step
    of training on nano samples works."""
    save_pretrained(tmp_path / "lm", CONFIGS[family])
    torch.manual_seed(3)
    tower_config = {**config.model["vision_config"]}
    VisionTower(VisionTower.config_class(**tower_config)).save_pretrained(tmp_path / "tower")
    fields: dict[str, Any] = {**config.model}
    fields["text_config"] = {"max_position_embeddings": 640, "vocab_size": 77, "hidden_size": 32}
    settings = config.stages["pretrain"].model_copy(
        update={
            "init_language_model": str(tmp_path / "lm"),
            "init_from": str(tmp_path / "tower"),
            "row_length": 512,
        }
    )
    data = config.data.model_copy(update={"template": template})
    config = config.model_copy(update={"model": fields, "data": data, "stages": {"pretrain": settings}})
    stage = build_stage(config, "pretrain", None)
    model, tokenizer = stage.module, stage.processor.tokenizer
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    known = plain.model.embed_tokens.weight
    assert torch.equal(model.language_model.model.embed_tokens.weight[:400], known[:400])
    assert model.config.text_config.max_position_embeddings == 640
    old = VisionTower.from_pretrained(tmp_path / "tower")
    assert torch.equal(model.vision_tower.quantizer.codebook, old.quantizer.codebook)
    names = stage.processor.template
    assert model.config.image_start_id == tokenizer.convert_tokens_to_ids(names.image_start)
    assert model.config.video_end_id == tokenizer.convert_tokens_to_ids(names.video_end)
    stage.train_mode()
    loss = stage.compute(stage.make_batch(0, 0, 1), 0).loss
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_language_model_is_put_in_place_without_a_second_copy(
    config: TrainConfig, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7B take 28 GB once: the loaded tensors are those of the joined model, and what else is made of its size is
    without content."""
    save_pretrained(tmp_path, CONFIGS[family])
    loaded: list[Any] = []
    load = language_model.load_language_model
    monkeypatch.setattr(language_model, "load_language_model", lambda *a: loaded.append(load(*a)) or loaded[0])
    made: list[Any] = []
    build = vila_u.AutoModelForCausalLM.from_config
    monkeypatch.setattr(vila_u.AutoModelForCausalLM, "from_config", lambda c: made.append(build(c)) or made[-1])
    settings = config.stages["pretrain"].model_copy(update={"init_language_model": str(tmp_path)})
    fields = {name: value for name, value in config.model.items() if name != "text_config"}
    config = config.model_copy(update={"model": fields})
    model = starting_model(config, settings, None).model
    assert len(loaded) == 1 and model.language_model is loaded[0]
    assert {p.device.type for one in made for p in one.parameters()} <= {"meta"}
    assert {p.device.type for p in model.parameters()} == {b.device.type for b in model.buffers()} == {"cpu"}
    known = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in model.language_model.state_dict().items():
        assert torch.equal(tensor[: len(known[name])][:400], known[name][:400]), name
    tied = CONFIGS[family].tie_word_embeddings
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    model.save_pretrained(tmp_path / "joined")
    again = vila_u.VilaUModel.from_pretrained(tmp_path / "joined")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_tower_of_other_sizes_is_an_error(config: TrainConfig, tmp_path: Path) -> None:
    """Weights that do not fit are named, not left out."""
    small = {**config.model["vision_config"], "codebook_size": 64}
    VisionTower(VisionTower.config_class(**small)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not have the sizes of model.vision_config"):
        starting_model(config, config.stages["pretrain"], tmp_path)


def test_a_released_checkpoint_must_be_converted_first(config: TrainConfig) -> None:
    """Else its tower would be taken and its language model left behind."""
    golden = Path(__file__).resolve().parents[1] / "golden" / "tiny256" / "ckpt"
    assert golden.is_dir()
    with pytest.raises(ValueError, match="vilau convert"):
        starting_model(config, config.stages["sft"], golden)


def test_missing_folders_are_named() -> None:
    """`init_from` is a folder or the word `shipped`."""
    assert starting_folder("shipped") == SHIPPED_MODEL
    with pytest.raises(ValueError, match="there is no folder /nowhere"):
        starting_folder("/nowhere")


def test_sizes_are_needed_for_a_new_model_only(config: TrainConfig) -> None:
    """A configuration without `model` is enough to go on from a finished model, and an error for a new one: defaults of
    many gigabytes must not step in."""
    bare = config.model_copy(update={"model": {}})
    assert starting_model(bare, bare.stages["sft"], SHIPPED_MODEL).model.config.hidden_size == 192
    for stage in ("align", "pretrain"):
        with pytest.raises(ValueError, match="`model` is missing"):
            build_stage(bare, stage, None)
