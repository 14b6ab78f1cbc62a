"""The page of the experiments says of each comparison no more than its figures do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vilau.evaluation.tower_cells import find_cells
from vilau.evaluation.tower_claims import CLAIMS, DESCRIPTIONS, GROUPS
from vilau.evaluation.tower_page import write_page


@pytest.fixture
def write(root: Path, tmp_path: Path):
    """Write results of shipped cells, as psnr and zero-shot by name (None: failed), and return the page's text."""
    cells = find_cells(root / "configs" / "nano")

    def page(figures: dict[str, tuple[float, float] | None], steps: dict[str, int] | None = None) -> str:
        out = tmp_path / "tower"
        out.mkdir(exist_ok=True)
        for name, pair in figures.items():
            result: dict[str, Any] = {
                "config_sha256": cells[name].digest,
                "status": "done" if pair else "failed",
                "error": None if pair else "the loss of step 7 is not finite",
                "settings": cells[name].config.model_dump(mode="json"),
                "seed": 1,
                "steps": (steps or {}).get(name, 450),
                "steps_planned": 450,
                "stopped_at_budget": name in (steps or {}),
                "budget_cpu_seconds": 600.0,
                "cpu_seconds": 60.0,
                "starts_from": [],
                "curve": [],
                "data": "nano-heldout-0",
                "chance": {"zero_shot_objects": 0.02},
            }
            if pair:
                result |= {"metrics": {"psnr": pair[0], "zero_shot_objects": pair[1]}, "items": {"psnr": 512}}
            (out / f"{name}.json").write_text(json.dumps(result))
        return write_page(cells, out).read_text()

    return page


def test_verdicts_follow_the_figures(write) -> None:
    """More than the margin one way, more than it the other way, and in between."""
    text = write(
        {"unified": (22.0, 0.7), "reconstruction": (22.1, 0.1), "recipe-0": (20.0, 0.8), "depth-1": (19.0, 0.7)}
    )
    lines = {line.split(" | ")[0].lstrip("| "): line for line in text.splitlines() if "`unified`" in line}
    assert "**reproduced**" in next(line for start, line in lines.items() if "keeps the codes aligned" in start)
    assert "**no difference**" in next(line for start, line in lines.items() if "costs some reconstruction" in start)
    assert "**contradicted**" in next(line for start, line in lines.items() if "From scratch with both" in start)
    assert "**reproduced**" in next(line for start, line in lines.items() if "better than plain VQ" in start)
    assert "not run" in next(line for start, line in lines.items() if "frozen image encoder" in start)


def test_unequal_steps_and_failures_are_told(write) -> None:
    """A cell that its budget stopped is marked where it is compared; one that failed is listed with its reason."""
    text = write({"unified": (22.0, 0.7), "recipe-3": (15.0, 0.7), "mcq": None}, {"recipe-3": 200})
    assert "200 of 450\\*" in text and "with 450 and 200 steps" in text
    assert "`mcq` failed: the loss of step 7 is not finite" in text and "2 of 14 cells have a result" in text


def test_the_comparisons_name_cells_that_exist(root: Path) -> None:
    """Groups, descriptions and claims are about cells that ship, and every cell stands in a group."""
    cells = set(find_cells(root / "configs" / "nano"))
    grouped = {name for names in GROUPS.values() for name in names}
    assert grouped == cells == set(DESCRIPTIONS)
    assert {name for claim in CLAIMS for name in (claim.better, claim.worse)} <= cells
