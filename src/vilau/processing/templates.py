"""Chat templates: which tokens stand around turns, pictures and films. This is the only file that knows them.

A template turns a conversation (or a document) into a flat list of ``Segment``s; ``encode.py`` turns segments into
token ids. The template belongs to a checkpoint: it is written to ``processor_config.json`` and read from there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from ..data.sample import Part, Turn

GenerationMode = Literal["text", "image", "video", "interleaved"]
GENERATION_MODES: tuple[str, ...] = ("text", "image", "video", "interleaved")


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation.

    kind: ``special`` (``text`` is the name of one special token), ``text`` (plain text, in which special tokens mean
    nothing) or ``visual`` (``frames``: pictures of ``(S, S, 3)`` uint8, each taking P positions).
    target: the tokens of this segment are what the model shall say (they are in an assistant turn or a document).
    said: ranges ``(start, end)`` of characters of ``text`` that are what a user said or showed and not the template's;
    of a visual segment of a user one empty range. Supervised only where both sides are.
    """

    kind: Literal["special", "text", "visual"]
    text: str = ""
    frames: tuple[np.ndarray, ...] = ()
    target: bool = False
    said: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class ChatTemplate:
    """The strings around turns and media of one family of checkpoints.

    Strings in ``special_tokens`` that occur in the template's own strings become one token each; everything else in
    them is ordinary text and is tokenised together with the text beside it. Text of users never yields a special token.
    """

    name: str = "vilau"
    begin: str = "<s>"
    text_start: str = ""  # before text that opens the sequence or follows a picture: SentencePiece's dummy prefix
    content_prefix: str = ""  # before what a user or the assistant says; a target in answers
    system_prefix: str = "<|system|>"
    system_suffix: str = ""
    user_prefix: str = "<|user|>"
    user_suffix: str = ""  # after a user turn that is not empty
    assistant_prefix: str = "<|assistant|>"
    assistant_suffix: str = "</s>"
    document_suffix: str = "</s>"
    image_prefix: str = "<image_start>"  # around a picture that is shown to the model
    image_suffix: str = "<image_end>"
    video_prefix: str = "<video_start>"  # around a film that is shown to the model
    video_suffix: str = "<video_end>"
    frame_suffix: str = ""  # after each frame of a film that is shown to the model
    training_image_prefix: str | None = None  # the same around a picture in training samples, where that differs
    training_image_suffix: str | None = None
    image_start: str = "<image_start>"  # around a picture that the model draws
    image_end: str = "<image_end>"
    video_start: str = "<video_start>"  # around a film that the model draws
    video_end: str = "<video_end>"
    default_system: str = ""  # system text of conversations that bring none
    strip_content: bool = False  # drop blanks and line ends around what a turn says, media suffixes included
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
        flags, optional = {"strip_content"}, {"training_image_prefix", "training_image_suffix"}
        words = {key: value for key, value in values.items() if key not in flags and key != "special_tokens"}
        wrong = sorted(k for k, v in words.items() if not isinstance(v, str) and not (v is None and k in optional))
        if wrong:
            raise ValueError(f"chat template keys {wrong} must be strings")
        if not all(isinstance(values.get(key, False), bool) for key in flags):
            raise ValueError(f"chat template keys {sorted(flags)} must be true or false")
        return cls(**{**values, "special_tokens": tuple(values.get("special_tokens", cls().special_tokens))})

    def generation_prefix(self, mode: GenerationMode) -> str:
        """What opens the answer: the assistant's prefix and, to draw, the start token of a picture or film."""
        if mode not in GENERATION_MODES:
            raise ValueError(f"unknown generation_mode {mode!r}: choose one of {', '.join(GENERATION_MODES)}")
        opened = {"image": self.image_start, "video": self.video_start}.get(mode, "")
        return self.assistant_prefix + (self.content_prefix + opened if opened else "")

    def for_training(self) -> ChatTemplate:
        """The template of training samples: the same, but for pictures where the checkpoint's training differed."""
        prefix, suffix = self.training_image_prefix, self.training_image_suffix
        return replace(
            self,
            image_prefix=self.image_prefix if prefix is None else prefix,
            image_suffix=self.image_suffix if suffix is None else suffix,
        )

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
            content = self._content(turn)
            self._literal(out, getattr(self, f"{turn.role}_prefix"), target=False)
            if content and turn.role != "system":
                self._literal(out, self.content_prefix, target=answer)
            out.extend(content)
            if content or turn.role != "user":
                self._literal(out, getattr(self, f"{turn.role}_suffix"), target=answer)
        if generation_mode is not None:
            self._literal(out, self.generation_prefix(generation_mode), target=False)
        return _join_text(out)

    def _content(self, turn: Turn) -> list[Segment]:
        """What a turn says, joined, and stripped if the template asks for it; empty text leaves nothing."""
        answer = turn.role == "assistant"
        parts: list[Segment] = []
        for part in turn.parts:
            self._part(parts, part, drawn=answer, target=answer)
        content = _join_text(parts)
        if self.strip_content:
            if content and content[0].kind == "text":
                content[0] = replace(content[0], text=content[0].text.lstrip())
            if content and content[-1].kind == "text":
                content[-1] = replace(content[-1], text=content[-1].text.rstrip())
            content = _join_text(content)
        if turn.role != "user":
            return content
        return [replace(segment, said=((0, len(segment.text)),)) for segment in content]

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
VICUNA_V1 = ChatTemplate(
    name="vicuna_v1",
    text_start=" ",
    content_prefix=" ",
    system_prefix="",
    system_suffix=" ",
    user_prefix="USER:",
    user_suffix=" ",
    assistant_prefix="ASSISTANT:",
    image_prefix="",
    image_suffix="\n",
    video_prefix="",
    video_suffix="",
    frame_suffix="\n",
    training_image_prefix=" <im_start>",
    training_image_suffix="<im_end>\n",
    image_start="<im_start>",
    image_end="<im_end>",
    video_start="<vi_start>",
    video_end="<vi_end>",
    default_system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    strip_content=True,
    special_tokens=("<s>", "</s>", "<im_start>", "<im_end>", "<vi_start>", "<vi_end>"),
)  # of the released checkpoints (METHOD, section 3)
PRESETS: dict[str, ChatTemplate] = {template.name: template for template in (OURS, VICUNA_V1)}


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
            moved = tuple((start + len(last.text), end + len(last.text)) for start, end in segment.said)
            out[-1] = replace(last, text=last.text + segment.text, said=last.said + moved)
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
