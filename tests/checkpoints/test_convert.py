"""Conversion in both directions: bit for bit, in pieces, interrupted, and refused."""

from __future__ import annotations

import filecmp
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vilau.checkpoints import convert as module
from vilau.checkpoints.convert import convert
from vilau.checkpoints.shards import open_weights, write_shard
from vilau.checkpoints.target import partial_folder
from vilau.model import VilaUForConditionalGeneration
from vilau.processing.processor import VilaUProcessor


@pytest.mark.parametrize("name", ["released", "released_384"])
def test_there_and_back_gives_the_same_bytes(name, request, tmp_path):
    """Released -> ours -> released: every file of the released folder is byte-identical, and there is no other."""
    source: Path = request.getfixturevalue(name)
    ours = convert(source, tmp_path / "ours", "ours", shard_bytes=2_000_000)
    assert len(list(ours.glob("model-*.safetensors"))) > 1
    back = convert(ours, tmp_path / "back", "released")
    files = sorted(str(file.relative_to(source)) for file in source.rglob("*") if file.is_file())
    assert files == sorted(str(file.relative_to(back)) for file in back.rglob("*") if file.is_file())
    assert filecmp.cmpfiles(source, back, files, shallow=False)[0] == files


def test_index_and_metadata_come_back(copy, tmp_path):
    """Shards with an index of another style and headers with metadata of their own are the same bytes in the end."""
    folder = copy / "llm"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    metadata = iter((None, {"origin": "a run"}))  # several would come in any order
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata=next(metadata))
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}, "metadata": {}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / ".git").mkdir()
    (copy / ".git" / "large").write_bytes(b"not of the model")
    back = convert(convert(copy, tmp_path / "ours", "ours"), tmp_path / "back", "released")
    files = sorted(str(file.relative_to(back)) for file in back.rglob("*") if file.is_file())
    assert filecmp.cmpfiles(copy, back, files, shallow=False)[0] == files
    assert "llm/model-00002-of-00002.safetensors" in files and ".git/large" not in files
    half = convert(tmp_path / "ours", tmp_path / "half", "released", "float16")
    told = json.loads((half / "llm" / "model.safetensors.index.json").read_text())
    assert told["metadata"]["total_size"] == 2 * sum(tensor.numel() for tensor in tensors.values())
    assert open_weights(half / "llm").tensors["lm_head.weight"].dtype == torch.float16


def test_the_converted_folder_is_the_same_model(model, released, tmp_path):
    """Our folder loads through the library with the same tensors, prompts and defaults of sampling."""
    ours = convert(released, tmp_path / "ours", "ours")
    other = VilaUForConditionalGeneration.from_pretrained(ours)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert other.visual_defaults() == model.visual_defaults()
    one, two = (VilaUProcessor.from_pretrained(folder) for folder in (released, ours))
    messages = [{"role": "user", "content": "A <im_start> melting apple."}]
    for mode in ("text", "image", "video"):
        a, b = one.apply_chat_template(messages, mode), two.apply_chat_template(messages, mode)
        assert torch.equal(a["input_ids"], b["input_ids"])
    assert one.context_length == two.context_length == 4096
    assert (ours / "README.md").read_text().startswith("---\nlibrary_name: vilau")


def test_without_the_kept_files_the_way_back_is_the_same_network(released_384, tmp_path):
    """A model of ours that never was a released one gets released files made from its configuration."""
    ours = convert(released_384, tmp_path / "ours", "ours")
    shutil.rmtree(ours / "released")
    again = convert(convert(ours, tmp_path / "back", "released"), tmp_path / "again", "ours")
    assert json.loads((again / "config.json").read_text()) == json.loads((ours / "config.json").read_text())
    one, two = open_weights(ours), open_weights(again)
    assert all(torch.equal(one.read(name), two.read(name)) for name in one.tensors)


def test_dtype(released, tmp_path):
    """Weights are cast, the codebook stays float32, and both folders say so."""
    ours = open_weights(convert(released, tmp_path / "ours", "ours", "bfloat16"))
    assert ours.tensors["projector.fc1.weight"].dtype == torch.bfloat16
    assert ours.tensors["vision_tower.quantizer.codebook"].dtype == torch.float32
    assert VilaUForConditionalGeneration.from_pretrained(ours.folder).dtype == torch.bfloat16
    back = convert(ours.folder, tmp_path / "back", "released", "float16")
    assert open_weights(back / "llm").tensors["lm_head.weight"].dtype == torch.float16
    assert json.loads((back / "config.json").read_text())["model_dtype"] == "torch.float16"


def test_an_interrupted_conversion_goes_on(released, tmp_path, monkeypatch):
    """After an interruption nothing stands at the target; the next run writes only what is missing."""
    written = []

    def stop_after_two(file, *args):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file.name)
        write_shard(file, *args)

    monkeypatch.setattr(module, "write_shard", stop_after_two)
    target = tmp_path / "ours"
    with pytest.raises(KeyboardInterrupt):
        convert(released, target, "ours", shard_bytes=2_000_000)
    assert not target.exists() and partial_folder(target).is_dir()
    first = list(written)
    monkeypatch.setattr(
        module, "write_shard", lambda file, *args: (written.append(file.name), write_shard(file, *args))
    )
    convert(released, target, "ours", shard_bytes=2_000_000)
    assert target.is_dir() and not partial_folder(target).exists()
    assert not set(first) & set(written[2:])
    assert VilaUForConditionalGeneration.from_pretrained(target).config.vision_config.depth == 4


def test_an_interruption_of_other_work_is_not_gone_on_with(released, tmp_path):
    """What another conversion left behind is thrown away."""
    target = tmp_path / "ours"
    left = partial_folder(target)
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"of another conversion")
    (left / ".conversion.json").write_text('{"fingerprint": "other"}')
    convert(released, target, "ours")
    assert open_weights(target).tensors


def test_a_tensor_is_all_that_stands_in_memory(released, tmp_path, monkeypatch):
    """The largest thing read at once is one tensor: never a shard, never the model."""
    sizes = []
    read = module.ReleasedCheckpoint.read

    def watched(self, name):
        tensor = read(self, name)
        sizes.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(module.ReleasedCheckpoint, "read", watched)
    convert(released, tmp_path / "ours", "ours")
    assert sum(sizes) > 7_000_000 and max(sizes) < 500_000


def test_refusals(released, tmp_path):
    """An existing target, the same layout, an unknown dtype, a damaged source: nothing is written."""
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists; choose another folder or pass --force"):
        convert(released, tmp_path / "there", "ours")
    with pytest.raises(ValueError, match="already has the layout 'released'"):
        convert(released, tmp_path / "new", "released")
    with pytest.raises(ValueError, match="dtype is 'int3'"):
        convert(released, tmp_path / "new", "ours", "int3")
    ours = convert(released, tmp_path / "there", "ours", force=True)
    config = json.loads((ours / "config.json").read_text())
    config["vision_config"]["stem"] = "conv"
    (ours / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="knows no stem 'conv'"):
        convert(ours, tmp_path / "new", "released")
    assert not (tmp_path / "new").exists() and not partial_folder(tmp_path / "new").exists()


def test_a_target_that_would_do_harm_is_refused(released, copy, tmp_path):
    """`force` replaces a model's folder only, never another one, and never the source."""
    with pytest.raises(ValueError, match="must not lie in each other"):
        convert(copy, copy, "ours", force=True)
    with pytest.raises(ValueError, match="must not lie in each other"):
        convert(copy, copy / "ours", "ours")
    with pytest.raises(ValueError, match="must not lie in each other"):
        convert(copy, tmp_path, "ours", force=True)
    other = tmp_path / "letters"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="is no model's folder, so it is not replaced"):
        convert(released, other, "ours", force=True)
    assert (other / "letter.txt").read_text() == "dear" and (copy / "llm").is_dir()
    target = convert(released, tmp_path / "ours", "ours")
    (target / "mine.txt").write_text("old")
    convert(released, target, "ours", force=True)
    assert not (target / "mine.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "letters", "ours"]


def test_command_line(released, tmp_path):
    """`vilau convert` and `vilau info` work on both layouts and agree about the parts."""
    from vilau.cli.main import app

    runner = CliRunner()
    result = runner.invoke(app, ["convert", str(released), str(tmp_path / "ours")], catch_exceptions=False)
    assert result.exit_code == 0 and str(tmp_path / "ours") in result.output
    facts = []
    for folder in (released, tmp_path / "ours"):
        shown = runner.invoke(app, ["info", str(folder), "--json"], catch_exceptions=False)
        facts.append(json.loads(shown.stdout))
    assert facts[0]["parameters"] == facts[1]["parameters"] and facts[0]["shapes"] == facts[1]["shapes"]
    assert [fact["layout"] for fact in facts] == ["released", "ours"]
    assert facts[0]["parameters"]["quantizer"] == 1024 * 96
