"""Build the nano data: sprites out of registry packages, samples in shards, a manifest with licences and credits."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vilau.data.nano import sources as packages
from vilau.data.nano.dataset import FORM_OF, NanoDataset
from vilau.data.nano.shards import Shard, write_shard
from vilau.data.nano.sources import Source
from vilau.data.nano.world import ASSETS, HELDOUT, OBJECTS, STYLES, TRAIN, World, sprite_name
from vilau.files import file_digest

MANIFEST = "manifest.json"
SHARD_SAMPLES = 1000
FORMAT = 1
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Manifest:
    """What a data folder holds and where it comes from; ``manifest.json`` in the folder.

    Args:
        format: version of the layout.
        samples: training samples in all; there are a tenth as many held-out ones.
        styles, image_size, num_frames, seed: what they were rendered with.
        sprites: SHA-256 of ``sprites.zip``.
        sources: the packages, with licences and attributions.
        shards: every tar file with its digest.
        digest: SHA-256 over the digests of sprites and shards: equal for equal data.
    """

    format: int
    samples: int
    styles: tuple[str, ...]
    image_size: int
    num_frames: int
    seed: int
    sprites: str
    sources: tuple[Source, ...]
    shards: tuple[Shard, ...]
    digest: str

    def to_json(self) -> str:
        """The manifest as indented JSON."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """The manifest of a data folder; ValueError when there is none or it is of another format."""
        try:
            record: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if record["format"] != FORMAT:
                raise ValueError(
                    f"{folder / MANIFEST} has format {record['format']}, this version reads {FORMAT}: "
                    "build the data again"
                )
            record["styles"] = tuple(record["styles"])
            record["sources"] = tuple(Source(**source) for source in record["sources"])
            record["shards"] = tuple(Shard(**shard) for shard in record["shards"])
            return cls(**record)
        except OSError as error:
            raise ValueError(
                f"{folder} holds no nano data ({error.strerror}): run `vilau data nano --out {folder}`"
            ) from error
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{folder / MANIFEST} is not a manifest of nano data ({error}): build the data again"
            ) from error

    def verify(self, folder: Path) -> None:
        """Check every file against its digest; ValueError names the first that differs."""
        wanted = {"sprites.zip": self.sprites, **{shard.path: shard.sha256 for shard in self.shards}}
        for name, digest in wanted.items():
            path = folder / name
            found = file_digest(path) if path.is_file() else "nothing"
            if found != digest:
                raise ValueError(
                    f"{path} has the digest {found}, the manifest says {digest}: build the data again with --force"
                )


def fetch_sprites(styles: Sequence[str], cache: Path) -> dict[str, bytes]:
    """PNG files of all objects in the given styles by their names in the archive, out of the packages in ``cache``.

    Missing packages are fetched; the objects' names are checked against Unicode's, with ValueError where they differ.
    """
    names = packages.read_members(packages.fetch(packages.NAMES, cache), {"package/data-by-emoji.json": "names"})[
        "names"
    ]
    known: dict[str, dict[str, str]] = json.loads(names)
    for spec in OBJECTS:
        emoji = "".join(chr(int(code, 16)) for code in spec.code.split("-"))
        found = known.get(emoji, {}).get("name")
        if found != spec.unicode_name:
            raise ValueError(
                f"{spec.code} is named {found!r} in {packages.NAMES.package}, expected {spec.unicode_name!r}"
            )
    sprites: dict[str, bytes] = {}
    for style in styles:
        tarball = packages.fetch(packages.STYLE_SOURCES[style], cache)
        folder = packages.STYLE_FOLDERS[style]
        wanted = {f"{folder}/{spec.code}.png": sprite_name(style, spec.name) for spec in OBJECTS}
        sprites.update(packages.read_members(tarball, wanted))
    return sprites


def shipped_sprites(styles: Sequence[str]) -> dict[str, bytes]:
    """The same files out of the archive that ships with the package."""
    with zipfile.ZipFile(ASSETS / "sprites.zip") as archive:
        return {
            sprite_name(style, spec.name): archive.read(sprite_name(style, spec.name))
            for style in styles
            for spec in OBJECTS
        }


def write_sprites(path: Path, sprites: dict[str, bytes]) -> None:
    """Write an archive of sprites whose bytes depend on the sprites alone."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(sprites):
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, sprites[name])
    path.write_bytes(out.getvalue())


def _parts(total: int) -> dict[str, int]:
    """How many samples each key of the mixture gets, ``total`` in all."""
    keys = tuple(FORM_OF)
    return {key: total // len(keys) + (i < total % len(keys)) for i, key in enumerate(keys)}


def _write_shards(
    out: Path, world: World, samples: int, image_size: int, num_frames: int, seed: int, progress: Progress
) -> Iterator[Shard]:
    done, total = 0, samples + max(1, samples // 10)
    for split, number in ((TRAIN, samples), (HELDOUT, total - samples)):
        for place, (key, count) in enumerate(_parts(number).items()):
            if count == 0:
                continue
            # Each key has a stream of its own, so that ids differ and no two keys show the same scenes.
            dataset = NanoDataset(world, {key: 1.0}, split, seed * 100 + place, image_size, num_frames, size=count)
            for first in range(0, count, SHARD_SAMPLES):
                last = min(first + SHARD_SAMPLES, count)
                path = out / "shards" / split / f"{key}-{first // SHARD_SAMPLES:05d}.tar"
                written, digest = write_shard(path, (dataset[i] for i in range(first, last)))
                done += written
                progress(done, total)
                name = path.relative_to(out).as_posix()
                yield Shard(name, split, key, FORM_OF[key], written, path.stat().st_size, digest)


def _check(out: Path, samples: int, styles: Sequence[str], force: bool) -> None:
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    unknown = [style for style in styles if style not in STYLES]
    if unknown or not styles:
        raise ValueError(f"styles {list(styles)} must be one or more of {', '.join(STYLES)}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} exists and is no folder: name another --out")
    if out.is_dir() and any(out.iterdir()):
        if not force:
            raise ValueError(f"{out} exists and is not empty: name another --out, or replace it with --force")
        if not (out / MANIFEST).is_file():
            raise ValueError(
                f"{out} holds no {MANIFEST}, so it is not nano data and is not replaced: name another --out"
            )


def _fill(
    out: Path,
    samples: int,
    styles: tuple[str, ...],
    sprites: dict[str, bytes],
    sizes: tuple[int, int, int],
    progress: Progress,
) -> Manifest:
    image_size, num_frames, seed = sizes
    write_sprites(out / "sprites.zip", sprites)
    world = World.load(out, styles=styles)
    shards = tuple(_write_shards(out, world, samples, image_size, num_frames, seed, progress))
    used = (*(packages.STYLE_SOURCES[style] for style in styles), packages.NAMES, packages.easy_vqa_source())
    packages.copy_licences(used, out)
    (out / "ATTRIBUTION.txt").write_text(packages.attribution(used), encoding="utf-8")
    archive = file_digest(out / "sprites.zip")
    digest = hashlib.sha256("\n".join([archive, *(shard.sha256 for shard in shards)]).encode()).hexdigest()
    manifest = Manifest(FORMAT, samples, styles, image_size, num_frames, seed, archive, used, shards, digest)
    (out / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def build_nano(
    out: Path,
    *,
    samples: int = 10_000,
    styles: tuple[str, ...] = ("noto",),
    cache: Path | None = None,
    force: bool = False,
    download: bool = True,
    image_size: int = 32,
    num_frames: int = 4,
    seed: int = 0,
) -> Manifest:
    """Write the nano data to the folder ``out``: sprites, shards, licences, attribution, manifest.

    Equal arguments give equal bytes. Everything is written beside ``out`` and renamed at the end; what fails leaves
    nothing behind. Progress goes to stderr.

    Args:
        samples: training samples, spread evenly over the forms; a tenth as many held-out ones come on top.
        styles: of ``noto`` and ``twemoji``.
        cache: folder of the packages' tarballs, fetched once; None is ``vilau/npm`` in the user's cache folder.
        force: replace nano data that is there.
        download: False takes the sprites that ship with this package and fetches nothing.
        image_size, num_frames: side of pictures in pixels, frames of a film.
        seed: another seed, other samples.

    Raises:
        ValueError: an argument is out of range, ``out`` is taken, or a package can not be had.
    """
    out, styles = Path(out), tuple(dict.fromkeys(styles))
    _check(out, samples, styles, force)
    sprites = fetch_sprites(styles, cache or packages.default_cache()) if download else shipped_sprites(styles)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        with _progress_bar() as progress:
            manifest = _fill(partial, samples, styles, sprites, (image_size, num_frames, seed), progress)
        _publish(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _publish(partial: Path, out: Path) -> None:
    """Put the finished folder in its place, in one rename; an old one steps aside first and is deleted last."""
    mask = os.umask(0)
    os.umask(mask)
    partial.chmod(0o777 & ~mask)
    old: Path | None = None
    if out.is_dir():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
        out.replace(old)
    try:
        partial.replace(out)
    except OSError:
        if old is not None:
            old.replace(out)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _progress_bar() -> Iterator[Progress]:
    """A bar on stderr; what it gives is called with (done, total)."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("rendering nano samples", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def write_assets(cache: Path | None = None) -> None:
    """Make the shipped sprites and their manifest again, out of the packages: ``python -m vilau.data.nano.build``."""
    write_sprites(ASSETS / "sprites.zip", fetch_sprites(STYLES, cache or packages.default_cache()))
    used = (*packages.STYLE_SOURCES.values(), packages.NAMES)
    record = {
        "sprites": {
            "file": "sprites.zip",
            "sha256": file_digest(ASSETS / "sprites.zip"),
            "styles": STYLES,
            "objects": len(OBJECTS),
        },
        "tokenizer": {
            "file": "tokenizer/tokenizer.json",
            "sha256": file_digest(ASSETS / "tokenizer" / "tokenizer.json"),
        },
        "sources": [asdict(source) for source in used],
    }
    (ASSETS / MANIFEST).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_assets()
