"""The builder: same arguments, same bytes; licences with the data; nothing half-written."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from pathlib import Path

import pytest

from vilau.data.nano import build, sources
from vilau.data.nano.build import Manifest, build_nano
from vilau.data.nano.dataset import FORM_OF, NanoDataset
from vilau.data.nano.shards import from_members, read_shard, to_members
from vilau.data.nano.world import World
from vilau.files import file_digest


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """Data built of the shipped sprites."""
    out = tmp_path_factory.mktemp("nano") / "data"
    return out, build_nano(out, samples=66, download=False)


def files(folder: Path) -> dict[str, str]:
    """All files of a folder with their digests."""
    return {
        path.relative_to(folder).as_posix(): file_digest(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def test_equal_arguments_give_equal_bytes(built: tuple[Path, Manifest], tmp_path: Path) -> None:
    """Protects reproduction: a second build is the same, byte for byte; another seed is not."""
    out, manifest = built
    again = build_nano(tmp_path / "again", samples=66, download=False)
    assert again == manifest and files(tmp_path / "again") == files(out)
    assert build_nano(tmp_path / "other", samples=66, download=False, seed=1).digest != manifest.digest


def test_manifest_counts_and_verifies(built: tuple[Path, Manifest], tmp_path: Path) -> None:
    """Protects users of the data: counts, digests, sources and licences are what lies there, and damage is noticed."""
    out, manifest = built
    assert Manifest.load(out) == manifest
    manifest.verify(out)
    assert sum(shard.samples for shard in manifest.shards if shard.split == "train") == 66
    assert {shard.key for shard in manifest.shards} == set(FORM_OF)
    for source in manifest.sources:
        assert (out / "LICENSES" / source.licence_file).is_file()
        assert source.package in (out / "ATTRIBUTION.txt").read_text(encoding="utf-8")
    listed = {"manifest.json", "ATTRIBUTION.txt", "sprites.zip", *(shard.path for shard in manifest.shards)}
    assert {name for name in files(out) if not name.startswith("LICENSES/")} == listed
    broken = dataclasses.replace(manifest, sprites="0" * 64)
    with pytest.raises(ValueError, match=r"sprites\.zip.*--force"):
        broken.verify(out)
    with pytest.raises(ValueError, match="vilau data nano"):
        Manifest.load(tmp_path)


def test_shards_give_the_samples_back(built: tuple[Path, Manifest]) -> None:
    """Protects training from shards: reading gives the very samples that the dataset makes, pixels included."""
    out, manifest = built
    world = World.load(out)
    for place, key in enumerate(FORM_OF):
        shard = next(shard for shard in manifest.shards if shard.key == key and shard.split == "train")
        dataset = NanoDataset(world, {key: 1.0}, "train", place, size=shard.samples)
        read = list(read_shard(out / shard.path))
        assert len(read) == shard.samples
        for index, sample in enumerate(read):
            wanted = dataset[index]
            assert (sample.id, sample.form) == (wanted.id, wanted.form) and dict(sample.meta) == dict(wanted.meta)
            assert to_members(sample) == to_members(wanted)


def test_shards_have_fixed_times_and_owners(built: tuple[Path, Manifest]) -> None:
    """Protects equal bytes on other machines: no clock and no user enters a shard."""
    out, manifest = built
    with tarfile.open(out / manifest.shards[0].path) as archive:
        for member in archive:
            assert (member.mtime, member.uid, member.gid, member.uname, member.mode) == (0, 0, 0, "", 0o644)


def test_existing_folders_are_left_alone(tmp_path: Path) -> None:
    """Protects users' files: without force nothing is replaced, with it only nano data is."""
    out = tmp_path / "data"
    out.mkdir()
    build_nano(out, samples=2, download=False)
    before = files(out)
    with pytest.raises(ValueError, match="--force"):
        build_nano(out, samples=3, download=False)
    assert files(out) == before
    assert build_nano(out, samples=3, download=False, force=True).samples == 3
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("dear all")
    with pytest.raises(ValueError, match="not nano data"):
        build_nano(other, samples=3, download=False, force=True)
    assert (other / "letter.txt").read_text() == "dear all"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "other"]


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    """Protects from half-written data: when the work fails in the middle, no folder stays behind."""
    sprites = build.shipped_sprites(("noto",))
    sprites["noto/dog.png"] = b"no picture"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError):
        patch.setattr(build, "shipped_sprites", lambda styles: sprites)
        build_nano(tmp_path / "data", samples=200, download=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [({"samples": 0}, "samples=0"), ({"styles": ("apple",)}, "apple.*noto, twemoji"), ({"styles": ()}, "one or more")],
)
def test_wrong_arguments_are_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    """Protects the command line: a message names the value and the limit, and nothing is written."""
    with pytest.raises(ValueError, match=said):
        build_nano(tmp_path / "data", download=False, **change)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_tarballs_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects from other bytes than those checked: a wrong tarball in the cache is named and not used; with npm out of
    reach and nothing in the cache, the remedy is said."""
    (tmp_path / sources.NAMES.tarball).write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"sha512-.*delete the file"):
        sources.fetch(sources.NAMES, tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"npm.*not installed.*unicode-emoji-json-0\.9\.0\.tgz"):
        build_nano(tmp_path / "data", cache=tmp_path / "empty")
    assert not (tmp_path / "data").exists()


def test_members_are_read_by_name(tmp_path: Path) -> None:
    """Protects reading packages: members come under our names, a missing one is named."""
    path = tmp_path / "a.tgz"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("package/a.png")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"abc"))
    assert sources.read_members(path, {"package/a.png": "noto/dog.png"}) == {"noto/dog.png": b"abc"}
    with pytest.raises(ValueError, match=r"lacks package/b\.png"):
        sources.read_members(path, {"package/a.png": "a", "package/b.png": "b"})


def test_broken_samples_are_refused() -> None:
    """Protects readers: a sample without its record or its picture is named, never half-read."""
    with pytest.raises(ValueError, match=r"lacks its \.json"):
        from_members({"0.png": b""})
    with pytest.raises(ValueError, match="not one of ours"):
        from_members({"json": b"{}"})
    dataset = NanoDataset(World.load(), {"image_text": 1.0}, size=1)
    members = to_members(dataset[0])
    del members["0.png"]
    with pytest.raises(ValueError, match=r"lacks its picture 0\.png"):
        from_members(members)
