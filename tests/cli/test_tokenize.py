"""`vilau tokenize` and `detokenize`: the round trip, what lies in the file, and every wrong use in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from vilau.checkpoints.digest import tower_digest


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five pictures, one of them deeper down, and a text."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "deep").mkdir()
    draw = np.random.default_rng(0)
    for number, name in enumerate(("a.png", "b.png", "c.png", "d.png", "deep/a.png")):
        pixels = draw.integers(0, 256, (20 + number, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 20 + number)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def coded(cli, tiny_model_dir: Path, pictures: Path, tmp_path: Path) -> Path:
    """The pictures' codes."""
    path = tmp_path / "codes.safetensors"
    assert cli("tokenize", pictures, "-o", path, "--model", tiny_model_dir).code == 0
    return path


def test_what_the_file_holds(cli, tiny_model_dir: Path, pictures: Path, tmp_path: Path) -> None:
    """Codes as the tower makes them, whatever the batch; names, sizes and the tower's digest beside them."""
    from vilau.evaluation.tower_suite import load_tower
    from vilau.processing.images import normalise, to_array

    files = sorted(str(path) for path in pictures.rglob("*.png"))
    tables = []
    for size in (2, 5):
        path = tmp_path / f"{size}.safetensors"
        result = cli("tokenize", pictures, "-o", path, "--model", tiny_model_dir, "--batch-size", size, "--json")
        told = json.loads(result.out)
        assert result.code == 0 and (told["pictures"], told["positions"], told["depth"]) == (5, 16, 4)
        with safe_open(path, "numpy") as opened:
            tables.append(opened.get_tensor("codes"))
            facts = opened.metadata()
    tower = load_tower(tiny_model_dir)
    frames = np.stack([to_array(file, 32) for file in files])
    wanted = tower.encode(torch.from_numpy(normalise(frames))).numpy()
    assert tables[0].dtype == np.int16 and np.array_equal(tables[0], tables[1])
    assert (tables[0] == wanted).mean() > 0.99  # a batch of another size may round another way at a border
    assert json.loads(facts["names"]) == files and json.loads(facts["sizes"])[0] == [64, 20]
    assert facts["tower_sha256"] == tower_digest(tower) == told["tower_sha256"]


def test_round_trip(cli, tiny_model_dir: Path, coded: Path, tmp_path: Path) -> None:
    """Drawn again: one file each, also for two of one name; at the original size and from fewer codes if asked."""
    out = tmp_path / "seen"
    result = cli("detokenize", coded, "-o", out, "--model", tiny_model_dir, "--json")
    assert result.code == 0, result.err
    names = [Path(file).name for file in json.loads(result.out)["files"]]
    assert names == ["a.png", "b.png", "c.png", "d.png", "a-2.png"]
    assert Image.open(out / "a.png").size == (32, 32)
    coarse = tmp_path / "coarse"
    options = ("--depth", "1", "--original-size", "--format", "webp")
    assert cli("detokenize", coded, "-o", coarse, "--model", tiny_model_dir, *options).code == 0
    assert Image.open(coarse / "b.webp").size == (64, 21)
    again = cli("detokenize", coded, "-o", out, "--model", tiny_model_dir)
    assert again.code == 1 and "--force" in again.error


def test_patterns_crops_and_duplicates(cli, tiny_model_dir: Path, pictures: Path, tmp_path: Path) -> None:
    """A pattern in quotes is expanded, a file named twice taken once, the crop gives other codes."""
    squashed, cropped = tmp_path / "s.safetensors", tmp_path / "c.safetensors"
    arguments = ("tokenize", pictures / "[ab].png", pictures / "a.png", "--model", tiny_model_dir)
    assert cli(*arguments, "-o", squashed).code == 0 and cli(*arguments, "--crop", "-o", cropped).code == 0
    tables = []
    for path in (squashed, cropped):
        with safe_open(path, "numpy") as opened:
            tables.append(opened.get_tensor("codes"))
    assert tables[0].shape == (2, 16, 4) and not np.array_equal(*tables)


def test_pictures_that_cannot_be_read(cli, tiny_model_dir: Path, pictures: Path, tmp_path: Path) -> None:
    """A broken picture is an error that names it; with --skip-bad it is left out and counted; nothing left is one."""
    broken = tmp_path / "broken.png"
    broken.write_bytes((pictures / "a.png").read_bytes()[:60])
    out = tmp_path / "codes.safetensors"
    arguments = ("tokenize", broken, "-o", out, "--model", tiny_model_dir)
    result = cli(*arguments, pictures / "b.png")
    assert result.code == 1 and "broken.png" in result.error and not out.exists()
    result = cli(*arguments, pictures / "b.png", "--skip-bad", "--json")
    assert result.code == 0
    told = json.loads(result.out)
    assert told["pictures"] == 1 and "broken.png" in told["bad"][0]["name"]
    result = cli(*arguments, "--skip-bad", "--force")
    assert result.code == 1 and "no picture of 1 can be read" in result.error


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("nowhere.png", "-o", "x.safetensors"), 1, "nowhere.png"),
        (("*.none", "-o", "x.safetensors"), 1, "matches the pattern"),
        ((".", "-o", "x.safetensors"), 1, "holds no picture"),
        (("a.png", "-o", "x.pt"), 2, ".safetensors"),
        (("a.png",), 2, "--output"),
    ],
)
def test_tokenize_wrong_usage(cli, tmp_path: Path, monkeypatch, arguments: tuple[str, ...], code: int, named: str):
    """Wrong use fails at once and leaves nothing."""
    monkeypatch.chdir(tmp_path)
    result = cli("tokenize", *arguments)
    assert result.code == code and named in result.error
    assert list(tmp_path.iterdir()) == []


def test_another_tower_refuses_the_codes(cli, coded: Path, shipped_model_dir: Path, tmp_path: Path) -> None:
    """Codes mean nothing to a tower that did not make them: an error that describes both, and no picture."""
    result = cli("detokenize", coded, "-o", tmp_path / "seen", "--model", shipped_model_dir)
    assert result.code == 1 and "another vision tower" in result.error and "out of 256" in result.error
    assert not list((tmp_path / "seen").glob("*"))


def test_a_tower_alone_and_in_a_whole_model_are_one(cli, tiny_model_dir: Path, coded: Path, tmp_path: Path) -> None:
    """Codes made with a whole model are drawn by its tower saved alone."""
    from vilau.evaluation.tower_suite import load_tower

    load_tower(tiny_model_dir).save_pretrained(tmp_path / "tower")
    assert cli("detokenize", coded, "-o", tmp_path / "seen", "--model", tmp_path / "tower").code == 0


def test_files_that_hold_no_codes(cli, tiny_model_dir: Path, coded: Path, tmp_path: Path) -> None:
    """Not there, no safetensors, other tensors, codes out of range, a depth that they have not."""
    arguments = ("-o", tmp_path / "seen", "--model", tiny_model_dir)
    assert "no such file" in cli("detokenize", tmp_path / "none.safetensors", *arguments).error
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"no safetensors")
    assert "cannot be read as codes" in cli("detokenize", other, *arguments).error
    save_file({"weights": np.zeros(3)}, other)
    assert "holds no codes" in cli("detokenize", other, *arguments).error
    with safe_open(coded, "numpy") as opened:
        facts, codes = opened.metadata(), opened.get_tensor("codes")
    save_file({"codes": codes + 256}, other, metadata=facts)
    assert "do not fit a codebook of 256" in cli("detokenize", other, *arguments).error
    assert "1 to 4" in cli("detokenize", coded, *arguments, "--depth", 5).error
    assert cli("detokenize", coded, *arguments, "--format", "tiff").code == 2
