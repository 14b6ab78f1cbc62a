"""What a tower starts from: SigLIP checkpoints, other towers, parts of them, and what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from vilau.modeling.vision_tower import VisionTower
from vilau.training.config import TowerStageConfig, TrainConfig
from vilau.training.run import build_stage, load_tokenizer
from vilau.training.tower_init import StartingTower, starting_tower
from vilau.training.vision_tower import encode_captions

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "dog", "blue", "cat"]
IMAGE = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {
    "depth": 2,
    "codebook_size": 16,
    "decoder_channels": 8,
    "decoder_groups": 4,
    "decoder_multipliers": [1, 1, 1, 1],
    "decoder_blocks": 1,
    "decoder_attention": [],
    "decoder_latent_channels": 8,
}


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SigLIP checkpoint as transformers saves one, with a tokenizer that ends captions as SigLIP's does."""
    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(3)
    ends = {"vocab_size": len(WORDS), "max_position_embeddings": 6, "pad_token_id": 0, "eos_token_id": 1}
    text = SiglipTextConfig(**TEXT, **ends, bos_token_id=None)
    SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=IMAGE)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    return folder


def configured(tmp_path: Path, stage: dict[str, Any], text: dict[str, Any] | None = None, **vision: Any) -> TrainConfig:
    """A run with one stage `vision_tower`."""
    encoder = IMAGE | vision.pop("image_encoder_config", {})
    model = {"vision_config": {"image_encoder_config": encoder} | VISION | vision}
    settings = {"steps": 2, "batch_size": 4} | stage
    return TrainConfig(
        name="t", output=str(tmp_path / "run"), model=model, text_encoder=text or {}, stages={"vision_tower": settings}
    )


def start(config: TrainConfig) -> StartingTower:
    """The tower that the configuration's stage starts from."""
    settings = config.stages["vision_tower"]
    assert isinstance(settings, TowerStageConfig)
    folder = Path(settings.init_from) if settings.init_from else None
    return starting_tower(config, settings, folder, load_tokenizer(config))


def test_siglip_embeddings_are_the_checkpoints_own(siglip: Path, tmp_path: Path) -> None:
    """Unquantised, the tower says of pictures and captions what SiglipModel says; scale and bias come along."""
    found = start(configured(tmp_path, {"init_siglip": str(siglip)}))
    reference = SiglipModel.from_pretrained(siglip)
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    ids = encode_captions(found.tokenizer, ["a RED dog", "a blue cat"], 6)
    with torch.no_grad():
        expected = reference(input_ids=ids, pixel_values=pixels)
        images = found.tower.eval()(pixels, quantize=False).image_embeds
        texts = found.tower.text_embeds(ids)
    torch.testing.assert_close(images, expected.image_embeds)
    torch.testing.assert_close(texts, expected.text_embeds)
    logits = found.tower.logit_scale.exp() * texts @ images.t() + found.tower.logit_bias
    torch.testing.assert_close(logits, expected.logits_per_text)
    assert found.sees


def test_captions_are_read_as_siglip_reads_them(siglip: Path) -> None:
    """Lower case, an end token that a cut caption keeps, padding on the right whatever the tokenizer's own side."""
    tokenizer = AutoTokenizer.from_pretrained(siglip)
    ids = encode_captions(tokenizer, ["A red DOG", "a red dog " * 9, ""], 6)
    assert ids.tolist() == [[3, 4, 5, 1, 0, 0], [3, 4, 5, 3, 4, 1], [1, 0, 0, 0, 0, 0]]
    spelled = encode_captions(tokenizer, [f"a {tokenizer.eos_token} dog {tokenizer.pad_token}"], 6).tolist()[0]
    assert spelled.count(1) == 1 and 0 not in spelled[: spelled.index(1)], "one end token, the one that is added"


def test_siglip_trains_in_a_run(siglip: Path, tmp_path: Path) -> None:
    """The stage reads captions with the checkpoint's tokenizer, at its length, and its result keeps both."""
    stage = build_stage(configured(tmp_path, {"init_siglip": str(siglip), "batch_size": 4}), "vision_tower", None)
    batch = stage.make_batch(0, 0, 1)
    assert batch.text_ids.shape == (4, 6) and int(batch.text_ids.max()) < len(WORDS)
    stage.train_mode()
    assert torch.isfinite(stage.compute(batch, 0).loss)
    stage.save_result(tmp_path)
    again = start(configured(tmp_path, {"init_from": str(tmp_path)}))
    assert len(again.tokenizer) == len(WORDS)
    for name, tensor in stage.module.state_dict().items():
        assert torch.equal(again.tower.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("stage", "text", "vision", "words"),
    [
        ({}, {}, {"image_encoder_config": {"patch_size": 4}, "latent_size": 2}, "patch_size 4 instead of 8"),
        ({}, {}, {"image_encoder_config": {"image_size": 32}, "latent_size": 4}, "image_size 32 instead of 16"),
        ({}, {"hidden_size": 64}, {}, "text_encoder.hidden_size is 64, but the text encoder of .* has 32"),
        ({}, {}, {"stem": "conv"}, "has 'image_encoder.embeddings.patch_embedding"),
        (
            {"siglip_parts": ["^text_encoder"]},
            {},
            {"image_encoder_config": {"hidden_size": 64}},
            "embeddings have width 32 and the image encoder's 64",
        ),
        ({"siglip_parts": ["^txt"]}, {}, {}, r"nothing that matches the pattern '\^txt'"),
        ({"init_siglip": "/no/such/folder"}, {}, {}, "init_siglip: '/no/such/folder' is neither a folder"),
    ],
)
def test_what_does_not_fit_is_named(
    siglip: Path, tmp_path: Path, stage: dict[str, Any], text: dict[str, Any], vision: dict[str, Any], words: str
) -> None:
    """Patch, resolution, widths, stem, patterns, a missing checkpoint: one clear error each, before any training."""
    with pytest.raises(ValueError, match=words):
        start(configured(tmp_path, {"init_siglip": str(siglip)} | stage, text, **vision))


def test_other_models_are_no_siglip(make_config: Callable[..., Any], tmp_path: Path) -> None:
    """A folder of another model is named with its type."""
    SiglipVisionConfig(**IMAGE).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model of type 'siglip_vision_model', not 'siglip'"):
        start(configured(tmp_path, {"init_siglip": str(tmp_path)}))


def test_parts_of_two_sources(siglip: Path, tmp_path: Path) -> None:
    """Appendix C, 1 and 2: text encoder from SigLIP, decoder and codebook from a tower of ours, the rest fresh."""
    donor = start(configured(tmp_path, {})).tower
    with torch.no_grad():
        donor.quantizer.codebook.normal_()
    donor.save_pretrained(tmp_path / "donor")
    parts = {"init_from": str(tmp_path / "donor"), "init_parts": ["^pixel_decoder", "^quantizer"]}
    found = start(configured(tmp_path, {"init_siglip": str(siglip), "siglip_parts": ["^text_encoder"]} | parts))
    texts = SiglipModel.from_pretrained(siglip).text_model.state_dict()
    for name, tensor in found.tower.state_dict().items():
        part = name.split(".")[0]
        if part == "text_encoder":
            assert torch.equal(tensor, texts[name.removeprefix("text_encoder.")]), name
        elif part in ("pixel_decoder", "quantizer"):
            assert torch.equal(tensor, donor.state_dict()[name]), name
    fresh, old = found.tower.image_encoder.encoder, donor.image_encoder.encoder
    assert not torch.equal(fresh.layers[0].mlp.fc1.weight, old.layers[0].mlp.fc1.weight)
    assert not found.sees, "no image encoder came from anywhere"
    assert len(found.tokenizer) == len(WORDS), "captions are read with the tokenizer of the text encoder"


def test_a_tower_of_other_sizes_is_refused(tmp_path: Path) -> None:
    """Whole towers must fit whole: another codebook or quantizer is an error that names the way out."""
    start(configured(tmp_path, {})).tower.save_pretrained(tmp_path / "donor")
    given = {"init_from": str(tmp_path / "donor")}
    with pytest.raises(ValueError, match=r"'quantizer.codebook' has the shape .*init_parts"):
        start(configured(tmp_path, given, codebook_size=32))
    with pytest.raises(ValueError, match="num_hidden_layers 3 instead of 2"):
        start(configured(tmp_path, given, image_encoder_config={"num_hidden_layers": 3}))
    parts = {"init_parts": ["^image_encoder"]}
    assert start(configured(tmp_path, given | parts, codebook_size=32)).sees


def test_an_untrained_encoder_as_measure_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Recipe 0 with perceptual 'siglip' compares features of a random network: allowed, and said."""
    settings = {"perceptual": "siglip", "contrastive_weight": 0}
    with caplog.at_level("WARNING"):
        build_stage(configured(tmp_path, settings), "vision_tower", None)
    assert "untrained here: a random network's distances" in caplog.text


def test_no_text_encoder_unless_asked_for(tmp_path: Path) -> None:
    """Without `text_encoder` and without a source the tower has none, and a contrast is refused."""
    assert start(configured(tmp_path, {})).tower.text_encoder is None
    with pytest.raises(ValueError, match="needs a vision tower with a text encoder"):
        build_stage(configured(tmp_path, {}), "vision_tower", None)
    with pytest.raises(ValueError, match="embeddings have width 16 and the image encoder's 32"):
        start(configured(tmp_path, {}, TEXT | {"projection_size": 16}))


def test_tower_from_disk_is_a_vision_tower(siglip: Path, tmp_path: Path) -> None:
    """What stage 1 saved after SigLIP opens by itself."""
    start(configured(tmp_path, {"init_siglip": str(siglip)})).tower.save_pretrained(tmp_path / "tower")
    assert VisionTower.from_pretrained(tmp_path / "tower").config.text_encoder_config.eos_token_id == 1
