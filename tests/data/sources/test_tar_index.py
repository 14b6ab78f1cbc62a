"""The index says exactly where each member of a tar file lies, and is made anew when the file changes."""

from __future__ import annotations

import os
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.sources.conftest import write_tar
from vilau.data.sources.source import BadSample
from vilau.data.sources.tar_index import TarIndex, split_name

KEYS = st.text("abcXYZ019_-é漢 ", min_size=1, max_size=140)
FOLDERS = st.sampled_from(["", "part/", "a/long/" * 20, "./"])
ENDINGS = st.sampled_from(["jpg", "json", "txt", "0.png", "seg.npy"])
SAMPLES = st.lists(
    st.tuples(FOLDERS, KEYS, st.dictionaries(ENDINGS, st.binary(max_size=1200), min_size=1)), min_size=1, max_size=12
)


@settings(max_examples=60, deadline=None)
@given(SAMPLES, st.booleans())
def test_any_tar_file_is_read_as_tarfile_reads_it(samples: list, cached: bool) -> None:
    """Long and foreign names, folders, empty members: keys, endings and bytes are those that the library sees."""
    with tempfile.TemporaryDirectory() as folder:
        members = [
            (f"{place}{number}{key}.{ending}", content)
            for number, (place, key, endings) in enumerate(samples)
            for ending, content in endings.items()
        ]
        path = write_tar(Path(folder) / "a.tar", members)
        expected: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as archive:
            for member in archive:
                key, ending = split_name(member.name)
                expected.setdefault(key, {})[ending] = archive.extractfile(member).read()
        cache = Path(folder) / "cache" if cached else None
        for index in (TarIndex(path, cache), TarIndex(path, cache)):
            read = [index.sample(number) for number in range(len(index))]
            found = {sample.key: {ending: index.read(sample, ending) for ending in sample.members} for sample in read}
            assert found == expected
            assert [sample.key for sample in read] == list(expected)


def test_the_index_follows_the_file(tmp_path: Path) -> None:
    """Another size or time of the shard, or a damaged index, makes a new index; otherwise it stays as it is."""
    path = write_tar(tmp_path / "a.tar", [("0.txt", b"old")])
    index = TarIndex(path)
    beside = tmp_path / ".a.tar.index"
    first = beside.stat().st_ino
    TarIndex(path)
    assert beside.stat().st_ino == first
    write_tar(path, [("0.txt", b"new"), ("1.txt", b"more")])
    os.utime(path, ns=(1, 1))
    index = TarIndex(path)
    assert [index.read(index.sample(n), "txt") for n in range(len(index))] == [b"new", b"more"]
    for damage in (beside.read_bytes()[:-1], b"", b"vilau-tar-index-1\n" + b"\xff" * 400):
        beside.write_bytes(damage)
        assert len(TarIndex(path)) == 2


def test_a_shard_that_cannot_be_written_beside_uses_the_cache(tmp_path: Path) -> None:
    """Data on a read-only disk is indexed in the cache folder, under a name of its own for each path."""
    shards = [write_tar(tmp_path / name / "a.tar", [("0.txt", name.encode())]) for name in ("one", "two")]
    cache = tmp_path / "cache"
    for path in shards:
        index = TarIndex(path, cache)
        assert index.read(index.sample(0), "txt") == path.parent.name.encode()
        assert not (path.parent / ".a.tar.index").exists()
    assert len(list(cache.iterdir())) == 2


def test_members_that_are_not_there(tmp_path: Path) -> None:
    """A missing member is a bad sample that says what there is; a shard that vanished, too."""
    path = write_tar(tmp_path / "a.tar", [("0.txt", b"words"), ("0.json", b"{}")])
    index = TarIndex(path, tmp_path / "cache")
    with pytest.raises(BadSample, match="it has txt, json") as caught:
        index.read(index.sample(0), "jpg")
    assert caught.value.kind == "missing_file"
    path.unlink()
    with pytest.raises(BadSample, match="cannot be read"):
        index.read(index.sample(0), "txt")
