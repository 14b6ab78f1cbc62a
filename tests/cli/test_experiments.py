"""`vilau experiments`: wrong use in one line, and a run that is stopped goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml


def test_wrong_usage(cli, mini_cells: Path, tmp_path: Path) -> None:
    """An unknown cell names those there are; a folder without cells says what a cell is."""
    result = cli("experiments", "tower", "--cells", "unifed", "--configs", mini_cells, "--out", tmp_path / "out")
    assert result.code == 2 and "unified" in result.error
    result = cli("experiments", "tower", "--list", "--configs", tmp_path)
    assert result.code == 1 and "mini-NAME.yaml" in result.error
    assert cli("experiments", "tower", "--budget-minutes", "0").code == 2


@pytest.mark.long
def test_a_stopped_run_goes_on(mini_cells: Path, tmp_path: Path) -> None:
    """SIGTERM to the command ends its cells with a checkpoint and exit code 143; the same command finishes the rest."""
    file = mini_cells / "mini-align.yaml"
    long: dict[str, Any] = yaml.safe_load(file.read_text())
    long["stages"]["align"]["steps"] = 400
    file.write_text(yaml.safe_dump(long))
    out = tmp_path / "results"
    command = [sys.executable, "-m", "vilau", "experiments", "tower", "--configs", mini_cells, "--out", out]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    spent = tmp_path / "runs" / "align" / "spent.json"
    while not spent.is_file() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 143 and "the same command goes on" in said
    step = json.loads(spent.read_text())["step"]
    assert 10 <= step < 400 and not (out / "align.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "align.json").read_text())["steps"] == 400
    assert json.loads((out / "unified.json").read_text())["status"] == "done"
    resumed = (tmp_path / "runs" / "align.log").read_text()
    assert f"align {step - step % 2 + 2}/400" in resumed
