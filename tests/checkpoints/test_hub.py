"""A hub id: fetched by the library's own client from a hub on this machine, and from its cache without one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from checkpoints.local_hub import LocalHub, serve
from vilau.checkpoints.layout import resolve
from vilau.cli.main import main
from vilau.model import VilaUForConditionalGeneration
from vilau.processing.processor import VilaUProcessor

TOKEN = "hf_secret"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A private hub; the client knows no other and has an empty cache."""
    local = LocalHub(private=TOKEN)
    local.uploads = tmp_path / "uploads"
    with serve(local) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield local


def both_kinds(source: Path, target: Path) -> None:
    """A released folder whose weights are there twice, as safetensors and as ``.bin``."""
    shutil.copytree(source, target)
    for file in list(target.rglob("model.safetensors")):
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))


def test_revision_token_and_cache(hub, released, tmp_path):
    """The revision asked for is fetched with the token, once; the next time it comes from the cache."""
    other = tmp_path / "other"
    shutil.copytree(released, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"num_video_frames": 5}))
    hub.repos["owner/vila-u"] = {"main": released, "v2": other}
    options = {"token": TOKEN, "cache_dir": str(tmp_path / "elsewhere")}
    model = VilaUForConditionalGeneration.from_pretrained("owner/vila-u", revision="v2", **options)
    assert model.config.num_frames == 5
    assert VilaUProcessor.from_pretrained("owner/vila-u", **options).num_frames == 8
    assert not (tmp_path / "cache").exists()
    sent = len(hub.fetched)
    again = VilaUForConditionalGeneration.from_pretrained("owner/vila-u", revision="v2", **options)
    assert torch.equal(again.projector.fc1.weight, model.projector.fc1.weight) and len(hub.fetched) == sent
    with pytest.raises(ValueError, match=r"owner/vila-u: .*cannot be fetched from the hub \(.*(Revision|404)"):
        resolve("owner/vila-u", revision="v3", **options)
    with pytest.raises(ValueError, match=r"cannot be fetched from the hub \(.*(401|gated|Access)"):
        resolve("owner/vila-u", token="hf_wrong", cache_dir=str(tmp_path / "empty"))


def test_weights_are_fetched_once(hub, released, tmp_path):
    """Of weights that are there twice only the safetensors are fetched; ``.bin`` where there is nothing else."""
    both_kinds(released, tmp_path / "twice")
    (tmp_path / "twice" / "llm" / "model.safetensors").unlink()
    hub.repos["owner/twice"] = {"main": tmp_path / "twice"}
    folder = resolve("owner/twice", token=TOKEN)
    assert [name for name in hub.fetched if name.endswith(".bin")] == ["llm/pytorch_model.bin"]
    assert len(list(folder.rglob("model.safetensors"))) == 2
    loaded = VilaUForConditionalGeneration.from_pretrained("owner/twice", token=TOKEN)
    expected = load_file(released / "llm" / "model.safetensors")["lm_head.weight"]
    assert torch.equal(loaded.language_model.lm_head.weight, expected)


def test_push_to_hub(hub, model, released, tmp_path):
    """What `push_to_hub` of model and processor uploads is a model of ours for whoever fetches it."""
    model.push_to_hub("owner/mine", token=TOKEN)
    VilaUProcessor.from_pretrained(released).push_to_hub("owner/mine", token=TOKEN)
    stored = tmp_path / "uploads" / "mine"
    assert {"config.json", "model.safetensors", "processor_config.json"} <= {file.name for file in stored.iterdir()}
    fetched = VilaUForConditionalGeneration.from_pretrained("owner/mine", token=TOKEN)
    assert all(torch.equal(tensor, fetched.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert VilaUProcessor.from_pretrained("owner/mine", token=TOKEN).template.name == "vicuna_v1"


def test_offline(released, tmp_path, monkeypatch, capfd):
    """With ``HF_HUB_OFFLINE`` a cached id works in every command, and one that is not cached says so at once."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = tmp_path / "models--owner--vila-u"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "snapshots").mkdir()
    (root / "snapshots" / commit).symlink_to(released, target_is_directory=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["info", "owner/vila-u", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["shapes"]["vocabulary"] == 516
    assert main(["convert", "owner/vila-u", str(tmp_path / "ours")]) == 0
    assert (tmp_path / "ours" / "model.safetensors").is_file()
    capfd.readouterr()
    assert main(["info", "owner/other"]) == 1
    said = capfd.readouterr().err
    assert "owner/other: there is no such folder, and it cannot be fetched from the hub" in said
    assert said.count("\n") == 1 and "Traceback" not in said
