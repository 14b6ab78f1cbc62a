"""OpenVid: a CSV of file names and captions becomes [text, video]."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.sources.telling import told, write_film
from vilau.data.sources.openvid import OpenVidConfig
from vilau.data.sources.registry import detect_format
from vilau.data.sources.source import BadSample, ReadOptions

HEADER = "video,caption,aesthetic score,frame,fps,seconds\n"


def test_rows_become_prompts_with_films(tmp_path: Path, options: ReadOptions) -> None:
    """Captions with commas, quotes and line breaks are whole; the films lie in the folder that is named."""
    write_film(tmp_path / "films" / "a_0.mp4", 4, 5)
    (tmp_path / "rows.csv").write_text(
        HEADER + 'a_0.mp4,"A car, red,\nis ""fast"".",5.2,2,8,0.25\na_0.mp4,Plain.,5.2,2,8,0.25\n'
    )
    assert isinstance(detect_format(tmp_path / "rows.csv"), OpenVidConfig)
    source = OpenVidConfig(path=str(tmp_path / "rows.csv"), media=str(tmp_path / "films"), name="ov").open(options)
    assert len(source) == 2 and source.shard(1) == "rows.csv"
    assert told(source.read(0)) == ["text_video", 'user: A car, red,\nis "fast".', "assistant: <4 5>"]
    assert told(source.read(1))[1] == "user: Plain." and source.read(1).id == "ov/rows/1"


def test_bad_rows_are_named(tmp_path: Path, options: ReadOptions) -> None:
    """A film that is not there, a blank caption, a row of another length: one bad sample each."""
    film = write_film(tmp_path / "a.mp4", 4, 5)
    (tmp_path / "cut.mp4").write_bytes(film.read_bytes()[:-150])
    rows = ["none.mp4,C,1,1,1,1", "a.mp4, ,1,1,1,1", "a.mp4,C", "cut.mp4,C,1,1,1,1", ",C,1,1,1,1"]
    (tmp_path / "rows.csv").write_text(HEADER + "\n".join(rows))
    source = OpenVidConfig(path=str(tmp_path / "rows.csv")).open(options)
    kinds = []
    for index in range(len(rows)):
        with pytest.raises(BadSample) as caught:
            source.read(index)
        kinds.append(caught.value.kind)
    assert kinds == ["missing_file", "missing_text", "bad_record", "broken_video", "missing_text"]


def test_columns_may_have_other_names_but_must_be_there(tmp_path: Path, options: ReadOptions) -> None:
    """A table of another layout is an error before the first step that names its columns."""
    write_film(tmp_path / "a.mp4", 4, 5)
    (tmp_path / "rows.csv").write_text("file,words\na.mp4,A car\n")
    with pytest.raises(ValueError, match="no column 'video'.*file, words"):
        OpenVidConfig(path=str(tmp_path / "rows.csv")).open(options)
    config = OpenVidConfig(path=str(tmp_path / "rows.csv"), video_column="file", caption_column="words")
    assert told(config.open(options).read(0))[1] == "user: A car"
