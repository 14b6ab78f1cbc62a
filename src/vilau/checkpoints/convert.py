"""`vilau convert`: the released layout -> ours and back, one tensor at a time.

The new folder is built beside its place under a hidden name and moved there when it is whole. An interrupted
conversion goes on with the shards that are already written. What the released layout has and ours does not - its own
configuration files, the padding rows of the codebooks, repeated tensors, the split into files - is kept in the
subfolder ``released`` of our folder, so that the way back gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vilau.checkpoints import keys
from vilau.checkpoints.card import model_card
from vilau.checkpoints.layout import find_layout
from vilau.checkpoints.loading import released_generation
from vilau.checkpoints.released import ReleasedCheckpoint, books, expected_shapes, released_shape
from vilau.checkpoints.released_config import PARTS, read_config
from vilau.checkpoints.released_processor import load_released_processor
from vilau.checkpoints.released_writer import released_files
from vilau.checkpoints.shards import (
    FORMAT,
    WeightFiles,
    listed,
    nbytes,
    open_weights,
    read_json,
    read_metadata,
    write_json,
    write_shard,
)
from vilau.checkpoints.target import check_target, partial_folder, put_in_place
from vilau.configuration import VilaUConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 2_000_000_000
KEPT = "released"  # subfolder of ours with what only the released layout has
EXTRA = "extra.safetensors"
FACTS = "layout.json"
_REMADE = (".safetensors", ".bin", ".bin.index.json")  # endings of files that a conversion makes anew

Progress = Callable[[int, int], None]
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass
class Job:
    """What a conversion writes: `shards` (file -> tensors), how to `read` them, and `finish` for the rest.

    `metadata` holds the headers' metadata of shards where it is not the usual.
    """

    shards: dict[str, Shapes]
    read: Callable[[str, str], torch.Tensor]
    finish: Callable[[Path], None]
    sources: list[Path]
    options: dict[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, dict[str, str] | None] = field(default_factory=dict)


def convert(
    source: Path,
    target: Path,
    to: str,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write `source` in the other layout.

    Args:
        source: a folder of the other layout.
        target: the new folder; it appears whole or not at all.
        to: `ours` or `released`.
        dtype: of the weights (`float32`, `bfloat16`, `float16`); as stored if absent. Our codebook is float32 always.
        force: replace an existing target.
        progress: called with bytes written and bytes in all.
        shard_bytes: size of our shards.

    Raises:
        ValueError: the source is of no known layout or damaged, the released layout cannot hold it, the target exists.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    if find_layout(source) == to:
        raise ValueError(f"{source} already has the layout {to!r}; choose the other one with --to")
    check_target(source, target, force)
    cast = DTYPES[dtype] if dtype else None
    job = _to_ours(source, cast, shard_bytes) if to == "ours" else _to_released(source, cast)
    job.options |= {"to": to, "dtype": dtype}
    return _run(job, target, progress)


def _run(job: Job, target: Path, progress: Progress | None) -> Path:
    beside = partial_folder(target)
    fingerprint = _fingerprint(job)
    note = beside / ".conversion.json"
    if not (note.is_file() and read_json(note).get("fingerprint") == fingerprint):
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        note.write_text(json.dumps({"fingerprint": fingerprint}), encoding="utf-8")
    total = sum(nbytes(*fact) for shapes in job.shards.values() for fact in shapes.values())
    done = 0

    def tick(size: int) -> None:
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    for name, shapes in job.shards.items():
        file = beside / name
        if file.is_file():  # written whole before an interruption
            tick(sum(nbytes(*fact) for fact in shapes.values()))
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        metadata = job.metadata.get(name, FORMAT)
        write_shard(file, shapes, lambda key, shard=name: job.read(shard, key), tick, metadata)  # type: ignore[misc]
    job.finish(beside)
    note.unlink()
    return put_in_place(target)


def _fingerprint(job: Job) -> str:
    facts = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(job.sources)]
    plan = {name: sorted(shapes) for name, shapes in job.shards.items()}
    return hashlib.sha256(json.dumps([facts, plan, sorted(job.options.items())]).encode()).hexdigest()


# ---- released -> ours


def _to_ours(source: Path, cast: torch.dtype | None, shard_bytes: int) -> Job:
    checkpoint = ReleasedCheckpoint(source)
    processor = load_released_processor(source)

    def stored(name: str) -> torch.dtype:
        dtype = checkpoint.dtype(name)
        return cast if cast is not None and dtype.is_floating_point and name not in keys.BOOKS else dtype

    shapes = {name: (stored(name), shape) for name, shape in checkpoint.shapes.items()}
    shards = _split(shapes, shard_bytes)

    def finish(folder: Path) -> None:
        if len(shards) > 1:
            _write_index(folder, shards)
        config = checkpoint.config
        if cast is not None:
            config.dtype = cast
        config.save_pretrained(folder)
        write_json(folder / "generation_config.json", released_generation(source))
        processor.save_pretrained(folder)
        counts = sum(tensor.numel() for tensor in (torch.empty(s, device="meta") for _, s in shapes.values()))
        (folder / "README.md").write_text(model_card(config, counts, source), encoding="utf-8")
        _keep(checkpoint, folder / KEPT)
        for name in ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)

    files = [file for part in checkpoint.parts.values() for file in part.files]
    return Job(shards, lambda _, name: checkpoint.read(name), finish, [*files, *source.rglob("*.json")])


def _keep(checkpoint: ReleasedCheckpoint, folder: Path) -> None:
    """Write what only the released layout has."""
    for file in sorted(checkpoint.folder.rglob("*")):
        inner = file.relative_to(checkpoint.folder)
        hidden = any(name.startswith(".") for name in inner.parent.parts)  # such as .git
        if file.is_file() and not hidden and not file.name.endswith(_REMADE):
            place = folder / inner
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
    released = checkpoint.released
    vision: Any = checkpoint.config.vision_config
    size = vision.codebook_size
    extra: dict[str, torch.Tensor] = {}
    for source in checkpoint.plan.sources["vision_tower.quantizer.codebook"]:
        extra[source] = checkpoint.read_released(source)[size:]
    for name in released:
        if keys.is_computed(name):
            extra[name] = checkpoint.read_released(name)
    write_shard(folder / EXTRA, {n: (t.dtype, tuple(t.shape)) for n, t in extra.items()}, extra.__getitem__)
    book_sources = {s for name in keys.BOOKS for s in checkpoint.plan.sources[name]}
    facts = {
        "files": {name: _safe_name(fact.file) for name, fact in released.items()},
        "copies": dict(checkpoint.plan.copies),
        "metadata": {name: value for name, value in _metadata(checkpoint).items() if value != FORMAT},
        "dtypes": {name: str(released[name].dtype).removeprefix("torch.") for name in sorted(book_sources)},
    }
    write_json(folder / FACTS, facts)


def _metadata(checkpoint: ReleasedCheckpoint) -> dict[str, dict[str, str] | None]:
    """``part/file`` -> metadata of the header of every safetensors shard."""
    return {
        f"{part}/{file.name}": read_metadata(file)
        for part, weights in checkpoint.parts.items()
        for file in weights.files
        if file.suffix == ".safetensors"
    }


def _safe_name(file: Path) -> str:
    """The name that a ``.bin`` shard has as safetensors."""
    if file.suffix == ".safetensors":
        return file.name
    return file.name.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"


def _split(shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], limit: int) -> dict[str, Shapes]:
    groups: list[Shapes] = [{}]
    size = 0
    for name, fact in shapes.items():
        if size and size + nbytes(*fact) > limit:
            groups.append({})
            size = 0
        groups[-1][name] = fact
        size += nbytes(*fact)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def _write_index(folder: Path, shards: Mapping[str, Shapes]) -> None:
    total = sum(nbytes(*fact) for shapes in shards.values() for fact in shapes.values())
    weight_map = {name: Path(file).name for file, shapes in shards.items() for name in shapes}
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


# ---- ours -> released


def _to_released(source: Path, cast: torch.dtype | None) -> Job:
    config = VilaUConfig.from_pretrained(str(source))
    weights = open_weights(source)
    _check_ours(source, config, weights)
    kept = _kept_folder(source, config)
    facts = read_json(kept / FACTS) if kept is not None else {}
    extra = open_extra(kept / EXTRA) if kept is not None else {}
    ours, shapes = _released_shapes(config, weights, cast, facts, extra)
    shards: dict[str, Shapes] = {}
    for name, fact in shapes.items():
        part, key = name.split(":", 1)
        file = f"{part}/{facts.get('files', {}).get(name, 'model.safetensors')}"
        shards.setdefault(file, {})[key] = fact
    vision: Any = config.vision_config
    size = vision.codebook_size

    def read(shard: str, key: str) -> torch.Tensor:
        name = f"{shard.split('/')[0]}:{key}"
        name = facts.get("copies", {}).get(name, name)
        if name in extra and name not in ours:
            return extra[name]
        mine, depth = ours[name]
        tensor = weights.read(mine)
        if mine in keys.BOOKS:
            book = tensor[depth]
            if not mine.endswith(".codebook"):
                return book
            padding = extra[name].to(book.dtype) if name in extra else book.new_zeros(1, book.shape[1])
            return torch.cat([book[:size], padding])
        return tensor[None] if mine == keys.POSITIONS else tensor

    def finish(folder: Path) -> None:
        for part in PARTS:
            mine = {file: shapes for file, shapes in shards.items() if file.startswith(f"{part}/")}
            if len(mine) > 1:
                _write_index(folder / part, mine)
        released_files(source, kept, config, folder, cast)

    sources = [*weights.files, source / "config.json"]
    return Job(shards, read, finish, sources, metadata=facts.get("metadata", {}))


def _kept_folder(source: Path, config: VilaUConfig) -> Path | None:
    """What was kept of a released folder; None if nothing was, or the configuration was changed since."""
    kept = source / KEPT
    if not (kept / FACTS).is_file():
        return None
    return kept if _same_network(read_config(kept, _has_text(config)), config) else None


def open_extra(file: Path) -> dict[str, torch.Tensor]:
    """Return what was kept beside our tensors; nothing if the file is not there."""
    from safetensors.torch import load_file

    return load_file(file) if file.is_file() else {}


def _released_shapes(
    config: VilaUConfig,
    weights: WeightFiles,
    cast: torch.dtype | None,
    facts: Mapping[str, Any],
    extra: Mapping[str, torch.Tensor],
) -> tuple[dict[str, tuple[str, int]], Shapes]:
    """Return released name -> (our name, depth), and released name -> (dtype, shape)."""
    vision: Any = config.vision_config
    stages = len(vision.decoder_multipliers)
    ours: dict[str, tuple[str, int]] = {}
    shapes: Shapes = {}
    for mine, fact in weights.tensors.items():
        if mine == keys.INITIALISED:
            continue
        if mine in keys.BOOKS:
            for depth in books(config):
                name = keys.BOOKS[mine].format(d=depth)
                dtype = getattr(torch, facts.get("dtypes", {}).get(name, "float32"))
                ours[name] = (mine, depth)
                shapes[name] = (dtype, released_shape(mine, fact.shape))
            continue
        name = str(keys.to_released(mine, stages))
        ours[name] = (mine, 0)
        dtype = cast if cast is not None and fact.dtype.is_floating_point else fact.dtype
        shapes[name] = (dtype, released_shape(mine, fact.shape))
    for copy, original in facts.get("copies", {}).items():
        shapes[copy] = shapes[original]
    for name, tensor in extra.items():
        if name not in shapes:
            shapes[name] = (tensor.dtype, tuple(tensor.shape))
    return ours, shapes


def _check_ours(source: Path, config: VilaUConfig, weights: WeightFiles) -> None:
    vision: Any = config.vision_config
    depth: Any = config.depth_config
    language: Any = config.text_config
    problems = []
    if vision.encoder_type != "siglip":
        problems.append(f"encoder_type {vision.encoder_type!r}")
    if vision.quantizer != "rq":
        problems.append(f"quantizer {vision.quantizer!r}")
    if vision.codebook_learning != "ema":
        problems.append(f"codebook_learning {vision.codebook_learning!r} (a basis and its map)")
    if vision.stem != "patch":
        problems.append(f"stem {vision.stem!r}")
    if vision.code_dim is not None:
        problems.append(f"code_dim {vision.code_dim} (linear maps around the quantizer)")
    if vision.decoder_groups != 32:
        problems.append(f"decoder_groups {vision.decoder_groups}")
    if depth.mlp_ratio != 4:
        problems.append(f"depth_config.mlp_ratio {depth.mlp_ratio}")
    if language.model_type != "llama":
        problems.append(f"a language model of type {language.model_type!r}")
    first = language.vocab_size - 4
    tokens = (config.image_start_id, config.image_end_id, config.video_start_id, config.video_end_id)
    if tokens != tuple(range(first, first + 4)):
        problems.append(f"visual tokens {tokens} that are not the last four ids")
    if problems:
        raise ValueError(f"{source} cannot be written in the released layout, which knows no {'; no '.join(problems)}")
    shapes = expected_shapes(config)
    missing = sorted(set(shapes) - set(weights.tensors))
    unused = sorted(set(weights.tensors) - set(shapes))
    wrong = sorted(n for n in shapes if n in weights.tensors and weights.tensors[n].shape != shapes[n])
    if missing or unused or wrong:
        raise ValueError(
            f"{source}: weights and config.json do not fit: missing {listed(missing) or 'none'}; of no use "
            f"{listed(unused) or 'none'}; of another shape {listed(wrong) or 'none'}"
        )


def _has_text(config: VilaUConfig) -> bool:
    vision: Any = config.vision_config
    return vision.text_encoder_config is not None


def _same_network(one: VilaUConfig, other: VilaUConfig) -> bool:
    return comparable(one.to_dict()) == comparable(other.to_dict())


def comparable(value: Any) -> Any:
    """A configuration's fields without those that say nothing about the network."""
    ignored = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures")
    if isinstance(value, Mapping):
        return {key: comparable(item) for key, item in value.items() if key not in ignored}
    return [comparable(item) for item in value] if isinstance(value, list | tuple) else value
