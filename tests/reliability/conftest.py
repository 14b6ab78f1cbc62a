"""Real training processes: killed, stopped, restarted."""

from __future__ import annotations

import json
import multiprocessing
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).with_name("driver.py")
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "nano" / "debug.yaml"
STAGES = ("align", "vision_tower", "pretrain", "sft")
STEPS, SAVE_EVERY = 20, 5
PRELOAD = ["torch.distributed.run", "torch.distributed.launcher.api", "vilau.training.run"]


@dataclass(frozen=True)
class Runner:
    """Starts training processes whose runs live in `folder`."""

    folder: Path

    def job(self, *overrides: str, **accident: Any) -> dict[str, Any]:
        """What `driver.py` needs to know."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return accident | {
            "config": str(CONFIG),
            "log": str(self.folder / "log.txt"),
            "trace": str(self.folder / "trace.txt"),
            "overrides": [
                f"output={self.run}",
                *(f"stages.{stage}.steps={STEPS}" for stage in STAGES),
                f"save_every={SAVE_EVERY}",
                "log_every=1",
                *overrides,
            ],
        }

    def __call__(self, *overrides: str, **accident: Any) -> int:
        """Train all stages into `folder` and return the exit code; minus the signal's number when killed.

        The processes come from a fork server that has imported everything once and never trained itself.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        options = {"init_globals": {"JOB": self.job(*overrides, **accident)}, "run_name": "__main__"}
        process = context.Process(target=runpy.run_path, args=(str(DRIVER),), kwargs=options)
        process.start()
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    @property
    def run(self) -> Path:
        """The run's folder, one folder per stage inside."""
        return self.folder / "run"

    @property
    def log(self) -> str:
        """Everything that the processes said."""
        return (self.folder / "log.txt").read_text(encoding="utf-8")

    @property
    def codes(self) -> list[int]:
        """The exit codes of the workers that failed in the last job of several processes."""
        return list(json.loads((self.folder / "log.codes").read_text()).values())

    def trace(self, rank: int = 0) -> list[tuple[str, int]]:
        """The steps that were done, in order, repeated ones included."""
        lines = [line.split() for line in (self.folder / "trace.txt").read_text(encoding="utf-8").splitlines()]
        return [(stage, int(step)) for number, stage, step in lines if int(number) == rank]

    def digests(self) -> dict[str, str]:
        """The digest of each finished stage."""
        return {
            stage: json.loads((self.run / stage / "final" / "training.json").read_text())["digest"]
            for stage in STAGES
            if (self.run / stage / "final").is_dir()
        }

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """The figures of each step of a stage, without the ones that are times."""
        lines = (self.run / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [{k: v for k, v in json.loads(line).items() if not _is_time(k)} for line in lines]


def _is_time(name: str) -> bool:
    return name.endswith("_per_second") or name == "mfu"


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """The run that nothing interrupts: four stages of 20 steps."""
    runner = Runner(tmp_path_factory.mktemp("reference"))
    assert runner() == 0, runner.log
    return runner


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    """A run of its own."""
    return Runner(tmp_path)


@pytest.fixture
def runner_at(tmp_path: Path, reference: Runner) -> Callable[[str], Runner]:
    """A run whose stages before the given one are finished: links to the reference's results."""

    def prepare(stage: str) -> Runner:
        runner = Runner(tmp_path)
        for name in STAGES[: STAGES.index(stage)]:
            (runner.run / name).mkdir(parents=True)
            (runner.run / name / "final").symlink_to(reference.run / name / "final")
        return runner

    return prepare
