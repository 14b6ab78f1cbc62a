"""Stage `vision_tower` with every loss on, by two processes: the same training as by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

STEPS = 6
EVERYTHING = [
    f"stages.vision_tower.steps={STEPS}",
    "stages.vision_tower.contrastive=sigmoid",
    "stages.vision_tower.perceptual=siglip",
    "stages.vision_tower.perceptual_weight=0.2",
    "stages.vision_tower.adversarial_weight=0.75",
    "stages.vision_tower.adversarial_start=2",
    "stages.vision_tower.discriminator={channels: 16, groups: 4}",
    # a discriminator that knows nothing yet pulls hardly anywhere: its adaptive weight is large and magnifies rounding
    "stages.vision_tower.adversarial_limit=1.0",
    "stages.vision_tower.discriminator_optimizer.lr=2e-3",
    "stages.vision_tower.weight_ema=0.8",
    "stages.vision_tower.reconstruction_share=0.7",
]
FIGURES = ("contrast", "retrieval", "pixel", "perceptual", "commitment", "psnr", "grad_norm")
LATE = ("adversarial", "discriminator", "judged_real", "judged_drawn", "adversarial_weight", "grad_norm/discriminator")
LOOSE = ("grad_norm", "adversarial_weight", "grad_norm/discriminator")  # ratios and norms that magnify rounding
pytestmark = pytest.mark.timeout(1800)  # real processes, on a machine that may be busy


def test_two_processes_train_the_tower_of_one(runner_at: Callable[[str], Any], tmp_path: Path) -> None:
    """At one global batch: losses, adaptive weight, codebook and averaged weights agree to rounding, step by step."""
    one = runner_at("vision_tower")
    two = type(one)(tmp_path / "two")
    (two.run / "align").mkdir(parents=True)
    (two.run / "align" / "final").symlink_to((one.run / "align" / "final").resolve())
    assert one(*EVERYTHING, until="vision_tower") in (0, 143), one.log
    two(*EVERYTHING, processes=2, until="vision_tower")
    assert two.trace(1)[-1] == ("vision_tower", STEPS), two.log
    expected, found = one.metrics("vision_tower"), two.metrics("vision_tower")
    assert len(expected) == len(found) == STEPS
    for step in range(STEPS):
        for name in FIGURES + (LATE if step >= 2 else ()):
            tolerance = 1e-2 if name in LOOSE else 1e-4
            assert found[step][name] == pytest.approx(expected[step][name], rel=tolerance, abs=1e-6), (step, name)
    balanced = [line["adversarial_weight"] for line in expected[2:]]
    assert min(balanced) < 1.0, "at least one step's adaptive weight was below its limit"
    weights = [load_file(runner.run / "vision_tower" / "final" / "model.safetensors") for runner in (one, two)]
    codebooks = [w["quantizer.codebook"] for w in weights]
    assert float((codebooks[0] - codebooks[1]).norm() / codebooks[0].norm()) < 1e-5
    for name, tensor in weights[0].items():
        if not name.endswith("bias"):  # one before a GroupNorm has no effect: Adam makes steps of its rounding noise
            torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-4, msg=name)
