"""Pickle shards -> shards that are safe to read: JSONL of documents or conversations, tar files of captioned pictures.

Three layouts are known, by their fields: documents of MMC4 (``text_list``, ``image_info``), pictures with captions
(``image`` or ``rawbytes``, ``text`` or ``caption``; COYO), and questions about pictures (``question``, ``answer``,
``image``; VFLAN, whose field names may end in a colon).
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files import atomic_path
from .pickles import read_shard
from .sources.paths import find_files

_MAGIC = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp", b"GI": "gif"}
_MARK = re.compile(r"\s*<image>\s*")
_LIMIT = 200_000  # values in one record; a thousand characters count as one


@dataclass
class ConversionReport:
    """What became of some pickle shards: records written, and how many were left out by reason."""

    files: list[Path] = field(default_factory=list)
    records: int = 0
    left_out: Counter[str] = field(default_factory=Counter)


def convert_pickles(
    source: Path, target: Path, allow: bool, progress: Callable[[str], None] = lambda line: None
) -> ConversionReport:
    """Convert a pickle shard, or a folder of them, into a folder of JSONL or tar files of the same names.

    Raises:
        ValueError: ``allow`` is not set, a shard is refused or damaged, its layout is not known, or a file is in the
            way. Files of shards before it are complete.
    """
    if not allow:
        raise ValueError(
            "pickle files can hold programs, so none is read unasked: --allow-pickle reads plain data out of them, "
            "runs nothing and refuses all else"
        )
    shards = [path for path in find_files(str(source), ".pkl") if path.suffix == ".pkl"]
    if not shards:
        raise ValueError(f"{source} is no .pkl file")
    target.mkdir(parents=True, exist_ok=True)
    report = ConversionReport()
    for shard in shards:
        records = read_shard(shard)
        out = _write(shard, records, target, report)
        progress(f"{shard.name} -> {out.name}: {len(records)} records")
        report.files.append(out)
    return report


def _write(shard: Path, records: list[dict[str, Any]], target: Path, report: ConversionReport) -> Path:
    first: Mapping[str, Any] = records[0] if records else {}
    if {"text_list", "image_info"} <= set(first):
        convert: Callable[[Mapping[str, Any]], Any] = _document
        ending = ".jsonl"
    elif "question" in first and {"answer", "answer:"} & set(first):
        convert, ending = _question, ".jsonl"
    elif {"image", "rawbytes"} & set(first) and {"text", "caption"} & set(first):
        convert, ending = _pair, ".tar"
    else:
        known = ", ".join(map(str, list(first)[:12])) or "nothing"
        raise ValueError(f"{shard}: no known layout; its first record has the fields {known}")
    out = target / f"{shard.stem}{ending}"
    if out.exists():
        raise ValueError(f"{out} is there already: remove it, or name another folder")
    converted = _converted(records, convert, report)
    with atomic_path(out) as temporary:
        if ending == ".tar":
            _write_tar(temporary, converted)
        else:
            with temporary.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in converted)
    return out


def _converted(
    records: Iterable[dict[str, Any]], convert: Callable[[Mapping[str, Any]], Any], report: ConversionReport
) -> Iterator[Any]:
    for record in records:
        try:
            converted = convert(record)
        except (_LeftOut, RecursionError) as reason:
            report.left_out[str(reason) if isinstance(reason, _LeftOut) else "nested too deep"] += 1
            continue
        report.records += 1
        yield converted


class _LeftOut(Exception):
    """A record cannot be converted; the message is the reason that is counted."""


def _document(record: Mapping[str, Any]) -> dict[str, Any]:
    """MMC4's own layout, pictures as base64; the matrix of similarities, which nothing reads, is left out."""
    infos = record.get("image_info")
    if not isinstance(infos, list | tuple) or not all(isinstance(info, Mapping) for info in infos):
        raise _LeftOut("image_info is no list of mappings")
    kept = []
    for info in infos:
        info = dict(info)
        for name in ("image_base64", "image", "rawbytes"):
            if info.get(name) is not None:
                info["image_base64"] = _base64(_picture(info[name]))
                break
        kept.append({name: value for name, value in info.items() if name not in ("image", "rawbytes")})
    rest = {name: value for name, value in record.items() if name not in ("image_info", "similarity_matrix")}
    return dict(_plain({**rest, "image_info": kept}, [0]))


def _question(record: Mapping[str, Any]) -> dict[str, Any]:
    """LLaVA's layout: the pictures, which are names of files or base64, before the question."""
    question, answer = record.get("question"), record.get("answer:", record.get("answer"))
    if not isinstance(question, str) or not isinstance(answer, str):
        raise _LeftOut("question or answer is not text")
    images = record.get("image:", record.get("image"))
    listed = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
    named = [
        image if isinstance(image, str) and Path(image[-8:]).suffix in (".jpg", ".jpeg", ".png") else _data_url(image)
        for image in listed
    ]
    marks = "<image>\n" * len(named)
    words = _MARK.sub(" ", question).strip()
    turns = [{"from": "human", "value": marks + words}, {"from": "gpt", "value": answer.strip()}]
    return {**({"images": named} if named else {}), "conversations": turns}


def _pair(record: Mapping[str, Any]) -> tuple[bytes, str]:
    """A picture's file and its caption."""
    caption = record.get("text", record.get("caption"))
    if not isinstance(caption, str) or not caption.strip():
        raise _LeftOut("no caption")
    return _picture(record.get("image", record.get("rawbytes"))), caption.strip()


def _write_tar(path: Path, pairs: Iterable[tuple[bytes, str]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, (picture, caption) in enumerate(pairs):
            for ending, content in ((_MAGIC[picture[:2]], picture), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{number:06d}.{ending}")
                member.size, member.mode = len(content), 0o644
                archive.addfile(member, io.BytesIO(content))


def _picture(value: Any) -> bytes:
    """The file of a picture given as bytes, base64 or pixels ``(H, W, 3)`` uint8."""
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3:
        out = io.BytesIO()
        Image.fromarray(value).save(out, "PNG")
        return out.getvalue()
    if isinstance(value, str):
        try:
            value = base64.b64decode("".join(value.split()), validate=True)
        except (binascii.Error, ValueError):
            raise _LeftOut("a picture that is not base64") from None
    if not isinstance(value, bytes | bytearray):
        raise _LeftOut("no picture")
    if bytes(value[:2]) not in _MAGIC:
        raise _LeftOut("a picture that is not JPEG, PNG, WebP or GIF")
    return bytes(value)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _data_url(value: Any) -> str:
    content = _picture(value)
    kind = {"jpg": "jpeg"}.get(_MAGIC[content[:2]], _MAGIC[content[:2]])
    return f"data:image/{kind};base64,{_base64(content)}"


def _plain(value: Any, seen: list[int]) -> Any:
    """A value as JSON can hold it; shared and nested content is counted as often as it would be written."""
    seen[0] += 1 + (len(value) // 1000 if isinstance(value, str | bytes | bytearray) else 0)
    if seen[0] > _LIMIT:
        raise _LeftOut(f"more than {_LIMIT} values")
    if isinstance(value, np.ndarray):
        seen[0] += value.size
        return _plain(value.tolist(), seen) if seen[0] <= _LIMIT else _plain(None, seen)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, seen) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, seen) for item in value]
    if isinstance(value, bytes | bytearray):
        return _base64(bytes(value))
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    raise _LeftOut(f"a {type(value).__name__}")
