"""Experiments with towers: one cell is one configuration file, trained within a budget, measured, and kept as JSON.

A cell's training is resumable (its checkpoints) and its result is written once, whole. A cell whose stages start from
another cell's folder (`init_from`) needs that one first, so a shared `align` run is a cell like the others.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vilau import __version__
from vilau.evaluation.features import load_extractor
from vilau.evaluation.tower_data import nano_validation
from vilau.evaluation.tower_pictures import draw_strip
from vilau.evaluation.tower_suite import load_tower, measure_finished
from vilau.evaluation.validation import TowerValidation
from vilau.files import write_json
from vilau.modeling.vision_tower import VisionTower
from vilau.training.config import TrainConfig, load_config
from vilau.training.data import load_world
from vilau.training.engine import TrainingError
from vilau.training.run import Hooks, run
from vilau.training.stage import Stage
from vilau.training.stopping import StopRequested

PREFIX = "mini-"
SPENT, FACTS, SUPERSEDED = "spent.json", "cell.json", "superseded"
CURVE_POINTS = 60
_NOT_TRAINING = ("name", "output", "threads", "log_every", "save_every", "sample_every", "keep_checkpoints")


@dataclass(frozen=True)
class Cell:
    """One experiment: its name (the file's, without `mini-`), file, configuration, and the cells it starts from."""

    name: str
    path: Path
    config: TrainConfig
    needs: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of everything in the configuration that decides the outcome."""
        facts = self.config.model_dump(mode="json", exclude_defaults=True)  # a new key must not undo old results
        kept = {key: value for key, value in facts.items() if key not in _NOT_TRAINING}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    @property
    def stage(self) -> str:
        """The last stage, which is what is measured."""
        return [name for name in ("align", "vision_tower") if name in self.config.stages][-1]

    @property
    def steps(self) -> int:
        """Planned steps of that stage."""
        return int(self.config.stages[self.stage].num_steps)  # type: ignore[literal-required]

    @property
    def draws(self) -> bool:
        """Whether its pixel decoder is trained."""
        settings = self.config.stages.get("vision_tower")
        return settings is not None and settings.reconstruction_weight > 0

    @property
    def folder(self) -> Path:
        """Where it trains."""
        return Path(self.config.output)


def find_cells(folder: Path) -> dict[str, Cell]:
    """Return the cells ``mini-*.yaml`` of a folder by name, each after those it needs.

    Raises:
        ValueError: there are none, one cannot be read, has stages of other kinds, or they need each other in a circle.
    """
    files = sorted(folder.glob(f"{PREFIX}*.yaml"))
    if not files:
        raise ValueError(f"no cells in {folder}: a cell is a file {PREFIX}NAME.yaml; name the folder with --configs")
    configs = {file: load_config(file) for file in files}
    for file, config in configs.items():
        if not config.stages or set(config.stages) - {"align", "vision_tower"}:
            raise ValueError(f"{file}: a cell has the stages align and vision_tower and no other")
        if any(stage.steps is None for stage in config.stages.values()):  # type: ignore[attr-defined]
            raise ValueError(f"{file}: a cell says how long its stages are in steps, not in epochs")
    outputs = {Path(config.output): file.stem.removeprefix(PREFIX) for file, config in configs.items()}
    if len(outputs) < len(files):
        raise ValueError(f"two cells in {folder} have the same output: each needs one of its own")
    cells = {}
    for file, config in configs.items():
        name = file.stem.removeprefix(PREFIX)
        needs = {outputs[parent] for path in _paths(config) for parent in path.parents if parent in outputs}
        cells[name] = Cell(name, file, config, tuple(sorted(needs - {name})))
    return _ordered(cells)


def _paths(config: TrainConfig) -> Iterator[Path]:
    """Yield every text value of the stages: those that are paths into another run are what a cell starts from."""
    pending: list[Any] = list(config.model_dump(mode="json")["stages"].values())
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, str):
            yield Path(value)


def _ordered(cells: Mapping[str, Cell]) -> dict[str, Cell]:
    done: dict[str, Cell] = {}
    while len(done) < len(cells):
        ready = [cell for name, cell in cells.items() if name not in done and set(cell.needs) <= set(done)]
        if not ready:
            raise ValueError(f"cells start from each other in a circle: {', '.join(sorted(set(cells) - set(done)))}")
        done |= {cell.name: cell for cell in ready}
    return done


def read_result(cell: Cell, out: Path) -> dict[str, Any] | None:
    """Return a cell's finished result; None when there is none, or only one of another configuration."""
    try:
        result = json.loads((out / f"{cell.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("config_sha256") == cell.digest else None


def run_cell(cell: Cell, out: Path, budget_seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Train and measure one cell in this process, or go on where it was; write and return its result.

    Training that reaches the budget of CPU seconds stops there, and the result says so. A run of another configuration
    in the same folder, and a result of it, are kept beside under the digest's first letters.

    Raises:
        StopRequested: SIGTERM or SIGINT; calling this again goes on from there.
        ValueError: another process is at work on this cell, or the configuration does not fit.
    """
    with _alone(cell):
        put_aside(cell, out)
        trained = _Training(cell, budget_seconds)
        error = None
        try:
            final = trained.run()
        except TrainingError as failure:
            error = str(failure)
        result = _facts(cell, trained) | {"status": "failed" if error else "done"}
        if error is not None:
            result["error"] = error
        else:
            say(f"{cell.name}: measuring after {trained.step} steps, {trained.seconds / 60:.1f} CPU minutes")
            result |= _measure(cell, final, out)
        write_json(result, out / f"{cell.name}.json")
    return result


class _Training:
    """The training of one cell: counts its CPU seconds over all its processes and stops it at the budget."""

    def __init__(self, cell: Cell, budget: float) -> None:
        self.cell, self.budget = cell, budget
        spent = _read_json(cell.folder / SPENT)
        self.before = float(spent.get("seconds", 0.0))
        self.step = int(spent.get("step", 0))
        self.stopped_at_budget = bool(spent.get("stopped_at_budget", False))
        self.started, self.aside = time.process_time(), 0.0

    @property
    def seconds(self) -> float:
        """CPU seconds of training, without validation, of this and earlier processes."""
        return self.before + time.process_time() - self.started - self.aside

    def run(self) -> Path:
        """Train to the end or to the budget; return the folder with the result."""
        world = load_world(self.cell.config)
        count = self.cell.config.validation_samples
        measure = TowerValidation(lambda size: nano_validation(world, size, count), load_extractor)

        def validate(stage: Stage, step: int, folder: Path) -> Mapping[str, float]:
            start = time.process_time()
            figures = measure(stage, step, folder)
            self.aside += time.process_time() - start
            return figures

        hooks = Hooks(validation=validate, on_step=self._watch)
        try:
            if self.stopped_at_budget:
                return run(self._shortened(), hooks)
            return run(self._settings(), hooks)
        except StopRequested:
            if not self.stopped_at_budget:
                raise
        finally:
            self._keep()
        return run(self._shortened(), hooks)

    def _watch(self, stage: str, step: int) -> None:
        if stage != self.cell.stage:
            return
        self.step = step
        if step % 10 == 0:
            self._keep()
        if self.seconds > self.budget and step < self.cell.steps:
            self.stopped_at_budget = True
            os.kill(os.getpid(), signal.SIGTERM)  # the engine then ends after this step, with a checkpoint

    def _keep(self) -> None:
        facts = {"seconds": self.seconds, "step": self.step, "stopped_at_budget": self.stopped_at_budget}
        write_json(facts, self.cell.folder / SPENT)

    def _settings(self) -> TrainConfig:
        config = self.cell.config
        return config.model_copy(update={"threads": 1, "data": config.data.model_copy(update={"workers": 0})})

    def _shortened(self) -> TrainConfig:
        """The same run with the steps that were done: the engine finishes it without another one."""
        config, name = self._settings(), self.cell.stage
        stage = config.stages[name].model_copy(update={"steps": self.step})  # type: ignore[literal-required]
        return config.model_copy(update={"stages": {**config.stages, name: stage}})


def _facts(cell: Cell, trained: _Training) -> dict[str, Any]:
    curve, losses = _curves(cell.folder / cell.stage / "metrics.jsonl")
    return {
        "cell": cell.name,
        "config": cell.path.name,
        "config_sha256": cell.digest,
        "settings": cell.config.model_dump(mode="json"),
        "vilau": __version__,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "seed": cell.config.seed,
        "starts_from": list(cell.needs),
        "stage": cell.stage,
        "steps": trained.step,
        "steps_planned": cell.steps,
        "stopped_at_budget": trained.stopped_at_budget,
        "budget_cpu_seconds": trained.budget,
        "cpu_seconds": round(trained.seconds, 1),
        "curve": curve,
        "losses": losses,
    }


def _measure(cell: Cell, final: Path, out: Path) -> dict[str, Any]:
    tower = load_tower(final)
    config = cell.config
    data = nano_validation(load_world(config), tower.config.image_size, config.validation_samples)
    extractor = load_extractor() if cell.draws else None
    found = measure_finished(
        tower, final, data, extractor, quantize=cell.stage == "vision_tower", reconstruct=cell.draws
    )
    if cell.draws:
        draw_strip(tower, data.frames, out / f"{cell.name}.png")
    return {
        "metrics": {name: round(value, 5) for name, value in found.metrics.items()},
        "items": found.items,
        "chance": data.chance(),
        "data": data.name,
        "extractor": extractor.name if extractor is not None else None,
        "parameters": count_parameters(tower),
        "training": _read_json(final / "training.json"),
    }


def count_parameters(tower: VisionTower) -> dict[str, int]:
    """Return how many numbers each part holds; the codebook's are buffers where it learns by moving averages."""
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in tower.named_children()}
    codebook = getattr(tower.quantizer, "codebook", None)
    if isinstance(codebook, torch.Tensor):
        counts["quantizer"] = max(counts.get("quantizer", 0), codebook.numel())
    counts = {name: count for name, count in counts.items() if count}
    return counts | {"all": sum(counts.values())}


def _curves(file: Path) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Return the validations and, thinned out, the averages of losses over steps, from a stage's log."""
    validations, reports = [], []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        record = json.loads(line)
        figures = {name: value for name, value in record.items() if name not in ("stage", "samples_per_second")}
        if any(name.startswith("validation/") for name in figures):
            validations.append({name.removeprefix("validation/"): round(v, 5) for name, v in figures.items()})
        else:
            reports.append({name: round(value, 6) for name, value in figures.items()})
    stride = -(-len(reports) // CURVE_POINTS) or 1
    return validations, reports[stride - 1 :: stride]


def put_aside(cell: Cell, out: Path, force: bool = False) -> None:
    """Keep what another configuration of the same name left (with `force`: this one too), and let the cell start anew.

    The run's folder gets the digest's first letters, a result goes into `superseded` beside the others.
    """
    kept = _read_json(cell.folder / FACTS).get("config_sha256")
    if kept is not None and (force or kept != cell.digest):
        cell.folder.rename(_free(cell.folder.with_name(f"{cell.folder.name}-{kept[:8]}")))
    write_json({"cell": cell.name, "config_sha256": cell.digest}, cell.folder / FACTS)
    old = out / f"{cell.name}.json"
    digest = _read_json(old).get("config_sha256")
    if digest is not None and (force or digest != cell.digest):
        old.rename(_free(out / SUPERSEDED / f"{cell.name}-{digest[:8]}.json"))


def progress_of(cell: Cell) -> tuple[int, float]:
    """Return the steps done and CPU seconds spent so far, as last written."""
    spent = _read_json(cell.folder / SPENT)
    return int(spent.get("step", 0)), float(spent.get("seconds", 0.0))


def _free(path: Path) -> Path:
    """Return the path, or the first of its kind that is not taken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


@contextmanager
def _alone(cell: Cell) -> Iterator[None]:
    """Hold the cell's lock, which ends with the process, however it ends."""
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    with cell.folder.with_name(f".{cell.folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another process is at work on the cell {cell.name}: wait for it or stop it") from error
        yield


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
