"""Folders of pictures are read in each of the layouts that people have."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data.sources.conftest import encoded, picture
from vilau.data.sources.folder import FolderConfig
from vilau.data.sources.source import BadSample, ReadOptions


def read_all(source: object) -> list[tuple[str, str]]:
    """Id and caption of all samples, after a look at their pictures."""
    found = []
    for index in range(len(source)):  # type: ignore[arg-type]
        sample = source.read(index)  # type: ignore[attr-defined]
        assert sample.frames[0].shape == (12, 20, 3)
        found.append((sample.id, sample.turns[1].parts[0].text))
    return found


def test_captions_beside_pictures(tmp_path: Path, options: ReadOptions) -> None:
    """Same-name .txt comes first, then .json; a picture without either is a bad sample."""
    root = tmp_path / "set"
    (root / "sub").mkdir(parents=True)
    for number, name in enumerate(["a.png", "sub/b.jpg", "c.webp", ".hidden.png"]):
        (root / name).write_bytes(encoded(number, "JPEG" if name.endswith("jpg") else "PNG"))
    (root / "a.txt").write_text("  an A\n", encoding="utf-8")
    (root / "sub" / "b.json").write_text('{"caption": "a B", "score": 3}')
    source = FolderConfig(path=str(root)).open(options)
    assert [source.shard(index) for index in range(3)] == [".", ".", "sub"]
    assert source.read(0).turns[1].parts[0].text == "an A"
    assert np.array_equal(source.read(0).frames[0], picture(0))
    with pytest.raises(BadSample, match="neither c.txt nor c.json") as caught:
        source.read(1)
    assert caught.value.kind == "missing_text"
    assert source.read(2).id == "set/sub/b.jpg"
    filtered = FolderConfig(path=str(root), filters=["score > 2"]).open(options)
    assert read_all(filtered) == [("set/sub/b.jpg", "a B")]


@pytest.mark.parametrize("name", ["captions.csv", "metadata.jsonl", "list.csv"])
def test_captions_in_a_table(name: str, tmp_path: Path, options: ReadOptions) -> None:
    """A table of file names and captions, with line breaks and quotes in the captions of a CSV file."""
    rows = [("p0.png", 'says "hi",\nthen leaves', 0.2), ("p1.png", "plain", 0.9)]
    for number, (file, _, _) in enumerate(rows):
        (tmp_path / file).write_bytes(encoded(number))
    if name.endswith("csv"):
        lines = ["\ufefffile_name,text,score"]
        lines += ['{},"{}",{}'.format(f, t.replace('"', '""'), s) for f, t, s in rows]
    else:
        lines = [json.dumps({"file_name": f, "text": t, "score": s}) for f, t, s in rows]
    (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    extra = {"table": name} if name == "list.csv" else {}
    source = FolderConfig(path=str(tmp_path), name="t", **extra).open(options)
    assert read_all(source) == [("t/0/p0.png", 'says "hi",\nthen leaves'), ("t/1/p1.png", "plain")]
    assert source.shard(1) == name
    kept = FolderConfig(path=str(tmp_path), name="t", filters=["score >= 0.5"], **extra).open(options)
    assert read_all(kept) == [("t/1/p1.png", "plain")]


def test_names_of_subfolders_as_captions(tmp_path: Path, options: ReadOptions) -> None:
    """Class folders give captions by template; with several templates another one comes each epoch."""
    for number, name in enumerate(["red_fox", "owl"]):
        (tmp_path / "animals" / name).mkdir(parents=True)
        (tmp_path / "animals" / name / "1.png").write_bytes(encoded(number))
    path = str(tmp_path / "animals")
    assert [said for _, said in read_all(FolderConfig(path=path).open(options))] == [
        "a photo of a owl",
        "a photo of a red fox",
    ]
    source = FolderConfig(path=path, captions="classes", templates=["{}", "this is {}"]).open(options)
    assert set(source.read(1).meta["captions"]) == {"red fox", "this is red fox"}
    with pytest.raises(ValueError, match="must hold {} for the class's name"):
        FolderConfig(path=path, templates=["a class"])


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ("{not json", "bad_json"),
        ("[1]", "bad_record"),
        ('{"text": "no file"}', "bad_record"),
        ('{"file_name": 3, "text": "a"}', "bad_record"),
        ('{"file_name": "gone.png", "text": "a"}', "missing_file"),
        ('{"file_name": "http://a/b.png", "text": "a"}', "remote_file"),
        ('{"file_name": "p.png"}', "missing_text"),
        ('{"file_name": "p.png", "text": " "}', "missing_text"),
        ('{"file_name": "p.png", "text": null}', "missing_text"),
    ],
)
def test_bad_rows_are_named(row: str, kind: str, tmp_path: Path, options: ReadOptions) -> None:
    """Whatever is wrong with one row has a name of its own, and the next row is read all the same."""
    (tmp_path / "p.png").write_bytes(encoded(0))
    good = '{"file_name": "p.png", "text": "good"}'
    (tmp_path / "captions.jsonl").write_text(f"{good}\n{row}\n\n{good}\n")
    source = FolderConfig(path=str(tmp_path)).open(options)
    assert len(source) == 3
    with pytest.raises(BadSample) as caught:
        source.read(1)
    assert caught.value.kind == kind
    assert source.read(2).turns[1].parts[0].text == "good"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty_file"),
        (b"GIF89a is what it says", "wrong_type"),
        (b"plain words", "wrong_type"),
        (encoded(1, "JPEG")[:-40], "broken_image"),
    ],
)
def test_bad_pictures_are_named(content: bytes, kind: str, tmp_path: Path, options: ReadOptions) -> None:
    """Empty, foreign and damaged pictures are told apart."""
    (tmp_path / "p.png").write_bytes(content)
    (tmp_path / "p.txt").write_text("words")
    with pytest.raises(BadSample) as caught:
        FolderConfig(path=str(tmp_path)).open(options).read(0)
    assert caught.value.kind == kind


def test_too_large_and_too_small(tmp_path: Path, options: ReadOptions) -> None:
    """The sizes that are refused are those of the configuration."""
    (tmp_path / "p.png").write_bytes(encoded(0))
    (tmp_path / "p.txt").write_text("words")
    for config, limits, kind in (
        (FolderConfig(path=str(tmp_path), min_side=13), options, "too_small"),
        (FolderConfig(path=str(tmp_path)), ReadOptions(max_pixels=239), "too_large"),
    ):
        with pytest.raises(BadSample) as caught:
            config.open(limits).read(0)
        assert caught.value.kind == kind


def test_whole_sources_that_are_wrong(tmp_path: Path, options: ReadOptions) -> None:
    """No folder, no pictures, no such table, an empty table: an error that names the folder, before any sample."""
    with pytest.raises(ValueError, match="is not a folder"):
        FolderConfig(path=str(tmp_path / "none")).open(options)
    with pytest.raises(ValueError, match="holds no pictures"):
        FolderConfig(path=str(tmp_path)).open(options)
    with pytest.raises(ValueError, match="has none of captions.jsonl"):
        FolderConfig(path=str(tmp_path), captions="table").open(options)
    (tmp_path / "captions.csv").write_text("file_name,text\n")
    with pytest.raises(ValueError, match="captions.csv: there is not one record in it"):
        FolderConfig(path=str(tmp_path)).open(options)
    (tmp_path / "captions.csv").write_text("")
    with pytest.raises(ValueError, match="first line must name the columns"):
        FolderConfig(path=str(tmp_path)).open(options)
