from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vilau.cli.evaluate import table as evaluate_table
from vilau.evaluation.nano import PARTS, Counts, run_suite, tune_sampling
from vilau.evaluation.report import GOALS, MEANINGS, main, markdown, table
from vilau.evaluation.subject import Sampling
from vilau.model import VilaUForConditionalGeneration
from vilau.processing.processor import VilaUProcessor

WANTED = (
    "caption_object",
    "caption_background",
    "draw_object",
    "draw_background",
    "film_motion",
    "easy_vqa",
    "easy_vqa_open",
    "reconstruction_psnr",
    "code_usage",
    "text_gap",
)


@pytest.fixture(scope="module")
def result(tiny_model_dir: Path, random_judge_dir: Path) -> dict[str, Any]:
    """The suite on a tiny random model, four items per metric."""
    return run_suite(tiny_model_dir, limit=4, device="cpu", judge_path=random_judge_dir)


def test_all_parts_are_there(result: dict[str, Any]) -> None:
    """Metrics, ceilings, counts and protocol have the promised keys, and the limit holds for every metric."""
    assert {"metrics", "ceilings", "samples", "protocol"} <= set(result)
    assert set(WANTED) <= set(result["metrics"])
    assert set(result["samples"]) == set(result["metrics"])
    assert all(0 < items <= 4 for name, items in result["samples"].items() if name != "easy_vqa_open")
    assert {"draw_object", "draw_background", "draw_object_real", "film_motion"} <= set(result["ceilings"])
    assert result["ceilings"]["film_motion_real"] == 1.0
    assert {"easy_vqa_majority", "easy_vqa_question_only"} <= set(result["baselines"])


def test_protocol_says_how(result: dict[str, Any]) -> None:
    """Whoever reads the figures knows the weights, the settings, the seed, the judge and the world."""
    protocol = result["protocol"]
    assert len(protocol["model_sha256"]) == 64 and len(protocol["judge"]["sha256"]) == 64
    drawn_by = {"guidance_scale", "temperature", "top_k", "top_p", "guidance_schedule", "guidance_interval"}
    assert set(protocol["sampling"]) == drawn_by
    assert protocol["world"]["combinations"] == {"train": 336, "heldout": 48}
    assert (protocol["seed"], protocol["limit"], protocol["split"]) == (0, 4, "heldout")
    json.dumps(result, allow_nan=False)


def test_a_repeat_gives_the_same_figures(result: dict[str, Any], tiny_model_dir: Path, random_judge_dir: Path) -> None:
    """Seeds are fixed: everything printed is equal at the second run."""
    assert run_suite(tiny_model_dir, limit=4, device="cpu", judge_path=random_judge_dir) == result


def test_parts_alone_give_the_figures_of_the_whole(
    result: dict[str, Any], tiny_model_dir: Path, random_judge_dir: Path
) -> None:
    """No part depends on the ones before it, and progress is told."""
    lines: list[str] = []
    part = run_suite(
        tiny_model_dir, 4, device="cpu", judge_path=random_judge_dir, only=["text_gap"], progress=lines.append
    )
    assert part["metrics"] == {name: result["metrics"][name] for name in ("visual_cross_entropy", "text_gap")}
    assert lines


def test_a_model_of_continuous_tokens_is_asked_and_nothing_else(
    random_judge_dir: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Without codes there is nothing to draw or score: understanding is measured, the rest is named, never a crash."""
    model = VilaUForConditionalGeneration.from_pretrained(tiny_model_dir)
    model.config.vision_config.quantizer = "none"
    VilaUForConditionalGeneration(model.config).save_pretrained(tmp_path)
    VilaUProcessor.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
    found = run_suite(tmp_path, limit=2, device="cpu", judge_path=random_judge_dir)
    assert set(found["left_out"]) == {"draw", "film", "reconstruction", "text_gap"}
    assert {"caption_object", "questions", "multi_image", "video_text", "easy_vqa"} <= set(found["metrics"])
    assert not any(name.startswith(("draw", "film", "reconstruction", "code")) for name in found["metrics"])
    assert any("left out: draw" in line for line in evaluate_table(found))
    with pytest.raises(ValueError, match="reads continuous tokens .*: draw need codes"):
        run_suite(tmp_path, limit=2, device="cpu", judge_path=random_judge_dir, only=["draw"])


def test_tuning_never_touches_heldout_combinations(tiny_model_dir: Path) -> None:
    """Settings are tried on the training split, and each result names its settings."""
    tried = tune_sampling(tiny_model_dir, [Sampling(guidance_scale=1.0), Sampling(top_k=1)], 1, parts=["text_gap"])
    assert [one["sampling"]["guidance_scale"] for one in tried] == [1.0, 3.0]
    assert tried[1]["sampling"]["top_k"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"limit": 0}, "limit is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"only": ["drawing"]}, "unknown part 'drawing'"),
        ({"split": "test"}, "split 'test'"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(
    arguments: dict[str, Any], words: str, tiny_model_dir: Path
) -> None:
    """One clear line."""
    with pytest.raises(ValueError, match=words):
        run_suite(tiny_model_dir, **arguments)


def test_limits_cap_every_count() -> None:
    """A limit above a count leaves it alone."""
    full = Counts()
    assert Counts().limited(None) == full == full.limited(10**6)
    assert set(vars(full.limited(7)).values()) == {7}


def test_report_shows_every_metric(result: dict[str, Any], tmp_path: Path) -> None:
    """The page and the table name each metric with its value and ceiling; the command writes the page."""
    page = markdown(result)
    for name in result["metrics"]:
        assert f"| {name} |" in page
    assert result["protocol"]["model_sha256"] in page
    assert table(result).row_count == len(result["metrics"])
    assert {name for name in result["metrics"] if not name.startswith("question_")} == set(MEANINGS)
    assert set(GOALS) <= set(result["metrics"]) and len(PARTS) == 7
    source, target = tmp_path / "result.json", tmp_path / "docs" / "page.md"
    source.write_text(json.dumps(result))
    assert main([str(source), "-o", str(target)]) == 0
    assert target.read_text() == page
    assert main([str(tmp_path / "none.json")]) == 1
