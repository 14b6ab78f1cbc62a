"""The one shape that every data source is turned into.

A :class:`Sample` is a short conversation (or one document) whose turns are made of text, pictures and films. It knows
nothing of tokens, models or files; ``processing`` turns it into model inputs, with the supervision that its ``form``
asks for (VILA-U, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np

PartKind = Literal["text", "image", "video"]
Role = Literal["system", "user", "assistant", "document"]
Form = Literal[
    "image_text",
    "text_image",
    "text_video",
    "interleaved",
    "question",
    "video_text",
    "text",
    "image_edit",  # [image, text, image]: beyond the paper, as are the next two
    "image_video",  # [image, text, video]
    "mixed",  # answers that mix text with pictures or films
]

PART_KINDS: tuple[str, ...] = get_args(PartKind)
ROLES: tuple[str, ...] = get_args(Role)
FORMS: tuple[str, ...] = get_args(Form)


@dataclass(frozen=True)
class Part:
    """One piece of a turn: a text, a picture, or a film.

    Args:
        kind: ``"text"``, ``"image"`` or ``"video"``.
        text: the words; only for ``"text"``.
        frames: arrays ``(H, W, 3)`` uint8 RGB, or ``(P, D)`` of integers: the codes of a frame that a vision tower has
            read already. Exactly one for ``"image"``, one or more for ``"video"``, none for ``"text"``.

    Raises:
        ValueError: the kind is unknown, or text and frames do not fit it.
    """

    kind: PartKind
    text: str = ""
    frames: tuple[np.ndarray, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in PART_KINDS:
            raise ValueError(f"part kind {self.kind!r} is not one of {', '.join(PART_KINDS)}")
        if self.kind == "text" and self.frames:
            raise ValueError(
                f"a text part holds {len(self.frames)} frames, but may hold none: put them in an image or video part"
            )
        if self.kind != "text" and self.text:
            raise ValueError(
                f"a part of kind {self.kind!r} holds text {self.text[:40]!r}: put it in a text part of its own"
            )
        if self.kind == "image" and len(self.frames) != 1:
            raise ValueError(
                f"an image part holds {len(self.frames)} frames, but needs exactly 1: use a video part for several"
            )
        if self.kind == "video" and not self.frames:
            raise ValueError("a video part holds no frames, but needs at least 1")
        for frame in self.frames:
            pixels = frame.ndim == 3 and frame.shape[2] == 3 and frame.dtype == np.uint8
            if not pixels and not holds_codes(frame):
                raise ValueError(
                    f"a frame has shape {tuple(frame.shape)} and type {frame.dtype}, but needs (H, W, 3) and uint8: "
                    "convert it to RGB bytes"
                )


@dataclass(frozen=True)
class Turn:
    """What one speaker says: ``parts`` in order. ``"document"`` is the role of an interleaved story."""

    role: Role
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r} is not one of {', '.join(ROLES)}")


@dataclass(frozen=True)
class Sample:
    """One training or test example.

    Args:
        id: unique within its dataset.
        form: decides which positions are supervised (see ``processing``).
        turns: the conversation in order.
        meta: free facts (object, background, answer ...), for evaluation only; never an input of a model.
    """

    id: str
    form: Form
    turns: tuple[Turn, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"sample {self.id!r}: form {self.form!r} is not one of {', '.join(FORMS)}")

    @property
    def frames(self) -> tuple[np.ndarray, ...]:
        """All frames of all parts, pixels or codes, in order of appearance."""
        return tuple(frame for turn in self.turns for part in turn.parts for frame in part.frames)


def holds_codes(frame: np.ndarray) -> bool:
    """Return whether a frame is the codes of a picture and not its pixels.

    Codes are ``(P, D)``, or ``(2, P, D)`` where the picture was read squashed and cut to its centre square.
    """
    return frame.ndim in (2, 3) and np.issubdtype(frame.dtype, np.signedinteger)


def form_of(turns: Sequence[Turn]) -> Form:
    """The form of a conversation or document, from who shows what.

    What an answer holds decides first, then what the user shows; pictures alone from the user and text alone from the
    assistant, once each, are a caption (``image_text``).
    """
    if turns and turns[0].role == "document":
        return "interleaved"
    shown = {part.kind for turn in turns if turn.role == "user" for part in turn.parts}
    answers = [[part.kind for part in turn.parts] for turn in turns if turn.role == "assistant"]
    given = {kind for kinds in answers for kind in kinds}
    if not given <= {"text"}:
        for kind, alone, edited in (("image", "text_image", "image_edit"), ("video", "text_video", "image_video")):
            if given == {kind} and all(len(kinds) == 1 for kinds in answers):
                if shown <= {"text"}:
                    return alone  # type: ignore[return-value]
                if shown <= {"text", "image"}:
                    return edited  # type: ignore[return-value]
        return "mixed"
    if "video" in shown:
        return "video_text"
    if "image" in shown:
        return "image_text" if shown == {"image"} and len(answers) == 1 else "question"
    return "text"


def text(words: str) -> Part:
    """A text part."""
    return Part("text", text=words)


def image(pixels: np.ndarray) -> Part:
    """A picture part of pixels ``(S, S, 3)`` uint8."""
    return Part("image", frames=(pixels,))


def video(frames: tuple[np.ndarray, ...]) -> Part:
    """A film part of frames, each ``(S, S, 3)`` uint8."""
    return Part("video", frames=tuple(frames))
