"""Training over every format at once, and over the forms beyond the paper: the whole way from files to losses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from data.sources.telling import said, write_records
from data.test_formats import EXPECTED
from vilau.training.config import TrainConfig, load_config
from vilau.training.run import run

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "nano" / "debug.yaml"
SMALL = ("stages.pretrain.steps=2", "data.workers=0", "log_every=1", "threads=1")


def configure(folder: Path, *overrides: str) -> TrainConfig:
    """The debug configuration's stage `pretrain` alone, two steps long."""
    base = folder / "pretrain.yaml"
    base.write_text(f"base: {CONFIG}\nstages: {{align: null, vision_tower: null, sft: null}}\n")
    return load_config(base, [f"output={folder / 'run'}", f"data.cache={folder / 'cache'}", *SMALL, *overrides])


def figures(folder: Path) -> dict[str, float]:
    """The last report of a run."""
    return dict(json.loads((folder / "run" / "pretrain" / "metrics.jsonl").read_text().splitlines()[-1]))


def test_one_run_reads_every_format(tmp_path: Path) -> None:
    """All formats in one mixture, with rows that are bad and rows that are long, end in finite losses of every form."""
    sources = []
    for name, (build, _) in EXPECTED.items():
        (tmp_path / name).mkdir()
        sources.append({"format": name, "name": name, "path": str(build(tmp_path / name))})
    rows = [
        {"conversations": said(*["im", "red"] * 60)},
        {"image": "gone.png", "conversations": said("<image>\nim", "red")},
        {"conversations": said("im", "")},
    ]
    long = write_records(tmp_path / "long.jsonl", rows)
    sources.append({"format": "llava", "name": "long", "path": str(long)})
    settings = ("stages.pretrain.mixture={}", "stages.pretrain.batch_size=44", "data.max_skipped_share=0.5")
    run(configure(tmp_path, f"data.sources={json.dumps(sources)}", *settings), show_progress=False)
    report = figures(tmp_path)
    forms = ("image_text", "text_image", "question", "video_text", "text", "interleaved", "text_video")
    assert {name.split("/")[1] for name in report if "/" in name} >= set(forms)
    assert all(math.isfinite(value) for name, value in report.items() if "/" in name)
    assert 0 < report["shortened"] < 0.5


def test_the_forms_beyond_the_paper_train(tmp_path: Path) -> None:
    """Edits and animations have visual losses, mixed answers both."""
    mixture = json.dumps({"edit": 1.0, "animate": 1.0, "mixed": 1.0})
    settings = (f"stages.pretrain.mixture={mixture}", "stages.pretrain.row_length=160", "stages.pretrain.batch_size=12")
    run(configure(tmp_path, *settings), show_progress=False)
    report = figures(tmp_path)
    assert {"visual/image_edit", "visual/image_video", "visual/mixed", "text/mixed"} <= set(report)


def test_a_source_that_is_wrong_as_a_whole_stops_before_the_first_step(tmp_path: Path) -> None:
    """A wrong media folder is said at once, with the reason and the first file that is missing."""
    path = write_records(tmp_path / "a.jsonl", [{"image": "gone.png", "conversations": said("<image>\nim", "red")}] * 3)
    sources = json.dumps([{"format": "llava", "path": str(path)}])
    with pytest.raises(ValueError, match=r"none of 3 samples tried can be used \(missing_file 3\).*gone.png"):
        run(configure(tmp_path, f"data.sources={sources}", "stages.pretrain.mixture={}"), show_progress=False)
    assert not (tmp_path / "run" / "pretrain" / "metrics.jsonl").exists()
