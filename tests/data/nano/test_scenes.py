"""Scenes and films: pixels as described, the same every time, fast enough to train from."""

from __future__ import annotations

import time

import numpy as np
import pytest

from vilau.data.nano import scenes
from vilau.data.nano.scenes import MOTIONS, Film, Scene, contact_sheet, film_scene, render, render_film
from vilau.data.nano.world import World

WORLD = World.load()


def covered(pixels: np.ndarray, background: str) -> np.ndarray:
    """Where ``(S, S)`` the picture differs from its background."""
    return np.abs(pixels.astype(int) - np.array(WORLD.backgrounds[background])).max(axis=-1) > 12


def extent(mask: np.ndarray) -> tuple[float, float, float]:
    """Middle of the covered box (x, y) and its longer side, as shares of the picture."""
    ys, xs = np.nonzero(mask)
    side = max(np.ptp(xs), np.ptp(ys)) + 1
    return (
        (xs.min() + xs.max() + 1) / 2 / mask.shape[1],
        (ys.min() + ys.max() + 1) / 2 / mask.shape[0],
        side / mask.shape[0],
    )


@pytest.mark.parametrize("size", [16, 32, 64])
def test_background_and_place(size: int) -> None:
    """Protects captions: the corners have the named colour, the object lies in the middle."""
    for name in WORLD.names:
        pixels = render(scenes.single(name, "blue"), WORLD, size)
        assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
        assert (pixels[0, 0] == WORLD.backgrounds["blue"]).all()
        x, y, side = extent(covered(pixels, "blue"))
        # Emoji are not all centred in their own square: the car and the whale sit low in it.
        assert abs(x - 0.5) < 0.1 and abs(y - 0.5) < 0.18 and 0.5 < side <= 0.95, (name, x, y, side)


def test_small_is_smaller_than_big() -> None:
    """Protects questions of size: a small object covers less than half of a big one, whatever it is."""
    for name in WORLD.names:
        big = covered(render(scenes.single(name, "gray"), WORLD, 32), "gray").sum()
        little = covered(render(scenes.small(name, "gray"), WORLD, 32), "gray").sum()
        assert little < 0.5 * big


@pytest.mark.parametrize("number", [2, 3, 4])
def test_counted_objects_lie_apart(number: int) -> None:
    """Protects counting: as many separate objects as said, each fully within the picture."""
    scene = scenes.count("lemon", number, "blue")
    assert len(scene.items) == number
    for item in scene.items:
        assert item.size / 2 <= item.cx <= 1 - item.size / 2 and item.size / 2 <= item.cy <= 1 - item.size / 2
    for i, one in enumerate(scene.items):
        for other in scene.items[i + 1 :]:
            assert max(abs(one.cx - other.cx), abs(one.cy - other.cy)) >= one.size


@pytest.mark.parametrize("how", scenes.RELATIONS)
def test_relations_are_what_they_say(how: str) -> None:
    """Protects relation captions: the first object stands where the words put it."""
    first, second = scenes.relation("dog", how, "car", "green").items
    assert (first.object, second.object) == ("dog", "car")
    dx, dy = second.cx - first.cx, second.cy - first.cy
    assert {"left of": dx > 0.4, "right of": dx < -0.4, "above": dy > 0.4, "below": dy < -0.4}[how]


@pytest.mark.parametrize("motion", MOTIONS)
def test_films_move_as_they_say(motion: str) -> None:
    """Protects film captions and their judge: every object moves or changes steadily, the right way, far enough."""
    for name in WORLD.names:
        frames = render_film(Film("purple", name, motion), WORLD, 32, 4)
        assert len(frames) == 4
        boxes = [extent(covered(frame, "purple")) for frame in frames]
        x, y, side = (np.diff([box[axis] for box in boxes]) for axis in range(3))
        steps = {"left": -x, "right": x, "up": -y, "down": y, "growing": side, "shrinking": -side}[motion]
        assert (steps > 0.05).all() and 0.28 < steps.sum() < 0.65, (name, steps)
        still = (y, side) if motion in ("left", "right") else (x, side) if motion in ("up", "down") else (x, y)
        assert all(abs(change.sum()) < 0.15 for change in still), (name, still)


def test_objects_are_cut_at_the_border() -> None:
    """Protects jitter and odd sizes: an object half outside is drawn as far as it is seen, one outside not at all."""
    half = render(scenes.single("dog", "blue", shift=(0.5, 0.0)), WORLD, 32)
    mask = covered(half, "blue")
    assert not mask[:, :8].any() and mask[:, 20:].any()
    assert not covered(render(scenes.single("dog", "blue", shift=(2.0, 0.0)), WORLD, 32), "blue").any()


def test_rendering_is_repeatable_and_leaves_sprites_alone() -> None:
    """Protects determinism: drawing twice, with others between, gives equal bytes."""
    scene = scenes.relation("cat", "above", "bus", "yellow")
    first = render(scene, WORLD, 32)
    render(scenes.count("cat", 4, "red"), WORLD, 32)
    assert render(scene, WORLD, 32).tobytes() == first.tobytes()


def test_rendering_is_fast() -> None:
    """Protects training from waiting for data: over 2,500 scenes in a second of one core's own time."""
    todo = [scenes.single(name, colour) for name in WORLD.names for colour in WORLD.colours] * 3
    for scene in todo[:400]:
        render(scene, WORLD, 32)
    start = time.process_time()
    for scene in todo:
        render(scene, WORLD, 32)
    assert len(todo) / max(time.process_time() - start, 1e-9) > 2500


def test_wrong_descriptions_are_refused() -> None:
    """Protects callers: the message names what may be used."""
    with pytest.raises(ValueError, match=r"5 objects.*2, 3, 4"):
        scenes.count("dog", 5, "red")
    with pytest.raises(ValueError, match=r"'behind'.*left of"):
        scenes.relation("dog", "behind", "cat", "red")
    with pytest.raises(ValueError, match=r"'spinning'.*growing"):
        film_scene(Film("red", "dog", "spinning"), 0.5)


def test_contact_sheet_shows_all() -> None:
    """Protects looking: one cell for each picture, enlarged without blur."""
    pictures = [render(Scene("single", colour, ()), WORLD, 8) for colour in WORLD.colours]
    sheet = contact_sheet(pictures, list(WORLD.colours), columns=3, scale=4)
    assert sheet.width == 3 * 134 and sheet.height > 3 * 32
    assert sheet.getpixel((3 + 134, 3)) == WORLD.backgrounds["orange"]
