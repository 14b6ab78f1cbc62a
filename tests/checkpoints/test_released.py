"""Loading the released layout: what is accepted, what is refused, and that every tensor finds its place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vilau.checkpoints import keys
from vilau.checkpoints.layout import find_layout, resolve
from vilau.checkpoints.released import ReleasedCheckpoint
from vilau.checkpoints.released_config import read_config
from vilau.model import VilaUForConditionalGeneration
from vilau.processing.processor import VilaUProcessor


def edit(file: Path, **fields) -> None:
    value = json.loads(file.read_text())
    for path, new in fields.items():
        *parents, last = path.split("__")
        inner = value
        for name in parents:
            inner = inner[name]
        if new is ...:
            inner.pop(last)
        else:
            inner[last] = new
    file.write_text(json.dumps(value))


def rewrite(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def test_every_tensor_is_loaded_as_it_stands(model, released):
    """Each released tensor is one of ours, bit for bit; the padding row of the codebook is left out."""
    tower = load_file(released / "vision_tower/model.safetensors")
    state = model.state_dict()
    book = tower["rqvaesiglip.quantizer.codebooks.0.weight"]
    assert torch.equal(state["vision_tower.quantizer.codebook"][0], book[:1024])
    assert bool(state["vision_tower.quantizer.initialised"])
    for name, tensor in tower.items():
        mine = keys.to_ours(f"vision_tower:{name}", 5)
        if mine is not None:
            assert torch.equal(state[mine], tensor[0] if name.endswith("pos_emb_d") else tensor), name


def test_stages_are_numbered_from_the_other_end(model):
    """Released `up.4` is the coarsest stage, our `stages.0`."""
    assert keys.to_ours("vision_tower:rqvaesiglip.decoder.up.4.attn.1.proj_out.bias", 5) == (
        "vision_tower.pixel_decoder.stages.0.attention.1.out.bias"
    )
    for name in model.state_dict():
        source = keys.to_released(name, 5)
        if source is not None:
            assert keys.to_ours(source, 5) == name


def test_configuration(released, released_384):
    """Sizes, RoPE scaling, latent size and special ids come from the released files."""
    config, large = read_config(released), read_config(released_384)
    assert (config.vision_config.depth, config.vision_config.grid, config.vision_config.latent_size) == (4, 16, None)
    assert (large.vision_config.depth, large.vision_config.grid, large.vision_config.latent_size) == (16, 27, 24)
    assert config.vision_config.decoder_attention == [16] and large.vision_config.decoder_attention == [24]
    assert large.text_config.rope_parameters["rope_type"] == "linear"
    assert (config.context_length, large.context_length) == (4096, 8192)
    assert config.image_start_id == 512 and config.video_end_id == 515
    assert config.depth_config.hidden_size == 80 and config.num_frames == 8


def test_missing_latent_shape_is_inferred(copy, released_384):
    """Without `decoder_latent_shape` the latent map is the one that gives pictures of the right size: 24 of 27."""
    edit(copy / "vision_tower/config.json", rqvaesiglip__decoder_latent_shape=...)
    assert read_config(copy).vision_config.latent_size is None
    large = copy.parent / "large"
    shutil.copytree(released_384, large, ignore=shutil.ignore_patterns("*.safetensors"))
    edit(large / "vision_tower/config.json", rqvaesiglip__decoder_latent_shape=...)
    vision = read_config(large).vision_config
    assert (vision.grid, vision.latent_size, vision.image_size) == (27, 24, 384)
    assert vision.decoder_attention == [24]
    edit(large / "vision_tower/config.json", rqvaesiglip__decoder_latent_shape=[20, 20])
    with pytest.raises(ValueError, match=r"draw 320 px pictures \(20 latents"):
        read_config(large)


def test_released_encoders_are_known_without_a_network(copy):
    """The SigLIP configurations of the published checkpoints are known by name."""
    edit(copy / "vision_tower/config.json", rqvaesiglip__pretrained_model="google/siglip-large-patch16-256")
    with pytest.raises(ValueError, match="embed_dim is 96, but the image encoder is 1024 wide"):
        read_config(copy)


def test_sharded_bin_with_separate_copies(copy, released):
    """`.bin` shards with an index, and a shared codebook that is stored once per depth, load to the same tensors."""
    folder = copy / "vision_tower"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for end in ("weight", "cluster_size_ema", "embed_ema"):
        for depth in range(1, 4):
            tensors[f"rqvaesiglip.quantizer.codebooks.{depth}.{end}"] = tensors[
                f"rqvaesiglip.quantizer.codebooks.0.{end}"
            ]
    tensors["rqvaesiglip.siglip_model.logit_scale"] = tensors["rqvaesiglip.logit_scale"]
    names = sorted(tensors)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in shards.items():
        torch.save({name: tensors[name].clone() for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    one, other = ReleasedCheckpoint(copy), ReleasedCheckpoint(released)
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.shapes)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model-00002-of-00002.bin is missing"):
        ReleasedCheckpoint(copy)


def test_separate_codebooks(copy):
    """One codebook per depth becomes a buffer of as many books."""
    edit(copy / "vision_tower/config.json", rqvaesiglip__shared_codebook=False)

    def separate(tensors):
        for end in ("weight", "cluster_size_ema", "embed_ema"):
            for depth in range(1, 4):
                name = f"rqvaesiglip.quantizer.codebooks.{depth}.{end}"
                tensors[name] = tensors[f"rqvaesiglip.quantizer.codebooks.0.{end}"] + depth

    rewrite(copy / "vision_tower/model.safetensors", separate)
    book = ReleasedCheckpoint(copy).read("vision_tower.quantizer.codebook")
    assert book.shape == (4, 1024, 96) and torch.equal(book[3], book[0] + 3)


def test_a_shared_codebook_that_differs_between_depths_is_refused(copy):
    """Copies of a shared tensor must be equal: else the configuration is wrong."""

    def differ(tensors):
        name = "rqvaesiglip.quantizer.codebooks.{}.weight"
        tensors[name.format(2)] = tensors[name.format(0)] + 1

    rewrite(copy / "vision_tower/model.safetensors", differ)
    with pytest.raises(ValueError, match="codebooks.2.weight differs"):
        ReleasedCheckpoint(copy)


BROKEN = {
    "unknown tower field": ("vision_tower/config.json", {"rqvaesiglip__surprise": 1}, "unknown field 'surprise'"),
    "unknown decoder": ("vision_tower/config.json", {"rqvaesiglip__ddconfig__tanh": True}, "unknown field 'tanh'"),
    "unknown depth field": ("vision_tower/config.json", {"rqtransformer__emded_dim": 1}, "nearest known.*'embed_dim'"),
    "unknown projector field": ("mm_projector/config.json", {"depth": 3}, "unknown field 'depth'"),
    "unknown field": ("config.json", {"surprise": 1}, "config.json: unknown field 'surprise'"),
    "unknown field of a copy": ("config.json", {"vision_tower_cfg__rqvaesiglip__new": 1}, "unknown field 'new'"),
    "projector kind": ("mm_projector/config.json", {"mm_projector_type": "linear"}, "only 'mlp2x_gelu'"),
    "codebook of another size": ("vision_tower/config.json", {"rqvaesiglip__n_embed": 512}, "vocab_size is 1024"),
    "positions": ("vision_tower/config.json", {"rqvaesiglip__code_shape": [8, 8, 4]}, "code_shape says 8x8"),
    "depth": ("vision_tower/config.json", {"rqvaesiglip__code_shape": [16, 16, 8]}, "block_size is"),
    "width": ("llm/config.json", {"intermediate_size": 100}, r"gate_proj.weight is \[128, 64\], expected \[100, 64\]"),
    "kind of RoPE": (
        "llm/config.json",
        {"rope_scaling": {"type": "odd", "factor": 2.0}},
        "llm/config.json: rope_scaling",
    ),
    "no number": (
        "vision_tower/config.json",
        {"rqtransformer__head__n_layer": "x"},
        "vision_tower/config.json holds a",
    ),
    "no shape": ("vision_tower/config.json", {"rqvaesiglip__code_shape": 16}, "vision_tower/config.json holds a value"),
    "no width": ("llm/config.json", {"hidden_size": "64"}, "llm/config.json holds a value .*'hidden_size'"),
    "heads": ("llm/config.json", {"num_attention_heads": 5}, "llm/config.json holds a value .*attention heads"),
    "dtype": ("config.json", {"model_dtype": "torch.float7"}, "dtype of the weights is 'float7'"),
    "widths": ("vision_tower/config.json", {"rqvaesiglip__ddconfig__ch": 20}, "must be multiples of 32"),
    "layers": ("llm/config.json", {"num_hidden_layers": 3}, "9 missing: llm:model.layers.2.input_layernorm.weight"),
    "fewer layers": ("llm/config.json", {"num_hidden_layers": 1}, "9 of no use: llm:model.layers.1.input_layernorm"),
}


@pytest.mark.parametrize("case", BROKEN, ids=list(BROKEN))
def test_what_does_not_fit_is_refused(copy, case):
    """A configuration that does not fit the code or the weights is an error that names the field or the tensors."""
    file, fields, message = BROKEN[case]
    edit(copy / file, **fields)
    with pytest.raises(ValueError, match=message):
        ReleasedCheckpoint(copy)


def test_both_sizes_of_codebook_are_compared_with_the_weights(copy):
    """Configuration fields that agree with each other but not with the table are an error too."""
    edit(copy / "vision_tower/config.json", rqvaesiglip__n_embed=512, rqtransformer__vocab_size=512)
    with pytest.raises(ValueError, match=r"codebooks.0.weight is \[1025, 96\], expected \[513, 96\]"):
        VilaUForConditionalGeneration.from_pretrained(copy)


def test_unused_and_missing_keys_are_listed(copy):
    """A renamed tensor is one missing and one of no use, both named."""

    def rename(tensors):
        tensors["layers.3.weight"] = tensors.pop("layers.2.weight")

    rewrite(copy / "mm_projector/model.safetensors", rename)
    message = "1 missing: mm_projector:layers.2.weight. 1 of no use: mm_projector:layers.3.weight"
    with pytest.raises(ValueError, match=message):
        VilaUForConditionalGeneration.from_pretrained(copy)


def test_truncated_shard(copy, released):
    """A shard that ends too early is named with both sizes."""
    file = copy / "llm/model.safetensors"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"llm/model.safetensors is damaged: it has \d+ bytes and should have"):
        VilaUForConditionalGeneration.from_pretrained(copy)


def test_pickle_with_code_is_refused(copy):
    """A `.bin` with anything but tensors is refused, and its code does not run."""
    (copy / "mm_projector/model.safetensors").unlink()

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (copy / "exploded",))

    torch.save({"layers.0.weight": Bomb()}, copy / "mm_projector/pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin holds more than tensors.*\(it names getattr\).*safetensors"
    ):
        VilaUForConditionalGeneration.from_pretrained(copy)
    assert not (copy / "exploded").exists()
    (copy / "mm_projector/pytorch_model.bin").write_bytes(b"no file of this kind")
    with pytest.raises(ValueError, match=r"pytorch_model.bin"):
        VilaUForConditionalGeneration.from_pretrained(copy)


def test_tokenizer_without_visual_tokens(copy):
    """A tokenizer that lacks the four visual tokens, or has them elsewhere, is refused."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        (copy / "llm" / name).write_text((copy / "llm" / name).read_text().replace("<vi_end>", "<other>"))
    with pytest.raises(ValueError, match=r"tokenizer in .*llm does not fit: .*absent"):
        VilaUProcessor.from_pretrained(copy)
    (copy / "llm/tokenizer.model").unlink()
    with pytest.raises(ValueError, match="holds no tokenizer"):
        VilaUProcessor.from_pretrained(copy)


def test_folders_of_no_known_layout(tmp_path, copy, monkeypatch):
    """What is no checkpoint says what was expected; a hub id without a network says that it cannot be fetched."""
    with pytest.raises(ValueError, match="neither|known layout"):
        find_layout(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type is 'llama'"):
        VilaUForConditionalGeneration.from_pretrained(tmp_path)
    (copy / "llm").rename(copy / "away")
    with pytest.raises(ValueError, match="without llm"):
        VilaUForConditionalGeneration.from_pretrained(copy)
    with pytest.raises(ValueError, match="cannot be fetched"):
        resolve("owner/name", cache_dir=str(tmp_path / "cache"), local_files_only=True)


def test_hub_cache_is_used_offline(released, tmp_path):
    """A hub id that is in the cache loads without a network, at the revision asked for."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = tmp_path / "models--owner--vila-u"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "snapshots").mkdir()
    (root / "snapshots" / commit).symlink_to(released, target_is_directory=True)
    options = {"cache_dir": str(tmp_path), "local_files_only": True, "revision": "main"}
    processor = VilaUProcessor.from_pretrained("owner/vila-u", **options)
    assert processor.template.name == "vicuna_v1" and processor.positions_per_frame == 256
    found = VilaUForConditionalGeneration.from_pretrained("owner/vila-u", dtype=torch.bfloat16, **options)
    assert found.dtype == torch.bfloat16
    assert found.vision_tower.quantizer.codebook.dtype == torch.float32
