"""What a run tells: averages with exact counts, rates, utilisation, one JSON line per report."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vilau.training.metrics import MetricLog


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of the log."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_averages_are_sums_over_counts(tmp_path: Path) -> None:
    """Steps of unequal size count by their size; a figure that some steps lack is averaged over the others."""
    with MetricLog(tmp_path, "tiny", 4, 0, show_progress=False, loggers=()) as log:
        log.add({"loss": (torch.tensor(6.0), 2), "rare": (5.0, 1.0), "none": (0.0, 0)}, {"samples": 2})
        log.add({"loss": (1.0, 8)}, {"samples": 8})
        log.report(2, 0.1)
        log.add({"loss": (3.0, 1)}, {"samples": 1})
        log.report(3, 0.2)
    first, second = read(tmp_path)
    assert (first["step"], first["lr"], first["loss"], first["rare"]) == (2, 0.1, 0.7, 5.0)
    assert "none" not in first
    assert (second["loss"], "rare" in second) == (3.0, False)


def test_rates_and_utilisation_come_from_one_time(tmp_path: Path) -> None:
    """Images, tokens and operations per second are in the proportion of what the batches held."""
    with MetricLog(tmp_path, "tiny", 2, 0, show_progress=False, loggers=(), peak=1e6) as log:
        for _ in range(2):
            log.add({}, {"samples": 4, "tokens": 100, "flops": 5000.0})
        log.report(2, 0.1)
    (line,) = read(tmp_path)
    assert line["tokens_per_second"] == pytest.approx(25 * line["samples_per_second"])
    assert line["mfu"] == pytest.approx(1250 * line["samples_per_second"] / 1e6)


def test_the_end_is_summed_up_with_remarks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A person who comes back reads how long it took, the last figures and what was skipped."""
    with MetricLog(tmp_path, "tiny", 1, 0, show_progress=True, loggers=()) as log:
        log.add({"loss": (1.5, 1)}, {"samples": 4})
        log.report(1, 0.1)
        log.summarise(["2 of 6 samples read were skipped"])
    said = capsys.readouterr().err
    assert "tiny 1/1" in said and "samples/s" in said and "loss 1.5" in said
    assert "tiny: 1 steps in 0 s; loss 1.5" in said
    assert said.rstrip().endswith("2 of 6 samples read were skipped")


def test_wandb_without_wandb_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The optional logger says what to install."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"), MetricLog(tmp_path, "tiny", 1, 0, False, ("wandb",)):
        pass
