"""Several processes: they stop together, resume exactly, and share the work without changing it (R6 to R9)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vilau.training.checkpoint import find_fault

ROOT = Path(__file__).resolve().parents[2]
FIGURES = {
    "align": ("contrast",),
    "vision_tower": ("contrast", "pixel", "commitment"),
    "pretrain": ("text", "visual"),
    "sft": ("text", "visual"),
}
pytestmark = pytest.mark.timeout(1800)  # real processes, on a machine that may be busy


@pytest.fixture(scope="module")
def pair(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The stage `align` trained by two processes that nothing interrupts."""
    runner = type(reference)(tmp_path_factory.mktemp("pair"))
    assert runner(processes=2, until="align") == 1, runner.log
    assert runner.codes == [143] * len(runner.codes)
    return runner


def test_nan_on_one_of_two_processes_stops_both_before_the_update(runner: Any) -> None:
    """R6: both end with the step before, non-zero, and one line names step and process."""
    assert runner(processes=2, rank=1, nan=["align", 8]) == 1
    assert runner.trace(0)[-1] == runner.trace(1)[-1] == ("align", 7)
    said = [line for line in runner.log.splitlines() if line.startswith("vilau train:")]
    assert said == [
        "vilau train: align: the loss of step 8 is not finite on process 1; stopped before the update - lower the "
        "learning rate or look at the batch"
    ]
    assert 1 in runner.codes
    assert [path.name for path in (runner.run / "align" / "checkpoints").iterdir()] == ["step-0000005"]


def test_sigterm_to_one_of_two_processes(runner: Any, pair: Any) -> None:
    """R7: both leave with 143 after one complete checkpoint; restarted workers leave at once; the resume is exact."""
    assert runner(processes=2, rank=1, stop=["align", 8], max_restarts=1) == 1
    assert set(runner.codes) == {143}
    assert runner.trace(0)[-1] == runner.trace(1)[-1] == ("align", 8)
    assert (runner.run / "align" / "STOPPED").read_text() == "stopped on request after step 8\n"
    assert find_fault(runner.run / "align" / "checkpoints" / "step-0000008") is None
    runner(processes=2, until="align")
    assert runner.digests() == pair.digests()
    assert runner.metrics("align") == pair.metrics("align")


def test_a_killed_worker_comes_back(runner: Any, pair: Any) -> None:
    """R9: with one restart allowed, SIGKILL of one of two workers changes no bit of the result."""
    runner(processes=2, max_restarts=1, rank=1, kill={"at": ["align", 8]}, until="align")
    assert ("align", 20) in runner.trace(1), runner.log
    assert runner.digests() == pair.digests()
    assert runner.metrics("align") == pair.metrics("align")


# the other two are of the same kinds: contrast alone, and packed rows
@pytest.mark.parametrize(
    "stage",
    ["vision_tower", "pretrain", *(pytest.param(name, marks=pytest.mark.long) for name in ("align", "sft"))],
)
def test_one_two_one_processes(stage: str, runner_at: Callable[[str], Any], reference: Any) -> None:
    """R8: a stage begun by one process, continued by two and ended by one has the losses of one process throughout."""
    runner = runner_at(stage)
    assert runner(stop=[stage, 7]) == 143, runner.log
    assert runner(processes=2, stop=[stage, 14]) == 1, runner.log
    assert set(runner.codes) == {143}
    assert runner(until=stage) in (0, 143), runner.log
    found, expected = runner.metrics(stage), reference.metrics(stage)
    assert len(found) == len(expected) == 20
    for name in FIGURES[stage]:
        assert [line[name] for line in found] == pytest.approx([line[name] for line in expected], rel=1e-5), name


def test_sigterm_to_the_whole_group_with_loader_workers(tmp_path: Path) -> None:
    """Ctrl-C-like signals reach loader processes too: training still ends with a checkpoint, 143 and no orphan."""
    command = [sys.executable, "-m", "vilau", "train", str(ROOT / "configs" / "nano" / "debug.yaml")]
    command += [f"output={tmp_path / 'run'}", "data.workers=2", "stages.align.steps=100000", "log_every=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        metrics = tmp_path / "run" / "align" / "metrics.jsonl"
        while process.poll() is None and not (metrics.is_file() and metrics.read_text()):
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        os.killpg(process.pid, signal.SIGTERM)
        code = process.wait()
    said = (tmp_path / "log.txt").read_text()
    assert code == 143, said
    assert "stopped on request after step" in said
    assert "Traceback" not in said
    step = int((tmp_path / "run" / "align" / "STOPPED").read_text().split()[-1])
    assert find_fault(tmp_path / "run" / "align" / "checkpoints" / f"step-{step:07d}") is None
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.long
def test_torchrun_itself(runner: Any, pair: Any) -> None:
    """R7 and R9 by the command `torchrun`: a kill is survived, a stop ends with 143, going on is exact."""

    def torchrun(restarts: int, **accident: Any) -> str:
        job = runner.folder / "job.json"
        job.write_text(json.dumps(runner.job(**accident)))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command += [f"--max-restarts={restarts}", str(Path(__file__).with_name("driver.py")), str(job)]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
        return subprocess.run(command, env=environment, capture_output=True, text=True).stderr

    runner.folder.mkdir(exist_ok=True)
    said = torchrun(0, rank=1, stop=["align", 8])
    assert "exitcode  : 143" in said
    assert (runner.run / "align" / "STOPPED").is_file()
    torchrun(1, rank=1, kill={"at": ["align", 13]}, until="align")
    assert runner.digests() == pair.digests()
