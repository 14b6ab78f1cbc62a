"""The registry packages the nano world is made from: fetched with the ordinary client, checked against digests."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from vilau.data.nano.world import ASSETS


@dataclass(frozen=True)
class Source:
    """One package.

    Args:
        package: its name in the registry ``registry`` (``npm`` or ``PyPI``).
        version: the version that was checked.
        integrity: ``sha512-`` and the digest of its tarball in base64; empty where pip checks it.
        licence: SPDX name of the licence of what is taken from it.
        licence_file: its text under ``LICENSES/``.
        attribution: whom to credit, and for what.
    """

    registry: str
    package: str
    version: str
    integrity: str
    licence: str
    licence_file: str
    attribution: str

    @property
    def tarball(self) -> str:
        """File name of the package's tarball."""
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


STYLE_SOURCES: dict[str, Source] = {
    "noto": Source(
        "npm",
        "emoji-datasource-google",
        "16.0.0",
        "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
        "Apache-2.0",
        "Apache-2.0.txt",
        "Noto Emoji, copyright Google LLC and the Noto Emoji authors; 64 px renders packaged by Cal Henderson.",
    ),
    "twemoji": Source(
        "npm",
        "emoji-datasource-twitter",
        "16.0.0",
        "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
        "CC-BY-4.0",
        "CC-BY-4.0.txt",
        "Twemoji, copyright Twitter, Inc (X Corp.) and other contributors; 64 px renders packaged by Cal Henderson.",
    ),
}
STYLE_FOLDERS = {"noto": "package/img/google/64", "twemoji": "package/img/twitter/64"}
NAMES = Source(
    "npm",
    "unicode-emoji-json",
    "0.9.0",
    "sha512-HdrQW/7SdbXUsTd8uTATv7LvQJkCSgbAgRCDCtOhQ6xn3EAx+xZHQtRniOXWJK3ywIqPegkNhP4U4EbuFsiQng==",
    "MIT",
    "MIT-unicode-emoji-json.txt",
    "Names of emoji: unicode-emoji-json by Mu-An Chiou.",
)


def easy_vqa_source() -> Source:
    """easy-VQA in the version installed here; pip has checked its digest."""
    try:
        version = metadata.version("easy-vqa")
    except metadata.PackageNotFoundError:
        raise ValueError(
            "easy-VQA needs the package easy-vqa, which is not installed: `pip install easy-vqa`"
        ) from None
    said = "easy-VQA: pictures, questions and answers by Victor Zhou."
    return Source("PyPI", "easy-vqa", version, "", "MIT", "MIT-easy-vqa.txt", said)


def default_cache() -> Path:
    """Where tarballs are kept: ``$XDG_CACHE_HOME/vilau/npm``, or the same under ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vilau" / "npm"


def integrity_of(path: Path) -> str:
    """``sha512-`` and the file's digest in base64, as npm writes it."""
    with path.open("rb") as file:
        return "sha512-" + base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()


def fetch(source: Source, cache: Path) -> Path:
    """The package's tarball in ``cache``, fetched by ``npm pack`` if it is not there yet, with the right digest.

    Raises:
        ValueError: npm is missing or fails, or the digest is another.
    """
    path = cache / source.tarball
    if not path.is_file():
        _pack(source, path)
    found = integrity_of(path)
    if found != source.integrity:
        raise ValueError(
            f"{path} has the digest {found}, but {source.package} {source.version} has {source.integrity}: "
            "delete the file and run again"
        )
    return path


def _pack(source: Source, path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            f"{source.package} {source.version} is not in {path.parent} and npm, which fetches it, is not installed: "
            f"install npm, put {source.tarball} there, or build from the shipped sprites"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".fetch-") as folder:
        command = [npm, "pack", f"{source.package}@{source.version}", "--loglevel=error", "--pack-destination", folder]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        packed = Path(folder) / source.tarball
        if done.returncode != 0 or not packed.is_file():
            told = [line for line in done.stderr.splitlines() if line.startswith("npm error")] or ["no message"]
            said = told[min(1, len(told) - 1)].removeprefix("npm error").strip()
            raise ValueError(
                f"npm could not fetch {source.package} {source.version} (exit code {done.returncode}: {said}): "
                f"check the network, or put {source.tarball} into {path.parent}"
            )
        packed.replace(path)


def read_members(tarball: Path, wanted: dict[str, str]) -> dict[str, bytes]:
    """Members of a tarball: ``wanted`` maps names within it to names in the answer.

    Raises:
        ValueError: one is missing.
    """
    found: dict[str, bytes] = {}
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            name = wanted.get(member.name)
            if name is None or not member.isfile():
                continue
            file = archive.extractfile(member)
            assert file is not None
            found[name] = file.read()
            if len(found) == len(wanted):
                break
    missing = [inside for inside, name in wanted.items() if name not in found]
    if missing:
        raise ValueError(f"{tarball} lacks {missing[0]} and {len(missing) - 1} others: is it another version?")
    return found


def copy_licences(sources: tuple[Source, ...], out: Path) -> None:
    """Write the licence texts of the sources to ``out/LICENSES``."""
    folder = out / "LICENSES"
    folder.mkdir(parents=True, exist_ok=True)
    names = {source.licence_file for source in sources}
    if any(source.package.startswith("emoji-datasource") for source in sources):
        names.add("MIT-emoji-datasource.txt")
    for name in sorted(names):
        (folder / name).write_bytes((ASSETS / "LICENSES" / name).read_bytes())


def attribution(sources: tuple[Source, ...]) -> str:
    """A text that credits every source."""
    lines = ["This data was made from the following works; the licence texts are in LICENSES/.", ""]
    for source in sources:
        lines += [
            f"{source.attribution}",
            f"  {source.registry} package {source.package} {source.version}, {source.licence}",
            "",
        ]
    lines.append("Emoji are scaled, placed on coloured backgrounds, repeated and moved.")
    return "\n".join(lines) + "\n"
