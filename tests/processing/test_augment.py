"""Pictures become squares: by their form in samples, at random but repeatably for the tower."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from vilau.data.sample import Sample, Turn, image, text, video
from vilau.processing.augment import AugmentConfig, augment, fit_sample


def ramp(width: int, height: int) -> np.ndarray:
    """Red rises from left to right, green from top to bottom."""
    out = np.zeros((height, width, 3), dtype=np.uint8)
    out[..., 0] = np.linspace(0, 255, width)[None, :]
    out[..., 1] = np.linspace(0, 255, height)[:, None]
    return out


def test_without_augmentation_nothing_is_random() -> None:
    """`squash` keeps all of the picture, `crop` its centre square; the key does not matter."""
    squashed = augment(ramp(64, 32), 16, AugmentConfig(), 1, "a")
    assert np.array_equal(squashed, augment(ramp(64, 32), 16, AugmentConfig(), 2, "b"))
    assert squashed[0, 0, 0] < 12 and squashed[0, -1, 0] > 243
    cropped = augment(ramp(64, 32), 16, AugmentConfig(resize="crop"), 1, "a")
    assert 60 < cropped[0, 0, 0] < 75 and 180 < cropped[0, -1, 0] < 195


def test_augmentation_is_a_function_of_its_key() -> None:
    """The same key gives the same pixels, another key others; this is what makes resumed runs exact."""
    config = AugmentConfig(crop="random", flip=0.5)
    first = augment(ramp(64, 48), 16, config, 1, "a#0")
    assert np.array_equal(first, augment(ramp(64, 48), 16, config, 1, "a#0"))
    for key in ((2, "a#0"), (1, "b#0"), (1, "a#1")):
        assert not np.array_equal(first, augment(ramp(64, 48), 16, config, *key))


def test_flip_mirrors_its_share() -> None:
    """About the configured share of pictures is mirrored, the others are untouched."""
    plain = augment(ramp(20, 20), 20, AugmentConfig(), 0)
    results = [augment(ramp(20, 20), 20, AugmentConfig(flip=0.3), number) for number in range(300)]
    mirrored = sum(np.array_equal(result, plain[:, ::-1]) for result in results)
    assert mirrored + sum(np.array_equal(result, plain) for result in results) == 300
    assert 60 < mirrored < 125


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 24), st.integers(0))
def test_any_picture_becomes_a_square(width: int, height: int, size: int, key: int) -> None:
    """Slim and tiny pictures too, whatever part is cut from them."""
    config = AugmentConfig(crop="random", scale=(0.1, 1.0), flip=0.5)
    out = augment(ramp(width, height), size, config, key)
    assert out.shape == (size, size, 3) and out.dtype == np.uint8


def test_random_parts_have_the_configured_area() -> None:
    """With a scale of a quarter, a part spans about half of each side; parts lie everywhere."""
    config = AugmentConfig(crop="random", scale=(0.25, 0.25), ratio=(1.0, 1.0))
    parts = [augment(ramp(128, 128), 8, config, number).astype(int) for number in range(60)]
    spans = [part[0, -1, 0] - part[0, 0, 0] for part in parts]
    assert all(90 < span < 135 for span in spans)
    lefts = [part[0, 0, 0] for part in parts]
    assert min(lefts) < 25 and max(lefts) > 110


@pytest.mark.parametrize("values", [{"scale": (0.5, 0.2)}, {"scale": (0.0, 1)}, {"scale": (0.5, 2)}, {"flip": 2}])
def test_impossible_settings_are_errors(values: dict) -> None:
    """Ranges the wrong way round, areas above the picture's and shares above 1 are refused."""
    with pytest.raises(ValidationError):
        AugmentConfig(**values)


def test_frames_fit_by_what_is_learnt() -> None:
    """What is drawn is cut to the centre, and what is edited with it; what is only seen is squashed."""
    wide = ramp(64, 32)
    user, answer = Turn("user", (image(wide), text("hi"))), Turn("assistant", (text("a"),))
    seen = fit_sample(Sample("a", "question", (user, answer)), 16)
    assert seen.frames[0].shape == (16, 16, 3) and seen.frames[0][0, 0, 0] < 12
    drawn = fit_sample(
        Sample("a", "text_video", (Turn("user", (text("a"),)), Turn("assistant", (video((wide,) * 2),)))), 16
    )
    assert [60 < frame[0, 0, 0] < 75 for frame in drawn.frames] == [True, True]
    edited = fit_sample(Sample("a", "image_edit", (user, Turn("assistant", (image(wide),)))), 16)
    assert all(60 < frame[0, 0, 0] < 75 for frame in edited.frames)


def test_frames_that_fit_or_hold_codes_are_left_alone() -> None:
    """No copy of what has the size already; codes in place of pixels have no size to change."""
    square, codes = ramp(16, 16), np.zeros((4, 2), dtype=np.int64)
    sample = Sample("a", "question", (Turn("user", (image(square), image(codes))), Turn("assistant", (text("a"),))))
    fitted = fit_sample(sample, 16)
    assert fitted.frames[0] is square and fitted.frames[1] is codes
