"""Cells of the experiments with towers: found, ordered, trained within a budget, resumed, kept, and put on a page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from vilau.evaluation.tower_cells import find_cells, put_aside, read_result, run_cell
from vilau.evaluation.tower_page import write_page

STEPS = 6


def _silent(_: str) -> None:
    pass


def test_the_cells_that_ship(root: Path) -> None:
    """Every cell of issue and paper is a file; each stands after those it starts from, and trains a tower only."""
    cells = find_cells(root / "configs" / "nano")
    recipes = {f"recipe-{number}" for number in range(5)}
    depths = {"depth-1", "depth-2", "depth-8"}
    assert {"align", "unified", "reconstruction", "rq-vae", "mcq", "none"} | recipes | depths <= set(cells)
    order = list(cells)
    for cell in cells.values():
        assert all(order.index(need) < order.index(cell.name) for need in cell.needs)
    assert cells["unified"].needs == ("align",) and cells["recipe-2"].needs == ("rq-vae",)
    assert len({cell.digest for cell in cells.values()}) == len(cells)


def test_only_what_decides_the_outcome_is_in_the_digest(mini_cells: Path) -> None:
    """Another output or log interval is the same cell, another learning rate is not."""
    before = find_cells(mini_cells)["unified"].digest
    file = mini_cells / "mini-unified.yaml"
    text = file.read_text()
    file.write_text(text.replace("log_every: 2", "log_every: 5"))
    assert find_cells(mini_cells)["unified"].digest == before
    file.write_text(text.replace("pixel_weight: 4.0", "pixel_weight: 3.0"))
    assert find_cells(mini_cells)["unified"].digest != before


def test_what_is_no_cell(mini_cells: Path, tmp_path: Path) -> None:
    """No cells, another stage, a circle, one output for two, epochs: errors that name them."""
    with pytest.raises(ValueError, match="no cells"):
        find_cells(tmp_path)
    align = mini_cells / "mini-align.yaml"
    text = align.read_text()
    align.write_text(text.replace("runs/align", "runs/unified"))
    with pytest.raises(ValueError, match="same output"):
        find_cells(mini_cells)
    circle = yaml.safe_load(text)
    circle["stages"]["align"]["init_from"] = str(tmp_path / "runs" / "unified" / "vision_tower" / "final")
    align.write_text(yaml.safe_dump(circle))
    with pytest.raises(ValueError, match="circle"):
        find_cells(mini_cells)
    endless = yaml.safe_load(text)
    endless["data"]["sources"] = [{"format": "nano"}]
    endless["stages"]["align"] |= {"steps": None, "epochs": 2}
    align.write_text(yaml.safe_dump(endless))
    with pytest.raises(ValueError, match="how long its stages are in steps, not in epochs"):
        find_cells(mini_cells)


def test_cells_from_training_to_page(mini_cells: Path, tmp_path: Path) -> None:
    """Both cells run; results hold figures, curves and facts; the page and its pictures come from them alone."""
    out = tmp_path / "results"
    cells = find_cells(mini_cells)
    for cell in cells.values():
        result = run_cell(cell, out, 3600, _silent)
        assert result["status"] == "done" and not result["stopped_at_budget"]
        assert read_result(cell, out) == json.loads((out / f"{cell.name}.json").read_text())
    assert result["steps"] == STEPS and result["starts_from"] == ["align"] and result["cpu_seconds"] > 0
    assert [record["step"] for record in result["curve"]] == [3, 6]
    assert {"psnr", "ssim", "rfid_judge", "zero_shot_objects", "retrieval_image_to_text"} <= set(result["metrics"])
    # what is exported is what was validated, the averaged weights
    assert result["metrics"]["psnr"] == pytest.approx(result["curve"][-1]["psnr"], abs=1e-3)
    assert Image.open(out / "unified.png").size == (10 * 32, 5 * 32)  # originals, then depth 1 to 4
    page = write_page(cells, out)
    text = page.read_text()
    assert "| `unified` | 6 |" in text and "not run" in text and "a first look" in text
    assert (out / "curves.svg").is_file() and (out / "strip.png").is_file()
    page.write_text(text.replace("# Experiments with the vision tower", "# Mine\n\nWords by hand."))
    assert write_page(cells, out).read_text().startswith("# Mine\n\nWords by hand.") and page.read_text().count(
        "| `unified` | 6 |"
    ) == text.count("| `unified` | 6 |")


def test_the_budget_stops_a_cell_and_a_second_call_changes_nothing(mini_cells: Path, tmp_path: Path) -> None:
    """Training ends at the budget with a whole result that says so; killed while measuring, it only measures again."""
    out = tmp_path / "results"
    cell = find_cells(mini_cells)["align"]
    result = run_cell(cell, out, 1e-6, _silent)
    assert result["stopped_at_budget"] and (result["steps"], result["steps_planned"]) == (1, 2)
    assert json.loads((cell.folder / "align" / "final" / "training.json").read_text())["steps"] == 1
    (out / "align.json").unlink()
    assert run_cell(cell, out, 1e-6, _silent)["training"] == result["training"]


def test_earlier_results_are_kept(mini_cells: Path, tmp_path: Path) -> None:
    """A result of another configuration, or one that is repeated, goes aside with its run."""
    out = tmp_path / "results"
    cell = find_cells(mini_cells)["align"]
    run_cell(cell, out, 1e-6, _silent)
    put_aside(cell, out, force=True)
    assert read_result(cell, out) is None
    assert (out / "superseded" / f"align-{cell.digest[:8]}.json").is_file()
    assert (tmp_path / "runs" / f"align-{cell.digest[:8]}" / "align" / "final").is_dir()
