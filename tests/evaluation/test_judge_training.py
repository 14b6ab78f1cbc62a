from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vilau.data.nano.world import World
from vilau.evaluation.judge import WEIGHTS, Judge
from vilau.evaluation.judge_training import Recipe, main, real, train_judge
from vilau.model import VilaUForConditionalGeneration
from vilau.modeling.vision_tower import VisionTower

TINY = Recipe(steps=2, batch_size=8, pool=4, width=4)


@pytest.fixture(scope="module")
def towers(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two untrained towers of different seeds, one inside a whole model, one alone."""
    config = VilaUForConditionalGeneration.from_pretrained(tiny_model_dir).config.vision_config
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("tower")
    VisionTower(config).save_pretrained(folder)
    return [tiny_model_dir, folder]


def test_the_same_seed_trains_the_same_judge(towers: list[Path], tmp_path: Path) -> None:
    """The judge is a function of its seed and its towers: weights and record equal, another seed another judge."""
    records = [train_judge(tmp_path / name, 3, towers, TINY, measured=8) for name in ("a", "b")]
    assert records[0] == records[1]
    weights = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    train_judge(tmp_path / "c", 4, towers, TINY, measured=1)
    assert (tmp_path / "c" / WEIGHTS).read_bytes() != weights[0]
    judge = Judge.load(tmp_path / "a")
    assert judge.record["seed"] == 3 and len(judge.record["towers"]) == 2
    assert {"real_object", "degraded_mixture_background", "tower_2_object"} <= set(judge.record["accuracies"])


def test_one_tower_is_not_enough(towers: list[Path], tmp_path: Path) -> None:
    """At least two towers, and really two: the judge must not learn the traces of a single one."""
    with pytest.raises(ValueError, match="at least 2 towers"):
        train_judge(tmp_path, 0, towers[:1], TINY)
    with pytest.raises(ValueError, match="same tower twice"):
        train_judge(tmp_path, 0, [towers[0], towers[0]], TINY)


def test_real_pictures_show_every_label_and_depend_on_their_number(world: World) -> None:
    """The stream reaches all objects and colours, and picture n is the same at every call."""
    many = real(world, Recipe(), range(600))
    assert set(many.objects) == set(range(48)) and set(many.backgrounds) == set(range(8))
    again = real(world, Recipe(), [17])
    assert (again.pixels[0] == many.pixels[17]).all() and again.objects[0] == many.objects[17]


def test_command_explains_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong tower is one line on stderr and exit code 1, and nothing is written."""
    assert main(["--out", str(tmp_path / "out"), "--tower", str(tmp_path), "--tower", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "not a finished vision tower" in captured.err and captured.out == ""
    assert not (tmp_path / "out").exists()
