"""MMC4 documents: pictures before the sentences they are matched to."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from data.sources.conftest import encoded
from data.sources.telling import told, write_pictures, write_records
from vilau.data.sources.mmc4 import Mmc4Config
from vilau.data.sources.registry import detect_format
from vilau.data.sources.source import BadSample, ReadOptions


def named(number: int, place: Any, **more: Any) -> dict[str, Any]:
    return {"image_name": f"{number}.png", "matched_text_index": place, **more}


def within(number: int, place: int) -> dict[str, Any]:
    return {"image_base64": base64.b64encode(encoded(number)).decode(), "matched_text_index": place}


def document(*pictures: dict[str, Any], words: list[str] | None = None) -> dict[str, Any]:
    return {"text_list": ["one.", "two.", "three."] if words is None else words, "image_info": list(pictures)}


GOOD: list[tuple[dict[str, Any], str]] = [
    (document(named(0, 1)), "one. <0> two. three."),
    (document(named(0, 2), named(1, 0)), "<1> one. two. <0> three."),
    (document(within(2, 1), within(3, 1)), "one. <2> <3> two. three."),
    (document(), "one. two. three."),
    (document(named(0, 1), words=["<image> is a tag.", " ", "three."]), "<image> is a tag. <0> three."),
    (document(*(named(n % 4, 2) for n in range(8))), "one. two. <0> <1> <2> <3> <0> <1> three."),
]
BAD: list[tuple[dict[str, Any], str]] = [
    (document(named(9, 1)), "missing_file"),
    (document(named(0, 3)), "bad_record"),
    (document(named(0, None)), "bad_record"),
    (document({"matched_text_index": 0}), "missing_file"),
    (document({"image_base64": "?!", "matched_text_index": 0}), "broken_image"),
    (document(words=["", " "]), "missing_text"),
    ({"text_list": "one.", "image_info": []}, "bad_record"),
    (document(words=["one.", 2]), "bad_record"),  # type: ignore[list-item]
]


def test_pictures_stand_before_their_sentences(tmp_path: Path, options: ReadOptions) -> None:
    """As VILA reads them: before the sentence, the first six of them, marks within texts are no pictures."""
    write_pictures(tmp_path, 0, 1, 2, 3)
    path = write_records(tmp_path / "docs.jsonl", [record for record, _ in GOOD])
    config = detect_format(path)
    assert isinstance(config, Mmc4Config)
    source = config.open(options)
    got = [told(source.read(index)) for index in range(len(source))]
    assert got == [["interleaved", f"document: {line}"] for _, line in GOOD]


def test_bad_documents_are_named(tmp_path: Path, options: ReadOptions) -> None:
    """One bad picture makes a document bad: half a document would pair words with the wrong pictures."""
    write_pictures(tmp_path, 0)
    path = write_records(tmp_path / "docs.jsonl", [record for record, _ in BAD])
    source = Mmc4Config(path=str(path)).open(options)
    for index, (record, kind) in enumerate(BAD):
        with pytest.raises(BadSample) as caught:
            source.read(index)
        assert caught.value.kind == kind, (record, str(caught.value))


def test_pictures_may_be_left_out(tmp_path: Path, options: ReadOptions) -> None:
    """Dead links are common in MMC4: whoever wants may keep such documents without the picture, or filter them."""
    write_pictures(tmp_path, 0)
    infos = [named(0, 2, matched_sim=0.3), named(9, 1, matched_sim=0.3), named(0, 0, matched_sim=0.1)]
    path = write_records(tmp_path / "docs.jsonl", [document(*infos)])
    kept = Mmc4Config(path=str(path), drop_missing=True).open(options)
    assert told(kept.read(0))[1] == "document: <0> one. two. <0> three."
    strict = Mmc4Config(path=str(path), drop_missing=True, min_similarity=0.24).open(options)
    assert told(strict.read(0))[1] == "document: one. two. <0> three."
