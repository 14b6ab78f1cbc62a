"""Nothing is lost when a training process dies (promises R1, R2, R11)."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).with_name("golden_losses.json")
FIGURES = {
    "align": ("contrast",),
    "vision_tower": ("contrast", "pixel", "commitment"),
    "pretrain": ("text", "visual"),
    "sft": ("text", "visual"),
}
KILLS: list[dict[str, Any]] = [
    {"path": "align/checkpoints/.step-0000010.partial", "events": 4},
    {"at": ["vision_tower", 8]},
    {"path": "pretrain/checkpoints/.step-0000015.partial", "events": 9},
    {"at": ["sft", 13]},
    {"path": "sft/.final.partial", "events": 6},
]
pytestmark = pytest.mark.timeout(1800)  # real processes, on a machine that may be busy


def check_equal(run: Any, reference: Any) -> None:
    """Same weights, optimizers, buffers and figures of every step, bit for bit."""
    assert run.digests() == reference.digests()
    for stage in FIGURES:
        assert run.metrics(stage) == reference.metrics(stage)
        weights = "final/model.safetensors"
        assert (run.run / stage / weights).read_bytes() == (reference.run / stage / weights).read_bytes()


def check_lost_work(trace: list[tuple[str, int]], save_every: int) -> None:
    """No resumed process went back further than one save interval."""
    done: dict[str, int] = {}
    for stage, step in trace:
        assert done.get(stage, 0) - step < save_every, f"{stage} went back from step {done[stage]} to {step}"
        done[stage] = step


def test_five_kills_end_in_the_digests_of_the_uninterrupted_run(runner: Any, reference: Any) -> None:
    """R1, R2, R11: SIGKILL in each stage, thrice inside a save, changes no bit of any result or figure."""
    for kill in KILLS:
        assert runner(kill=kill) == -9, runner.log
    assert runner() == 0, runner.log
    check_equal(runner, reference)
    check_lost_work(runner.trace(), save_every=5)
    steps = len(runner.trace())
    assert runner() == 0
    assert len(runner.trace()) == steps, "a finished run called again must train nothing"


@pytest.mark.torture
def test_fifty_kills(runner: Any, reference: Any) -> None:
    """R1 with 50 kills: 30 at random file operations of saves and results, 20 between steps."""
    chance, killed = random.Random(7), 0
    for number in range(200):
        if killed == 50:
            break
        stages = [name for name in FIGURES if name not in runner.digests()]
        stage = stages[0] if stages else "sft"
        if not stages or killed % 13 == 12:  # begin again, so that there is always something to kill
            check_equal(runner, reference) if not stages else None
            runner = type(runner)(runner.folder.parent / f"again-{number}")
            stage = "align"
        at = _last_step(runner, stage)
        if number % 5 < 3:
            step = min(20, at // 5 * 5 + 5)
            part = chance.choice([f"{stage}/checkpoints/.step-{step:07d}", f"{stage}/.final.partial"])
            kill: dict[str, Any] = {"path": part, "events": chance.randint(1, 20)}
        else:
            kill = {"at": [stage, min(20, at + chance.randint(1, 6))]}
        killed += runner(kill=kill) == -9
    assert killed == 50
    assert runner() == 0, runner.log
    check_equal(runner, reference)
    check_lost_work(runner.trace(), save_every=5)


def _last_step(runner: Any, stage: str) -> int:
    folder = runner.run / stage / "checkpoints"
    return max((int(path.name.removeprefix("step-")) for path in folder.glob("step-*")), default=0)


def test_golden_losses(reference: Any) -> None:
    """R11: 20 steps of every stage give the stored losses: 1e-4 relative at step 1, 1e-2 at step 20.

    `VILAU_WRITE_GOLDEN=1` stores those of this run, for a change that means to change them.
    """
    losses = {
        stage: {name: [line[name] for line in reference.metrics(stage)] for name in names}
        for stage, names in FIGURES.items()
    }
    if os.environ.get("VILAU_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    for stage, figures in golden.items():
        for name, stored in figures.items():
            found = losses[stage][name]
            assert len(found) == len(stored) == 20
            assert math.isclose(found[0], stored[0], rel_tol=1e-4), (stage, name, found[0], stored[0])
            assert math.isclose(found[-1], stored[-1], rel_tol=1e-2), (stage, name, found[-1], stored[-1])
