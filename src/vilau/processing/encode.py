"""Samples and prompts -> token ids, kinds and supervision, one entry per position (paper section 3.2).

Training (``encode_sample``) and inference (``encode_prompt``) share every line that decides about tokens, so a prompt
is always a prefix of the training sequence that it stands for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..configuration import PositionKind
from ..data.sample import Sample, Turn, holds_codes
from .templates import ChatTemplate, GenerationMode, Segment

VISUAL_TARGET_FORMS: frozenset[str] = frozenset({"text_image", "text_video"})


@dataclass(frozen=True, eq=False)
class EncodedSample:
    """One sequence.

    input_ids: ``(L,)`` int64; at visual positions the pad id, which is never embedded
    kinds: ``(L,)`` int8 of ``PositionKind`` (TEXT or VISUAL)
    text_targets: ``(L,)`` bool; this position's token is a supervised text target (predicted from the position before)
    visual_targets: ``(L,)`` bool; this position's codes are supervised visual targets
    frames: ``(F, S, S, 3)`` uint8 RGB in order of appearance; frame f owns the f-th P visual positions; F may be 0
    codes: ``(F, P, D)`` int64 in place of ``frames`` where a vision tower has read them already, else ``(0, 0, 0)``
    """

    sample_id: str
    form: str
    input_ids: np.ndarray
    kinds: np.ndarray
    text_targets: np.ndarray
    visual_targets: np.ndarray
    frames: np.ndarray
    codes: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.input_ids)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Plain text -> ids, without begin or end tokens; special tokens spelled out in the text stay plain text."""
    if not text:
        return []
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # lone surrogates are no text
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def encode_bare_text(tokenizer: Any, text: str) -> list[int]:
    """As ``encode_text``, but nothing is put before the text: SentencePiece's dummy prefix is the template's business.

    transformers leaves that prefix out where the text begins with a blank, the released tokenizers do not.
    """
    if not text:
        return []
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # lone surrogates are no text
    return list(_without_dummy_prefix(tokenizer).encode(text, add_special_tokens=False).ids)


@lru_cache(maxsize=8)
def _without_dummy_prefix(tokenizer: Any) -> Tokenizer:
    """A copy of the tokenizer's backend that adds no blank before text and treats special tokens as plain text."""
    layout = json.loads(tokenizer.backend_tokenizer.to_str())
    for step in _steps(layout.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
    normalizer = layout.get("normalizer")
    if normalizer is not None:
        kept = [step for step in _steps(normalizer, "normalizers") if step["type"] != "Prepend"]
        layout["normalizer"] = {"type": "Sequence", "normalizers": kept}
    bare = Tokenizer.from_str(json.dumps(layout))
    bare.encode_special_tokens = True
    return bare


def _steps(stage: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a stage of a tokenizer's pipeline: one, or those of a sequence."""
    return [] if stage is None else list(stage[key]) if stage["type"] == "Sequence" else [stage]


def special_id(tokenizer: Any, token: str) -> int:
    """Id of a special token; ``ValueError`` when the tokenizer does not have it."""
    index = tokenizer.convert_tokens_to_ids(token)
    if index is None or (index == tokenizer.unk_token_id and token != tokenizer.unk_token):
        raise ValueError(
            f"the tokenizer has no token {token!r}, which the chat template needs: use the checkpoint's own tokenizer"
        )
    return int(index)


def placeholder_id(tokenizer: Any) -> int:
    """The id that stands at visual and padding positions: the pad token's."""
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad token: set tokenizer.pad_token")
    return int(tokenizer.pad_token_id)


def encode_sample(
    sample: Sample, tokenizer: Any, template: ChatTemplate, positions_per_frame: int, drop_text: bool = False
) -> EncodedSample:
    """Encode a training sample.

    Supervision (METHOD, section 2): text targets are all tokens of assistant turns after ``<|assistant|>``, start, end
    and ``</s>`` tokens included, and every text token of a document but the first; visual targets are the assistant's
    visual positions of the forms text_image and text_video. ``drop_text`` empties the user's text of these two forms,
    which gives the unconditional sequences that classifier-free guidance learns from; it changes no other form.
    ``ValueError``: no turns, unknown roles, frames of different or wrong shapes.
    """
    draws = sample.form in VISUAL_TARGET_FORMS
    turns = _without_user_text(sample.turns) if drop_text and draws else sample.turns
    try:
        segments = template.for_training().render(turns)
        return _encode(sample.id, sample.form, segments, tokenizer, template, positions_per_frame, draws)
    except ValueError as error:
        raise ValueError(f"sample {sample.id}: {error}") from error


def encode_prompt(
    turns: Sequence[Turn],
    tokenizer: Any,
    template: ChatTemplate,
    positions_per_frame: int,
    generation_mode: GenerationMode | None,
    prompt_id: str = "prompt",
) -> EncodedSample:
    """Encode a conversation for inference; with a ``generation_mode`` the answer is opened. Nothing is a target."""
    segments = [replace(segment, target=False) for segment in template.render(turns, generation_mode)]
    form = generation_mode or "text"
    return _encode(prompt_id, form, segments, tokenizer, template, positions_per_frame, draws=False)


def unconditional_turns() -> tuple[Turn, ...]:
    """The conversation without a condition: one empty user turn (what ``drop_text`` leaves of a sample)."""
    return (Turn(role="user", parts=()),)


def _without_user_text(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    return tuple(
        replace(turn, parts=tuple(part for part in turn.parts if part.kind != "text")) if turn.role == "user" else turn
        for turn in turns
    )


def _encode(
    sample_id: str,
    form: str,
    segments: Sequence[Segment],
    tokenizer: Any,
    template: ChatTemplate,
    positions_per_frame: int,
    draws: bool,
) -> EncodedSample:
    if positions_per_frame < 1:
        raise ValueError(f"positions_per_frame is {positions_per_frame}: it must be at least 1")
    ids: list[int] = []
    visual: list[bool] = []
    target: list[bool] = []
    frames: list[np.ndarray] = []
    placeholder = placeholder_id(tokenizer)
    text_start = template.text_start
    for segment in segments:
        if segment.kind == "visual":
            new = [placeholder] * (len(segment.frames) * positions_per_frame)
            frames.extend(segment.frames)
            text_start = template.text_start
        elif segment.kind == "special":
            new = [special_id(tokenizer, segment.text)]
            text_start = text_start if segment.text == template.begin else ""
        elif template.text_start:
            new = encode_bare_text(tokenizer, text_start + segment.text)
            text_start = ""
        else:
            new = encode_text(tokenizer, segment.text)
        ids.extend(new)
        visual.extend([segment.kind == "visual"] * len(new))
        target.extend([segment.target] * len(new))
    if not ids:
        raise ValueError("the sequence is empty: its template and its text give no token")
    is_visual = np.asarray(visual, dtype=bool)
    is_target = np.asarray(target, dtype=bool)
    pixels, codes = _stack(frames), _stack_codes(frames, positions_per_frame)
    is_target[0] = False  # nothing stands before the first position that could predict it
    return EncodedSample(
        sample_id=sample_id,
        form=form,
        input_ids=np.asarray(ids, dtype=np.int64),
        kinds=np.where(is_visual, int(PositionKind.VISUAL), int(PositionKind.TEXT)).astype(np.int8),
        text_targets=is_target & ~is_visual,
        visual_targets=is_target & is_visual & draws,
        frames=pixels,
        codes=codes,
    )


def _stack(frames: Sequence[np.ndarray]) -> np.ndarray:
    """``F`` frames -> ``(F, S, S, 3)`` uint8; ``(0, 0, 0, 3)`` without frames of pixels."""
    if not frames or holds_codes(frames[0]):
        return np.zeros((0, 0, 0, 3), dtype=np.uint8)
    shape = frames[0].shape
    for index, frame in enumerate(frames):
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[0] != frame.shape[1] or frame.shape[2] != 3:
            raise ValueError(f"frame {index} is {frame.dtype} {frame.shape}: frames must be square (S, S, 3) uint8 RGB")
        if frame.shape != shape:
            raise ValueError(f"frame {index} is {frame.shape} where frame 0 is {shape}: all frames must have one size")
    return np.stack(frames)


def _stack_codes(frames: Sequence[np.ndarray], positions: int) -> np.ndarray:
    """Codes of ``F`` frames -> ``(F, P, D)`` int64; ``(0, 0, 0)`` where the frames are pixels."""
    if not frames or not holds_codes(frames[0]):
        return np.zeros((0, 0, 0), dtype=np.int64)
    depth = frames[0].shape[1]
    for index, frame in enumerate(frames):
        if not holds_codes(frame):
            raise ValueError(f"frame {index} holds pixels where frame 0 holds codes: encode all frames or none")
        if frame.shape != (positions, depth):
            raise ValueError(
                f"frame {index} holds codes {frame.shape}, the model needs {(positions, depth)}: "
                "encode the frames anew with its own vision tower"
            )
    return np.stack(frames).astype(np.int64)
