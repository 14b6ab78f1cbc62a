"""`vilau data codes`: from a configuration to a store that training takes, by commands alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration of two steps over three pictures, from the shipped model."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("red", "green", "blue"):
        Image.new("RGB", (40, 30), name).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"all {name}")
    path = tmp_path / "my.yaml"
    path.write_text(
        f"name: my\noutput: {tmp_path / 'run'}\nthreads: 1\n"
        "data:\n  workers: 0\n"
        f"  sources: [{{format: folder, path: {folder}, forms: {{text_image: 1, image_text: 1}}}}]\n"
        "stages: {sft: {init_from: shipped, steps: 2, batch_size: 4, row_length: 64}}\n"
    )
    return path


def test_codes_are_made_once_and_trained_from(cli: Any, config: Path, tmp_path: Path) -> None:
    """The command prints its folder, a second one finds nothing to do, and training reads it in place of pixels."""
    out = tmp_path / "codes"
    made = cli("data", "codes", config, "--stage", "sft", "--out", out, "--verify", 1)
    assert made.code == 0 and made.out.strip() == str(out)
    assert "1 of 1 shards written" in made.err and "3 frames encoded again and found equal" in made.err
    assert "0 of 1 shards written" in cli("data", "codes", config, "--stage", "sft", "--out", out).err
    trained = cli("train", config, f"stages.sft.codes={out}", "sample_every=100")
    assert trained.code == 0, trained.err
    assert (tmp_path / "run" / "sft" / "final" / "model.safetensors").is_file()


def test_every_process_checks_its_own_shards(
    cli: Any, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under torchrun nothing goes unchecked, and a process without shards has nothing to say against it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        made = cli("data", "codes", config, "--stage", "sft", "--out", tmp_path / "codes", "--verify", 1)
        assert made.code == 0, made.err
        said.append(made.err)
    assert "0 of 1 shards written" in said[0] and "again" not in said[0]
    assert "1 of 1 shards written" in said[1] and "3 frames encoded again and found equal" in said[1]


def test_wrong_usage(cli: Any, config: Path, tmp_path: Path) -> None:
    """A stage that is not there, a tower that is not there, a misspelt key: one line each, nothing written."""
    out = tmp_path / "codes"
    assert cli("data", "codes", config, "--stage", "pretrain", "--out", out).code == 2
    missing = cli("data", "codes", config, "--stage", "sft", "--out", out, "--tower", tmp_path / "none")
    assert missing.code == 1 and "none" in missing.error
    slip = cli("data", "codes", config, "--stage", "sft", "--out", out, "--set", "stages.sft.stepz=1")
    assert slip.code == 2 and "steps" in slip.error
    assert not out.exists()
