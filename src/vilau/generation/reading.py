"""Prompts of a running batch: read piece by piece into the rows that need them, and kept for later requests."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from vilau.generation.requests import Prompt
from vilau.generation.running import Picture, Reading, Target, Text
from vilau.generation.slots import Prefix, Row, SlotStore, copy_row

_KEPT_PREFIXES = 4


class Reader:
    """The prompts that are being read, the oldest first, and the few with a key that are kept.

    Args:
        store: the batch's rows, in which kept prompts count.
        width: of embeddings.
        ready: called with a target whose prompt is read, and the state ``(H,)`` of its last position.
    """

    def __init__(self, store: SlotStore, width: int, ready: Callable[[Target, torch.Tensor], None]) -> None:
        self.store, self.width, self.ready = store, width, ready
        self._readings: list[Reading] = []
        self._prefixes: OrderedDict[Any, Prefix] = OrderedDict()

    @property
    def busy(self) -> bool:
        """Whether anything is left to be read."""
        return bool(self._readings)

    def reserve(self, capacities: Sequence[int]) -> list[Row]:
        """Return an empty row of each capacity, or none at all; kept prompts give way."""
        rows: list[Row] = []
        try:
            for capacity in capacities:
                while self._prefixes and not self.store.has_room(capacity):
                    _, prefix = self._prefixes.popitem(last=False)
                    self.store.kept -= prefix.length
                rows.append(self.store.reserve(capacity))
        except Exception:
            for row in rows:
                self.store.release(row)
            raise
        return rows

    def read(self, prompt: Prompt, targets: list[Target]) -> None:
        """Begin to read a prompt, or take it from where it was or is being read."""
        if prompt.key is not None:
            prefix = self._prefixes.get(prompt.key)
            if prefix is not None and prefix.length == prompt.length:
                self._prefixes.move_to_end(prompt.key)
                for target in targets:
                    prefix.fill(target.row)
                    self.ready(target, prefix.state)
                return
            for reading in self._readings:
                if reading.prompt.key == prompt.key and reading.prompt.length == prompt.length:
                    reading.targets.extend(targets)
                    return
        embeds = prompt.embeds()
        expected = (prompt.length, self.width)
        if tuple(embeds.shape) != expected:
            raise ValueError(f"the prompt's embeddings have the shape {tuple(embeds.shape)}; {expected} was announced")
        embeds = embeds.to(self.store.like)
        if not bool(torch.isfinite(embeds).all()):
            raise ValueError("the prompt's embeddings hold NaN or infinite numbers")
        self._readings.append(Reading(prompt, embeds, targets))

    def go_on(self, target: Target, embeds: torch.Tensor) -> None:
        """Read the next positions ``(n, H)`` of an answer, before prompts, of which it is not to wait for any."""
        self._readings.insert(0, Reading(Prompt.of(embeds), embeds, [target], target.row.length))

    def drop(self, sequences: Collection[Text | Picture | None]) -> None:
        """Read nothing more for these sequences; what others share with them goes on."""
        for reading in list(self._readings):
            lead = reading.row
            reading.targets = [target for target in reading.targets if target.sequence not in sequences]
            if not reading.targets:
                self._readings.remove(reading)
            elif reading.row is not lead and lead.length:
                copy_row(lead, reading.row, lead.length)

    def pieces(self, most: int) -> list[tuple[Reading, int]]:
        """Return how many positions of which prompts are read now, at most so many together."""
        pieces = []
        for reading in self._readings:
            count = min(most, reading.left)
            if count < 1:
                break
            pieces.append((reading, count))
            most -= count
        return pieces

    def finish(self, pieces: Sequence[tuple[Reading, int]], hidden: torch.Tensor, start: int) -> None:
        """Note that pieces have been read, whose states ``(N, H)`` begin at ``start``."""
        for reading, count in pieces:
            start += count
            reading.row.length += count
            if reading.left:
                continue
            self._readings.remove(reading)
            state, lead = hidden[start - 1], reading.row
            for target in reading.targets[1:]:
                copy_row(lead, target.row, lead.length)
            self._keep(reading, state)
            for target in reading.targets:
                self.ready(target, state)

    def _keep(self, reading: Reading, state: torch.Tensor) -> None:
        """Keep what was read for later requests, if it has a key and there is memory."""
        length = reading.prompt.length
        if reading.prompt.key is None or self.store.positions + self.store.kept + length > self.store.limit:
            return
        self._prefixes[reading.prompt.key] = Prefix.of(reading.row, length, state.clone())
        self.store.kept += length
        if len(self._prefixes) > _KEPT_PREFIXES:
            _, dropped = self._prefixes.popitem(last=False)
            self.store.kept -= dropped.length
