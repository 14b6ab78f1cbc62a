from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vilau.data.nano.draw import Draw
from vilau.data.nano.scenes import render, single
from vilau.data.nano.world import World
from vilau.evaluation.degradations import degrade
from vilau.evaluation.judge import RECORD, SHIPPED_JUDGE, WEIGHTS, Judge
from vilau.processing.images import normalise


@pytest.fixture(scope="module")
def judge() -> Judge:
    """The judge that ships."""
    return Judge.load()


def pictures(world: World, pairs: list[tuple[str, str]], size: int = 32) -> np.ndarray:
    return np.stack([render(single(*pair), world, size) for pair in pairs])


def right(judge: Judge, frames: np.ndarray, pairs: list[tuple[str, str]]) -> tuple[float, float]:
    found = judge.name(torch.from_numpy(normalise(frames)))
    both = [(a[0] == b[0], a[1] == b[1]) for a, b in zip(found, pairs, strict=True)]
    return sum(a for a, _ in both) / len(both), sum(b for _, b in both) / len(both)


def test_shipped_judge_knows_real_renders(judge: Judge, world: World) -> None:
    """On real pictures of held-out and other combinations the judge of drawings is right in at least 99 %."""
    pairs = list(world.combinations("heldout")) + list(world.combinations("train"))[::4]
    objects, backgrounds = right(judge, pictures(world, pairs), pairs)
    assert objects >= 0.99 and backgrounds >= 0.99


def test_shipped_judge_sees_through_degradations(judge: Judge, world: World) -> None:
    """Blur, JPEG, noise, jitter and rescaling do not blind it."""
    pairs = list(world.combinations("heldout"))
    worse = np.stack([degrade(p, Draw(5, i), 1.0) for i, p in enumerate(pictures(world, pairs))])
    objects, backgrounds = right(judge, worse, pairs)
    assert objects >= 0.8 and backgrounds >= 0.9


def test_shipped_judge_says_where_it_comes_from(judge: Judge, world: World) -> None:
    """Seed, recipe, the two towers and its accuracies stand beside the weights, and it fits the world it judges."""
    record = judge.record
    assert len(record["towers"]) >= 2 and len({tower["sha256"] for tower in record["towers"]}) >= 2
    assert set(record["degradations"]) == {"blur", "jpeg", "noise", "colour_jitter", "rescale"}
    assert record["accuracies"]["real_object"] >= 0.99
    assert isinstance(record["seed"], int) and record["recipe"]["steps"] > 0
    assert judge.objects == world.names and judge.backgrounds == world.colours
    assert (SHIPPED_JUDGE / WEIGHTS).stat().st_size < 1_500_000


def test_other_sizes_are_resized(judge: Judge, world: World) -> None:
    """Pictures of a 64 px model are judged by the same judge."""
    pairs = list(world.combinations("heldout"))
    objects, backgrounds = right(judge, pictures(world, pairs, 64), pairs)
    assert objects >= 0.9 and backgrounds >= 0.95


def test_films_are_judged_by_all_frames(judge: Judge, world: World) -> None:
    """One unreadable frame among four does not decide."""
    pairs = list(world.combinations("heldout"))[:16]
    frames = torch.from_numpy(normalise(pictures(world, pairs))).unsqueeze(1).repeat(1, 4, 1, 1, 1)
    frames[:, 0] = 0
    found = judge.name_films(frames)
    assert sum(a == b for a, b in zip(found, pairs, strict=True)) >= 12


def test_the_same_pictures_get_the_same_verdict_in_any_chunk(random_judge_dir: Path) -> None:
    """A verdict depends on the picture alone, not on its neighbours."""
    judge = Judge.load(random_judge_dir)
    pixels = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole, single_ = judge.look(pixels), judge.look(pixels, chunk=1)
    torch.testing.assert_close(whole.objects, single_.objects)
    torch.testing.assert_close(whole.backgrounds, single_.backgrounds)


def test_missing_and_wrong_files_are_explained(tmp_path: Path, random_judge_dir: Path) -> None:
    """A folder without a judge, or with weights of another size, is one clear error."""
    with pytest.raises(ValueError, match="no judge in"):
        Judge.load(tmp_path)
    record = json.loads((random_judge_dir / RECORD).read_text())
    (tmp_path / RECORD).write_text(json.dumps(record | {"width": 16}))
    (tmp_path / WEIGHTS).write_bytes((random_judge_dir / WEIGHTS).read_bytes())
    with pytest.raises(ValueError, match="does not fit"):
        Judge.load(tmp_path)
