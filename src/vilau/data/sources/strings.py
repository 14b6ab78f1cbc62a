"""Long lists of strings on little memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np


class Strings:
    """Strings by number in one block of bytes: about their length plus 8 bytes each, and not copied by fork."""

    def __init__(self, values: Sequence[str]) -> None:
        parts = [value.encode("utf-8", "surrogateescape") for value in values]
        self._ends = np.fromiter(accumulate(map(len, parts), initial=0), dtype=np.int64, count=len(parts) + 1)
        self._block = b"".join(parts)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"string {index} is out of range: there are {len(self)}")
        return self._block[self._ends[index] : self._ends[index + 1]].decode("utf-8", "surrogateescape")
