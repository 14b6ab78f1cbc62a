"""Codes computed once: whole samples with the codes of their pictures in place of pixels, in shards on disk.

The vision tower is frozen in stages 2 and 3, so its codes can be stored and training never touches a pixel (paper,
section 3.2). A store keeps samples under the numbers they have where they come from, bad ones with their reason, so
whoever reads by number sees the same sequence as without it. Shards are safetensors with the codes of all frames, and
the texts as JSON lines beside them; each is written beside, then renamed, so that any number of processes can share
the work and a killed one loses its shard in progress only.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..files import atomic_path, write_json, write_text
from .sample import Part, Sample, Turn
from .sources.source import BadSample

INFO = "codes.json"
FRAMES_AT_ONCE = 64

Encode = Callable[[np.ndarray], np.ndarray]
Read = Callable[[int], tuple[Sample, Sequence[np.ndarray]]]
"""Number -> a sample and the squares ``(S, S, 3)`` uint8 to encode, `variants` per frame; `BadSample` for a bad one."""


@dataclass(frozen=True)
class StoreInfo:
    """What a store holds: written once, before its first shard; a store made with other facts is another store.

    data, tower: digests of where the samples come from and of the tower's weights; files: of the data's files, "" where
    there are none, and in stores made before it was kept; positions, depth, codebook_size:
    of the codes ``(P, D)`` in [0, K); samples: how many, bad ones included; variants: codes per frame, 2 where a frame
    is read both squashed and cut to its centre square; shard_size: samples per shard.
    """

    data: str
    tower: str
    positions: int
    depth: int
    codebook_size: int
    samples: int
    variants: int = 1
    shard_size: int = 4096
    files: str = ""

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.samples // self.shard_size)

    def span(self, shard: int) -> range:
        """Return the numbers of the samples of a shard."""
        return range(shard * self.shard_size, min(self.samples, (shard + 1) * self.shard_size))


def create_store(folder: Path, info: StoreInfo) -> None:
    """Make the folder of a store, or go on with the one that is there.

    Raises:
        ValueError: the folder holds a store of other data or of another tower; the facts that differ are named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / INFO
    if not path.is_file():
        write_json(asdict(info), path, durable=True)
    present = read_info(folder)
    different = [name for name, value in asdict(info).items() if getattr(present, name) != value]
    if different:
        raise ValueError(
            f"{folder} holds codes made with another {', '.join(different)}: choose another folder, or remove this one"
        )


def read_info(folder: Path) -> StoreInfo:
    """Return what a store holds; ``ValueError`` if the folder is none."""
    path = folder / INFO
    try:
        return StoreInfo(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder} is no store of codes: {INFO} is missing or damaged; run `vilau data codes`") from (
            error
        )


def missing_shards(folder: Path, info: StoreInfo) -> list[int]:
    """Return the numbers of the shards that are not written yet."""
    return [shard for shard in range(info.shards) if not _codes_path(folder, shard).is_file()]


def write_shard(
    folder: Path, info: StoreInfo, shard: int, read: Read, encode: Encode, on_sample: Callable[[], object]
) -> None:
    """Encode and write one shard.

    Args:
        encode: frames ``(F, S, S, 3)`` uint8 -> codes ``(F, P, D)``.
        on_sample: called after each sample, for progress.
    """
    records: list[dict[str, Any]] = []
    coded: list[np.ndarray] = []
    waiting: list[np.ndarray] = []
    for number in info.span(shard):
        try:
            sample, squares = read(number)
        except BadSample as error:
            records.append({"bad": error.kind, "message": str(error)})
        else:
            assert len(squares) == info.variants * len(sample.frames)
            records.append(_to_record(sample))
            waiting.extend(squares)
        if len(waiting) >= FRAMES_AT_ONCE:
            coded.append(_encode(encode, waiting, info))
            waiting = []
        on_sample()
    if waiting:
        coded.append(_encode(encode, waiting, info))
    kind = np.int16 if info.codebook_size <= 1 << 15 else np.int32
    codes = np.concatenate(coded) if coded else np.zeros((0, info.positions, info.depth))
    lines = "".join(json.dumps(record) + "\n" for record in records)  # ASCII: any text, lone surrogates too
    text_path, codes_path = _text_path(folder, shard), _codes_path(folder, shard)
    write_text(lines, text_path, durable=True)
    with atomic_path(codes_path, durable=True) as beside:  # last: it counts
        save_file({"codes": codes.astype(kind)}, beside)


class CodeStore:
    """Read a store: samples by number, whose frames are codes ``(P, D)``, or ``(2, P, D)`` with two variants.

    Args:
        needed: the shards that will be read; all if None.

    Raises:
        ValueError: the folder is no store, or shards that are needed are not written yet.
    """

    def __init__(
        self, folder: str | os.PathLike[str], shards_in_memory: int = 8, needed: Container[int] | None = None
    ) -> None:
        self.folder = Path(folder)
        self.info = read_info(self.folder)
        missing = [n for n in missing_shards(self.folder, self.info) if needed is None or n in needed]
        if missing:
            raise ValueError(
                f"{self.folder}: {len(missing)} of {self.info.shards} shards are not written yet; "
                "run `vilau data codes` again to go on"
            )
        self._limit = shards_in_memory
        self._shards: OrderedDict[int, tuple[list[dict[str, Any]], list[int], np.ndarray]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": OrderedDict()}

    def __len__(self) -> int:
        return self.info.samples

    def __getitem__(self, index: int) -> Sample:
        """Return a sample; ``BadSample`` where it was bad when the codes were made."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is out of range: the store has {len(self)}")
        shard, place = divmod(index, self.info.shard_size)
        records, starts, codes = self._shard(shard)
        record = records[place]
        if "bad" in record:
            raise BadSample(record["bad"], record["message"])
        return _from_record(record, _by_frame(codes[starts[place] : starts[place + 1]], self.info.variants))

    def _shard(self, number: int) -> tuple[list[dict[str, Any]], list[int], np.ndarray]:
        if number not in self._shards:
            try:
                lines = _text_path(self.folder, number).read_bytes().split(b"\n")  # no other line end: texts hold them
                records = [json.loads(line) for line in lines if line]
                with safe_open(_codes_path(self.folder, number), "numpy") as file:
                    codes = file.get_tensor("codes")
            except (OSError, ValueError, SafetensorError) as error:
                raise ValueError(
                    f"{self.folder}: shard {number} is damaged; remove it and run `vilau data codes`"
                ) from (error)
            counts = [record.get("frames", 0) * self.info.variants for record in records]
            starts = np.concatenate([[0], np.cumsum(counts)]).tolist()
            if len(records) != len(self.info.span(number)) or starts[-1] != len(codes):
                raise ValueError(f"{self.folder}: shard {number} is incomplete; remove it and run `vilau data codes`")
            self._shards[number] = (records, starts, codes)
            if len(self._shards) > self._limit:
                self._shards.popitem(last=False)
        self._shards.move_to_end(number)
        return self._shards[number]


def verify(store: CodeStore, read: Read, encode: Encode, numbers: Iterable[int]) -> int:
    """Encode some samples again and compare; return how many frames agreed.

    Raises:
        ValueError: a sample is not what the store holds, or is bad in one of the two only; its number is named.
    """
    compared = 0
    remedy = f"the data changed since {store.folder} was made; remove that folder and run `vilau data codes`"
    for number in numbers:
        held: Sample | BadSample
        try:
            held = store[number]
        except BadSample as bad:
            held = bad
        try:
            fresh, squares = read(number)
        except BadSample as bad:
            if isinstance(held, BadSample):
                continue
            raise ValueError(f"sample {number} ({held.id}) cannot be read any more ({bad}): {remedy}") from bad
        if isinstance(held, BadSample):
            raise ValueError(f"sample {number} ({fresh.id}) can be read now, but could not ({held}): {remedy}")
        codes = _encode(encode, list(squares), store.info) if squares else np.zeros((0, 0, 0))
        swapped = _from_record(_to_record(fresh), _by_frame(codes, store.info.variants))
        if not _equal(swapped, held):
            raise ValueError(
                f"{store.folder}: sample {number} ({fresh.id}) is not what the store holds: other data, another "
                "tower or another machine's rounding; remove that folder and run `vilau data codes`"
            )
        compared += len(fresh.frames)
    return compared


def _by_frame(codes: np.ndarray, variants: int) -> Iterator[np.ndarray]:
    return iter(codes if variants == 1 else codes.reshape(-1, variants, *codes.shape[1:]))


def _encode(encode: Encode, frames: list[np.ndarray], info: StoreInfo) -> np.ndarray:
    codes = encode(np.stack(frames))
    assert codes.shape == (len(frames), info.positions, info.depth), f"the tower gave {codes.shape}"
    return codes


def _to_record(sample: Sample) -> dict[str, Any]:
    turns = [
        {"role": turn.role, "parts": [{part.kind: part.text or len(part.frames)} for part in turn.parts]}
        for turn in sample.turns
    ]
    record = {"id": sample.id, "form": sample.form, "frames": len(sample.frames), "turns": turns}
    return {**record, "meta": dict(sample.meta)} if sample.meta else record


def _from_record(record: dict[str, Any], frames: Iterator[np.ndarray]) -> Sample:
    turns = []
    for turn in record["turns"]:
        parts = []
        for part in turn["parts"]:
            ((kind, value),) = part.items()
            text = kind == "text"
            parts.append(
                Part(kind, value or "") if text else Part(kind, frames=tuple(next(frames) for _ in range(value)))
            )
        turns.append(Turn(turn["role"], tuple(parts)))
    return Sample(record["id"], record["form"], tuple(turns), record.get("meta", {}))


def _equal(one: Sample, other: Sample) -> bool:
    same = [np.array_equal(a, b) for a, b in zip(one.frames, other.frames, strict=False)]
    return _to_record(replace(one, meta={})) == _to_record(replace(other, meta={})) and all(same)


def _codes_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:06d}.safetensors"


def _text_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:06d}.jsonl"
