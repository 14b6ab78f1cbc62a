"""Weight files: what they hold, read one tensor at a time, and written one tensor at a time.

Both directions work from the headers, so that a checkpoint of any size is checked before its first tensor is read and
converted without ever standing in memory.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from vilau.errors import first_line

DTYPES = {  # safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FORMAT = {"format": "pt"}  # the metadata that the library writes
_LARGEST_HEADER = 100_000_000
_ORDER = ("F64", "I64", "F32", "I32", "F16", "BF16", "I16", "U8", "I8", "BOOL")  # wide types first, as the library


@dataclass(frozen=True)
class TensorFact:
    """Where a tensor stands and what it is, without its values."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass
class WeightFiles:
    """The tensors of one folder's safetensors or ``.bin`` shards.

    Of ``.bin`` shards only the last one read stays mapped, so that a large checkpoint never stands in memory whole.

    Args:
        folder: where the files are.
        tensors: name -> `TensorFact`, in the order of the files.
        files: the shards.
    """

    folder: Path
    tensors: dict[str, TensorFact]
    files: list[Path]
    _mapped: tuple[Path, Mapping[str, torch.Tensor]] | None = field(default=None, repr=False)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        fact = self.tensors[name]
        if fact.file.suffix != ".safetensors":
            if self._mapped is None or self._mapped[0] != fact.file:
                self._mapped = None
                self._mapped = (fact.file, load_pickled(fact.file))
            return self._mapped[1][name]
        with safe_open(fact.file, framework="pt") as opened:
            return opened.get_tensor(name)


def open_weights(folder: Path) -> WeightFiles:
    """Return the tensors of a folder: sharded or single, safetensors or ``.bin``.

    Raises:
        ValueError: there are no weights, a shard is missing, truncated or damaged, a ``.bin`` holds more than tensors,
            or the index and the shards disagree. The message names the file.
    """
    for index, single in (
        ("model.safetensors.index.json", "model.safetensors"),
        ("pytorch_model.bin.index.json", "pytorch_model.bin"),
    ):
        if (folder / index).is_file():
            return _open_indexed(folder, folder / index)
        if (folder / single).is_file():
            return _open_files(folder, [folder / single])
    raise ValueError(
        f"{folder} holds no weights: expected model.safetensors, pytorch_model.bin, or an index with its shards; "
        "fetch the folder again"
    )


def _open_indexed(folder: Path, index: Path) -> WeightFiles:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} holds no weight_map: it is no index of shards; fetch it again")
    files = []
    for name in sorted(set(weight_map.values())):
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} names the shard {name!r}, which is no file of the same folder")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing, but {index.name} names it; fetch the folder again")
        files.append(folder / name)
    weights = _open_files(folder, files)
    absent = sorted(key for key, name in weight_map.items() if key not in weights.tensors)
    moved = sorted(
        key for key, name in weight_map.items() if key in weights.tensors and weights.tensors[key].file.name != name
    )
    if absent or moved:
        raise ValueError(
            f"{index} and its shards disagree: {listed(absent or moved)} not in the shard that the index names; "
            "fetch the folder again"
        )
    return weights


def _open_files(folder: Path, files: Sequence[Path]) -> WeightFiles:
    weights = WeightFiles(folder, {}, list(files))
    for file in files:
        if file.suffix == ".safetensors":
            facts = {
                name: TensorFact(file, _dtype(file, name, value["dtype"]), tuple(value["shape"]))
                for name, value in read_header(file).items()
            }
        else:
            facts = {
                name: TensorFact(file, tensor.dtype, tuple(tensor.shape)) for name, tensor in load_pickled(file).items()
            }
        twice = sorted(set(facts) & set(weights.tensors))
        if twice:
            raise ValueError(f"{file} repeats tensors of another shard: {listed(twice)}; fetch the folder again")
        weights.tensors |= facts
    return weights


def _dtype(file: Path, name: str, stored: str) -> torch.dtype:
    if stored not in DTYPES:
        raise ValueError(f"{file}: {name} is stored as {stored}, which is not one of {', '.join(DTYPES)}")
    return DTYPES[stored]


def read_header(file: Path) -> dict[str, Any]:
    """Return name -> ``{"dtype", "shape", "data_offsets"}`` of a safetensors file.

    Raises:
        ValueError: the file is truncated or no such file.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(_LARGEST_HEADER, size):
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            end = max((value["data_offsets"][1] for value in header.values()), default=0)
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{file} is not a readable safetensors file ({error}); fetch it again") from error
    if size != 8 + length + end:
        raise ValueError(f"{file} is damaged: it has {size} bytes and should have {8 + length + end}; fetch it again")
    return dict(header)


def read_metadata(file: Path) -> dict[str, str] | None:
    """Return what the header of a safetensors file says beside its tensors, or ``None``."""
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def load_pickled(file: Path) -> Mapping[str, torch.Tensor]:
    """Return the tensors of a ``.bin`` file, mapped into memory where its format allows it; runs none of its code.

    Raises:
        ValueError: it is damaged, or holds anything but tensors.
    """
    loaded = unpickle(file, "ask for the weights as safetensors")
    if not is_table(loaded):
        raise ValueError(f"{file} holds something else than a table of tensors; ask for the weights as safetensors")
    return dict(loaded)


def is_table(value: Any) -> bool:
    """Return whether a value is a mapping of names to tensors."""
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    )


def unpickle(file: Path, remedy: str) -> Any:
    """Return what a PyTorch file holds, if it is tensors and plain values alone; runs none of its code.

    Args:
        file: written by ``torch.save``.
        remedy: what to do if it holds more, for the message.

    Raises:
        ValueError: it is damaged, or holds more.
    """
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # files older than torch 1.6 cannot be mapped
            if "mmap" not in str(error):
                raise
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))  # the library's own text advises to switch the check off
        found = f"it names {named[1]}" if named else "it is no table of tensors"
        raise ValueError(
            f"{file} holds more than tensors and was refused, because such a file can run code when it is read "
            f"({found}); {remedy}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file} is damaged or no PyTorch file ({first_line(error)}); fetch it again") from error


def write_shard(
    file: Path,
    shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], torch.Tensor],
    tick: Callable[[int], None] | None = None,
    metadata: Mapping[str, str] | None = FORMAT,
) -> None:
    """Write a safetensors file, holding one tensor at a time; the file appears whole or not at all.

    Args:
        shapes: name -> (dtype, shape) of every tensor.
        read: gives a tensor; called once per name.
        tick: called with the bytes written after each tensor.
        metadata: what the header says beside the tensors.
    """
    order = sorted(shapes, key=lambda name: (_ORDER.index(NAMES[shapes[name][0]]), name))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    start = 0
    for name in order:
        dtype, shape = shapes[name]
        end = start + nbytes(dtype, shape)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    partial = file.with_name(f".{file.name}.partial")
    with open(partial, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            _write_tensor(stream, name, read(name), *shapes[name])
            if tick is not None:
                tick(nbytes(*shapes[name]))
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def _write_tensor(
    stream: BinaryIO, name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    assert tuple(tensor.shape) == shape, f"{name}: {tuple(tensor.shape)} is not the planned {shape}"
    flat = tensor.to(dtype).contiguous().reshape(-1)
    for part in flat.split(1 << 24):
        stream.write(part.view(torch.uint8).numpy().data)


def nbytes(dtype: torch.dtype, shape: Iterable[int]) -> int:
    """Return the bytes of a tensor."""
    return int(dtype.itemsize * math.prod(shape))


def read_json(file: Path) -> dict[str, Any]:
    """Return a file's JSON object; ``ValueError`` names the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"cannot read {file}: it holds no JSON object")
    return value


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object as the library does, indented, keys sorted; the folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def listed(names: Sequence[str], most: int = 12) -> str:
    """Return names for an error message: all of a few, the first of many."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
