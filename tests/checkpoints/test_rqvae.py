"""A trained RQ-VAE of the original project becomes the tower with the convolutional encoder: names and numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

import vilau
from checkpoints.rqvae_layout import decode, encode, write_rqvae
from vilau.checkpoints.rqvae import RqvaeCheckpoint, convert_rqvae, is_rqvae, load_rqvae
from vilau.cli.main import app, main
from vilau.modeling.vision_tower import VisionTower


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)) * 2 - 1


def edit(folder: Path, **fields) -> None:
    file = folder / "config.yaml"
    value = yaml.safe_load(file.read_text())
    for path, new in fields.items():
        section, name = path.split("__")
        if new is ...:
            value["arch"][section].pop(name)
        else:
            value["arch"][section][name] = new
    file.write_text(yaml.safe_dump(value))


@pytest.mark.parametrize("prefix", ["", "module.", "generator.module."])
@pytest.mark.parametrize("shared", [True, False])
def test_the_same_function(tmp_path, pictures, prefix, shared):
    """Features, codes and pixels are those of the network written anew; shared or separate codebooks, any prefix."""
    weights = write_rqvae(tmp_path / "in256", prefix, shared_codebook=shared)
    tower = load_rqvae(tmp_path / "in256").tower
    features, codes = encode(weights, pictures, 3)
    assert torch.allclose(tower.features(pictures), features, atol=1e-4)  # of features with deviation about 1
    assert torch.equal(tower.encode(pictures), codes) and codes.unique().numel() > 20
    expected = decode(weights, codes)
    assert expected.std() > 0.1
    assert torch.allclose(tower.decode(codes), expected.clamp(-1, 1), atol=1e-4)
    book = weights["quantizer.codebooks.2.weight"]
    assert torch.equal(tower.quantizer.book(2), book[:40])
    assert torch.equal(tower.quantizer.ema_count[-1], weights["quantizer.codebooks.2.cluster_size_ema"])
    assert bool(tower.quantizer.initialised)


def test_what_stays_random_is_named(tmp_path):
    """Everything that an RQ-VAE has comes from its file; the text-aligned rest is named and the same for a seed."""
    write_rqvae(tmp_path)
    text = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "projection_size": 32}
    one, two = (
        load_rqvae(tmp_path, image_encoder_config={"hidden_size": 32}, text_encoder_config=text, seed=seed)
        for seed in (1, 1)
    )
    parts = {name.split(".")[0] for name in one.random}
    assert parts == {"image_encoder", "from_code", "logit_scale", "logit_bias", "text_encoder"}
    assert not any("embeddings" in name for name in one.random if name.startswith("image_encoder"))
    states = [loaded.tower.state_dict() for loaded in (one, two)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert one.tower.text_embeds(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 32)


def test_averaged_weights(tmp_path):
    """`ema` takes the other entry of the file; a file without it says what it holds."""
    weights = write_rqvae(tmp_path)
    tower = load_rqvae(tmp_path, ema=True).tower
    assert torch.equal(tower.pixel_encoder.conv_in.weight, weights["encoder.conv_in.weight"] * 0.5)
    torch.save({"state_dict": weights}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="holds no state_dict_ema; it holds state_dict"):
        load_rqvae(tmp_path, ema=True)


def test_names_of_the_weight_file(tmp_path):
    """`model.pt` is preferred; of several others the file must be named; a bare table of tensors is accepted."""
    weights = write_rqvae(tmp_path, name="epoch10_model.pt")
    assert is_rqvae(tmp_path) and is_rqvae(tmp_path / "epoch10_model.pt") and not is_rqvae(tmp_path / "config.yaml")
    torch.save(weights, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"found epoch10_model.pt, last.ckpt; name the file"):
        load_rqvae(tmp_path)
    assert RqvaeCheckpoint(tmp_path / "last.ckpt").file.name == "last.ckpt"
    torch.save(weights, tmp_path / "model.pt")
    assert RqvaeCheckpoint(tmp_path).file.name == "model.pt"


def test_converted_folder_trains_on(tmp_path, pictures, capfd):
    """`vilau convert` writes a folder of `VisionTower.from_pretrained`; its card and stderr name what is random."""
    write_rqvae(tmp_path / "rq")
    assert main(["convert", str(tmp_path / "rq"), str(tmp_path / "tower")]) == 0
    assert "tensors are random until they are trained" in capfd.readouterr().err
    assert "- `image_encoder.head.probe`" in (tmp_path / "tower" / "README.md").read_text()
    tower = VisionTower.from_pretrained(tmp_path / "tower")
    loaded = vilau.load_rqvae(tmp_path / "rq").tower
    assert torch.equal(tower.encode(pictures), loaded.encode(pictures))
    opened = vilau.VisionTower.from_pretrained(tmp_path / "rq", dtype=torch.bfloat16)
    assert opened.dtype == torch.bfloat16 and torch.equal(opened.quantizer.codebook, loaded.quantizer.codebook)
    output = tower.train()(pictures)
    output.commitment.backward()
    assert tower.pixel_encoder.conv_in.weight.grad.abs().sum() > 0
    assert output.image_embeds.shape == (2, 24)


def test_info(tmp_path):
    """`vilau info` reads an RQ-VAE and the converted tower; what is not in the file is not counted."""
    weights = write_rqvae(tmp_path / "rq")
    convert_rqvae(tmp_path / "rq", tmp_path / "tower")
    facts = []
    for path in (tmp_path / "rq", tmp_path / "rq" / "model.pt", tmp_path / "tower"):
        shown = CliRunner().invoke(app, ["info", str(path), "--json"], catch_exceptions=False)
        facts.append(json.loads(shown.stdout))
    assert facts[0]["parameters"] == facts[1]["parameters"] and facts[0]["layout"] == "rq-vae"
    assert facts[0]["shapes"] == facts[2]["shapes"]
    stored = sum(t.numel() for name, t in weights.items() if "quantizer" not in name) + 40 * 24
    assert facts[0]["parameters"]["total"] == stored
    assert facts[2]["parameters"]["image_encoder"] > facts[0]["parameters"]["image_encoder"]
    table = CliRunner().invoke(app, ["info", str(tmp_path / "rq")], catch_exceptions=False).stdout
    assert "8x8" not in table and "64 positions x 3 codes of 40" in table and "film" not in table


BROKEN = {
    "unknown field": ({"hparams__surprise": 1}, "arch.hparams: unknown field 'surprise'"),
    "unknown decoder field": ({"ddconfig__tanh_out": True}, "arch.ddconfig: unknown field 'tanh_out'"),
    "double z": ({"ddconfig__double_z": True}, "double_z is True; only False"),
    "no size": ({"hparams__n_embed": ...}, "n_embed missing"),
    "several sizes": ({"hparams__n_embed": [40, 40, 20], "hparams__shared_codebook": False}, "different sizes"),
    "bottleneck": ({"hparams__bottleneck_type": "vq"}, "bottleneck_type is 'vq'"),
    "large codes": ({"hparams__code_shape": [4, 4, 3]}, "codes that cover several positions"),
    "latents": ({"hparams__latent_shape": [8, 8, 12]}, r"expected \[8, 8, 24\]"),
    "codebook": ({"hparams__n_embed": 41}, r"codebooks.0.weight is \[41, 24\], expected \[42, 24\]"),
    "depth": ({"hparams__code_shape": [8, 8, 2]}, "3 of no use: quantizer.codebooks.2.cluster_size_ema"),
    "width": ({"ddconfig__ch_mult": [1, 2, 8]}, "of another shape"),
    "attention": ({"ddconfig__attn_resolutions": []}, "50 of no use"),
    "groups": ({"ddconfig__ch": 20}, "ch times ch_mult gives the widths 20, 40, 80; all must be multiples of 32"),
}


@pytest.mark.parametrize("case", BROKEN, ids=list(BROKEN))
def test_what_does_not_fit_is_refused(tmp_path, case, capfd):
    """Nothing is loaded or written when configuration and weights disagree; the message names the field or tensor."""
    fields, message = BROKEN[case]
    write_rqvae(tmp_path)
    edit(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        load_rqvae(tmp_path)
    assert main(["convert", str(tmp_path), str(tmp_path / "new")]) == 1
    assert "Traceback" not in capfd.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "model.pt"]


def test_files_that_are_none(tmp_path):
    """Missing and damaged files, code in the pickle, and other networks are errors that name the file."""
    write_rqvae(tmp_path)

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"state_dict": {}, "scheduler": Bomb()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt holds more than tensors .* keep only its state_dict"):
        load_rqvae(tmp_path)
    assert not (tmp_path / "exploded").exists()
    torch.save({"optimizer": {}}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt holds no table of tensors named state_dict"):
        load_rqvae(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"model.pt .*no PyTorch file|model.pt holds more"):
        load_rqvae(tmp_path)
    (tmp_path / "config.yaml").write_text("arch: {type: rq-transformer, hparams: {}}")
    with pytest.raises(ValueError, match="arch.type is 'rq-transformer'"):
        load_rqvae(tmp_path)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"config.yaml is missing"):
        load_rqvae(tmp_path / "model.pt")


def test_it_is_no_whole_model(tmp_path):
    """Opening an RQ-VAE or its tower as a model says what they are and how they are opened."""
    write_rqvae(tmp_path / "rq")
    with pytest.raises(ValueError, match="RQ-VAE .*vilau.load_rqvae"):
        vilau.VilaUForConditionalGeneration.from_pretrained(tmp_path / "rq")
    convert_rqvae(tmp_path / "rq", tmp_path / "tower")
    with pytest.raises(ValueError, match="a vision tower alone"):
        vilau.VilaUForConditionalGeneration.from_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match="exists"):
        convert_rqvae(tmp_path / "rq", tmp_path / "tower")
