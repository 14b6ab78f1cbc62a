"""LLaVA and ShareGPT4V conversations: pictures at their marks, and a reason for every row that cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.sources.telling import said, told, write_film, write_pictures, write_records
from vilau.data.sources.llava import LlavaConfig
from vilau.data.sources.registry import detect_format
from vilau.data.sources.source import BadSample, ReadOptions

ROWS: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"id": "a", "image": "0.png", "conversations": said("<image>\nwhat is it?", "a dog")},
        ["question", "user: <0> what is it?", "assistant: a dog"],
    ),
    (
        {"id": "b", "image": "1.png", "conversations": said("what is it?\n<image>", "a cat", "sure?", " yes ")},
        ["question", "user: what is it? <1>", "assistant: a cat", "user: sure?", "assistant: yes"],
    ),
    (
        {"image": ["2.png", "3.png"], "conversations": said("<image>\n<image>\nsame?", "no")},
        ["question", "user: <2> <3> same?", "assistant: no"],
    ),
    (
        {"images": ["3.png", "2.png"], "conversations": said("this <image> or", "?", "that <image>?", "this")},
        ["question", "user: this <3> or", "assistant: ?", "user: that <2> ?", "assistant: this"],
    ),
    ({"conversations": said("two and two?", "four")}, ["text", "user: two and two?", "assistant: four"]),
    ({"image": "0.png", "conversations": said("<image>", "a dog")}, ["image_text", "user: <0>", "assistant: a dog"]),
    (
        {
            "image": "1.png",
            "conversations": [{"from": "system", "value": "be brief"}, *said("<image>\nwhat?", "a cat")],
        },
        ["question", "system: be brief", "user: <1> what?", "assistant: a cat"],
    ),
    (
        {"image": ["0.png", "1.png"], "conversations": said("<image>\nmake it blue", "<image>")},
        ["image_edit", "user: <0> make it blue", "assistant: <1>"],
    ),
    (
        {"image": "2.png", "conversations": said("draw", "here:\n<image>")},
        ["mixed", "user: draw", "assistant: here: <2>"],
    ),
    (
        {"video": "film.mp4", "conversations": said("<video>\nwhat moves?", "a car")},
        ["video_text", "user: <4 5> what moves?", "assistant: a car"],
    ),
]
BAD: list[tuple[dict[str, Any], str]] = [
    ({"image": "9.png", "conversations": said("<image>\nq", "a")}, "missing_file"),
    ({"image": "https://example.org/0.png", "conversations": said("<image>\nq", "a")}, "remote_file"),
    ({"image": "broken.png", "conversations": said("<image>\nq", "a")}, "broken_image"),
    ({"image": "note.txt", "conversations": said("<image>\nq", "a")}, "wrong_type"),
    ({"image": "0.png", "conversations": said("q", "a")}, "image_count"),
    ({"image": "0.png", "conversations": said("<image><image>q", "a")}, "image_count"),
    ({"conversations": said("<image>\nq", "a")}, "image_count"),
    ({"image": ["0.png", "1.png"], "conversations": said("<image>\nq", "a")}, "image_count"),
    ({"image": "0.png", "conversations": said("<image>\nq", " ")}, "empty_answer"),
    ({"image": "0.png", "conversations": said("<image>\nq")}, "empty_answer"),
    ({"image": "0.png", "conversations": said("<image>\nq", "a", " ", "b")}, "missing_text"),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "narrator", "value": "a"}]}, "unknown_role"),
    ({"conversations": [{"from": "gpt", "value": "a"}]}, "turn_order"),
    ({"conversations": [*said("q", "a"), {"from": "system", "value": "late"}]}, "turn_order"),
    ({"conversations": [{"from": "human", "value": "q"}, *said("q", "a")]}, "turn_order"),
    ({"conversations": []}, "bad_record"),
    ({"id": "nothing"}, "bad_record"),
    ({"conversations": [{"from": "human", "value": 3}]}, "bad_record"),
    ({"video": "cut.mp4", "conversations": said("<video>\nq", "a")}, "broken_video"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures, a film, and files that are neither."""
    write_pictures(tmp_path / "media", 0, 1, 2, 3)
    film = write_film(tmp_path / "media" / "film.mp4", 4, 4, 5, 5)
    (tmp_path / "media" / "cut.mp4").write_bytes(film.read_bytes()[:300])
    (tmp_path / "media" / "broken.png").write_bytes((tmp_path / "media" / "0.png").read_bytes()[:-30])
    (tmp_path / "media" / "note.txt").write_text("no picture at all")
    return tmp_path


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_rows_become_samples(folder: Path, options: ReadOptions, ending: str) -> None:
    """Every way to name pictures, in both layouts: each stands where its mark was."""
    path = write_records(folder / f"chat.{ending}", [row for row, _ in ROWS])
    source = LlavaConfig(path=str(path), media=str(folder / "media"), name="chat").open(options)
    assert len(source) == len(ROWS)
    assert [told(source.read(index)) for index in range(len(ROWS))] == [expected for _, expected in ROWS]
    assert [source.read(index).id for index in (0, 3)] == ["chat/0", "chat/3"]
    assert source.shard(0) == path.name


def test_bad_rows_are_named(folder: Path, options: ReadOptions) -> None:
    """Whatever is wrong with one row is one bad sample of its own kind, never another exception."""
    path = write_records(folder / "bad.jsonl", [row for row, _ in BAD])
    source = LlavaConfig(path=str(path), media=str(folder / "media")).open(options)
    for index, (row, kind) in enumerate(BAD):
        with pytest.raises(BadSample) as caught:
            source.read(index)
        assert caught.value.kind == kind, (row, str(caught.value))
        assert f"bad.jsonl, record {index}" in str(caught.value)


def test_format_is_told_from_the_content(folder: Path) -> None:
    """Users need not name what can be seen; pictures are looked for beside the file unless said otherwise."""
    path = write_records(folder / "media" / "chat.json", [ROWS[0][0], ROWS[4][0]])
    config = detect_format(path)
    assert isinstance(config, LlavaConfig)
    assert told(config.open(ReadOptions(cache=folder)).read(0)) == ROWS[0][1]


def test_a_missing_media_folder_is_an_error_at_once(folder: Path, options: ReadOptions) -> None:
    """A wrong folder would make every sample bad: it is said before the first step."""
    path = write_records(folder / "chat.jsonl", [ROWS[0][0]])
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        LlavaConfig(path=str(path), media=str(folder / "nowhere")).open(options)
