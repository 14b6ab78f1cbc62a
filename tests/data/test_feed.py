"""Stages read pairs and samples of the model's size out of any mixture."""

from __future__ import annotations

import numpy as np
import pytest

from vilau.data.feed import PairFeed, SampleFeed
from vilau.data.mixture import Entry, Mixture
from vilau.data.sample import Sample, Turn, image, text, video
from vilau.data.sources.source import BadSample, image_text
from vilau.processing.augment import AugmentConfig


class Listed:
    """A source of given samples; None is a bad one."""

    def __init__(self, samples: list[Sample | None]) -> None:
        self.name, self.samples = "listed", samples

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> Sample:
        sample = self.samples[index]
        if sample is None:
            raise BadSample("broken_image", "cut short")
        return sample

    def shard(self, index: int) -> str:
        return "here"


def mixture(*samples: Sample | None) -> Mixture:
    return Mixture([Entry(Listed(list(samples)))], 0)


def grey(level: int) -> np.ndarray:
    return np.full((6, 10, 3), level, np.uint8)


def pairs_of(number: int) -> Sample:
    return image_text(f"p{number}", grey(number), f"caption {number}")


def test_pairs_are_squares_with_captions() -> None:
    """Both ways round of a pair give its picture, squared, and its text; bad samples are replaced and counted."""
    turned = Sample("t", "text_image", (Turn("user", (text(" asked "),)), Turn("assistant", (image(grey(9)),))))
    feed = PairFeed(mixture(pairs_of(5), turned, None), 4, AugmentConfig(), 0)
    read = [feed[number] for number in range(64)]
    assert {(int(pixels[0, 0, 0]), caption) for pixels, caption in read} == {(5, "caption 5"), (9, "asked")}
    assert all(pixels.shape == (4, 4, 3) for pixels, _ in read)
    assert set(feed.take_skips()) == {("listed", "broken_image", "here")}
    assert all(np.array_equal(feed[number][0], read[number][0]) for number in (63, 0, 17))


def test_films_give_single_frames() -> None:
    """Of a film with its prompt one frame is taken, over the epochs all of them."""
    film = video(tuple(grey(level) for level in (10, 20, 30)))
    sample = Sample("f", "text_video", (Turn("user", (text("a film"),)), Turn("assistant", (film,))))
    feed = PairFeed(mixture(sample), 4, AugmentConfig(), 0)
    assert {int(feed[number][0][0, 0, 0]) for number in range(64)} == {10, 20, 30}
    assert feed[0][1] == "a film"


def test_conversations_do_not_fit_the_tower() -> None:
    """A source of another form is an error with the remedy, not millions of skips."""
    chat = Sample("c", "text", (Turn("user", (text("hi"),)), Turn("assistant", (text("ho"),))))
    feed = PairFeed(mixture(chat), 4, AugmentConfig(), 0)
    for read in (feed.probe, lambda: feed[0]):
        with pytest.raises(ValueError, match="has form text.*leave its source out") as caught:
            read()
        assert not isinstance(caught.value, BadSample)


def test_samples_are_squared_for_language_stages() -> None:
    """Frames come at the model's size, and a sample that the stage refuses gives way to another."""
    feed = SampleFeed(mixture(*map(pairs_of, range(8))), 4)
    assert feed[0].frames[0].shape == (4, 4, 3)

    def use(sample: Sample) -> int:
        level = int(sample.frames[0][0, 0, 0])
        if level == 3:
            raise BadSample("too_long", "no room")
        return level

    assert 3 not in [feed.draw(number, use) for number in range(64)]
    assert set(feed.take_skips()) == {("listed", "too_long", "here")}
    feed.probe()
    with pytest.raises(ValueError, match="none of 2 samples tried"):
        SampleFeed(mixture(None, None), 4).probe()
