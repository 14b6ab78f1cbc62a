"""What stages read: a mixture's samples at the model's size, as pairs for the tower and as samples for the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from ..processing.augment import AugmentConfig, augment, fit_sample
from .mixture import Mixture, SkipCounts
from .permutation import hash64
from .sample import Sample
from .sources.source import BadSample
from .variation import PAIR_FORMS

T = TypeVar("T")
PAIRED_FORMS = frozenset((*PAIR_FORMS, "text_video"))


class PairFeed:
    """Pictures with captions for the stages of the vision tower.

    Args:
        mixture: of sources whose samples are pairs of a picture or a film and a text, either way round; of a film one
            frame is taken, another one each epoch.
        size: side S of the square.
        config: resize rule and augmentation.
        seed: of the augmentation, which depends on (seed, epoch, sample).
        needs_captions: whether a picture without a caption is a bad sample; otherwise its caption is empty.

    ``feed[n]`` is ``(pixels (S, S, 3) uint8, caption)``.
    """

    def __init__(
        self, mixture: Mixture, size: int, config: AugmentConfig, seed: int, needs_captions: bool = True
    ) -> None:
        self.mixture, self.size, self.config, self.seed = mixture, size, config, seed
        self.needs_captions = needs_captions

    def __getitem__(self, number: int) -> tuple[np.ndarray, str]:
        return self.mixture.draw(number, self._pair)

    def take_skips(self) -> SkipCounts:
        """Return the bad samples met in this process since the last call."""
        return self.mixture.take_skips()

    def probe(self) -> None:
        """Find out before the first step when a whole source is wrong.

        Raises:
            ValueError: none of a source's probed samples can be read, or they are no pairs.
        """
        for entry in self.mixture.entries:
            others: frozenset[str] = getattr(entry.source, "forms", frozenset()) - PAIRED_FORMS
            if others:
                raise ValueError(
                    f"source {entry.source.name!r} holds the forms {', '.join(sorted(others))}; the stages of the "
                    "vision tower learn from pairs of picture and text: leave it out of their mixture, or give it "
                    "other `forms`"
                )
        self.mixture.probe(lambda sample: pair_of(sample, self.needs_captions))

    def _pair(self, sample: Sample) -> tuple[np.ndarray, str]:
        frames, caption = pair_of(sample, self.needs_captions)
        pixels = frames[hash64("frame", self.seed, sample.id) % len(frames)]
        return augment(pixels, self.size, self.config, self.seed, sample.id), caption


class SampleFeed:
    """Samples for the language stages, their frames at the model's size."""

    def __init__(self, mixture: Mixture, size: int) -> None:
        self.mixture, self.size = mixture, size

    def __getitem__(self, number: int) -> Sample:
        return self.draw(number, lambda sample: sample)

    def draw(self, number: int, use: Callable[[Sample], T]) -> T:
        """Return ``use`` of a sample or, where it raises ``BadSample``, of the one that takes its place."""
        return self.mixture.draw(number, lambda sample: use(fit_sample(sample, self.size)))

    def take_skips(self) -> SkipCounts:
        """Return the bad samples met in this process since the last call."""
        return self.mixture.take_skips()

    def probe(self) -> None:
        """Find out before the first step when a whole source is wrong.

        Raises:
            ValueError: none of a source's probed samples can be read.
        """
        self.mixture.probe(lambda sample: fit_sample(sample, self.size))


def pair_of(sample: Sample, needs_caption: bool = True) -> tuple[tuple[np.ndarray, ...], str]:
    """Return the picture's or film's frames ``(H, W, 3)`` and the text of a pair, "" where it has none and needs none.

    Raises:
        ValueError: a sample of another form, which no replacement could mend: the source does not fit the stage.
        BadSample: a pair without picture or without the text it needs.
    """
    parts = [part for turn in sample.turns for part in turn.parts]
    shown = [part for part in parts if part.kind != "text"]
    if sample.form not in PAIR_FORMS and not (sample.form == "text_video" and len(shown) == 1):
        raise ValueError(
            f"sample {sample.id} has form {sample.form}; the stages of the vision tower learn from pairs of picture "
            "and text: leave its source out of their mixture"
        )
    words = " ".join(part.text for part in parts if part.kind == "text").strip()
    if not shown or (needs_caption and not words):
        kind = "missing_text" if shown else "missing_file"
        raise BadSample(kind, f"sample {sample.id}: no pair of picture and text")
    return shown[0].frames, words
