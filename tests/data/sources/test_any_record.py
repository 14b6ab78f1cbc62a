"""No record, however strange, gets anything but a sample or a named bad sample out of a reader."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.sources.telling import write_pictures
from vilau.data.sample import Sample
from vilau.data.sources.chat import ChatConfig
from vilau.data.sources.dialogue import RecordConfig
from vilau.data.sources.llava import LlavaConfig
from vilau.data.sources.messages import MessagesConfig
from vilau.data.sources.mmc4 import Mmc4Config
from vilau.data.sources.source import KINDS, BadSample, ReadOptions
from vilau.data.sources.video_json import VideoJsonConfig

NAMES = [
    "image",
    "images",
    "video",
    "videos",
    "video_id",
    "conversations",
    "messages",
    "system",
    "q",
    "a",
    "question",
    "answer",
    "from",
    "value",
    "role",
    "content",
    "type",
    "text",
    "index",
    "path",
    "bytes",
    "url",
    "image_url",
    "fps",
    "frame_count",
    "text_list",
    "image_info",
    "matched_text_index",
    "matched_sim",
    "image_name",
    "image_base64",
]
WORDS = [
    "human",
    "gpt",
    "user",
    "assistant",
    "system",
    "image",
    "text",
    "video",
    "<image>",
    "<video>",
    "0.png",
    "none.png",
    "data:image/png;base64,AA==",
    "http://x/y",
    "/dev/null",
    "..",
    "\x00",
    "red",
]
LEAVES = st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.sampled_from(WORDS) | st.just("")
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=14,
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"from": st.sampled_from(["human", "gpt", "user", "assistant", "system", "x"]), "value": VALUES}
    )
    | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": VALUES}),
    max_size=4,
)
RECORDS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5) | st.fixed_dictionaries(
    {"conversations": TURNS, "messages": TURNS, "image": VALUES, "video": VALUES}
)


@pytest.mark.parametrize("kind", [LlavaConfig, VideoJsonConfig, MessagesConfig, ChatConfig, Mmc4Config])
def test_any_record(kind: type[RecordConfig], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Training for weeks must not end at one record that nobody had thought of."""
    folder = tmp_path_factory.mktemp("any")
    write_pictures(folder, 0)
    options = ReadOptions(num_frames=2, cache=folder / "indices")
    made = 0

    @settings(max_examples=60, deadline=None)
    @given(record=RECORDS)
    def check(record: dict[str, Any]) -> None:
        nonlocal made
        made += 1
        path = folder / f"{made}.jsonl"
        path.write_text(json.dumps(record) + "\n")
        try:
            assert isinstance(kind(path=str(path)).open(options).read(0), Sample)
        except BadSample as bad:
            assert bad.kind in KINDS and "\n" not in str(bad)[:40]

    check()
