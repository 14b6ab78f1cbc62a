"""`vilau train`, `data` and `eval`: wrong settings fail at once, in one line, and leave nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vilau.cli.evaluate import table


@pytest.fixture
def config(root: Path, tmp_path: Path) -> Path:
    """A copy of the debug configuration."""
    path = tmp_path / "debug.yaml"
    path.write_text((root / "configs" / "nano" / "debug.yaml").read_text())
    return path


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("stages.sft.step=3", "steps"),
        ("sead=3", "seed"),
        ("stages.sft.steps=0", "steps"),
        ("stages.sft.steps=many", "steps"),
        ("stages.sft.optimizer.lr=-1", "lr"),
        ("nonsense", "key=value"),
        ("seed=[", "YAML"),
        ("name.deeper=1", "name"),
    ],
)
def test_wrong_configuration_keys_and_values(cli, config: Path, tmp_path: Path, override: str, named: str) -> None:
    """On the command line a wrong key names the nearest right one, a wrong value its limit: wrong usage, not the file's
    fault; no run folder appears."""
    result = cli("train", config, f"output={tmp_path / 'run'}", override)
    assert (result.code, result.out) == (2, "")
    assert named in result.error and str(config) not in result.error
    assert not (tmp_path / "run").exists()


def test_a_slip_costs_no_time(config: Path) -> None:
    """A misspelt key is told before torch is loaded: seconds on a laptop, a minute on a cold network disk."""
    code = (
        "import sys; from vilau.cli.main import main; "
        f"code = main(['train', {str(config)!r}, 'sead=3']); sys.exit(code * 10 + ('torch' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 20 and "seed" in done.stderr


def test_a_wrong_file_is_a_failure_whatever_is_changed(cli, tmp_path: Path) -> None:
    """What the file itself has wrong is exit code 1 and names the file."""
    path = tmp_path / "x.yaml"
    path.write_text("name: x\noutput: y\nsead: 1\nstages: {}\n")
    result = cli("train", path, "seed=3")
    assert result.code == 1 and "x.yaml" in result.error and "seed" in result.error


@pytest.mark.parametrize("data", [None, b"", b"- a\n- b\n", b"a: [", b"\xff\xfe\x00"])
def test_unreadable_configurations(cli, tmp_path: Path, data: bytes | None) -> None:
    """Missing, empty, no mapping, no YAML, no text."""
    path = tmp_path / "x.yaml"
    if data is not None:
        path.write_bytes(data)
    result = cli("train", path)
    assert result.code == 1 and "x.yaml" in result.error


def test_nano_data_offline(cli, tmp_path: Path) -> None:
    """`vilau data nano --offline` needs no network; a second build does not overwrite the first unasked."""
    out = tmp_path / "nano"
    arguments = ("data", "nano", "--out", out, "--samples", 30, "--offline", "--json")
    result = cli(*arguments)
    assert result.code == 0, result.err
    assert json.loads(result.out)["samples"] == 30 and (out / "manifest.json").is_file()
    again = cli(*arguments)
    assert again.code == 1 and "--force" in again.error


@pytest.mark.parametrize(
    "arguments", [("--samples", "0"), ("--image-size", "1"), ("--frames", "0"), ("--seed", "-1"), ("--sample", "3")]
)
def test_data_wrong_usage(cli, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """Wrong numbers and options are exit code 2, before any work."""
    result = cli("data", "nano", "--out", tmp_path / "nano", *arguments)
    assert result.code == 2 and arguments[0] in result.error
    assert list(tmp_path.iterdir()) == []


def test_data_unknown_style(cli, tmp_path: Path) -> None:
    """An unknown style names the known ones."""
    result = cli("data", "nano", "--out", tmp_path / "nano", "--style", "cubist", "--offline")
    assert result.code == 1 and "noto" in result.error
    assert list(tmp_path.iterdir()) == []


def test_eval_wrong_usage(cli, tmp_path: Path) -> None:
    """An unknown suite, no items, a place that cannot be written to."""
    assert "nano" in cli("eval", "--suite", "imagenet").error
    assert cli("eval", "--limit", "0").code == 2
    assert cli("eval", "--out", tmp_path / "no" / "x.json").code == 1


def test_eval_of_a_tower(cli, tiny_model_dir: Path, tmp_path: Path) -> None:
    """JSON on stdout and in the file; options of the other suite and unknown towers are errors."""
    out = tmp_path / "result.json"
    result = cli("eval", tiny_model_dir, "--suite", "tower", "--limit", 4, "--out", out, "--json")
    assert result.code == 0 and json.loads(result.out) == json.loads(out.read_text())
    assert "psnr" in cli("eval", tiny_model_dir, "--suite", "tower", "--limit", 4).out
    assert cli("eval", "--extractor", "x.pt").code == 2
    assert "no feature extractor" in cli("eval", tiny_model_dir, "--suite", "tower", "--extractor", "x.pt").error
    assert "no such folder" in cli("eval", "nowhere", "--suite", "tower").error


def test_eval_table() -> None:
    """Each metric stands beside its ceiling and the number of items; ceilings without a metric are shown too."""
    result = {
        "metrics": {"draw_object": 0.5, "film_motion": None},
        "ceilings": {"draw_object": 0.8, "draw_object_real": 0.99},
        "samples": {"draw_object": 48},
    }
    text = "\n".join(table(result))
    for word in ("draw_object", "0.500", "0.800", "48", "film_motion", "draw_object_real", "0.990"):
        assert word in text
