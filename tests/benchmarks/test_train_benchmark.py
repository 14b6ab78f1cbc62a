"""The benchmark of language stages runs and says what it promises; no time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_train_benchmark(root: Path) -> None:
    """One command gives three ways of a step, the packed ones with less padding, and heads with less memory."""
    command = [sys.executable, str(root / "benchmarks" / "train.py"), "--repeat", "1", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    padded, packed, codes = found["steps"].values()
    assert padded["padding"] > packed["padding"] == codes["padding"]
    assert codes["floor_s"] < packed["floor_s"]
    assert all(head["fused_mb"] < head["plain_mb"] for head in found["heads"].values())
