"""The benchmark of language stages runs and says what it promises; no time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmark once around."""
    command = [sys.executable, str(root / "benchmarks" / "train.py"), "--repeat", "1", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_train_benchmark(root: Path) -> None:
    """One command gives three ways of a step, the packed ones with less padding, and heads with less memory."""
    done = run(root, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    padded, packed, codes = found["steps"].values()
    assert padded["padding"] > packed["padding"] == codes["padding"]
    assert codes["floor_s"] < packed["floor_s"]
    assert all(head["fused_mb"] < head["plain_mb"] for head in found["heads"].values())


@pytest.mark.parametrize("switches", [(), ("--gradient-checkpointing", "--attention", "eager")], ids=["plain", "all"])
def test_utilisation_of_whole_steps(root: Path, switches: tuple[str, ...]) -> None:
    """Every figure of a tiny model, from end to end, and the counts that do not hang on the machine."""
    done = run(root, "--preset", "tiny", "--rows", "2", "--json", *switches)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    samples = 2 * (256 // (30 + 16))
    assert found["tokens"] == samples * (30 + 16) and 0 < found["padding"] < 0.2
    assert 0 < found["trained"] < found["parameters"]
    assert found["tokens_per_s"] == pytest.approx(found["tokens"] / found["step_s"])
    assert found["tflops_per_s"] > 0 and found["mfu"] > 0 and found["peak_mb"] > 0
    assert found["gradient_checkpointing"] == bool(switches)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_utilisation_says_what_it_cannot_measure(root: Path) -> None:
    """No GPU, a row too short for a picture: one line each and no figures."""
    for arguments, said in (
        (("--device", "cuda"), "there is no GPU here"),
        (("--row-length", "40"), "a row of 40 positions has no room for a picture of 16"),
    ):
        done = run(root, "--preset", "tiny", *arguments)
        assert done.returncode == 2 and said in done.stderr and not done.stdout
