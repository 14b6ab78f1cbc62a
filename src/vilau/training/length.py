"""How long a stage is: steps as they are given, or worked out once from epochs or tokens and kept with the run."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vilau.data.permutation import hash64
from vilau.files import write_json
from vilau.training import parallel
from vilau.training.config import StageConfig, StageName, TrainConfig

logger = logging.getLogger(__name__)

LENGTH_FILE = "length.json"
_FEW = 128  # samples that are measured to find out roughly how many there will be
_LEAST, _MOST = 256, 4096  # samples that are measured for the answer
_ERROR = 0.01  # standard error of their mean length that is aimed at, as a share of it


@dataclass(frozen=True)
class Length:
    """A number of steps, and in words how it came about."""

    steps: int
    account: str


def settle_length(config: TrainConfig, name: StageName, work_out: Callable[[], Length]) -> TrainConfig:
    """Return the configuration with the number of steps of a stage.

    Where it is not given, the first process takes what the run has kept in the stage's folder, or else works it out
    and keeps it there, and tells the others: a resumed run never changes its length by itself. Epochs, tokens or a
    `batch_size` other than those it was worked out for are worked out anew.

    Raises:
        ValueError: it cannot be worked out, or not be kept.
    """
    settings = config.stages[name]
    if settings.steps is not None:
        return config
    steps, fault = 0, ""
    if parallel.rank() == 0:
        try:
            steps = _kept_or_new(Path(config.output) / name, name, settings, work_out)
        except (ValueError, OSError) as error:
            fault = str(error)
    steps, fault = parallel.gather_objects((steps, fault))[0]
    if fault:
        raise ValueError(fault)
    settled = settings.model_copy(update={"steps": steps})
    return config.model_copy(update={"stages": {**config.stages, name: settled}})


def _kept_or_new(folder: Path, name: StageName, settings: StageConfig, work_out: Callable[[], Length]) -> int:
    kept = kept_steps(folder, settings)
    if kept is not None:
        logger.info("%s: %s: %s steps, as worked out before (%s)", name, settings.length, f"{kept:,}", LENGTH_FILE)
        return kept
    found, verb = work_out(), "is" if settings.length.startswith("1 ") else "are"
    logger.info("%s: %s %s %s", name, settings.length, verb, found.account)
    write_json(_asked(settings) | {"steps": found.steps, "account": found.account}, folder / LENGTH_FILE, durable=True)
    return found.steps


def kept_steps(folder: Path, settings: StageConfig) -> int | None:
    """Return the steps that a run has kept for a stage of this length and `batch_size`; None if there are none."""
    try:
        kept = json.loads((folder / LENGTH_FILE).read_text(encoding="utf-8"))
        if {key: kept.get(key) for key in ("epochs", "tokens", "batch_size")} == _asked(settings):
            return max(1, int(kept["steps"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # none, or damaged: the same comes out again
        pass
    return None


def _asked(settings: StageConfig) -> dict[str, Any]:
    return {"epochs": settings.epochs, "tokens": settings.tokens, "batch_size": settings.batch_size}


def steps_of_epochs(settings: StageConfig, held: int) -> Length:
    """Return the whole steps in so many epochs, at least one; `held` is the number of samples of all sources."""
    assert settings.epochs is not None
    steps = max(1, math.floor(settings.epochs * held / settings.batch_size))
    return Length(steps, f"{steps:,} steps of {settings.batch_size} samples ({held:,} samples an epoch)")


def steps_of_tokens(
    settings: StageConfig, length_of: Callable[[int], int], total: int | None, longest: int, seed: int
) -> Length:
    """Return the steps that come nearest to so many tokens, from the lengths of some samples of the stage's own order.

    The samples are spread evenly over the part of the order that the stage will read, one at random of each stretch,
    so that sources have their shares also where one of them is used up on the way. The more their lengths vary, the
    more are measured, up to 4,096.

    Args:
        length_of: number of a sample -> its positions, as it is trained on.
        total: how many samples there are; None for endless.
        longest: positions that a sample has at most.
        seed: of the choice.
    """
    assert settings.tokens is not None
    tokens = settings.tokens

    def within(samples: float) -> int:
        return max(1, math.ceil(samples if total is None else min(samples, total)))

    def measure(limit: int, count: int) -> np.ndarray:
        return np.array([length_of(number) for number in spread_numbers(limit, count, seed)], dtype=np.float64)

    limit = within(2 * tokens / longest)
    while True:
        lengths = measure(limit, _FEW)
        samples = _samples_until(tokens, lengths, limit)
        if samples <= limit or limit == total:
            break
        limit = within(min(1.1 * samples, 4 * limit))  # by and by: samples may be longer further on
    wanted = math.ceil((float(lengths.std()) / float(lengths.mean()) / _ERROR) ** 2)
    limit = within(1.1 * samples)
    lengths = measure(limit, min(_MOST, max(_LEAST, wanted)))
    samples = _samples_until(tokens, lengths, limit)
    steps = max(1, round(samples / settings.batch_size))
    measured = f"{tokens / samples:.1f} tokens each, over {len(lengths):,} samples"
    return Length(steps, f"about {steps:,} steps of {settings.batch_size} samples ({measured})")


def _samples_until(tokens: int, lengths: np.ndarray, limit: int) -> float:
    """Return how many samples have so many tokens, where `lengths` are those of equal stretches of the first `limit`.

    Beyond them their mean is taken.
    """
    ends = limit * np.arange(len(lengths) + 1) / len(lengths)
    sums = np.concatenate([[0.0], np.cumsum(lengths)]) * (limit / len(lengths))
    if sums[-1] < tokens:
        return float(limit + (tokens - sums[-1]) / lengths.mean())
    return float(np.interp(tokens, sums, ends))


def spread_numbers(limit: int, count: int, seed: int) -> list[int]:
    """Return `count` numbers below `limit` in rising order, one of each of as many equal stretches; all if too few."""
    count = min(count, limit)
    borders = [place * limit // count for place in range(count + 1)]
    return [
        low + hash64("length", seed, place) % (high - low)
        for place, (low, high) in enumerate(zip(borders, borders[1:], strict=False))
    ]
