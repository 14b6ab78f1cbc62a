"""Checkpoints of sharded training: every process writes its shards, as safetensors, with the same promises.

`torch.distributed.checkpoint` cuts and joins the shards, so another number of processes, or one process without FSDP2,
can go on from them. Nothing in them is a pickle.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from vilau.errors import first_line
from vilau.files import file_digest
from vilau.training import parallel
from vilau.training.checkpoint import begin, checkpoint_paths, publish, remove_others, seal

_SHARDS = "shards"
_SCALAR = "step"  # the one optimizer state that is a number and not shaped like its parameter


def is_sharded(path: Path) -> bool:
    """Return whether a checkpoint was written by sharded training."""
    return (path / _SHARDS).is_dir()


def save_sharded(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    facts: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write ``folder/step-NNNNNNN``, all processes together; see `checkpoint.save_checkpoint`.

    Each process also computes the SHA-256 of its part of the files.

    Raises:
        OSError: on every process, when one cannot write; what was there before is untouched.
    """
    beside, final = checkpoint_paths(folder, step)
    error: BaseException | None = None
    try:
        if parallel.rank() == 0:
            begin(beside)
            (beside / _SHARDS).mkdir()
        parallel.barrier()
        tensors = {name: t.detach() for name, t in _tensors(module, optimizers).items()}
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(beside / _SHARDS), save_distributed=True))
        files = sorted((beside / _SHARDS).iterdir())[parallel.rank() :: parallel.world_size()]
        digests = {f"{_SHARDS}/{file.name}": file_digest(file) for file in files}
        known = {name: digest for part in parallel.gather_objects(digests) for name, digest in part.items()}
        if parallel.rank() == 0:
            (beside / "state.json").write_text(json.dumps({"step": step, **facts}, indent=1))
            seal(beside, known)
            publish(beside, final)
            remove_others(final, keep)
    except (OSError, CheckpointException, RuntimeError) as caught:
        error = caught
    if parallel.any_rank(error is not None):
        if parallel.rank() == 0:
            shutil.rmtree(beside, ignore_errors=True)
        reason = _reason(error) if error is not None else "another process could not write"
        raise OSError(f"cannot write the checkpoint {final}: {reason}") from error
    return final


def load_sharded(path: Path, module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Load a verified checkpoint into `module` and `optimizers`, sharded or not; return what ``state.json`` says.

    Raises:
        ValueError: it belongs to another model or other optimizers.
    """
    reader = HuggingFaceStorageReader(str(path / _SHARDS))
    stored = set(reader.read_metadata().state_dict_metadata)
    try:
        _make_states(module, optimizers, stored)
        tensors = _tensors(module, optimizers)
        if stored != set(tensors):
            odd = min(stored ^ set(tensors))
            raise ValueError(f"{odd} is only in the {'checkpoint' if odd in stored else 'model'}")
        dcp.load(tensors, storage_reader=reader, no_dist=parallel.world_size() == 1)
    except (ValueError, KeyError, RuntimeError, CheckpointException, AssertionError) as error:
        raise ValueError(
            f"the checkpoint {path} does not fit this configuration's model and optimizers ({_reason(error)}); "
            "train with the configuration it was made with, or choose another output folder"
        ) from error
    return json.loads((path / "state.json").read_text())


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        return first_line(next(iter(error.failures.values()))[0], 2)
    return first_line(error, 2)


def _tensors(module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """Return all weights, buffers and optimizer states by name; numbers as views of one element."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    twice = {name for name, _ in module.named_parameters(remove_duplicate=False)} - set(names.values())  # tied weights
    tensors = {f"module.{name}": t for name, t in module.state_dict().items() if name not in twice}
    for number, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                tensors[f"optimizer.{number}.{names[parameter]}.{key}"] = value.view(1) if key == _SCALAR else value
    return tensors


def _make_states(module: nn.Module, optimizers: list[torch.optim.Optimizer], stored: set[str]) -> None:
    """Give the optimizers empty states of the names that are stored, to be filled."""
    parameters = dict(module.named_parameters())
    for optimizer in optimizers:
        optimizer.state.clear()
    for entry in stored:
        if not entry.startswith("optimizer."):
            continue
        number, rest = entry.removeprefix("optimizer.").split(".", 1)
        name, key = rest.rsplit(".", 1)
        parameter = parameters[name]
        empty = torch.zeros(()) if key == _SCALAR else torch.zeros_like(parameter.detach())
        optimizers[int(number)].state[parameter][key] = empty
