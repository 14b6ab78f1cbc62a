"""One training run for the tests, as a process of its own that may be told when to die.

The job (a dict, or a JSON file named on the command line) has: `config`, `overrides`, `log`, `trace`, `until` (the last
stage to train, all if absent) and at most one of `kill`, `stop`, `nan`, each naming the stage and the moment; it
befalls process `rank`, once. `processes` and `max_restarts` start the job under torchrun's agent, with forked workers,
which spares each of them the imports.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    """Run the job in this process, or in workers of an elastic agent."""
    descriptor = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = open(descriptor, "w", encoding="utf-8", buffering=1)  # noqa: SIM115 - for life
    if job.get("processes", 1) == 1:
        train(job)
        return
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job["processes"],
        run_id="vilau",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=job.get("max_restarts", 0),
        monitor_interval=0.05,
        start_method="fork",
    )
    try:
        elastic_launch(config, train)(job)
    except ChildFailedError as error:
        codes = {str(rank): failure.exitcode for rank, failure in error.failures.items()}
        Path(job["log"]).with_suffix(".codes").write_text(json.dumps(codes))
        raise SystemExit(1) from None


def train(job: dict[str, Any]) -> None:
    """Train as `vilau train` does, with the job's accident."""
    from vilau.training.config import load_config
    from vilau.training.engine import StopRequested, TrainingError
    from vilau.training.run import Hooks, run

    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    rank, again = int(os.environ.get("RANK", "0")), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    victim = rank == job.get("rank", 0) and not again
    kill, stop = (job.get(name) if victim else None for name in ("kill", "stop"))
    if kill and "events" in kill:
        die_in_file_work(kill["path"], kill["events"])
    if victim and "nan" in job:
        spoil_loss(*job["nan"])

    def on_step(stage: str, step: int) -> None:
        with open(job["trace"], "a", encoding="utf-8") as file:
            file.write(f"{rank} {stage} {step}\n")
        if kill and kill.get("at") == [stage, step]:
            os.kill(os.getpid(), signal.SIGKILL)
        if stop == [stage, step] or (stage == job.get("until") and step == config.stages[stage].steps):
            os.kill(os.getpid(), signal.SIGTERM)

    config = load_config(job["config"], job["overrides"])
    try:
        print(run(config, Hooks(on_step=on_step), show_progress=False), flush=True)
    except StopRequested as stopped:
        say(rank, str(stopped))
        sys.exit(stopped.exit_code)
    except TrainingError as error:
        say(rank, f"vilau train: {error}")
        sys.exit(1)


def say(rank: int, message: str) -> None:
    """Print on the first process only, as the command line does."""
    if rank == 0:
        print(message, flush=True)


def die_in_file_work(part: str, events: int) -> None:
    """Kill this process at the n-th file operation (open, mkdir, rename, remove) on a path that contains `part`."""
    left = events

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        works = event == "open" or event.startswith(("os.", "shutil."))
        if works and any(part in str(argument) for argument in arguments):
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def spoil_loss(stage: str, step: int) -> None:
    """Turn this process's loss of a 1-based step into NaN."""
    from dataclasses import replace

    from vilau.training.language import LanguageStage
    from vilau.training.vision_tower import TowerStage

    for kind in (TowerStage, LanguageStage):

        def compute(self: Any, batch: Any, number: int, honest: Any = kind.compute) -> Any:
            result = honest(self, batch, number)
            bad = (self.name, number + 1) == (stage, step)
            return replace(result, loss=result.loss * float("nan")) if bad else result

        kind.compute = compute  # type: ignore[method-assign]


if __name__ == "__main__":
    if "JOB" in globals():
        main(globals()["JOB"])
    else:  # started by torchrun itself
        train(json.loads(Path(sys.argv[1]).read_text()))
