"""Prompts and samples of a golden folder -> our turns and samples."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vilau.data.sample import Form, Part, Sample, Turn
from vilau.processing.templates import ChatTemplate, GenerationMode

PLACEHOLDER = -200  # what the reference writes where a picture stands
_MEDIUM = re.compile(r" ?<(im|vi)_start> ?((?:<unk> ?)+)<(?:im|vi)_end> ?")
Frames = Callable[[int], Sequence[np.ndarray]]


def blank_frames(count: int) -> list[np.ndarray]:
    """Frames for checks in which only their places matter."""
    return [np.zeros((2, 2, 3), np.uint8)] * count


def prompt_turns(case: Mapping[str, Any]) -> tuple[tuple[Turn, ...], GenerationMode]:
    """A case of ``prompts.json`` -> turns (pictures blank) and what the answer shall be."""
    options = case.get("kwargs", {})
    turns = [Turn("system", ())] if options.get("no_system_prompt") else []
    for message in case["messages"]:
        if message["value"] is not None:
            role = "user" if message["from"] == "human" else "assistant"
            turns.append(Turn(role, tuple(_prompt_parts(message["value"]))))  # type: ignore[arg-type]
    mode = "image" if options.get("image_generation") else "video" if options.get("video_generation") else "text"
    return tuple(turns), mode  # type: ignore[return-value]


def _prompt_parts(value: str) -> list[Part]:
    parts: list[Part] = []
    for number, words in enumerate(value.split("<image>")):
        if number:
            parts.append(Part("image", frames=tuple(blank_frames(1))))
            words = words.removeprefix("\n")  # the template puts it there
        if words:
            parts.append(Part("text", text=words))
    return parts


def parse_sample(name: str, decoded: str, template: ChatTemplate, frames: Frames) -> Sample:
    """A training sample from the text that its ids decode to (``meta.json``).

    Args:
        name: of the sample.
        decoded: ``<s> SYSTEM USER: ... ASSISTANT: ...</s>USER: ...``; ``<unk>`` stands for a picture or frame, and the
            decoder has put blanks around special tokens.
        frames: number of pictures or frames -> them.
    """
    body = decoded.strip().removeprefix("<s>").strip().removeprefix(template.default_system).strip()
    turns: list[Turn] = []
    for round_text in filter(None, (piece.strip() for piece in body.split("</s>"))):
        question, separator, answer = round_text.partition("ASSISTANT:")
        if not separator or not question.startswith("USER:"):
            raise ValueError(f"sample {name}: {round_text[:60]!r} is no round of a conversation")
        turns.append(Turn("user", tuple(_sample_parts(question.removeprefix("USER:"), frames))))
        turns.append(Turn("assistant", tuple(_sample_parts(answer, frames))))
    return Sample(name, _form(turns), tuple(turns))


def _sample_parts(value: str, frames: Frames) -> list[Part]:
    parts: list[Part] = []
    at = 0
    for match in _MEDIUM.finditer(value):
        if words := value[at : match.start()].strip():
            parts.append(Part("text", text=words))
        count = match.group(2).count("<unk>")
        kind = "image" if match.group(1) == "im" else "video"
        parts.append(Part(kind, frames=tuple(frames(count))))  # type: ignore[arg-type]
        at = match.end()
    if words := value[at:].strip():
        parts.append(Part("text", text=words))
    return parts


def _form(turns: Sequence[Turn]) -> Form:
    drawn = {part.kind for turn in turns if turn.role == "assistant" for part in turn.parts}
    shown = {part.kind for turn in turns if turn.role == "user" for part in turn.parts}
    if "video" in drawn:
        return "text_video"
    if "image" in drawn:
        return "text_image"
    return "image_text" if "image" in shown else "video_text" if "video" in shown else "text"
