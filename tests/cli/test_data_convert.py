"""`vilau data convert`: exit codes, counts, and that a hostile file is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vilau.cli.main import main


class Evil:
    """Writes a file when Python's own reader sees it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def test_shards_are_converted_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The new files are named, and what was left out is counted by reason."""
    picture = np.zeros((4, 4, 3), np.uint8)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([{"image": picture, "text": "black"}, {"image": None, "text": "x"}]))
    words = ["data", "convert", str(tmp_path / "a.pkl"), str(tmp_path / "out")]
    assert main([*words, "--allow-pickle", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"files": [str(tmp_path / "out" / "a.tar")], "records": 1, "left_out": {"no picture": 1}}


def test_pickles_need_the_switch_and_hostile_ones_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, one line that says why, and the command in the file has not run."""
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([{"text": Evil(tmp_path / "ran")}]))
    words = ["data", "convert", str(tmp_path / "a.pkl"), str(tmp_path / "out")]
    assert main(words) == 1
    assert "--allow-pickle" in capsys.readouterr().err
    assert main([*words, "--allow-pickle"]) == 1
    error = capsys.readouterr().err
    assert "is refused: the pickle names" in error and "Traceback" not in error
    assert not (tmp_path / "ran").exists()
