"""What may change from epoch to epoch in a pair of picture and text: which caption, and which way round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

from .permutation import hash64, unit
from .sample import Form, Part, Sample, Turn

PAIR_FORMS = ("image_text", "text_image")


def vary(sample: Sample, forms: Mapping[str, float] | None, seed: int, epoch: int) -> Sample:
    """Return a pair as it is used in one epoch: which of its captions, and which way round.

    The caption is another one each epoch; the way round is drawn by the shares in ``forms``, as read where there are
    none. Samples that are no pairs are returned as they are.
    """
    if sample.form not in PAIR_FORMS:
        return sample
    captions = sample.meta.get("captions")
    if captions is None and forms is None:
        return sample
    picture = next((part for part in _parts(sample) if part.kind == "image"), None)
    words = next((part for part in _parts(sample) if part.kind == "text"), None)
    if picture is None or words is None:
        return sample
    if captions is not None:
        words = Part("text", text=captions[(hash64("caption", seed, sample.id) + epoch) % len(captions)])
    form = sample.form if forms is None else cast(Form, _choose(forms, unit("form", seed, sample.id, epoch)))
    first, second = (picture, words) if form == "image_text" else (words, picture)
    return replace(sample, form=form, turns=(Turn("user", (first,)), Turn("assistant", (second,))))


def _parts(sample: Sample) -> list[Part]:
    return [part for turn in sample.turns for part in turn.parts]


def _choose(shares: Mapping[str, float], point: float) -> str:
    total, reached = sum(shares.values()), 0.0
    for name, share in shares.items():
        reached += share / total
        if point < reached:
            return name
    return next(reversed(list(shares)))
