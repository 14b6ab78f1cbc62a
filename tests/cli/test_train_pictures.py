"""A tower that only reconstructs learns from bare pictures, in every format of pairs."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

DEBUG = Path(__file__).resolve().parents[2] / "configs" / "nano" / "debug.yaml"
COUNT = 8


def _write_folder(root: Path, pictures: list[bytes]) -> None:
    for number, content in enumerate(pictures):
        (root / f"{number}.png").write_bytes(content)


def _write_webdataset(root: Path, pictures: list[bytes]) -> None:
    with tarfile.open(root / "00000.tar", "w") as shard:
        for number, content in enumerate(pictures):
            member = tarfile.TarInfo(f"{number:05d}.png")
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))


def _write_parquet(root: Path, pictures: list[bytes]) -> None:
    pq.write_table(pa.table({"image": pictures}), root / "pictures.parquet")


WRITERS: dict[str, Callable[[Path, list[bytes]], None]] = {
    "folder": _write_folder,
    "webdataset": _write_webdataset,
    "parquet": _write_parquet,
}


def config_for(root: Path, name: str, **stage: Any) -> Path:
    """A configuration with a small tower without a text encoder over bare pictures, which are also its validation."""
    data = root / "pictures"
    data.mkdir()
    draw = np.random.default_rng(0)
    pictures = []
    for _ in range(COUNT):
        out = io.BytesIO()
        Image.fromarray(draw.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(out, "PNG")
        pictures.append(out.getvalue())
    WRITERS[name](data, pictures)
    config = yaml.safe_load(DEBUG.read_text())
    del config["text_encoder"]
    config["model"]["vision_config"] |= {"decoder_channels": 8, "decoder_groups": 4, "decoder_latent_channels": 16}
    source = [{"format": name, "path": str(data)}]
    config["data"] = {"sources": source, "validation": source, "workers": 0}
    settings = config["stages"]["vision_tower"] | {"steps": 2, "batch_size": 4, "init_from": None} | stage
    config |= {"output": str(root / "run"), "stages": {"vision_tower": settings}, "validation_samples": COUNT}
    path = root / "bare.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("name", WRITERS)
def test_bare_pictures_train_a_tower_that_only_reconstructs(name: str, cli: Any, tmp_path: Path) -> None:
    """Nobody reads captions where `contrastive_weight` is 0: nothing is skipped, and pictures measure the tower."""
    config = config_for(tmp_path, name, contrastive_weight=0)
    checked = cli("data", "check", config)
    assert checked.code == 0 and f"{COUNT} of {COUNT} samples can be used" in checked.out, checked.err
    done = cli("train", config)
    assert done.code == 0, done.err
    assert "skipped" not in done.out + done.err
    measured = json.loads((tmp_path / "run" / "vision_tower" / "validation.json").read_text())
    assert measured["items"]["psnr"] == COUNT and not any("retrieval" in figure for figure in measured["metrics"])
    codes = tmp_path / "codes.safetensors"
    picture = tmp_path / "one.png"
    Image.new("RGB", (32, 32), "red").save(picture)
    final = tmp_path / "run" / "vision_tower" / "final"
    assert cli("tokenize", picture, "--model", final, "-o", codes).code == 0 and codes.is_file()


@pytest.mark.parametrize(("name", "said"), [("folder", "missing_text"), ("parquet", "caption_field")])
def test_contrast_still_needs_captions(name: str, said: str, cli: Any, tmp_path: Path) -> None:
    """With contrast, bare pictures are said to be wrong beforehand and before the first step."""
    config = config_for(tmp_path, name)
    assert cli("data", "check", config).code == 1
    failed = cli("train", config)
    assert failed.code == 1 and said in failed.err, failed.err
    assert not (tmp_path / "run" / "vision_tower" / "checkpoints").exists()
