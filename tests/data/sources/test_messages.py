"""Chats of the hub's layout: messages and pictures in parquet, JSON or JSONL."""

from __future__ import annotations

import base64
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.sources.conftest import encoded
from data.sources.telling import told, write_film, write_pictures, write_records
from vilau.data.sources.messages import MessagesConfig
from vilau.data.sources.registry import detect_format
from vilau.data.sources.source import BadSample, ReadOptions


def words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def chat(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


DATA_URL = "data:image/png;base64," + base64.b64encode(encoded(2)).decode()
ROWS: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"messages": chat([{"type": "image"}, words("what?")], [words("a dog")]), "images": ["0.png"]},
        ["question", "user: <0> what?", "assistant: a dog"],
    ),
    (
        {"messages": chat("<image>what?", "a dog", "and <image>?", "a cat"), "images": ["0.png", {"path": "1.png"}]},
        ["question", "user: <0> what?", "assistant: a dog", "user: and <1> ?", "assistant: a cat"],
    ),
    (
        {
            "messages": chat(
                [{"type": "image", "index": 1}, words("or"), {"type": "image", "index": 0}], [words("the first")]
            ),
            "images": ["0.png", "1.png"],
        },
        ["question", "user: <1> or <0>", "assistant: the first"],
    ),
    (
        {"messages": chat([{"type": "image_url", "image_url": {"url": DATA_URL}}, words("what?")], "a fox")},
        ["question", "user: <2> what?", "assistant: a fox"],
    ),
    (
        {"messages": chat([{"type": "image", "image": "3.png"}, words("film it")], [{"type": "video"}]),
         "videos": ["film.mp4"]},
        ["image_video", "user: <3> film it", "assistant: <4 5>"],
    ),
    (
        {"messages": [{"role": "system", "content": "be brief"}, *chat("hi", [words("hello"), words("there")])]},
        ["text", "system: be brief", "user: hi", "assistant: hello there"],
    ),
]  # fmt: skip
NAMED: dict[str, Any] = {"type": "image", "image": "1.png"}
TWICE: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"messages": chat([NAMED, words("what?")], "a cat"), "images": ["1.png"]},
        ["question", "user: <1> what?", "assistant: a cat"],
    ),
    (
        {"messages": chat([{"type": "image"}, NAMED, words("which?")], "both"), "images": [{"path": "1.png"}, "0.png"]},
        ["question", "user: <0> <1> which?", "assistant: both"],
    ),
    (
        {"messages": chat([NAMED, {"type": "image"}, words("same?")], "yes"), "images": ["1.png"]},
        ["question", "user: <1> <1> same?", "assistant: yes"],
    ),
    (
        {"messages": chat([NAMED, NAMED, words("same?")], "yes"), "images": ["file://1.png"]},
        ["question", "user: <1> <1> same?", "assistant: yes"],
    ),
]
BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": chat([{"type": "image"}, words("q")], "a"), "images": []}, "image_count"),
    ({"messages": chat("q", "a"), "images": ["0.png"]}, "image_count"),
    ({"messages": chat([NAMED, words("q")], "a"), "images": ["1.png", "1.png"]}, "image_count"),
    ({"messages": chat([NAMED, words("q")], "a"), "images": ["0.png"]}, "image_count"),
    ({"messages": chat([{"type": "image", "index": 0}], "a"), "images": ["1.png", "1.png"]}, "image_count"),
    ({"messages": chat([{"type": "image", "index": 3}], "a"), "images": ["0.png"]}, "image_count"),
    ({"messages": chat([{"type": "image", "index": 0}], "a"), "images": [None]}, "image_count"),
    ({"messages": chat([{"type": "audio"}], "a")}, "bad_record"),
    ({"messages": chat([{"type": "text"}], "a")}, "bad_record"),
    ({"messages": chat(3, "a")}, "bad_record"),
    ({"messages": [{"role": "tool", "content": "q"}]}, "unknown_role"),
    ({"messages": chat("q", [])}, "empty_answer"),
    ({"messages": chat("q", None)}, "empty_answer"),
    ({"messages": []}, "bad_record"),
    ({"messages": chat([{"type": "image_url", "image_url": {"url": "http://x/y.png"}}], "a")}, "remote_file"),
    ({"messages": chat([{"type": "image", "image": "data:image/png,xx"}], "a")}, "bad_record"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures and a film beside the records."""
    write_pictures(tmp_path, 0, 1, 2, 3)
    write_film(tmp_path / "film.mp4", 4, 5)
    return tmp_path


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_rows_become_samples(folder: Path, options: ReadOptions, ending: str) -> None:
    """Texts with marks, typed parts, parts with their own picture, parts that point: all in order."""
    path = write_records(folder / f"rows.{ending}", [row for row, _ in ROWS])
    config = detect_format(path)
    assert isinstance(config, MessagesConfig)
    source = config.open(options)
    assert [told(source.read(index)) for index in range(len(ROWS))] == [expected for _, expected in ROWS]


def test_a_picture_named_and_listed_is_one(folder: Path, options: ReadOptions) -> None:
    """What a part names and the list repeats is taken once; a part without a name gets what the list has for it."""
    path = write_records(folder / "twice.jsonl", [row for row, _ in TWICE])
    source = MessagesConfig(path=str(path)).open(options)
    assert [told(source.read(index)) for index in range(len(TWICE))] == [expected for _, expected in TWICE]


def test_bad_rows_are_named(folder: Path, options: ReadOptions) -> None:
    """Whatever is wrong with one row is one bad sample of its own kind."""
    path = write_records(folder / "bad.jsonl", [row for row, _ in BAD])
    source = MessagesConfig(path=str(path)).open(options)
    for index, (row, kind) in enumerate(BAD):
        with pytest.raises(BadSample) as caught:
            source.read(index)
        assert caught.value.kind == kind, (row, str(caught.value))


def test_parquet_as_the_hub_writes_it(tmp_path: Path, options: ReadOptions) -> None:
    """Pictures as bytes, nulls for absent fields, several row groups and files, and copies in loader processes."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"index": None, "text": f"what {n}?", "type": "text"},
                                             {"index": 0, "text": None, "type": "image"}]},
                {"role": "assistant", "content": [{"index": None, "text": "it", "type": "text"}]},
            ],
            "images": [{"bytes": encoded(n), "path": None}],
            "source": "x",
        }
        for n in range(5)
    ]  # fmt: skip
    for number, part in enumerate((rows[:3], rows[3:])):
        pq.write_table(pa.Table.from_pylist(part), tmp_path / f"{number}.parquet", row_group_size=2)
    config = detect_format(tmp_path)
    assert isinstance(config, MessagesConfig)
    opened = config.open(options)
    for source in (opened, pickle.loads(pickle.dumps(opened))):
        for index in (4, 0, 2, 3, 1):
            assert told(source.read(index)) == ["question", f"user: what {index}? <{index}>", "assistant: it"]
        assert [source.shard(index) for index in (2, 3)] == ["0.parquet", "1.parquet"]


def test_parquet_without_messages_is_refused(tmp_path: Path, options: ReadOptions) -> None:
    """The whole source is wrong, so it is said when it is opened, with the columns that are there."""
    pq.write_table(pa.table({"question": ["q"], "answer": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="no column `messages`; there are question, answer"):
        MessagesConfig(path=str(tmp_path / "a.parquet")).open(options)
