"""The vision tower as a tokenizer: many pictures to one file of codes, and back to pictures.

tower = vilau.VisionTower.from_pretrained(folder)
done = encode_pictures(tower, files)
write_codes(done, Path("codes.safetensors"), tower)
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vilau.checkpoints.digest import tower_digest
from vilau.files import atomic_path
from vilau.modeling.vision_tower import VisionTower
from vilau.processing.images import SquareMode, load_image, normalise, resize_square, save_image, to_pixels

FORMAT = "vilau-codes-1"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CodedPictures:
    """``codes`` (N, P, D), int16 or int32, the `names` and original `sizes` (width, height), and what was left out.

    `mode` says how pictures became squares; `tower` is the digest of the tower and `codebook_size` its K, where known.
    """

    codes: np.ndarray
    names: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    mode: str
    tower: str
    codebook_size: int
    image_size: int
    bad: tuple[tuple[str, str], ...] = field(default=())


def encode_pictures(
    tower: VisionTower,
    files: Sequence[Path],
    batch_size: int = 32,
    mode: SquareMode = "squash",
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> CodedPictures:
    """Encode pictures with a tower in evaluation mode.

    Args:
        files: pictures; of an animation the first frame.
        batch_size: pictures encoded at a time.
        mode: `squash` the whole picture into a square, or `crop` the middle square.
        skip_bad: leave out what cannot be read, with its reason in `bad`, instead of an error.
        progress: called with (pictures read, pictures in all).

    Raises:
        ValueError: the tower has continuous tokens, a picture cannot be read, or none is left.
    """
    if not tower.quantizer.discrete:
        raise ValueError("this vision tower has continuous tokens (quantizer 'none') and makes no codes; use another")
    size = tower.config.image_size
    coded, waiting, bad = [], [], []
    names, sizes = [], []
    for number, file in enumerate(files):
        try:
            picture = load_image(file)
        except (ValueError, OSError) as error:
            if not skip_bad:
                raise
            bad.append((str(file), " ".join(str(error).split())))
        else:
            names.append(str(file))
            sizes.append(picture.size)
            waiting.append(np.asarray(resize_square(picture, size, mode)))
        if waiting and (len(waiting) == batch_size or number + 1 == len(files)):
            coded.append(_encode(tower, np.stack(waiting)))
            waiting = []
        if progress is not None:
            progress(number + 1, len(files))
    if not coded:
        raise ValueError(f"no picture of {len(files)} can be read" + (f"; the first: {bad[0][1]}" if bad else ""))
    codes = np.concatenate(coded)
    small = tower.config.codebook_size <= 1 << 15
    return CodedPictures(
        codes.astype(np.int16 if small else np.int32),
        tuple(names),
        tuple(sizes),
        mode,
        tower_digest(tower),
        tower.config.codebook_size,
        size,
        tuple(bad),
    )


def _encode(tower: VisionTower, frames: np.ndarray) -> np.ndarray:
    pixels = torch.from_numpy(normalise(frames)).to(tower.device, tower.dtype)
    return tower.encode(pixels).cpu().numpy()


def write_codes(coded: CodedPictures, target: Path) -> None:
    """Write codes as safetensors; the file appears whole or not at all."""
    facts = {
        "format": FORMAT,
        "names": json.dumps(coded.names, ensure_ascii=False),
        "sizes": json.dumps(coded.sizes),
        "mode": coded.mode,
        "tower_sha256": coded.tower,
        "codebook_size": str(coded.codebook_size),
        "image_size": str(coded.image_size),
    }
    with atomic_path(target) as beside:
        beside.write_bytes(save({"codes": np.ascontiguousarray(coded.codes)}, metadata=facts))


def read_codes(file: Path) -> CodedPictures:
    """Read what `write_codes` wrote.

    Raises:
        ValueError: the file is damaged, or was written by something else.
    """
    try:
        with safe_open(file, "numpy") as opened:
            facts: dict[str, Any] = opened.metadata() or {}
            if facts.get("format") != FORMAT or list(opened.keys()) != ["codes"]:
                raise ValueError(f"{file} holds no codes of `vilau tokenize`: its metadata do not say {FORMAT!r}")
            codes = opened.get_tensor("codes")
        coded = CodedPictures(
            codes,
            tuple(json.loads(facts["names"])),
            tuple((int(width), int(height)) for width, height in json.loads(facts["sizes"])),
            facts["mode"],
            facts["tower_sha256"],
            int(facts["codebook_size"]),
            int(facts["image_size"]),
        )
    except (OSError, SafetensorError, KeyError, TypeError, struct.error) as error:
        raise ValueError(f"{file} cannot be read as codes ({error}); make it again with `vilau tokenize`") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: its metadata are damaged ({error}); make it again with `vilau tokenize`") from error
    _check(coded, file)
    return coded


def _check(coded: CodedPictures, file: Path) -> None:
    codes = coded.codes
    if codes.ndim != 3 or codes.dtype.kind != "i" or not len(codes):
        raise ValueError(f"{file}: codes are {codes.dtype} {codes.shape} and not (pictures, positions, depth) integers")
    if not len(coded.names) == len(coded.sizes) == len(codes):
        raise ValueError(f"{file}: {len(codes)} pictures but {len(coded.names)} names and {len(coded.sizes)} sizes")
    if codes.min() < 0 or codes.max() >= coded.codebook_size:
        raise ValueError(
            f"{file}: codes from {codes.min()} to {codes.max()} do not fit a codebook of {coded.codebook_size}"
        )


def decode_pictures(
    tower: VisionTower,
    coded: CodedPictures,
    targets: Sequence[Path],
    batch_size: int = 32,
    depth: int | None = None,
    original_size: bool = False,
    progress: Progress | None = None,
) -> None:
    """Draw pictures from codes into files.

    Args:
        depth: use the first so many codes of each position; all if None.
        original_size: resize each picture to its original size.

    Raises:
        ValueError: the codes were made by another tower, or `depth` is out of range.
    """
    if coded.tower != tower_digest(tower):
        config = tower.config
        raise ValueError(
            f"these codes were made by another vision tower ({coded.image_size} px, {coded.codes.shape[1]} positions x "
            f"{coded.codes.shape[2]} codes out of {coded.codebook_size}, SHA-256 {coded.tower[:12]}...), this one is "
            f"{config.image_size} px, {config.num_positions} x {config.depth} out of {config.codebook_size}, "
            f"{tower_digest(tower)[:12]}...: name the tower that made them with --model"
        )
    deepest = coded.codes.shape[2]
    if depth is not None and not 1 <= depth <= deepest:
        raise ValueError(f"depth is {depth}: these codes have 1 to {deepest}")
    for start in range(0, len(targets), batch_size):
        rows = slice(start, start + batch_size)
        codes = torch.from_numpy(coded.codes[rows].astype(np.int64)).to(tower.device)
        frames = to_pixels(_decode(tower, codes, depth).float().cpu().numpy())
        for frame, size, target in zip(frames, coded.sizes[rows], targets[rows], strict=True):
            picture = Image.fromarray(frame)
            if original_size:
                picture = picture.resize(size, Image.Resampling.BICUBIC)
            save_image(picture, target)
        if progress is not None:
            progress(min(start + batch_size, len(targets)), len(targets))


@torch.no_grad()
def _decode(tower: VisionTower, codes: torch.Tensor, depth: int | None) -> torch.Tensor:
    """Return pixels ``(N, 3, S, S)`` of ``codes`` (N, P, D), or of the first `depth` of each position."""
    if depth is None:
        return tower.decode(codes)
    return tower.decode_features(tower.quantizer.partial_z_q(codes)[..., depth - 1, :]).clamp(-1, 1)


def file_names(names: Sequence[str]) -> list[str]:
    """Return a file name without suffix for each picture: its own, with a number where two are the same."""
    taken: set[str] = set()
    found = []
    for name in names:
        stem = Path(name).stem or "picture"
        candidate, number = stem, 1
        while candidate.lower() in taken:
            number += 1
            candidate = f"{stem}-{number}"
        taken.add(candidate.lower())
        found.append(candidate)
    return found
