"""Chat templates: which tokens stand around turns, pictures and films. This is the only file that knows them.

A template turns a conversation (or a document) into a flat list of ``Segment``s; ``encode.py`` turns segments into
token ids. The template belongs to a checkpoint: it is written to ``processor_config.json`` and read from there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from ..data.sample import Part, Turn

GenerationMode = Literal["text", "image", "video"]
GENERATION_MODES: tuple[str, ...] = ("text", "image", "video")


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation.

    kind: ``special`` (``text`` is the name of one special token), ``text`` (plain text, in which special tokens mean
    nothing) or ``visual`` (``frames``: pictures of ``(S, S, 3)`` uint8, each taking P positions).
    target: the tokens of this segment are what the model shall say (they are in an assistant turn or a document).
    """

    kind: Literal["special", "text", "visual"]
    text: str = ""
    frames: tuple[np.ndarray, ...] = ()
    target: bool = False


@dataclass(frozen=True)
class ChatTemplate:
    """The strings around turns and media of one family of checkpoints.

    Strings in ``special_tokens`` that occur in the template's own strings become one token each; everything else in
    them is ordinary text and is tokenised together with the text beside it. Text of users never yields a special token.
    """

    name: str = "vilau"
    begin: str = "<s>"
    system_prefix: str = "<|system|>"
    system_suffix: str = ""
    user_prefix: str = "<|user|>"
    user_suffix: str = ""
    assistant_prefix: str = "<|assistant|>"
    assistant_suffix: str = "</s>"
    document_suffix: str = "</s>"
    image_prefix: str = "<image_start>"  # around a picture that is shown to the model
    image_suffix: str = "<image_end>"
    video_prefix: str = "<video_start>"  # around a film that is shown to the model
    video_suffix: str = "<video_end>"
    frame_suffix: str = ""  # after each frame of a film that is shown to the model
    image_start: str = "<image_start>"  # around a picture that the model draws
    image_end: str = "<image_end>"
    video_start: str = "<video_start>"  # around a film that the model draws
    video_end: str = "<video_end>"
    default_system: str = ""  # system text of conversations that bring none
    special_tokens: tuple[str, ...] = (
        "<s>",
        "</s>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<image_start>",
        "<image_end>",
        "<video_start>",
        "<video_end>",
    )

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values, for the processor's configuration."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values["special_tokens"] = list(self.special_tokens)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any] | str) -> ChatTemplate:
        """The template of a name or of a dictionary made by ``to_dict``; ``ValueError`` for unknown names or keys."""
        if isinstance(values, str):
            if values not in PRESETS:
                raise ValueError(f"unknown chat template {values!r}: known are {', '.join(sorted(PRESETS))}")
            return PRESETS[values]
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown chat template keys {unknown}: known are {sorted(known)}")
        wrong = sorted(key for key, value in values.items() if key != "special_tokens" and not isinstance(value, str))
        if wrong:
            raise ValueError(f"chat template keys {wrong} must be strings")
        return cls(**{**values, "special_tokens": tuple(values.get("special_tokens", cls().special_tokens))})

    def generation_prefix(self, mode: GenerationMode) -> str:
        """What opens the answer: the assistant's prefix and, to draw, the start token of a picture or film."""
        if mode not in GENERATION_MODES:
            raise ValueError(f"unknown generation_mode {mode!r}: choose one of {', '.join(GENERATION_MODES)}")
        return self.assistant_prefix + {"text": "", "image": self.image_start, "video": self.video_start}[mode]

    def render(self, turns: Sequence[Turn], generation_mode: GenerationMode | None = None) -> list[Segment]:
        """Conversation -> segments, with adjacent text joined.

        With a ``generation_mode`` the answer is opened at the end (``<|assistant|>``, ``<|assistant|><image_start>``,
        ...), so that the segments of a prompt are the first segments of the same conversation with its answer.
        ``ValueError`` for no turns, a system turn that is not the first, or a document beside other turns.
        """
        _check_turns(turns, generation_mode)
        out: list[Segment] = []
        self._literal(out, self.begin, target=False)
        if turns[0].role == "document":
            for part in turns[0].parts:
                self._part(out, part, drawn=False, target=True)
            self._literal(out, self.document_suffix, target=True)
            return _join_text(out)
        if turns[0].role != "system" and self.default_system:
            turns = (Turn(role="system", parts=(Part(kind="text", text=self.default_system),)), *turns)
        for turn in turns:
            answer = turn.role == "assistant"
            self._literal(out, getattr(self, f"{turn.role}_prefix"), target=False)
            for part in turn.parts:
                self._part(out, part, drawn=answer, target=answer)
            self._literal(out, getattr(self, f"{turn.role}_suffix"), target=answer)
        if generation_mode is not None:
            self._literal(out, self.generation_prefix(generation_mode), target=False)
        return _join_text(out)

    def _literal(self, out: list[Segment], text: str, target: bool) -> None:
        for piece, special in _split(text, self.special_tokens):
            out.append(Segment(kind="special" if special else "text", text=piece, target=target))

    def _part(self, out: list[Segment], part: Part, drawn: bool, target: bool) -> None:
        if part.kind == "text":
            out.append(Segment(kind="text", text=part.text, target=target))
            return
        if part.kind == "image":
            prefix, suffix = (self.image_start, self.image_end) if drawn else (self.image_prefix, self.image_suffix)
        else:
            prefix, suffix = (self.video_start, self.video_end) if drawn else (self.video_prefix, self.video_suffix)
        self._literal(out, prefix, target)
        if self.frame_suffix and part.kind == "video" and not drawn:
            for frame in part.frames:
                out.append(Segment(kind="visual", frames=(frame,), target=target))
                self._literal(out, self.frame_suffix, target)
        else:
            out.append(Segment(kind="visual", frames=part.frames, target=target))
        self._literal(out, suffix, target)


OURS = ChatTemplate()
PRESETS: dict[str, ChatTemplate] = {OURS.name: OURS}


def _check_turns(turns: Sequence[Turn], generation_mode: str | None) -> None:
    if not turns:
        raise ValueError("the conversation is empty: give at least one message")
    for index, turn in enumerate(turns):
        if turn.role == "system" and index > 0:
            raise ValueError(f"message {index} has the role 'system': only the first message may have it")
    if any(turn.role == "document" for turn in turns):
        if len(turns) > 1:
            raise ValueError(f"a document stands alone: it came with {len(turns) - 1} other turns")
        if generation_mode is not None:
            raise ValueError("a document opens no answer: use generation_mode=None or user turns")


def _join_text(segments: list[Segment]) -> list[Segment]:
    """Join neighbouring text of equal supervision, because a tokenizer does not commute with cutting text."""
    out: list[Segment] = []
    for segment in segments:
        last = out[-1] if out else None
        if last is not None and last.kind == segment.kind == "text" and last.target == segment.target:
            out[-1] = Segment(kind="text", text=last.text + segment.text, target=last.target)
        elif segment.kind != "text" or segment.text:
            out.append(segment)
    return out


@lru_cache(maxsize=256)
def _split(text: str, special_tokens: tuple[str, ...]) -> tuple[tuple[str, bool], ...]:
    """Cut a template's own string at its special tokens: ``((piece, is_special), ...)``, empty pieces left out."""
    if not special_tokens:
        return ((text, False),) if text else ()
    longest_first = sorted(special_tokens, key=len, reverse=True)
    pieces = re.split("(" + "|".join(re.escape(token) for token in longest_first) + ")", text)
    return tuple((piece, piece in special_tokens) for piece in pieces if piece)
