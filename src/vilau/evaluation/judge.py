"""The judge of drawings: one fixed small classifier that says which object stands on which background.

It never sees the tower that it judges: it learns from real renders, made worse in several ways, and from
reconstructions of other towers (`judge_training.py`). How often it is right on reconstructions of the judged tower is
the ceiling that stands beside every score.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from vilau.data.nano.world import ASSETS
from vilau.errors import first_line
from vilau.files import file_digest

SHIPPED_JUDGE = ASSETS / "judge"
WEIGHTS, RECORD = "judge.safetensors", "judge.json"


@dataclass(frozen=True)
class Verdict:
    """What the judge sees: log-probabilities of objects ``(N, objects)`` and backgrounds ``(N, backgrounds)``."""

    objects: torch.Tensor
    backgrounds: torch.Tensor


class JudgeNet(nn.Module):
    """Six convolutions, mean and maximum over places, two linear heads.

    Args:
        objects, backgrounds: how many of each.
        width: channels of the first convolution; the others are multiples of it.
    """

    def __init__(self, objects: int, backgrounds: int, width: int = 32) -> None:
        super().__init__()
        plan = ((3, 1, 1), (1, 2, 2), (2, 2, 1), (2, 3, 2), (3, 3, 1), (3, 4, 2))
        layers: list[nn.Module] = []
        for inputs, outputs, stride in plan:
            channels = inputs if not layers else inputs * width
            layers += [
                nn.Conv2d(channels, outputs * width, 3, stride, 1, bias=False),
                nn.BatchNorm2d(outputs * width),
                nn.ReLU(inplace=True),
            ]
        self.body = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.1)
        self.object_head = nn.Linear(8 * width, objects)
        self.background_head = nn.Linear(8 * width, backgrounds)

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return what the heads see ``(N, 8 * width)`` of pictures ``(N, 3, S, S)`` in [-1, 1]."""
        maps = self.body(pixel_values)
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)

    def forward(self, pixel_values: torch.Tensor) -> Verdict:
        """Judge pictures ``(N, 3, S, S)`` in [-1, 1]."""
        seen = self.dropout(self.features(pixel_values))
        return Verdict(self.object_head(seen).log_softmax(-1), self.background_head(seen).log_softmax(-1))


class Judge:
    """A trained judge and the names of what it knows.

    Build it with `Judge.load`. `record` is ``judge.json``: seed, recipe, towers, measured accuracies; `digest` is the
    SHA-256 of the weights.
    """

    def __init__(self, net: JudgeNet, record: dict[str, Any], digest: str) -> None:
        self.net, self.record, self.digest = net.eval(), record, digest
        self.objects: tuple[str, ...] = tuple(record["objects"])
        self.backgrounds: tuple[str, ...] = tuple(record["backgrounds"])
        self.image_size = int(record["image_size"])

    @classmethod
    def load(cls, folder: str | os.PathLike[str] | None = None) -> Judge:
        """Load a judge; the shipped one unless a folder is given.

        Raises:
            ValueError: there is none, or its files do not fit together.
        """
        path = Path(folder) if folder is not None else SHIPPED_JUDGE
        if not (path / WEIGHTS).is_file() or not (path / RECORD).is_file():
            raise ValueError(
                f"no judge in {path}: it needs {WEIGHTS} and {RECORD}; train one with "
                f"`python -m vilau.evaluation.judge_training --out {path}`"
            )
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        net = JudgeNet(len(record["objects"]), len(record["backgrounds"]), int(record["width"]))
        try:
            net.load_state_dict({name: value.float() for name, value in load_file(path / WEIGHTS).items()})
        except RuntimeError as error:
            first = first_line(error)
            raise ValueError(f"the judge's {WEIGHTS} does not fit its {RECORD} in {path}: {first}") from error
        return cls(net, record, file_digest(path / WEIGHTS))

    @torch.no_grad()
    def look(self, pixel_values: torch.Tensor, chunk: int = 256) -> Verdict:
        """Judge pictures ``(N, 3, S, S)`` in [-1, 1]; another size than the judge's is resized to it."""
        parts = [self.net(part) for part in self._fitting(pixel_values, chunk)]
        return Verdict(torch.cat([p.objects for p in parts]), torch.cat([p.backgrounds for p in parts]))

    @torch.no_grad()
    def features(self, pixel_values: torch.Tensor, chunk: int = 256) -> torch.Tensor:
        """Return the net's features ``(N, F)`` of pictures ``(N, 3, S, S)`` in [-1, 1], for a Fréchet distance."""
        return torch.cat([self.net.features(part) for part in self._fitting(pixel_values, chunk)])

    def _fitting(self, pixel_values: torch.Tensor, chunk: int) -> Iterator[torch.Tensor]:
        """Yield some pictures at a time at the judge's size."""
        size = (self.image_size, self.image_size)
        for part in pixel_values.detach().to("cpu", torch.float32).clamp(-1, 1).split(chunk):
            if part.shape[-2:] != size:
                part = F.interpolate(part, size, mode="bicubic", antialias=True).clamp(-1, 1)
            yield part

    def name(self, pixel_values: torch.Tensor) -> list[tuple[str, str]]:
        """Return (object, background) of each picture ``(N, 3, S, S)``."""
        return self.names(self.look(pixel_values))

    def names(self, verdict: Verdict) -> list[tuple[str, str]]:
        """Return the likeliest (object, background) of each picture of a verdict."""
        pairs = zip(verdict.objects.argmax(-1).tolist(), verdict.backgrounds.argmax(-1).tolist(), strict=True)
        return [(self.objects[one], self.backgrounds[other]) for one, other in pairs]

    def name_films(self, pixel_values: torch.Tensor) -> list[tuple[str, str]]:
        """Return (object, background) of each film ``(N, F, 3, S, S)``: the frames' log-probabilities added up."""
        verdict = self.look(pixel_values.flatten(0, 1))
        films = pixel_values.shape[:2]
        return self.names(
            Verdict(verdict.objects.unflatten(0, films).sum(1), verdict.backgrounds.unflatten(0, films).sum(1))
        )
