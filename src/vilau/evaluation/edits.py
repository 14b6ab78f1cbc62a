"""Beyond the paper: pictures that were changed, pictures set in motion, answers of words and pictures, all held out.

Each has one right answer by construction, so the judge only has to name what was drawn. Beside every share stand what
the judge finds in the right answer itself and what handing the given picture back would score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vilau.data.nano.dataset import NanoDataset
from vilau.data.nano.world import HELDOUT, World
from vilau.data.sample import Sample
from vilau.evaluation.judge import Judge
from vilau.evaluation.motion import judge_motion
from vilau.pipeline import Pipeline, load
from vilau.processing.images import normalise

ITEMS = {"edit": 96, "animate": 48, "mixed": 48}
SINGLE = ("background", "replace")  # edits whose result is one thing that the judge can name


@dataclass
class Tally:
    """Right answers by metric, for the model, for the truth itself, and for handing the given picture back."""

    shares: dict[str, list[bool]] = field(default_factory=dict)
    ceilings: dict[str, list[bool]] = field(default_factory=dict)
    unchanged: dict[str, list[bool]] = field(default_factory=dict)

    def add(self, name: str, right: bool, ceiling: bool | None = None, unchanged: bool | None = None) -> None:
        """Count one item."""
        self.shares.setdefault(name, []).append(right)
        if ceiling is not None:
            self.ceilings.setdefault(name, []).append(ceiling)
        if unchanged is not None:
            self.unchanged.setdefault(name, []).append(unchanged)


def run_edits(
    model: str | Path | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    device: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure a model on edits, animations and mixed answers of the held-out split; nothing random but by `seed`.

    Returns:
        ``metrics``, ``ceilings``, ``baselines`` (what the given picture itself scores), ``samples`` (items of each).
    """
    pipeline, judge, world = load(model, device), Judge.load(), World.load(None)
    tally = Tally()
    for key, measure in (("edit", _edit), ("animate", _animate), ("mixed", _mixed)):
        progress(key)
        for number, sample in enumerate(_samples(pipeline, world, key, seed)):
            if number >= min(ITEMS[key], limit or ITEMS[key]):
                break
            measure(pipeline, judge, sample, seed + number, tally)
    return {
        "suite": "edits",
        "metrics": {name: float(np.mean(found)) for name, found in tally.shares.items()},
        "ceilings": {name: float(np.mean(found)) for name, found in tally.ceilings.items()},
        "baselines": {f"{name}_unchanged": float(np.mean(found)) for name, found in tally.unchanged.items()},
        "samples": {name: len(found) for name, found in tally.shares.items()},
        "protocol": {"seed": seed, "split": HELDOUT, "judge": judge.digest},
    }


def _samples(pipeline: Pipeline, world: World, key: str, seed: int) -> Iterator[Sample]:
    sizes = pipeline.model.config
    data = NanoDataset(world, {key: 1.0}, HELDOUT, seed, int(sizes.vision_config.image_size), int(sizes.num_frames))
    for number in range(len(data)):
        sample = data[number]
        if sample.meta.get("edit", SINGLE[0]) in SINGLE:
            yield sample


def _edit(pipeline: Pipeline, judge: Judge, sample: Sample, seed: int, tally: Tally) -> None:
    drawn = _generate(pipeline, sample, "image", seed).pixel_values
    given, truth = (normalise(np.stack(turn.parts[0].frames)) for turn in sample.turns)
    names = judge.name(torch.cat([drawn.cpu().float(), torch.as_tensor(truth), torch.as_tensor(given)]))
    wanted = (sample.meta["object"], sample.meta["background"])
    for which, what in enumerate(("object", "background")):
        tally.add(f"edit_{what}", *(name[which] == wanted[which] for name in names))
    tally.add("edit_both", *(name == wanted for name in names))


def _animate(pipeline: Pipeline, judge: Judge, sample: Sample, seed: int, tally: Tally) -> None:
    drawn = _generate(pipeline, sample, "video", seed).pixel_values[0].cpu().float()
    truth = torch.as_tensor(normalise(np.stack(sample.turns[1].parts[0].frames)))
    motions = [judge_motion(film.numpy()).name == sample.meta["motion"] for film in (drawn, truth)]
    tally.add("animate_motion", *motions)
    named = [judge.name_films(film.unsqueeze(0))[0][0] == sample.meta["object"] for film in (drawn, truth)]
    tally.add("animate_object", *named)


def _mixed(pipeline: Pipeline, judge: Judge, sample: Sample, seed: int, tally: Tally) -> None:
    answer = _generate(pipeline, sample, "interleaved", seed, max_new_tokens=64)[0].parts
    wanted = sample.turns[1].parts
    tokenizer = pipeline.processor.tokenizer
    said = [tokenizer.decode(p.token_ids, skip_special_tokens=True).strip() for p in answer if p.kind == "text"]
    tally.add("mixed_words", [words for words in said if words] == [part.text for part in wanted if part.text])
    shown = [part.pixel_values.cpu().float() for part in answer if part.pixel_values is not None]
    names = judge.name(torch.cat(shown)) if shown else []
    for place, scene in enumerate(sample.meta["scenes"]):
        found = names[place] if place < len(names) else ("", "")
        for which, what in enumerate(("object", "background")):
            tally.add(f"mixed_{what}", found[which] == scene[which])


def _generate(pipeline: Pipeline, sample: Sample, mode: Any, seed: int, **settings: Any) -> Any:
    content = [
        {"type": "text", "text": part.text}
        if part.text
        else {"type": "image", "image": Image.fromarray(part.frames[0])}
        for part in sample.turns[0].parts
    ]
    inputs = pipeline.processor.apply_chat_template([{"role": "user", "content": content}], mode)
    return pipeline.model.generate(**inputs.to(pipeline.model.device), generation_mode=mode, seed=seed, **settings)
