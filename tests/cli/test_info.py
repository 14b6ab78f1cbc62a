"""`vilau info` and the names of models: facts from the files, and models that are none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may break."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def test_facts_equal_those_of_the_loaded_model(cli, tiny_model_dir: Path) -> None:
    """Counts read from the file headers are the counts of the network."""
    from vilau import VilaUForConditionalGeneration

    told = json.loads(cli("info", tiny_model_dir, "--json").out)
    network = VilaUForConditionalGeneration.from_pretrained(tiny_model_dir)
    codebook = network.vision_tower.quantizer.codebook
    learned = {id(p): p.numel() for p in network.parameters()} | {id(codebook): codebook.numel()}
    assert told["parameters"]["total"] == sum(learned.values())
    stored = sum({tensor.data_ptr(): tensor.numel() for tensor in network.state_dict().values()}.values())  # tied: once
    assert told["memory_mb"]["fp32"] == round(4 * stored / 1e6, 1)
    quantizer = sum(tensor.numel() for tensor in network.vision_tower.quantizer.state_dict().values())
    assert told["memory_mb"]["bf16"] == round((2 * stored + 2 * quantizer) / 1e6, 1)
    assert told["shapes"]["positions_per_image"] == 16 and told["shapes"]["depth"] == 4
    assert told["template"] == "vilau"


def test_the_table_names_every_part(cli, tiny_model_dir: Path) -> None:
    """People get the same facts as lines."""
    result = cli("info", tiny_model_dir)
    assert result.code == 0
    for word in ("image_encoder", "language_model", "depth_transformer", "bf16", "licence", "32x32 px"):
        assert word in result.out


@pytest.mark.parametrize("verb", [("info",), ("ask", "hello", "--model"), ("eval",)], ids=lambda verb: verb[0])
@pytest.mark.parametrize("name", ["no-such-model", "./nope", "/nope/nope", "a/b/c", "~/x", ""])
def test_unknown_models(cli, verb: tuple[str, ...], name: str) -> None:
    """A name that is no folder and cannot be a hub id is told at once."""
    result = cli(*verb, name)
    assert (result.code, result.out) == (1, "")
    assert "model" in result.error


def test_things_that_are_no_model(cli, tmp_path: Path) -> None:
    """A file, an empty folder."""
    (tmp_path / "file").write_text("x")
    assert "a model is a folder" in cli("info", tmp_path / "file").error
    (tmp_path / "empty").mkdir()
    assert "config.json" in cli("info", tmp_path / "empty").error


@pytest.mark.parametrize("verb", [("info",), ("ask", "hello", "--model")], ids=lambda verb: verb[0])
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("config.json", b"{"),
        ("config.json", b'{"model_type": "bert"}'),
        ("config.json", b'{"model_type": "vilau", "vision_config": {}}'),
        ("config.json", b"[]"),
        ("model.safetensors", None),
        ("model.safetensors", b"short"),
        ("model.safetensors", b"\xff" * 64),
    ],
)
def test_broken_models(cli, model: Path, verb: tuple[str, ...], name: str, data: bytes | None) -> None:
    """A missing or broken file of a model is one line and exit code 1, whatever reads it."""
    (model / name).unlink()
    if data is not None:
        (model / name).write_bytes(data)
    result = cli(*verb, model)
    assert (result.code, result.out) == (1, "")
    assert result.error


def test_cut_weights_and_missing_tensors(cli, model: Path) -> None:
    """Weights that lost their end, or a tensor, are refused: random weights must never answer."""
    from safetensors.torch import load_file, save_file

    weights = model / "model.safetensors"
    tensors = load_file(weights)
    weights.write_bytes(weights.read_bytes()[:-4])
    assert "damaged" in cli("info", model).error
    assert cli("ask", "hello", "--model", model).code == 1
    gone = "projector.fc1.weight"
    del tensors[gone]
    save_file(tensors, weights, metadata={"format": "pt"})
    result = cli("ask", "hello", "--model", model)
    assert result.code == 1 and gone in result.error


def test_a_model_without_its_processor(cli, model: Path) -> None:
    """The missing file is named."""
    (model / "processor_config.json").unlink()
    assert "processor_config.json" in cli("ask", "hello", "--model", model).error


def test_unknown_device(cli, tiny_model_dir: Path) -> None:
    """A device that is not there is told by name."""
    result = cli("ask", "hello", "--model", tiny_model_dir, "--device", "quantum")
    assert result.code == 1 and "quantum" in result.error
