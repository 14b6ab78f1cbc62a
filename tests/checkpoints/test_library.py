"""What users of the library expect: dtype, devices, attention, checkpointing, adapters, saving, scores."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

import vilau
from vilau.checkpoints.released import expected_shapes
from vilau.checkpoints.released_config import siglip_configs
from vilau.configuration import PositionKind, VilaUConfig
from vilau.model import VilaUForConditionalGeneration, register
from vilau.processing.processor import VilaUProcessor
from vilau.shipped import SHIPPED_MODEL

TEXT, VISUAL, PAD = PositionKind.TEXT, PositionKind.VISUAL, PositionKind.PAD


@pytest.fixture
def batch(model):
    """Two right-padded rows: text, one picture, text; the second has no picture."""
    torch.manual_seed(0)
    kinds = torch.tensor([[TEXT] * 4 + [VISUAL] * 256 + [TEXT] * 4, [TEXT] * 9 + [PAD] * 255])
    ids = torch.randint(3, 500, kinds.shape)
    codes = torch.randint(0, 1024, (1, 256, 4))
    return {"input_ids": ids, "kinds": kinds, "codes": codes}


def targets(batch):
    text = (batch["kinds"] == TEXT).clone()
    text[:, 0] = False
    return {"text_targets": text, "visual_targets": batch["kinds"] == VISUAL}


def test_saved_as_ours(model, tmp_path):
    """`save_pretrained` of a released checkpoint writes our layout, in one go and without shared tensors."""
    model.save_pretrained(tmp_path, save_original_format=False)
    other = VilaUForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert callable(model.push_to_hub)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged"):
        VilaUForConditionalGeneration.from_pretrained(tmp_path)


def test_unknown_field_of_our_configuration(model, tmp_path):
    """A misspelt field of `config.json` is an error with the nearest right one, not a silent default."""
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    stored["vision_config"]["decoder_atention"] = [16]
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"'vision_config.decoder_atention'; did you mean 'decoder_attention'"):
        VilaUForConditionalGeneration.from_pretrained(tmp_path)


def test_shapes_that_disagree_with_our_configuration(model, tmp_path):
    """Weights that do not fit `config.json` are an error that names the folder; nothing is half-loaded."""
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stored = json.loads(file.read_text())
    stored["vision_config"]["codebook_size"] = 512
    file.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"do not fit config.json"):
        VilaUForConditionalGeneration.from_pretrained(tmp_path)


def test_auto_classes(released):
    """The library's Auto classes open a released folder."""
    register()
    assert type(AutoModel.from_pretrained(released)) is VilaUForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(released)) is VilaUProcessor


def test_load_and_talk(released):
    """`vilau.load` opens a released folder; text alone, a picture and a drawing go through."""
    pipeline = vilau.load(released)
    assert isinstance(pipeline.chat([{"role": "user", "content": "Hello"}], max_new_tokens=2), str)
    picture = Image.new("RGB", (40, 30), "red")
    assert isinstance(pipeline.ask(picture, "What is it?", max_new_tokens=2), str)


@pytest.mark.parametrize("layout", ["released", "ours"])
def test_device_map_and_dtype(released, model, tmp_path, layout):
    """`device_map="auto"` and `dtype=` go through the library; the codebook stays float32."""
    folder = released
    if layout == "ours":
        folder = tmp_path
        model.save_pretrained(folder)
    loaded = VilaUForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, device_map="auto")
    assert loaded.dtype == torch.bfloat16 and loaded.vision_tower.quantizer.codebook.dtype == torch.float32
    assert torch.equal(loaded.vision_tower.quantizer.codebook.cpu(), model.vision_tower.quantizer.codebook)


def test_attention_implementation_reaches_the_parts(released):
    """`attn_implementation` is that of the language model and of both SigLIP towers."""
    loaded = VilaUForConditionalGeneration.from_pretrained(released, attn_implementation="eager")
    parts = (loaded.language_model, loaded.vision_tower.image_encoder, loaded.vision_tower.text_encoder)
    assert [part.config._attn_implementation for part in parts] == ["eager"] * 3


def test_score_is_the_log_likelihood(model, batch):
    """Sums of the scores are the negated losses, per row; a row alone has the scores that it has in a batch."""
    scores = model.score(**batch, **targets(batch))
    losses = model.losses(**batch, **targets(batch), attention_mask=(batch["kinds"] != PAD).long())
    assert torch.allclose(scores.total().sum(), -(losses.text.sum() + losses.visual.sum()), rtol=1e-5)
    assert scores.text.shape == (2, 264) and scores.visual.shape == (2, 264, 4)
    assert (scores.visual[0, 4:260] < 0).all() and not scores.visual[1].any()
    alone = model.score(batch["input_ids"][1:, :9], batch["kinds"][1:, :9])
    assert torch.allclose(alone.text[0], scores.text[1, :9], atol=1e-4)
    padded = {
        "input_ids": torch.cat([batch["input_ids"][1:, 9:20], batch["input_ids"][1:, :9]], 1),
        "kinds": torch.tensor([[PAD] * 11 + [TEXT] * 9]),
    }
    left = model.score(**padded)
    assert not left.text_mask[0, :12].any() and torch.allclose(left.text[0, 12:], alone.text[0, 1:], atol=1e-4)


def test_score_of_codes_given_text(model, batch):
    """The codes that the model is asked about are scored one by one: changing one changes only it and later ones."""
    asked = {"visual_targets": batch["kinds"] == VISUAL}
    before = model.score(**batch, **asked).visual[0, 4:260]
    codes = batch["codes"].clone()
    codes[0, 100, 2] = (codes[0, 100, 2] + 1) % 1024
    after = model.score(**(batch | {"codes": codes}), **asked).visual[0, 4:260]
    assert torch.allclose(before[:100], after[:100], atol=1e-5) and torch.allclose(
        before[100, :2], after[100, :2], atol=1e-5
    )
    assert abs(before[100, 2] - after[100, 2]) > 1e-5


def test_gradient_checkpointing_changes_nothing(released, batch):
    """The same loss and gradients, dropout included; the blocks of both transformers run again on the way back."""
    model = VilaUForConditionalGeneration.from_pretrained(released).train()
    runs = {}
    for name in ("language_model.base_model.layers.0.mlp", "depth_transformer.blocks.0.fc1"):
        runs[name] = []
        model.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: runs[name].append(1))
    found, counts = [], []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        model.zero_grad()
        torch.manual_seed(3)
        model.losses(**batch, **targets(batch)).total().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        counts.append([len(calls) for calls in runs.values()])
    assert counts == [[1, 1], [3, 3]]
    assert found[0].keys() == found[1].keys() and any("depth_transformer" in name for name in found[0])
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])
    assert model.depth_transformer.blocks[0].dropout.p > 0


def test_lora(released, batch, tmp_path):
    """Adapters on the language model and the depth transformer: train, save, load, merge."""
    import peft

    base = VilaUForConditionalGeneration.from_pretrained(released)
    modules = r".*(language_model\..*(q_proj|v_proj)|depth_transformer\.blocks\.\d+\.(query|value))"
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=modules))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("language_model" in n for n in trained) and any("depth_transformer" in n for n in trained)
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model.get_base_model().eval().losses(**batch, **targets(batch)).total()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = model.get_base_model().score(**batch, **targets(batch)).total()
    model.save_pretrained(tmp_path)
    fresh = VilaUForConditionalGeneration.from_pretrained(released).eval()
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.allclose(loaded.get_base_model().score(**batch, **targets(batch)).total(), expected, rtol=1e-5)
    merged = loaded.merge_and_unload()
    assert isinstance(merged, VilaUForConditionalGeneration)
    assert torch.allclose(merged.score(**batch, **targets(batch)).total(), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("encoder", "settings", "codes"),
    [
        ("google/siglip-large-patch16-256", {"depth": 4}, 256),
        ("google/siglip-so400m-patch14-384", {"depth": 16, "latent_size": 24}, 729),
    ],
)
def test_shapes_of_the_published_sizes(encoder, settings, codes, tmp_path):
    """The 7B models build without memory, with the parameter counts that their parts have."""
    image, text = siglip_configs(encoder, tmp_path, "here")
    config = VilaUConfig(
        vision_config={"image_encoder_config": image, "text_encoder_config": text, **settings},
        depth_config={"hidden_size": 2560, "num_hidden_layers": 6, "num_attention_heads": 40},
        text_config={"model_type": "llama", "vocab_size": 32004, "max_position_embeddings": 4096},
    )
    shapes = expected_shapes(config)
    assert config.vision_config.num_positions == codes
    language = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name.startswith("language_model."))
    assert language == 6_738_448_384  # LLaMA-2-7B with four more rows in and out
    assert shapes["vision_tower.quantizer.codebook"] == (1, 16384, image["hidden_size"])
    assert shapes["projector.fc1.weight"] == (4096, image["hidden_size"])
    assert shapes["depth_transformer.head.weight"] == (16384, 2560)


@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
def test_the_librarys_pipelines_answer(task, tmp_path):
    """`transformers.pipeline` reads pictures and talks as our own short way in does; drawing needs `generate`."""
    from transformers import pipeline

    import vilau.pipeline

    register()
    pipe = pipeline(task, model=str(SHIPPED_MODEL))
    picture = Image.new("RGB", (40, 40), "red")
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "what colour is it?"}]
    answer = pipe([{"role": "user", "content": parts}], max_new_tokens=12, return_full_text=False)
    expected = vilau.pipeline.Pipeline(pipe.model, pipe.processor).ask(picture, "what colour is it?", max_new_tokens=12)
    assert answer[0]["generated_text"].strip() == expected != ""
    begun = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hel"}]
    with pytest.raises(ValueError, match="cannot be continued"):
        pipe(begun, max_new_tokens=2)
