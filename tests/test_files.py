"""Files appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from vilau.files import atomic_path, file_digest, open_to_readers, write_json


@pytest.mark.parametrize("durable", [False, True])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, durable: bool) -> None:
    """A crash half-way neither spoils the file that was there nor leaves a half beside it."""
    target = tmp_path / "a.json"
    write_json({"n": 1}, target, durable)
    with pytest.raises(RuntimeError), atomic_path(target, durable) as beside:
        beside.write_text("{")
        raise RuntimeError
    assert json.loads(target.read_text()) == {"n": 1} and list(tmp_path.iterdir()) == [target]


def test_where_nothing_can_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    """A missing folder, or a folder of that name, is an error before the block runs."""
    with pytest.raises(FileNotFoundError, match="create it first"), atomic_path(tmp_path / "no" / "a.txt"):
        pytest.fail("the block must not run")
    with pytest.raises(ValueError, match="it is a folder"), atomic_path(tmp_path):
        pytest.fail("the block must not run")


def test_digest_is_that_of_sha256sum(tmp_path: Path) -> None:
    """Recorded digests can be checked with everyone's tools."""
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_a_failed_write_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    """The name beside it is ours: nobody who gave `a.txt` should have to read it."""
    with (
        pytest.raises(OSError, match=r"cannot write .*/a\.txt: No space left") as caught,
        atomic_path(tmp_path / "a.txt") as p,
    ):
        raise OSError(28, "No space left on device", str(p))
    assert ".tmp" not in str(caught.value) and caught.value.errno == 28


def test_what_is_published_can_be_read_by_others(tmp_path: Path) -> None:
    """A model trained by one user is served by another: weights have the permissions that the umask gives new files."""
    (tmp_path / "inner").mkdir()
    weights = tmp_path / "inner" / "model.safetensors"
    weights.touch(mode=0o600)
    before = os.umask(0o027)
    try:
        open_to_readers(tmp_path)
        assert weights.stat().st_mode & 0o777 == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
