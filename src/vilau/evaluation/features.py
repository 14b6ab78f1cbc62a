"""Feature extractors for Fréchet distances, each with a name that stands in every figure made with it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from vilau.evaluation.judge import Judge

JUDGE = "judge"


class FeatureExtractor(Protocol):
    """A callable from pictures ``(N, 3, S, S)`` in [-1, 1] to features ``(N, F)``; `name` names it in figures."""

    @property
    def name(self) -> str: ...

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class JudgeFeatures:
    """The features of a judge of drawings: at 32 px, where Inception sees nothing that it was trained on."""

    judge: Judge
    name: str = JUDGE

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.judge.features(pixel_values)


@dataclass(frozen=True)
class ScriptedFeatures:
    """A TorchScript file, called as the Inception exports for FID are: with uint8 pictures ``(N, 3, S, S)``.

    Where its `forward` has an argument `return_features` it is set. The script resizes as it was made to.
    """

    module: Any
    name: str
    options: tuple[tuple[str, bool], ...] = ()

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        pixels = ((pixel_values.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        features = self.module(pixels, **dict(self.options))
        if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != len(pixels):
            shape = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise ValueError(
                f"the feature extractor {self.name!r} gave {shape} for {len(pixels)} pictures: it must give (N, F)"
            )
        return features.float()


def load_extractor(source: str | os.PathLike[str] | None = None) -> FeatureExtractor:
    """Return the judge's features, or those of a TorchScript file.

    Args:
        source: `judge` or None for the shipped judge, a folder with another judge, or a TorchScript file such as the
            Inception export that FID figures are usually made with.

    Raises:
        ValueError: there is no such file, or it is no TorchScript.
    """
    if source is None or str(source) == JUDGE:
        return JudgeFeatures(Judge.load())
    path = Path(source)
    if path.is_dir():
        return JudgeFeatures(Judge.load(path), f"{JUDGE}_{_word(path.name)}")
    if not path.is_file():
        raise ValueError(f"no feature extractor {path}: name a TorchScript file, a judge's folder, or {JUDGE!r}")
    try:
        module = torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} cannot be read as TorchScript ({first[:120]}); a table of weights alone does not say how to "
            "compute: export the network with torch.jit.script or torch.jit.trace"
        ) from error
    arguments = {argument.name for argument in module.forward.schema.arguments}
    options = (("return_features", True),) if "return_features" in arguments else ()
    return ScriptedFeatures(module, _word(path.stem), options)


def _word(name: str) -> str:
    """A name fit for the name of a figure."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "script"
