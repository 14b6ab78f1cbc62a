"""`vilau parity`: subsets, unknown tensors, deviations, broken folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from parity.golden_data import GOLDEN
from vilau.cli.main import main
from vilau.evaluation.parity.chats import parse_sample
from vilau.evaluation.parity.compare import Outcome, compare
from vilau.processing.templates import VICUNA_V1


@pytest.fixture
def subset(tmp_path: Path) -> Path:
    """A golden folder with a few cheap tensors, one of them unknown."""
    source, folder = GOLDEN / "tiny256", tmp_path / "small"
    folder.mkdir()
    shutil.copytree(GOLDEN / "media", tmp_path / "media")
    (folder / "ckpt").symlink_to(source / "ckpt")
    for name in ("prompts.json", "meta.json", "crops.json", "inputs.safetensors"):
        shutil.copy(source / name, folder / name)
    kept = load_file(source / "outputs.safetensors")
    some = {name: kept[name] for name in ("a.ids.text", "f.logits", "f.sampling_probs_top_k900_top_p096")}
    save_file(some | {"z.unknown": torch.zeros(1)}, folder / "outputs.safetensors")
    return folder


def test_a_subset_is_checked_and_unknown_tensors_are_named(subset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing counts as checked that was not: tensors without a check are listed."""
    assert main(["parity", str(subset), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["holds"] and result["unchecked"] == ["z.unknown"]
    assert {row["name"] for row in result["tensors"]} == {
        "a.ids.text", "b.pixel_values", "f.logits", "f.sampling_probs_top_k900_top_p096"
    }  # fmt: skip


def test_a_deviation_fails_the_command(subset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tensor off by more than its tolerance, or of another shape, gives exit code 1 and is shown."""
    tensors = load_file(subset / "outputs.safetensors")
    tensors["f.logits"] = tensors["f.logits"] + 2e-4
    tensors["a.ids.text"] = tensors["a.ids.text"][:-1]
    save_file(tensors, subset / "outputs.safetensors")
    assert main(["parity", str(subset), "--only", "a.", "--only", "f."]) == 1
    lines = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line.count("|") > 5}
    assert "DIFFERS" in lines["f.logits"] and "0.0002" in lines["f.logits"]
    assert "DIFFERS" in lines["a.ids.text"] and "shape" in lines["a.ids.text"]
    assert "DIFFERS" not in lines["f.sampling_probs_top_k900_top_p096"]


def test_missing_pieces_are_said(subset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is none, and a check whose input is missing."""
    assert main(["parity", str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert main(["parity", str(tmp_path / "media")]) == 1
    assert "holds no ckpt" in capsys.readouterr().err
    (subset / "prompts.json").unlink()
    assert main(["parity", str(subset), "--only", "a."]) == 1
    assert "holds no prompts.json" in capsys.readouterr().out


def test_comparison_counts_what_it_says() -> None:
    """NaN agrees only with NaN; relative and largest-entry measures divide by the reference."""
    loss = torch.tensor([2.0, 2.0, float("nan")])
    assert compare("x", loss, Outcome(loss.clone(), "relative")).holds
    assert not compare("x", loss, Outcome(torch.tensor([2.0, 2.0, 1.0]), "relative")).holds
    assert compare("x", torch.tensor([2.0]), Outcome(torch.tensor([2.002]), "norm")).deviation == pytest.approx(
        1e-3, rel=1e-3
    )
    norms = torch.tensor([10.0, 1e-9])  # the second is zero but for rounding
    assert compare("x", norms, Outcome(torch.tensor([10.0, 4e-9]), "norm")).holds
    assert not compare("x", norms, Outcome(torch.tensor([10.0, 1e-6]), "norm")).holds
    codes = torch.tensor([1, 2, 3])
    assert compare("x", codes, Outcome(torch.tensor([1, 0, 0]), "equal")).deviation == 2


def test_samples_are_read_from_their_decoded_text() -> None:
    """Pictures and films stand where the decoded text has their tokens, in questions and answers."""
    from vilau.evaluation.parity.chats import blank_frames

    start = f"<s> {VICUNA_V1.default_system} "
    decoded = start + "USER: Look:  <im_start> <unk> <im_end> \nWho? ASSISTANT: A cat.</s>USER: Film it. ASSISTANT:  "
    decoded += "<vi_start> <unk><unk><unk> <vi_end> </s>"
    sample = parse_sample("x", decoded, VICUNA_V1, blank_frames)
    shown = [
        (turn.role, [part.text or f"{part.kind} {len(part.frames)}" for part in turn.parts]) for turn in sample.turns
    ]
    assert shown == [
        ("user", ["Look:", "image 1", "Who?"]),
        ("assistant", ["A cat."]),
        ("user", ["Film it."]),
        ("assistant", ["video 3"]),
    ]
    assert sample.form == "text_video"
    with pytest.raises(ValueError, match="no round"):
        parse_sample("x", start + "nonsense", VICUNA_V1, blank_frames)
