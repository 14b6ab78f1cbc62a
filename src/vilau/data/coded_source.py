"""A source whose pictures were read by the tower beforehand, and how a source is read for that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..processing.augment import fit_frames, fit_sample
from .codes import CodeStore
from .sample import Sample
from .sources.source import Source
from .variation import PAIR_FORMS


class CodedSource:
    """The samples of a source with codes for pixels: same name, numbers, texts and bad samples.

    Args:
        source: asked for its length and its shards' names; none of its media is opened.
        folder: of the store that `vilau data codes` made of it.

    Raises:
        ValueError: the store is missing or incomplete, or holds another number of samples.
    """

    def __init__(self, source: Source, folder: Path) -> None:
        self.source, self.store = source, CodeStore(folder)
        if len(self.store) != len(source):
            raise ValueError(
                f"{folder} holds codes of {len(self.store)} samples, but source {source.name!r} has {len(source)} now; "
                "run `vilau data codes` into a new folder"
            )

    @property
    def name(self) -> str:
        """The source's name."""
        return self.source.name

    def __len__(self) -> int:
        return len(self.store)

    def read(self, index: int) -> Sample:
        """Return a sample whose frames are codes; ``BadSample`` where it was bad when the codes were made."""
        return self.store[index]

    def shard(self, index: int) -> str:
        """Return the name of the file that the sample came from."""
        return self.source.shard(index)


class SquareReader:
    """Read a source's samples with the squares that the tower has to encode.

    Args:
        size: side S of the squares.
        both: pairs are used both ways round, so their pictures are needed squashed and cut to the centre square.
    """

    def __init__(self, source: Source, size: int, both: bool) -> None:
        self.source, self.size, self.both = source, size, both

    def __call__(self, index: int) -> tuple[Sample, Sequence[np.ndarray]]:
        sample = self.source.read(index)
        if not self.both:
            fitted = fit_sample(sample, self.size)
            return fitted, fitted.frames
        if sample.form not in PAIR_FORMS:
            raise ValueError(f"sample {sample.id} has form {sample.form}: only pairs can be used both ways round")
        ways = (fit_frames(sample.frames, self.size, mode) for mode in ("squash", "crop"))
        return sample, [square for pair in zip(*ways, strict=True) for square in pair]
