"""Text-only chats in their two layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.sources.telling import said, told, write_records
from vilau.data.sources.chat import ChatConfig
from vilau.data.sources.registry import detect_format
from vilau.data.sources.source import BadSample, ReadOptions


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_both_layouts(tmp_path: Path, options: ReadOptions, ending: str) -> None:
    """ShareGPT's and OpenAI's rows are the same chat; a mark of a picture is plain text here."""
    openai = [{"role": "user", "content": "what is <image>?"}, {"role": "assistant", "content": "a tag"}]
    rows = [
        {"id": "x", "conversations": said("what is <image>?", "a tag")},
        {"messages": openai},
        {"system": "be brief", "conversations": said("hi", "hello", "again", "hello again")},
        {"messages": [{"role": "developer", "content": "be brief"}, *openai]},
    ]
    path = write_records(tmp_path / f"chat.{ending}", rows)
    config = detect_format(path)
    assert isinstance(config, ChatConfig)
    source = config.open(options)
    assert [told(source.read(index)) for index in range(4)] == [
        ["text", "user: what is <image>?", "assistant: a tag"],
        ["text", "user: what is <image>?", "assistant: a tag"],
        ["text", "system: be brief", "user: hi", "assistant: hello", "user: again", "assistant: hello again"],
        ["text", "system: be brief", "user: what is <image>?", "assistant: a tag"],
    ]


def test_bad_chats_are_named(tmp_path: Path, options: ReadOptions) -> None:
    """Unknown speakers, two in a row, a question left open and silence are told apart."""
    rows = [
        ({"messages": [{"role": "function", "content": "{}"}]}, "unknown_role"),
        ({"conversations": said("a", "b")[::-1]}, "turn_order"),
        ({"conversations": said("a", "b", "c")}, "empty_answer"),
        ({"messages": [{"role": "system", "content": "only"}]}, "empty_answer"),
        ({"conversations": said("", "b")}, "missing_text"),
        ({"text": "no chat"}, "bad_record"),
        ({"conversations": [{"value": "a"}]}, "unknown_role"),
    ]
    source = ChatConfig(path=str(write_records(tmp_path / "a.jsonl", [row for row, _ in rows]))).open(options)
    for index, (row, kind) in enumerate(rows):
        with pytest.raises(BadSample) as caught:
            source.read(index)
        assert caught.value.kind == kind, (row, str(caught.value))
