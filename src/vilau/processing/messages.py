"""Messages as users write them -> turns, checked, with pictures and films loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..data.sample import Part, Turn
from .images import SquareMode, to_array
from .templates import GenerationMode
from .videos import to_frames

ROLES: tuple[str, ...] = ("system", "user", "assistant")
PART_TYPES: tuple[str, ...] = ("text", "image", "video")

Message = Mapping[str, Any]


def is_batch(conversation: Any) -> bool:
    """Whether this is a list of conversations rather than one conversation."""
    return isinstance(conversation, list | tuple) and bool(conversation) and isinstance(conversation[0], list | tuple)


def check_messages(messages: Sequence[Message], generation_mode: GenerationMode | None) -> None:
    """Everything that can be wrong before a file is opened: ``ValueError`` with the message's number and the remedy."""
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError("the conversation is empty: give at least one message")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(
                f"message {number} is a {type(message).__name__}: it must be a mapping with 'role' and 'content'"
            )
        unknown = sorted(str(key) for key in message if key not in ("role", "content"))
        if unknown or "role" not in message or "content" not in message:
            raise ValueError(
                f"message {number} has the keys {sorted(map(str, message))}: it needs exactly 'role' and 'content'"
            )
        if message["role"] not in ROLES:
            raise ValueError(
                f"message {number} has the unknown role {message['role']!r}: choose one of {', '.join(ROLES)}"
            )
        for kind, value in _parts(message["content"], number):
            if message["role"] == "system" and kind != "text":
                raise ValueError(
                    f"message {number} is the system's and holds a part of type {kind!r}: it may hold text only"
                )
            if kind == "text" and not isinstance(value, str):
                raise ValueError(
                    f"message {number} holds a text part that is a {type(value).__name__}: it must be a string"
                )
            if (
                isinstance(value, str)
                and kind != "text"
                and value.lower().startswith(("http://", "https://", "ftp://"))
            ):
                raise ValueError(
                    f"message {number} names a remote {kind}: nothing is fetched here, give a file or a PIL image"
                )
    if generation_mode is None:
        return
    if messages[-1]["role"] != "user":
        raise ValueError(
            f"the last message is the {messages[-1]['role']}'s: end with a user's message to get an answer"
        )
    parts = list(_parts(messages[-1]["content"], len(messages) - 1))
    if not any(kind != "text" or value.strip() for kind, value in parts):
        wanted = {"image": "say what to draw", "video": "say what to film"}
        asked = wanted.get(generation_mode, "ask something or show a picture")
        raise ValueError(f"the prompt is empty: {asked}")


def count_frames(messages: Sequence[Message], num_frames: int) -> tuple[int, int]:
    """``(media, frames)`` of checked messages: how many pictures and films, and how many frames they become."""
    kinds = [kind for number, message in enumerate(messages) for kind, _ in _parts(message["content"], number)]
    images, videos = kinds.count("image"), kinds.count("video")
    return images + videos, images + videos * num_frames


def count_characters(messages: Sequence[Message]) -> int:
    """Characters of all text in checked messages."""
    parts = (part for number, message in enumerate(messages) for part in _parts(message["content"], number))
    return sum(len(value) for kind, value in parts if kind == "text")


def to_turns(
    messages: Sequence[Message], image_size: int, num_frames: int, generation_mode: GenerationMode | None = None
) -> tuple[Turn, ...]:
    """Checked messages -> turns. Pictures are brought to the square; films become ``num_frames`` frames.

    They are squashed, but cut to the centre where the answer is to be drawn or an earlier one was: training does the
    same, so that what is edited lies over what it becomes.
    """
    turns = []
    drawn = generation_mode not in (None, "text") or any(
        kind != "text"
        for number, message in enumerate(messages)
        if message["role"] == "assistant"
        for kind, _ in _parts(message["content"], number)
    )
    square: SquareMode = "crop" if drawn else "squash"
    for number, message in enumerate(messages):
        parts: list[Part] = []
        for kind, value in _parts(message["content"], number):
            if kind == "text":
                parts.append(Part("text", text=value))
            elif kind == "image":
                parts.append(Part("image", frames=(to_array(value, image_size, square),)))
            else:
                parts.append(Part("video", frames=tuple(to_frames(value, num_frames, image_size, square))))
        turns.append(Turn(role=message["role"], parts=tuple(parts)))
    return tuple(turns)


def _parts(content: Any, number: int) -> Iterator[tuple[str, Any]]:
    """``(type, value)`` of each part of a message's content."""
    if isinstance(content, str):
        yield "text", content
        return
    if not isinstance(content, list | tuple):
        raise ValueError(
            f"message {number} has content of type {type(content).__name__}: give a string or a list of parts"
        )
    for part in content:
        if not isinstance(part, Mapping) or "type" not in part:
            raise ValueError(
                f"message {number} holds a part without 'type': parts look like {{'type': 'text', 'text': ...}}"
            )
        kind = part["type"]
        if kind not in PART_TYPES:
            raise ValueError(
                f"message {number} holds a part of unknown type {kind!r}: choose one of {', '.join(PART_TYPES)}"
            )
        keys = set(part) - {"type"}
        value = part.get(kind, part.get("path"))
        if len(keys) != 1 or not keys <= {kind, "path"} or (kind == "text" and "path" in keys) or value is None:
            raise ValueError(
                f"message {number} holds a part of type {kind!r} with the keys {sorted(map(str, keys))}: "
                f"it needs {kind!r}"
            )
        if "path" in keys and not isinstance(value, str | os.PathLike):
            raise ValueError(f"message {number} holds a 'path' that is a {type(value).__name__}: it must be a string")
        yield kind, value


def user_message(text: str = "", images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """One user's message: pictures, then films, then the text."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    content += [{"type": "video", "video": video} for video in videos]
    if text:
        content.append({"type": "text", "text": text})
    return [{"role": "user", "content": content}]
