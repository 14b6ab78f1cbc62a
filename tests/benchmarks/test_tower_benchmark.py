"""The tower's benchmark runs and says what it promises; no time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_tower_benchmark(root: Path, tmp_path: Path) -> None:
    """One command leaves a page and JSON whose shares of a step add up, and floors that nothing beats by far."""
    page = tmp_path / "tower.md"
    command = [sys.executable, str(root / "benchmarks" / "tower.py"), "--sizes", "nano", "--repeat", "1"]
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    more = ["--vectors", "0", "--out", str(page)]
    done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(page.with_suffix(".json").read_text())
    shares = result["sizes"]["nano"]["step"]["shares"]
    assert sum(share for name, share in shares.items() if name != "whole step") == pytest.approx(1.0)
    assert all(0 < row["floor_share_cpu"] < 1.5 for row in result["sizes"]["nano"]["use"].values())
    assert "| nano | encode |" in page.read_text() and result["quantizer"] is None
