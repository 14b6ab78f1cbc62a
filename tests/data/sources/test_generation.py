"""Shards for drawing: [text, image] whatever the prompt's field and the picture's kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.sources.conftest import encoded, write_tar
from data.sources.telling import told
from vilau.data.sources.generation import GenerationConfig
from vilau.data.sources.registry import detect_format
from vilau.data.sources.source import BadSample, ReadOptions


def member(key: str, record: object) -> tuple[str, bytes]:
    return (f"{key}.json", json.dumps(record).encode())


def test_prompts_and_pictures_of_all_kinds(tmp_path: Path, options: ReadOptions) -> None:
    """jpg, jpeg, png and webp; sharegpt4v before prompt before .txt."""
    members = [
        ("a.jpg", encoded(0, "JPEG")), member("a", {"sharegpt4v": "long", "prompt": "short"}),
        ("b.jpeg", encoded(1, "JPEG")), member("b", {"prompt": "short"}),
        ("c.png", encoded(2)), ("c.txt", b" words \n"),
        ("d.webp", encoded(3, "WEBP")), member("d", {"width": 20}), ("d.txt", b"beside"),
        ("e.png", encoded(4)), member("e", {"sharegpt4v": ""}),
        ("f.txt", b"no picture"),
    ]  # fmt: skip
    path = write_tar(tmp_path / "00000.tar", members)
    config = detect_format(path)
    assert isinstance(config, GenerationConfig)
    source = config.open(options)
    expected = ["user: long", "user: short", "user: words", "user: beside"]
    assert [told(source.read(index)) for index in range(4)] == [
        ["text_image", line, f"assistant: <{number}>"] for number, line in enumerate(expected)
    ]
    for index, kind in ((4, "missing_text"), (5, "missing_file")):
        with pytest.raises(BadSample) as caught:
            source.read(index)
        assert caught.value.kind == kind


def test_the_prompts_field_may_be_named(tmp_path: Path, options: ReadOptions) -> None:
    """A named field takes the place of all others, and its absence is not papered over."""
    path = write_tar(
        tmp_path / "a.tar",
        [("a.png", encoded(0)), member("a", {"sharegpt4v": "x", "mine": {"best": "words"}}), ("b.png", encoded(1)),
         ("b.txt", b"beside")],
    )  # fmt: skip
    source = GenerationConfig(path=str(path), caption_field="mine.best").open(options)
    assert told(source.read(0))[1] == "user: words"
    with pytest.raises(BadSample, match="mine.best"):
        source.read(1)
