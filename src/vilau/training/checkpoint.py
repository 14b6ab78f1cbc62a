"""Checkpoints that are whole or not there: written beside, fsynced, renamed; verified by SHA-256 before use."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vilau.errors import first_line
from vilau.files import file_digest, open_to_readers

logger = logging.getLogger(__name__)

_MANIFEST = "MANIFEST.json"
_PREFIX = "step-"


def state_digest(module: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> str:
    """Return the SHA-256 of all weights, buffers and optimizer states: equal digests mean equal training states.

    Sharded ones are gathered one by one, for which every process must call this.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    for optimizer in optimizers:
        for _, state in sorted(optimizer.state_dict()["state"].items()):
            for key in sorted(state):
                digest.update(_bytes(torch.as_tensor(state[key])))
    return digest.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def save_checkpoint(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    facts: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write ``folder/step-NNNNNNN`` and remove all but the `keep` newest; it is visible only when complete.

    Checkpoints of later steps are removed too: they were damaged, or training would have gone on from them.

    Raises:
        OSError: it cannot be written, for instance because the disk is full; what was there before is untouched.
    """
    beside, final = checkpoint_paths(folder, step)
    try:
        begin(beside)
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in module.state_dict().items()}
        save_file(tensors, beside / "module.safetensors")
        torch.save([optimizer.state_dict() for optimizer in optimizers], beside / "optimizers.pt")
        (beside / "state.json").write_text(json.dumps({"step": step, **facts}, indent=1))
        seal(beside)
        publish(beside, final)
    except (OSError, SafetensorError, RuntimeError) as error:  # the libraries report a full disk in ways of their own
        shutil.rmtree(beside, ignore_errors=True)
        raise OSError(f"cannot write the checkpoint {final}: {first_line(error, 2)}") from error
    remove_others(final, keep)
    return final


def checkpoint_paths(folder: Path, step: int) -> tuple[Path, Path]:
    """Return the folder in which the checkpoint of a step is written and the one in which it becomes visible."""
    final = folder / f"{_PREFIX}{step:07d}"
    return folder / f".{final.name}.partial", final


def begin(beside: Path) -> None:
    """Make an empty folder to write in."""
    beside.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()


def remove_others(final: Path, keep: int) -> None:
    """Remove all checkpoints but the `keep` newest up to `final`, and what killed processes left."""
    folder = final.parent
    kept = [path for path in list_checkpoints(folder) if path <= final][-keep:]
    for path in set(list_checkpoints(folder)) - set(kept):
        gone = path.with_name(f".{path.name}.old")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)  # at once, so that no half of it is ever in sight
    for path in folder.glob(f".{_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def load_checkpoint(path: Path, module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Load a verified checkpoint into `module` and `optimizers`; return what ``state.json`` says.

    Weights and states are sharded as the module's are. Learning rates and other settings of the optimizers stay those
    they were built with.

    Raises:
        ValueError: it belongs to another model or other optimizers, or its optimizer file holds more than tensors
            and plain values (nothing of it is executed).
    """
    try:
        here = module.state_dict()
        stored = load_file(path / "module.safetensors")
        module.load_state_dict({name: _placed_like(t, here[name]) if name in here else t for name, t in stored.items()})
        states = torch.load(path / "optimizers.pt", map_location="cpu", weights_only=True)
        for optimizer, state in zip(optimizers, states, strict=True):
            _load_optimizer(optimizer, state)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path / 'optimizers.pt'} is refused: it holds more than tensors and plain values") from error
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the checkpoint {path} does not fit this configuration's model and optimizers ({first_line(error, 2)}); "
            "train with the configuration it was made with, or choose another output folder"
        ) from error
    return json.loads((path / "state.json").read_text())


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    placed = {
        number: {key: _placed_like(value, parameters[number]) for key, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": placed})
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def _placed_like(value: Any, pattern: torch.Tensor) -> Any:
    """Shard a whole tensor as `pattern` is, if it is sharded and has this shape; without messages."""
    if not isinstance(pattern, DTensor) or not isinstance(value, torch.Tensor) or value.shape != pattern.shape:
        return value
    return distribute_tensor(value.to(pattern.device), pattern.device_mesh, pattern.placements, src_data_rank=None)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete-looking checkpoints in `folder`, oldest first."""
    return sorted(p for p in folder.glob(f"{_PREFIX}*") if p.is_dir()) if folder.is_dir() else []


def newest_intact(folder: Path) -> Path | None:
    """Return the newest checkpoint that passes its manifest; damaged ones are named in the log and passed over."""
    damaged: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        fault = find_fault(path) or _find_wrong_step(path)
        if fault is None:
            if damaged:
                logger.warning("using %s instead of damaged %s", path.name, ", ".join(damaged))
            return path
        logger.warning("checkpoint %s is damaged: %s", path.name, fault)
        damaged.append(path.name)
    return None


def seal(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write the manifest: size and SHA-256 of every file of `folder`; digests in `known` are not computed again."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != _MANIFEST}
    entries = {
        name: {"bytes": p.stat().st_size, "sha256": (known or {}).get(name) or file_digest(p)}
        for name, p in files.items()
    }
    (folder / _MANIFEST).write_text(json.dumps(entries, indent=1, sort_keys=True))


def find_fault(folder: Path, surplus: bool = False) -> str | None:
    """Return what is wrong with a sealed folder, or ``None``: missing, surplus (unless allowed), altered files."""
    try:
        entries = json.loads((folder / _MANIFEST).read_text())
        expected = {name: (int(e["bytes"]), str(e["sha256"])) for name, e in entries.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"its manifest cannot be read ({type(error).__name__})"
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != _MANIFEST}
    different = set(expected) - present if surplus else present ^ set(expected)
    if different:
        return f"files differ from its manifest: {', '.join(sorted(different))}"
    for name, (size, digest) in expected.items():
        path = folder / name
        try:
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes instead of {size}"
            if file_digest(path) != digest:
                return f"{name} does not have the SHA-256 of its manifest"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _find_wrong_step(path: Path) -> str | None:
    """Return what is wrong when a checkpoint's name and content speak of different steps."""
    step = int(json.loads((path / "state.json").read_text())["step"])
    return None if path.name == f"{_PREFIX}{step:07d}" else f"it holds step {step}"


def publish(beside: Path, final: Path) -> None:
    """Make a finished folder visible under its name: fsync everything, then rename, replacing what was there."""
    open_to_readers(beside)
    for path in [*beside.rglob("*"), beside]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if final.exists():
        old = final.with_name(f".{final.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        beside.rename(final)
        shutil.rmtree(old)
    else:
        beside.rename(final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
