"""`vilau info`: what a model is made of, read from its files without loading it."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import typer

from vilau.cli.common import JSON_HELP, MODEL_HELP, print_json, shown_model

BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
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
    """Show a model's parts, shapes, memory, template and licence."""
    facts = describe(model)
    if as_json:
        print_json(facts)
        return
    for line in table(facts):
        typer.echo(line)


def describe(model: str | None) -> dict[str, Any]:
    """Return the facts of a model's folder (a hub id is fetched); ``ValueError``: a file is missing or broken."""
    from vilau.cli.common import quiet_libraries
    from vilau.shipped import find_model

    folder = find_model(model)
    quiet_libraries()
    if not isinstance(folder, Path):
        folder = _fetch(folder)
    config, tensors, template = _read_released(folder) if _is_released(folder) else _read_ours(folder)
    counts = _parameters(tensors)
    total = sum(counts.values())
    vision: Any = config.vision_config
    language: Any = config.text_config
    return {
        "model": shown_model(model),
        "folder": str(folder),
        "parameters": {**counts, "total": total},
        "shapes": {
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "positions_per_image": vision.num_positions,
            "depth": vision.depth,
            "codebook_size": vision.codebook_size,
            "code_width": vision.code_width,
            "frames_per_video": config.num_frames,
            "language_model": language.model_type,
            "hidden_size": config.hidden_size,
            "layers": language.num_hidden_layers,
            "vocabulary": language.vocab_size,
            "context": config.context_length,
        },
        "stored_as": sorted({STORED.get(dtype, dtype) for dtype, _ in tensors.values()}),
        "memory_mb": {name: round(total * size / 1e6, 1) for name, size in BYTES.items()},
        "template": template.get("name", "own") if isinstance(template, dict) else template,
        "licence": _licence(folder),
        "licence_file": next((name for name in LICENCE_FILES if (folder / name).is_file()), None),
        "layout": "released" if _is_released(folder) else "ours",
    }


Tensors = dict[str, tuple[str, list[int]]]


def _is_released(folder: Path) -> bool:
    return _json(folder / "config.json").get("model_type") == "vila_u_llama"


def _read_ours(folder: Path) -> tuple[Any, Tensors, Any]:
    """Configuration, tensors and template of a folder of our layout."""
    from vilau.configuration import VilaUConfig

    try:
        config = VilaUConfig.from_pretrained(str(folder))
    except Exception as error:
        raise ValueError(f"cannot read {folder / 'config.json'}: {str(error).splitlines()[0]}") from error
    processor = folder / "processor_config.json"
    return config, _tensors(folder), _json(processor).get("template") if processor.is_file() else None


def _read_released(folder: Path) -> tuple[Any, Tensors, Any]:
    """The same of the released layout, under our names; the weights are checked on the way."""
    from vilau.checkpoints.released import ReleasedCheckpoint
    from vilau.checkpoints.released_processor import TEMPLATE
    from vilau.checkpoints.shards import NAMES

    checkpoint = ReleasedCheckpoint(folder)
    facts: Tensors = {}
    for name, shape in checkpoint.shapes.items():
        sources = checkpoint.plan.sources[name]
        dtype = checkpoint.released[sources[0]].dtype if sources else checkpoint.dtype(name)
        facts[name] = (NAMES[dtype], list(shape))
    return checkpoint.config, facts, TEMPLATE


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
        ("film", f"{shapes['frames_per_video']} frames = {shapes['frames_per_video'] * positions} positions"),
        ("code width", str(shapes["code_width"])),
        (
            "language",
            f"{shapes['language_model']}, {shapes['layers']} layers of {shapes['hidden_size']}, "
            f"{shapes['vocabulary']} words, context {shapes['context']}",
        ),
        ("stored as", ", ".join(facts["stored_as"])),
        ("memory", ", ".join(f"{size:g} MB in {name}" for name, size in facts["memory_mb"].items())),
        ("template", str(facts["template"])),
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


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except Exception as error:
        raise ValueError(f"cannot fetch the model {name!r}: {str(error).strip().splitlines()[0]}") from error
