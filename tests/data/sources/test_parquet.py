"""Parquet files are read row by row, with pictures in them or beside them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.sources.conftest import encoded, picture
from vilau.data.sources.parquet import ParquetConfig
from vilau.data.sources.source import BadSample, ReadOptions


def write(path: Path, rows: dict[str, list[Any]], group: int = 3) -> Path:
    """Write columns to a parquet file with small row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), path, row_group_size=group)
    return path


@pytest.mark.parametrize("layout", ["bytes", "mapping", "names"])
def test_pictures_in_and_beside(layout: str, tmp_path: Path, options: ReadOptions) -> None:
    """Bytes, the hub's mappings, and file names relative to the parquet file give the same samples."""
    for part in range(2):
        numbers = range(part * 7, part * 7 + 7)
        (tmp_path / "images").mkdir(exist_ok=True)
        for number in numbers:
            (tmp_path / "images" / f"{number}.png").write_bytes(encoded(number))
        cells: list[Any] = [encoded(number) for number in numbers]
        if layout == "mapping":
            cells = [{"bytes": cell, "path": "x.png"} for cell in cells]
        name = "image"
        if layout == "names":
            cells, name = [f"images/{number}.png" for number in numbers], "image_path"
        write(tmp_path / f"{part}.parquet", {name: cells, "caption": [f"caption {number}" for number in numbers]})
    source = ParquetConfig(path=str(tmp_path), cache_bytes=1).open(options)
    assert len(source) == 14
    for index in (13, 0, 6, 7, 3, 3):
        sample = source.read(index)
        assert np.array_equal(sample.frames[0], picture(index))
        assert sample.turns[1].parts[0].text == f"caption {index}"
        assert source.shard(index) == f"{index // 7}.parquet"
    assert np.array_equal(pickle.loads(pickle.dumps(source)).read(5).frames[0], picture(5))


def test_scores_filter_rows(tmp_path: Path, options: ReadOptions) -> None:
    """Thresholds as COYO's are applied to the columns before a picture is touched; missing scores do not pass."""
    scores = [0.1, 0.4, None, float("nan"), 0.35, 0.9]
    write(
        tmp_path / "a.parquet",
        {
            "image": [encoded(number) for number in range(6)],
            "text": [str(number) for number in range(6)],
            "clip_similarity_vitb32": scores,
            "watermark": [0, 1, 0, 0, 0, 0],
            "status": ["success"] * 5 + ["failed"],
        },
    )
    rules = ["clip_similarity_vitb32 >= 0.3", "watermark < 0.5"]
    for filters, kept in ((rules, ["4", "5"]), ([*rules, "status == success"], ["4"])):
        source = ParquetConfig(path=str(tmp_path), filters=filters).open(options)
        assert [source.read(index).turns[1].parts[0].text for index in range(len(source))] == kept
    with pytest.raises(ValueError, match="filter on 'aesthetic', but a.parquet has image, text"):
        ParquetConfig(path=str(tmp_path), filters=["aesthetic > 5"]).open(options)
    with pytest.raises(ValueError, match="none of 6 rows passes"):
        ParquetConfig(path=str(tmp_path), filters=["watermark > 5"]).open(options)


def test_dots_go_into_mappings(tmp_path: Path, options: ReadOptions) -> None:
    """Captions, pictures and scores within a column of mappings, some of them null, as in records of other formats."""
    rows = [{"caption": f"deep {n}", "score": n, "picture": {"bytes": encoded(n), "path": None}} for n in range(5)]
    write(tmp_path / "a.parquet", {"meta": [*rows, None], "image": [encoded(9)] * 6})
    deep = {"caption_field": "meta.caption", "filters": ["meta.score >= 1"]}
    for image, first in ((None, 9), ("meta.picture", 1)):
        source = ParquetConfig(path=str(tmp_path), image_field=image, **deep).open(options)  # type: ignore[arg-type]
        assert [source.read(n).turns[1].parts[0].text for n in range(len(source))] == [f"deep {n}" for n in range(1, 5)]
        assert np.array_equal(source.read(0).frames[0], picture(first))
    source = ParquetConfig(path=str(tmp_path), caption_field="meta.caption").open(options)
    with pytest.raises(BadSample, match="row 5: meta.caption: is missing"):
        source.read(5)
    for fields in ({"caption_field": "meta.title"}, {"caption_field": "meta.score.deep"}):
        with pytest.raises(ValueError, match=r"no column 'meta\..*; there are meta \(caption, score, picture\), image"):
            ParquetConfig(path=str(tmp_path), **fields).open(options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"filter on 'meta.title', but a.parquet has meta \(caption"):
        ParquetConfig(path=str(tmp_path), caption_field="meta.caption", filters=["meta.title > 1"]).open(options)


@pytest.mark.parametrize("field", ["caption", "meta.caption"])
def test_a_later_file_that_lacks_a_column(field: str, tmp_path: Path, options: ReadOptions) -> None:
    """Its rows are bad samples with a reason; those of the other files are read."""
    captions = {"caption": ["good"], "meta": [{"caption": "good"}]}
    write(tmp_path / "a.parquet", {"image": [encoded(0)], **captions})
    write(tmp_path / "b.parquet", {"image": [encoded(1)], "said": ["bad"], "meta": [{"other": 1}]})
    source = ParquetConfig(path=str(tmp_path), caption_field=field).open(options)
    assert source.read(0).turns[1].parts[0].text == "good"
    with pytest.raises(BadSample, match=f"b.parquet row 0: .*no column '{field}'") as caught:
        source.read(1)
    assert caught.value.kind == "bad_record"


def test_several_captions(tmp_path: Path, options: ReadOptions) -> None:
    """Captions as a list or as JSON of named captions all reach the sample; a bracket alone is no JSON."""
    cells = [json.dumps({"long": "a long one", "short": "short"}), "[not json", json.dumps(["one", " "])]
    write(tmp_path / "a.parquet", {"image": [encoded(0)] * 3, "captions": cells})
    source = ParquetConfig(path=str(tmp_path)).open(options)
    assert source.read(0).meta["captions"] == ("a long one", "short")
    assert source.read(1).turns[1].parts[0].text == "[not json"
    assert source.read(2).turns[1].parts[0].text == "one"


@pytest.mark.parametrize(
    ("cell", "caption", "kind"),
    [
        (None, "a", "missing_file"),
        (b"", "a", "empty_file"),
        (b"no picture at all", "a", "wrong_type"),
        (encoded(0), None, "missing_text"),
        (encoded(0), "  ", "missing_text"),
    ],
)
def test_bad_rows_are_named(cell: Any, caption: Any, kind: str, tmp_path: Path, options: ReadOptions) -> None:
    """What is wrong with one row has a name, and other rows are read."""
    write(tmp_path / "a.parquet", {"image": [cell, encoded(1)], "caption": [caption, "good"]})
    source = ParquetConfig(path=str(tmp_path)).open(options)
    with pytest.raises(BadSample) as caught:
        source.read(0)
    assert caught.value.kind == kind
    assert source.read(1).turns[1].parts[0].text == "good"


def test_whole_sources_that_are_wrong(tmp_path: Path, options: ReadOptions) -> None:
    """Addresses instead of pictures, no known columns, no parquet at all: an error with the remedy."""
    write(tmp_path / "urls" / "a.parquet", {"url": ["http://a"], "text": ["b"]})
    with pytest.raises(ValueError, match="download them first"):
        ParquetConfig(path=str(tmp_path / "urls")).open(options)
    write(tmp_path / "odd" / "a.parquet", {"picture": [encoded(0)], "said": ["b"]})
    with pytest.raises(ValueError, match="as image_field; there are picture, said"):
        ParquetConfig(path=str(tmp_path / "odd")).open(options)
    named = ParquetConfig(path=str(tmp_path / "odd"), image_field="picture", caption_field="said").open(options)
    assert named.read(0).turns[1].parts[0].text == "b"
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        ParquetConfig(path=str(tmp_path / "b.parquet")).open(options)
