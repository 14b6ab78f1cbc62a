"""Questions about films: every way to name the film and to ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.sources.telling import said, told, write_film, write_pictures, write_records
from vilau.data.sources.registry import detect_format
from vilau.data.sources.source import BadSample, ReadOptions
from vilau.data.sources.video_json import VideoJsonConfig

SEEN = ["video_text", "user: <4 5> what moves?", "assistant: a car"]
ROWS: list[dict[str, Any]] = [
    {"video": "film.mp4", "q": "what moves?", "a": "a car"},
    {"video_id": "film", "q": "what moves?", "a": "a car", "fps": 8, "frame_count": 4},
    {"video_id": 6513, "q": "what moves?", "a": "a car"},
    {"video": None, "video_id": 0, "q": "what moves?", "a": "a car"},
    {"video": "film.webp", "question": "what moves?", "answer": "a car"},
    {"id": 1, "video": "film.mp4", "conversations": said("<video>\nwhat moves?", "a car")},
    {"id": 2, "video": "film.mp4", "conversations": said("<image>\nwhat moves?", "a car"), "fps": 0.0},
    {"id": 3, "video": "film.mp4", "conversations": said("what moves?", "a car")},
    {"video": "frames", "q": "what moves?", "a": "a car"},
    {"video": ["frames/4.png", "frames/4.png", "frames/5.png"], "q": "what moves?", "a": "a car"},
]
BAD: list[tuple[dict[str, Any], str]] = [
    ({"video_id": "none", "q": "q", "a": "a"}, "missing_file"),
    ({"video": "cut.mp4", "q": "q", "a": "a"}, "broken_video"),
    ({"video": "frames/4.png", "q": "q", "a": "a"}, "wrong_type"),
    ({"video": "empty", "q": "q", "a": "a"}, "missing_file"),
    ({"video": "film.mp4", "q": "q", "a": ""}, "empty_answer"),
    ({"video": "film.mp4", "q": None, "a": "a"}, "missing_text"),
    ({"video": "film.mp4", "conversations": said("<video><video>q", "a")}, "image_count"),
    ({"video": "film.mp4", "q": "q", "a": "a", "fps": "fast"}, "bad_record"),
    ({"q": "q", "a": "a"}, "bad_record"),
    ({"video_id": True, "q": "q", "a": "a"}, "bad_record"),
    ({"video_id": 6514, "q": "q", "a": "a"}, "missing_file"),
    ({"video": {"name": "x"}, "q": "q", "a": "a"}, "bad_record"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One film in several forms."""
    film = write_film(tmp_path / "film.mp4", 4, 4, 5, 5)
    write_film(tmp_path / "film.webp", 4, 4, 5, 5)
    write_pictures(tmp_path / "frames", 4, 5)
    for number in (0, 6513):
        (tmp_path / f"{number}.mp4").write_bytes(film.read_bytes())
    (tmp_path / "cut.mp4").write_bytes(film.read_bytes()[:-200])
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_every_way_to_name_and_to_ask_gives_one_sample(folder: Path, options: ReadOptions) -> None:
    """The film stands first, or at its mark; evenly spread frames of files, folders and lists are the same."""
    path = write_records(folder / "asked.json", ROWS)
    config = detect_format(path)
    assert isinstance(config, VideoJsonConfig)
    source = config.open(options)
    assert [told(source.read(index)) for index in range(len(ROWS))] == [SEEN] * len(ROWS)
    assert dict(source.read(1).meta) == {"fps": 8, "frame_count": 4}


def test_the_number_of_frames_is_the_readers(folder: Path) -> None:
    """Frames are evenly spread from the first to the last, whatever the film's own rate."""
    path = write_records(folder / "asked.jsonl", ROWS[:1])
    source = VideoJsonConfig(path=str(path)).open(ReadOptions(num_frames=6, cache=folder))
    assert told(source.read(0))[1] == "user: <4 4 4 5 5 5> what moves?"


def test_bad_rows_are_named(folder: Path, options: ReadOptions) -> None:
    """Whatever is wrong with one row is one bad sample of its own kind."""
    path = write_records(folder / "bad.jsonl", [row for row, _ in BAD])
    source = VideoJsonConfig(path=str(path)).open(options)
    for index, (row, kind) in enumerate(BAD):
        with pytest.raises(BadSample) as caught:
            source.read(index)
        assert caught.value.kind == kind, (row, str(caught.value))
