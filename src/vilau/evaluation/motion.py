"""The judge of motion: where the thing that differs from the background is in each frame, and how large it is.

It has no weights. On real renders of every object, colour and motion it is right without exception (a test says so), so
what it says of a generated film is a matter of the film.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vilau.data.nano.scenes import GROW_FROM, GROW_TO, TRAVEL

STILL = "still"
_DIFFERENT = 0.12  # of the full range, in the channel that differs most
_LEAST_PIXELS = 3
_LEAST_SHARE = 0.3  # of a real film's travel or growth; less counts as standing still


@dataclass(frozen=True)
class Motion:
    """What a film does.

    `name` is one of ``scenes.MOTIONS`` or ``still``; `right`, `down` and `growth` say how far it goes from the first to
    the last frame, in units of what a real film does (1 is the same, negative is the other way).
    """

    name: str
    right: float
    down: float
    growth: float


def judge_motion(frames: np.ndarray) -> Motion:
    """Judge a film.

    Args:
        frames: ``(F, 3, S, S)`` in [-1, 1].

    Raises:
        ValueError: the shape is another one.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.shape[2] != frames.shape[3]:
        raise ValueError(f"a film must be (frames, 3, S, S), got {frames.shape}")
    pixels = np.clip((frames.astype(np.float64) + 1) / 2, 0, 1)
    background = border_colour(pixels)
    places, areas, times = [], [], []
    for number, frame in enumerate(pixels):
        weight = np.abs(frame - background[:, None, None]).max(0)
        weight = (weight > _DIFFERENT).astype(np.float64)
        area = weight.sum()
        if area < _LEAST_PIXELS:
            continue
        places.append(centroid(weight))
        areas.append(np.log(area))
        times.append(number)
    if len(times) < 2:
        return Motion(STILL, 0.0, 0.0, 0.0)
    span = len(frames) - 1
    right, down = (slope(times, [place[axis] for place in places]) * span / TRAVEL for axis in (0, 1))
    growth = slope(times, areas) * span / (2 * np.log(GROW_TO / GROW_FROM))
    return Motion(_name(right, down, growth), right, down, growth)


def border_colour(pixels: np.ndarray) -> np.ndarray:
    """Return the background ``(3,)`` of a film ``(F, 3, S, S)``: the median of the outermost pixels of all frames."""
    edges = (pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, :, 0], pixels[:, :, :, -1])
    return np.median(np.concatenate(edges, -1), axis=(0, 2))


def centroid(weight: np.ndarray) -> tuple[float, float]:
    """Return the weighted mean place (right, down) of ``weight`` (S, S), as shares of the side."""
    side = weight.shape[0]
    at = (np.arange(side) + 0.5) / side
    total = weight.sum()
    return float((weight.sum(0) * at).sum() / total), float((weight.sum(1) * at).sum() / total)


def slope(times: list[int], values: list[float]) -> float:
    """Return the least-squares slope of `values` per frame."""
    t = np.asarray(times, dtype=np.float64)
    t -= t.mean()
    return float((t * np.asarray(values)).sum() / (t * t).sum())


def _name(right: float, down: float, growth: float) -> str:
    strength = {
        "right" if right > 0 else "left": abs(right),
        "down" if down > 0 else "up": abs(down),
        "growing" if growth > 0 else "shrinking": abs(growth),
    }
    best = max(strength, key=lambda name: strength[name])
    return best if strength[best] >= _LEAST_SHARE else STILL
