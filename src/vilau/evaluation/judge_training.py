"""Train the judge of drawings from a seed: ``python -m vilau.evaluation.judge_training --out DIR --tower RUN ...``

It learns from real renders of all combinations of objects and backgrounds (also those held out from the models: the
judge must know what it is asked about), made worse by `degradations.py`, and from reconstructions of two or more vision
towers, none of which is ever judged. Those of the shipped judge come from configs/nano/judge-tower-a.yaml and
judge-tower-b.yaml.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from vilau.data.nano.draw import Draw
from vilau.data.nano.scenes import MOTIONS, Film, Scene, film_scene, render, single, small
from vilau.data.nano.world import World
from vilau.evaluation.degradations import DEGRADATIONS, degrade
from vilau.evaluation.judge import RECORD, WEIGHTS, Judge, JudgeNet
from vilau.modeling.vision_tower import VisionTower
from vilau.processing.images import normalise
from vilau.training.checkpoint import state_digest

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """How a judge is trained; the defaults made the shipped one.

    Args:
        steps, batch_size, lr, weight_decay: AdamW with a one-cycle schedule.
        width: of `JudgeNet`.
        pool: reconstructions kept per tower; each is drawn again and again with other degradations.
        reconstructed: share of a batch that is reconstructions.
        degraded: share of pictures that are made worse.
        small, films: shares of small objects and of single frames of films; the rest is one big object.
        shift: big and small objects are moved by up to so many thirty-seconds of the side.
    """

    steps: int = 450
    batch_size: int = 128
    lr: float = 4e-3
    weight_decay: float = 0.02
    width: int = 24
    pool: int = 4096
    reconstructed: float = 0.5
    degraded: float = 0.7
    small: float = 0.12
    films: float = 0.15
    shift: int = 2
    image_size: int = 32


@dataclass(frozen=True)
class Pictures:
    """Pictures ``(N, S, S, 3)`` uint8 with the numbers of their objects ``(N,)`` and backgrounds ``(N,)``."""

    pixels: np.ndarray
    objects: np.ndarray
    backgrounds: np.ndarray

    def take(self, rows: np.ndarray) -> Pictures:
        """Return some of them."""
        return Pictures(self.pixels[rows], self.objects[rows], self.backgrounds[rows])


def pick(world: World, draw: Draw, recipe: Recipe) -> Scene:
    """Return a scene to learn from: any object on any background."""
    name, background = draw.among(world.names), draw.among(world.colours)
    style, shift = draw.among(world.styles), draw.shift(recipe.shift)
    kind = draw.weighted({"small": recipe.small, "film": recipe.films, "big": 1 - recipe.small - recipe.films})
    if kind == "small":
        return small(name, background, style, shift=shift)
    if kind == "film":
        return film_scene(Film(background, name, draw.among(MOTIONS), style), float(draw.generator.random()))
    return single(name, background, style, shift=shift if draw.chance(0.5) else (0.0, 0.0))


def real(world: World, recipe: Recipe, stream: Sequence[int]) -> Pictures:
    """Return a real render for each number of the stream, a pure function of it."""
    pixels, labels = [], []
    for number in stream:
        scene = pick(world, Draw(*_entropy(number)), recipe)
        pixels.append(render(scene, world, recipe.image_size))
        labels.append((world.names.index(scene.object), world.colours.index(scene.background)))
    objects, backgrounds = np.asarray(labels).T
    return Pictures(np.stack(pixels), objects, backgrounds)


def canonical(world: World, recipe: Recipe) -> Pictures:
    """Return all combinations as one big object in the middle, each style."""
    scenes = [single(n, c, s) for s in world.styles for n in world.names for c in world.colours]
    labels = [(world.names.index(s.object), world.colours.index(s.background)) for s in scenes]
    objects, backgrounds = np.asarray(labels).T
    return Pictures(np.stack([render(s, world, recipe.image_size) for s in scenes]), objects, backgrounds)


@torch.no_grad()
def reconstructions(tower: VisionTower, pictures: Pictures, chunk: int = 64) -> Pictures:
    """Return the pictures as a tower encodes and decodes them."""
    out = []
    for start in range(0, len(pictures.pixels), chunk):
        values = torch.from_numpy(normalise(pictures.pixels[start : start + chunk]))
        decoded = tower.decode(tower.encode(values.to(tower.device)))
        out.append(_to_uint8(decoded.float().cpu()))
    return Pictures(np.concatenate(out), pictures.objects, pictures.backgrounds)


def train_judge(
    out: str | Path,
    seed: int,
    towers: Sequence[str | Path],
    recipe: Recipe = Recipe(),
    progress: Progress | None = None,
    judged: Sequence[str | Path] = (),
    measured: int = 2048,
) -> dict[str, Any]:
    """Train a judge, write ``judge.safetensors`` and ``judge.json`` into `out`, and return the record.

    Args:
        towers: folders of finished vision towers (two or more), none of which will be judged.
        judged: towers on which the finished judge is measured as well; it never learns from them.
        progress: called with lines for people.
        measured: at most about so many pictures of each set on which the finished judge is measured.

    Raises:
        ValueError: fewer than two towers, twice the same, or one of another image size.
    """
    if len(towers) < 2:
        raise ValueError(f"a judge needs the reconstructions of at least 2 towers to learn from, {len(towers)} given")
    say = progress or (lambda line: None)
    world = World.load()
    loaded = [_load_tower(path, recipe.image_size) for path in towers]
    described = [_describe(path, tower) for path, tower in zip(towers, loaded, strict=True)]
    if len({tower["sha256"] for tower in described}) < len(described):
        raise ValueError("the judge was given the same tower twice: train another one, from another seed")
    torch.manual_seed(seed)
    pools = []
    for number, tower in enumerate(loaded):
        say(f"reconstructing {recipe.pool} pictures with tower {number + 1} of {len(loaded)}")
        pools.append(reconstructions(tower, real(world, recipe, _stream(seed, 1 + number, recipe.pool))))
    net = JudgeNet(len(world.names), len(world.colours), recipe.width)
    _fit(net, world, recipe, seed, pools, say)
    record = {
        "format": 1,
        "objects": list(world.names),
        "backgrounds": list(world.colours),
        "styles": list(world.styles),
        "image_size": recipe.image_size,
        "width": recipe.width,
        "seed": seed,
        "recipe": asdict(recipe),
        "degradations": list(DEGRADATIONS),
        "towers": described,
        "parameters": sum(p.numel() for p in net.parameters()),
    }
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: _stored(value) for name, value in net.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    extra = [_load_tower(path, recipe.image_size) for path in judged]
    record["accuracies"] = measure(Judge.load(folder), world, recipe, seed, loaded, extra, measured)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _fit(net: JudgeNet, world: World, recipe: Recipe, seed: int, pools: Sequence[Pictures], say: Progress) -> None:
    decayed = [p for p in net.parameters() if p.ndim > 1]
    plain = [p for p in net.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=recipe.steps, pct_start=0.15, cycle_momentum=False
    )
    net.train()
    started, right, seen = time.monotonic(), 0, 0
    for step in range(recipe.steps):
        pixels, objects, backgrounds = _batch(world, recipe, seed, step, pools)
        verdict = net(pixels)
        loss = F.nll_loss(verdict.objects, objects) + 0.5 * F.nll_loss(verdict.backgrounds, backgrounds)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        right, seen = right + int((verdict.objects.argmax(-1) == objects).sum()), seen + len(objects)
        if (step + 1) % 50 == 0 or step + 1 == recipe.steps:
            left = (recipe.steps - step - 1) * (time.monotonic() - started) / (step + 1)
            say(f"judge {step + 1}/{recipe.steps} loss {loss.item():.3f} right {right / seen:.3f} left {left:.0f} s")
            right = seen = 0
    net.eval()


def _batch(
    world: World, recipe: Recipe, seed: int, step: int, pools: Sequence[Pictures]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return pixel values ``(N, 3, S, S)``, objects ``(N,)`` and backgrounds ``(N,)`` of a step."""
    numbers = [step * recipe.batch_size + row for row in range(recipe.batch_size)]
    rebuilt = round(recipe.batch_size * recipe.reconstructed)
    draw = Draw(seed, 101, step)
    parts = [real(world, recipe, [_number(seed, 0, n) for n in numbers[rebuilt:]])]
    for which, pool in enumerate(pools):
        rows = rebuilt // len(pools) + (which < rebuilt % len(pools))
        parts.append(pool.take(draw.generator.integers(len(pool.pixels), size=rows)))
    pixels = np.concatenate([part.pixels for part in parts])
    worse = np.stack([degrade(p, Draw(seed, 102, n), recipe.degraded) for p, n in zip(pixels, numbers, strict=True)])
    return (
        torch.from_numpy(normalise(worse)),
        torch.from_numpy(np.concatenate([part.objects for part in parts])).long(),
        torch.from_numpy(np.concatenate([part.backgrounds for part in parts])).long(),
    )


def measure(
    judge: Judge,
    world: World,
    recipe: Recipe,
    seed: int,
    towers: Sequence[VisionTower] = (),
    judged: Sequence[VisionTower] = (),
    number: int = 2048,
) -> dict[str, float]:
    """Return shares of right objects and backgrounds.

    On all combinations (big, in the middle), on a fresh mixture of scenes, on the mixture made worse, and on all
    combinations as each tower reconstructs them.
    """
    middle = canonical(world, recipe)
    middle = middle.take(np.arange(0, len(middle.pixels), max(1, len(middle.pixels) // number)))
    mixture = real(world, recipe, _stream(seed, 90, number))
    worse = [degrade(pixels, Draw(seed, 103, row), 1.0) for row, pixels in enumerate(mixture.pixels)]
    sets = {
        "real": middle,
        "real_mixture": mixture,
        "degraded_mixture": Pictures(np.stack(worse), mixture.objects, mixture.backgrounds),
    }
    sets |= {f"tower_{n + 1}": reconstructions(tower, middle) for n, tower in enumerate(towers)}
    sets |= {f"judged_{n + 1}": reconstructions(tower, middle) for n, tower in enumerate(judged)}
    figures = {}
    for name, pictures in sets.items():
        verdict = judge.look(torch.from_numpy(normalise(pictures.pixels)))
        figures[f"{name}_object"] = _share(verdict.objects, pictures.objects)
        figures[f"{name}_background"] = _share(verdict.backgrounds, pictures.backgrounds)
    return figures


def _share(scores: torch.Tensor, wanted: np.ndarray) -> float:
    return round(float((scores.argmax(-1).numpy() == wanted).mean()), 4)


def _stored(value: torch.Tensor) -> torch.Tensor:
    return value.half().contiguous() if value.is_floating_point() else value


def _to_uint8(pixel_values: torch.Tensor) -> np.ndarray:
    scaled = ((pixel_values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().numpy()


def _number(seed: int, stream: int, index: int) -> int:
    return (seed * 256 + stream) * 10**9 + index


def _stream(seed: int, stream: int, number: int) -> list[int]:
    return [_number(seed, stream, index) for index in range(number)]


def _entropy(number: int) -> tuple[int, int]:
    return 77, number


def _load_tower(path: str | Path, image_size: int) -> VisionTower:
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a finished vision tower: it holds no config.json")
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind == "vilau":
        from vilau.modeling.vila_u import VilaUModel

        tower = VilaUModel.from_pretrained(folder).vision_tower
    else:
        tower = VisionTower.from_pretrained(folder)
    if tower.config.image_size != image_size:
        raise ValueError(
            f"the tower in {folder} draws {tower.config.image_size} px pictures, the judge learns from {image_size} px"
        )
    return tower.eval()


def _describe(path: str | Path, tower: VisionTower) -> dict[str, Any]:
    folder = Path(path)
    run = folder.parent.parent.name if folder.name == "final" else folder.name
    config = tower.config
    return {
        "name": run,
        "sha256": state_digest(tower, ()),
        "hidden_size": config.hidden_size,
        "code_dim": config.code_width,
        "depth": config.depth,
        "codebook_size": config.codebook_size,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Train a judge from the command line; prints its record as JSON."""
    parser = argparse.ArgumentParser(prog="vilau.evaluation.judge_training", description="Train the judge of drawings.")
    parser.add_argument("--out", required=True, help="folder to write judge.safetensors and judge.json into")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower", action="append", default=[], help="a finished vision tower; give two or more")
    parser.add_argument("--judged", action="append", default=[], help="a tower to measure on, never learnt from")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    options = parser.parse_args(arguments)
    try:
        record = train_judge(
            options.out,
            options.seed,
            options.tower,
            Recipe(steps=options.steps),
            lambda line: print(line, file=sys.stderr, flush=True),
            options.judged,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(record, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
