"""`vilau info`: what a model is made of, read from its files without loading it."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from vilau.cli.common import JSON_HELP, MODEL_HELP, print_json, shown_model
from vilau.errors import first_line

BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
EMBEDDINGS = ("embed_tokens.weight", "_embedding.weight", "position_embedding")  # tables, no matrices of a product
STORED = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "U8": "uint8",
    "BOOL": "bool",
    "I8": "int8",
    "I32": "int32",
}
PARTS = {  # where a tensor's name belongs, tried in this order
    "quantizer": ("vision_tower.quantizer", "vision_tower.to_code", "vision_tower.from_code"),
    "image_encoder": ("vision_tower.image_encoder", "vision_tower.pixel_encoder"),
    "text_encoder": ("vision_tower.text_encoder",),
    "pixel_decoder": ("vision_tower.pixel_decoder",),
    "projector": ("projector",),
    "language_model": ("language_model",),
    "depth_transformer": ("depth_transformer",),
}
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")
STATISTICS = ("ema_count", "ema_sum", "initialised")  # of the quantizer's learning; no parameters


def info(
    model: str | None = typer.Argument(None, metavar="[MODEL]", help=MODEL_HELP),
    as_json: bool = typer.Option(False, "--json", help=JSON_HELP),
) -> None:
    """Show the parts, shapes, memory of the weights, template and licence of a model, a tower or an RQ-VAE."""
    facts = describe(model)
    if as_json:
        print_json(facts)
        return
    for line in table(facts):
        typer.echo(line)


@dataclass(frozen=True)
class ModelFiles:
    """`config`; `tensors`: our name -> (dtype, shape); the chat `template`, if any; `layout`."""

    config: Any
    tensors: dict[str, tuple[str, list[int]]]
    template: Any
    layout: str


def describe(model: str | None) -> dict[str, Any]:
    """Return the facts of a model's folder (a hub id is fetched); ``ValueError``: a file is missing or broken."""
    from vilau.cli.common import quiet_libraries

    quiet_libraries()
    folder = _locate(model)
    files = _read(folder)
    counts = _parameters(files.tensors)
    template = files.template
    folder = folder if folder.is_dir() else folder.parent
    return {
        "model": shown_model(model),
        "folder": str(folder),
        "parameters": {**counts, "total": sum(counts.values())},
        "shapes": _shapes(files.config),
        "stored_as": sorted({STORED.get(dtype, dtype) for dtype, _ in files.tensors.values()}),
        "memory_mb": {name: round(_memory(files.tensors, name) / 1e6, 1) for name in BYTES},
        "template": template.get("name", "own") if isinstance(template, dict) else template,
        "licence": _licence(folder),
        "licence_file": next((name for name in LICENCE_FILES if (folder / name).is_file()), None),
        "layout": files.layout,
    }


def _locate(model: str | None) -> Path:
    """The folder or file of a model; a hub id is fetched."""
    from vilau.checkpoints.layout import resolve
    from vilau.shipped import find_model

    try:
        folder = find_model(model)
    except ValueError:
        if model is None or not _is_tower(Path(model)):
            raise
        return Path(model)
    return folder if isinstance(folder, Path) else resolve(folder)


def _is_tower(path: Path) -> bool:
    from vilau.checkpoints.rqvae import is_rqvae

    return is_rqvae(path) or ((path / "config.json").is_file() and _kind(path) == "vilau_vision_tower")


def _kind(folder: Path) -> Any:
    return _json(folder / "config.json").get("model_type")


def _read(path: Path) -> ModelFiles:
    from vilau.checkpoints.rqvae import is_rqvae

    if is_rqvae(path):
        return _read_rqvae(path)
    return _read_released(path) if _kind(path) == "vila_u_llama" else _read_ours(path)


def _read_ours(folder: Path) -> ModelFiles:
    """A folder of our layout: a model, or a vision tower alone."""
    from vilau.configuration import VilaUConfig, VisionTowerConfig

    tower = _kind(folder) == "vilau_vision_tower"
    try:
        config: Any = (VisionTowerConfig if tower else VilaUConfig).from_pretrained(str(folder))
    except Exception as error:
        raise ValueError(f"cannot read {folder / 'config.json'}: {first_line(error)}") from error
    processor = folder / "processor_config.json"
    template = _json(processor).get("template") if processor.is_file() else None
    tensors = _tensors(folder)
    if tower:
        tensors = {f"vision_tower.{name}": fact for name, fact in tensors.items()}
    return ModelFiles(config, tensors, template, "ours")


def _read_released(folder: Path) -> ModelFiles:
    """The released layout, under our names; the weights are checked on the way."""
    from vilau.checkpoints.released import ReleasedCheckpoint
    from vilau.checkpoints.released_processor import TEMPLATE
    from vilau.checkpoints.shards import NAMES

    checkpoint = ReleasedCheckpoint(folder)
    facts: dict[str, tuple[str, list[int]]] = {}
    for name, shape in checkpoint.shapes.items():
        sources = checkpoint.plan.sources[name]
        dtype = checkpoint.released[sources[0]].dtype if sources else checkpoint.dtype(name)
        facts[name] = (NAMES[dtype], list(shape))
    return ModelFiles(checkpoint.config, facts, TEMPLATE, "released")


def _read_rqvae(path: Path) -> ModelFiles:
    """An RQ-VAE of the original project: what its file holds, under our names."""
    from vilau.checkpoints.rqvae import RqvaeCheckpoint
    from vilau.checkpoints.shards import NAMES

    checkpoint = RqvaeCheckpoint(path)
    facts = {
        f"vision_tower.{name}": (NAMES[checkpoint.stored[sources[0]].dtype], list(checkpoint.shapes[name]))
        for name, sources in checkpoint.sources.items()
    }
    return ModelFiles(checkpoint.config, facts, None, "rq-vae")


def _shapes(config: Any) -> dict[str, Any]:
    """Sizes of a model, or of a vision tower alone."""
    vision = getattr(config, "vision_config", config)
    shapes = {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "positions_per_image": vision.num_positions,
        "depth": vision.depth,
        "codebook_size": vision.codebook_size,
        "code_width": vision.code_width,
    }
    if vision is config:
        return shapes
    language = config.text_config
    return shapes | {
        "frames_per_video": config.num_frames,
        "language_model": language.model_type,
        "hidden_size": config.hidden_size,
        "layers": language.num_hidden_layers,
        "vocabulary": language.vocab_size,
        "context": config.context_length,
    }


def _memory(tensors: dict[str, tuple[str, list[int]]], kind: str) -> int:
    """Bytes that the weights need: the quantizer is float32 always, and int8 holds matrices, the rest being bfloat16.

    A matrix in int8 has one float32 scale per row.
    """
    total = 0
    for name, (_, shape) in tensors.items():
        count = math.prod(shape)
        if name.startswith("vision_tower.quantizer."):
            total += BYTES["fp32"] * count
        elif kind == "int8" and len(shape) == 2 and not name.endswith(EMBEDDINGS):
            total += count + BYTES["fp32"] * shape[0]
        else:
            total += (BYTES["bf16"] if kind == "int8" else BYTES[kind]) * count
    return total


def table(facts: dict[str, Any]) -> list[str]:
    """The facts as lines for people."""
    rows = [("model", facts["model"]), ("folder", facts["folder"]), ("", "")]
    counts = facts["parameters"]
    width = len(f"{counts['total']:,}")
    for name, count in counts.items():
        rows.append((name, f"{count:>{width},} parameters  {100 * count / max(1, counts['total']):5.1f} %"))
    shapes = facts["shapes"]
    side, positions = shapes["image_size"], shapes["positions_per_image"]
    rows += [
        ("", ""),
        ("picture", f"{side}x{side} px = {positions} positions x {shapes['depth']} codes of {shapes['codebook_size']}"),
        ("code width", str(shapes["code_width"])),
    ]
    if "language_model" in shapes:
        rows += [
            ("film", f"{shapes['frames_per_video']} frames = {shapes['frames_per_video'] * positions} positions"),
            (
                "language",
                f"{shapes['language_model']}, {shapes['layers']} layers of {shapes['hidden_size']}, "
                f"{shapes['vocabulary']} words, context {shapes['context']}",
            ),
        ]
    rows += [
        ("stored as", ", ".join(facts["stored_as"])),
        ("memory", ", ".join(f"{size:g} MB in {name}" for name, size in facts["memory_mb"].items())),
        ("template", str(facts["template"] or "none")),
        ("licence", ", ".join(str(facts[key]) for key in ("licence", "licence_file") if facts[key])),
        ("layout", facts["layout"]),
    ]
    return [f"{name:<18} {value}".rstrip() for name, value in rows]


def _parameters(tensors: dict[str, tuple[str, list[int]]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, (_, shape) in tensors.items():
        if name.rsplit(".", 1)[-1] in STATISTICS:
            continue
        part = next((part for part, prefixes in PARTS.items() if name.startswith(prefixes)), "other")
        counts[part] = counts.get(part, 0) + math.prod(shape)
    return {part: counts[part] for part in (*PARTS, "other") if part in counts}


def _tensors(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """Name -> (dtype, shape) of every tensor, from the headers of the safetensors files."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(_json(index).get("weight_map", {}).values()))]
    else:
        files = [folder / "model.safetensors"]
    found: dict[str, tuple[str, list[int]]] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder} is not a whole model: {file.name} is missing")
        header = _header(file)
        found |= {name: (value["dtype"], value["shape"]) for name, value in header.items() if name != "__metadata__"}
    return found


def _header(file: Path) -> dict[str, Any]:
    with open(file, "rb") as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(100_000_000, file.stat().st_size):
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
            end = max((value["data_offsets"][1] for name, value in header.items() if name != "__metadata__"), default=0)
        except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not a readable safetensors file: {error}") from error
    if file.stat().st_size != 8 + length + end:
        raise ValueError(f"{file} is damaged: it has {file.stat().st_size} bytes and should have {8 + length + end}")
    return header


def _json(file: Path) -> dict[str, Any]:
    from vilau.checkpoints.shards import read_json

    return read_json(file)


def _licence(folder: Path) -> str:
    """The licence named in the front matter of the model card."""
    card = folder / "README.md"
    if not card.is_file():
        return "not stated (no model card)"
    import yaml

    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n"):
        return "see README.md in the folder"
    try:
        front = yaml.safe_load(text[4:].split("\n---", 1)[0])
    except yaml.YAMLError:
        front = None
    named = front.get("license") if isinstance(front, dict) else None
    return str(named) if named else "see README.md in the folder"
