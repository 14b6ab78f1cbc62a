from __future__ import annotations

import json
from pathlib import Path

from vilau.cli.train import tower_validation
from vilau.training.config import load_config
from vilau.training.run import Hooks, run


def _lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_validation_changes_nothing_and_leaves_its_figures(mini_cells: Path, tmp_path: Path) -> None:
    """The trained weights are the same, bit for bit, with validation and without; its figures stand beside the rest."""
    digests = []
    for name, every in (("with", 1), ("without", 0)):
        options = (f"output={tmp_path / name}", f"validate_every={every}")
        config = load_config(mini_cells / "mini-align.yaml", options)
        final = run(config, Hooks(validation=tower_validation(config)), show_progress=False)
        digests.append(json.loads((final / "training.json").read_text())["digest"])
    assert digests[0] == digests[1]
    figures = [line for line in _lines(tmp_path / "with" / "align") if "validation/zero_shot_objects" in line]
    assert [line["step"] for line in figures] == [1, 2]
    summary = json.loads((tmp_path / "with" / "align" / "validation.json").read_text())
    assert summary["step"] == 2 and summary["extractor"] is None  # nothing is reconstructed in this stage
    assert summary["metrics"]["zero_shot_objects"] == figures[-1]["validation/zero_shot_objects"]
    assert summary["items"]["zero_shot_objects"] == 12 and summary["chance"]["zero_shot_objects"] == 0.25
    assert not [line for line in _lines(tmp_path / "without" / "align") if "validation/" in " ".join(line)]
