from __future__ import annotations

import numpy as np
import pytest

from vilau.data.nano.scenes import MOTIONS, Film, render_film
from vilau.data.nano.world import World
from vilau.evaluation.motion import STILL, judge_motion
from vilau.processing.images import normalise


def judged(film: Film, world: World, size: int = 32, frames: int = 4) -> str:
    return judge_motion(normalise(np.stack(render_film(film, world, size, frames)))).name


def test_right_on_real_films_of_every_object_and_motion(world: World) -> None:
    """The judge of motion is exact: on real renders it never errs, with and without a shift."""
    for number, name in enumerate(world.names):
        for turn, motion in enumerate(MOTIONS):
            colour = world.colours[(number + turn) % len(world.colours)]
            shift = ((0.0, 0.0), (2 / 32, -2 / 32))[(number + turn) % 2]
            film = Film(colour, name, motion, shift=shift)
            assert judged(film, world) == motion, film


@pytest.mark.long
def test_right_on_all_real_films() -> None:
    """The same without exception: every object, colour, motion and style."""
    world = World.load(styles=("noto", "twemoji"))
    films = [Film(c, n, m, s) for s in world.styles for n in world.names for c in world.colours for m in MOTIONS]
    assert [film for film in films if judged(film, world) != film.motion] == []


def test_other_sizes_and_lengths(world: World) -> None:
    """The judge knows no fixed picture size or number of frames."""
    for motion in MOTIONS:
        assert judged(Film("blue", "dog", motion), world, 64, 8) == motion


def test_sees_through_noise_and_small_flaws(world: World) -> None:
    """Generated films are not clean: noise and a wrong pixel do not change the verdict."""
    rng = np.random.default_rng(0)
    for motion in MOTIONS:
        frames = normalise(np.stack(render_film(Film("green", "car", motion), world, 32, 4)))
        frames = np.clip(frames + rng.normal(0, 0.04, frames.shape).astype(np.float32), -1, 1)
        frames[1, :, 3, 3] = -1
        assert judge_motion(frames).name == motion


def test_standing_still_is_no_motion(world: World) -> None:
    """A film whose frames are all alike, or all background, gets no credit by chance."""
    frame = normalise(np.stack(render_film(Film("red", "cat", "left"), world, 32, 4)))[:1]
    assert judge_motion(np.repeat(frame, 4, 0)).name == STILL
    assert judge_motion(np.zeros((4, 3, 32, 32), np.float32)).name == STILL


def test_strength_is_in_units_of_a_real_film(world: World) -> None:
    """`right`, `down` and `growth` are 1 for a real film and change their sign with the direction."""
    for motion, field, sign in (
        ("right", "right", 1),
        ("left", "right", -1),
        ("down", "down", 1),
        ("up", "down", -1),
        ("growing", "growth", 1),
        ("shrinking", "growth", -1),
    ):
        found = judge_motion(normalise(np.stack(render_film(Film("blue", "pig", motion), world, 32, 4))))
        assert getattr(found, field) == pytest.approx(sign, abs=0.15)


def test_wrong_shape_is_an_error() -> None:
    """A single picture is no film."""
    with pytest.raises(ValueError, match=r"\(frames, 3, S, S\)"):
        judge_motion(np.zeros((3, 32, 32), np.float32))
