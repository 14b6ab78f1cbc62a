"""Samples and prompts -> token ids, kinds and supervision, one entry per position (paper section 3.2).

Training (``encode_sample``) and inference (``encode_prompt``) share every line that decides about tokens, so a prompt
is always a prefix of the training sequence that it stands for.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from ..configuration import PositionKind
from ..data.sample import Sample, Turn, holds_codes
from ..data.sources.source import BadSample
from .templates import ChatTemplate, GenerationMode, Segment

DRAWN_FORMS: frozenset[str] = frozenset({"text_image", "text_video", "image_edit", "image_video", "mixed"})
Supervise = Literal["latter", "both"]


@dataclass(frozen=True, eq=False)
class EncodedSample:
    """One sequence.

    input_ids: ``(L,)`` int64; at visual positions the pad id, which is never embedded
    kinds: ``(L,)`` int8 of ``PositionKind`` (TEXT or VISUAL)
    text_targets: ``(L,)`` bool; this position's token is a supervised text target (predicted from the position before)
    visual_targets: ``(L,)`` bool; this position's codes are supervised visual targets
    frames: ``(F, S, S, 3)`` uint8 RGB in order of appearance; frame f owns the f-th P visual positions; F may be 0
    codes: ``(F, P, D)`` int64 in place of ``frames`` where a vision tower has read them already, else ``(0, 0, 0)``
    left_out: turns of a conversation or parts of a document that were left out to make it fit
    """

    sample_id: str
    form: str
    input_ids: np.ndarray
    kinds: np.ndarray
    text_targets: np.ndarray
    visual_targets: np.ndarray
    frames: np.ndarray
    codes: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0), dtype=np.int64))
    left_out: int = 0

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
    sample: Sample,
    tokenizer: Any,
    template: ChatTemplate,
    positions_per_frame: int,
    drop_text: bool = False,
    supervise: Supervise = "latter",
    max_length: int | None = None,
) -> EncodedSample:
    """Encode a training sample.

    Supervision (METHOD, section 2): text targets are all tokens of assistant turns after ``<|assistant|>``, start, end
    and ``</s>`` tokens included, and every text token of a document but the first; visual targets are the assistant's
    visual positions of the forms in ``DRAWN_FORMS``.

    Args:
        drop_text: leave nothing of what the user says and shows in these forms, except ``mixed``: this gives the
            unconditional sequences that classifier-free guidance learns from. It changes no other form.
        supervise: ``latter`` as above; ``both`` adds all that users say and show, and the pictures of documents, but no
            token that the template puts there (section 3.2 advises against it: an ablation).
        max_length: a longer sample is shortened, never within a picture or a text: the last exchanges of a conversation
            are left out, the last parts of a document.

    Raises:
        BadSample: ``too_long`` - nothing that could be left out makes the sample fit.
        ValueError: no turns, unknown roles, frames of different or wrong shapes.
    """
    draws = sample.form in DRAWN_FORMS
    turns = _without_user_content(sample.turns) if drop_text and draws and sample.form != "mixed" else sample.turns
    template = template.for_training()
    both = supervise == "both"

    def encode(turns: Sequence[Turn]) -> EncodedSample:
        segments = template.render(turns)
        return _encode(sample.id, sample.form, segments, tokenizer, template, positions_per_frame, draws or both, both)

    try:
        encoded = encode(turns)
        if max_length is None or len(encoded) <= max_length:
            return encoded
        return _shorten(turns, encode, encoded, max_length)
    except BadSample:
        raise
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


def _without_user_content(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    return tuple(replace(turn, parts=()) if turn.role == "user" else turn for turn in turns)


def _shortenings(turns: Sequence[Turn]) -> list[tuple[Turn, ...]]:
    """Shorter versions of a sample, rising in length: its first exchanges, or its first parts from a text on."""
    if turns and turns[0].role == "document":
        parts = turns[0].parts
        first = next((index for index, part in enumerate(parts) if part.kind == "text"), len(parts))
        return [(replace(turns[0], parts=parts[:count]),) for count in range(first + 1, len(parts))]
    ends = [index + 1 for index, turn in enumerate(turns) if turn.role == "assistant"]
    return [tuple(turns[:end]) for end in ends if end < len(turns)]


def _shorten(
    turns: Sequence[Turn], encode: Callable[[Sequence[Turn]], EncodedSample], whole: EncodedSample, max_length: int
) -> EncodedSample:
    """The longest version of a sample that fits, found by halving: lengths rise with the number of turns or parts."""
    versions = _shortenings(turns)
    fits = bisect_right(versions, max_length, key=lambda version: len(encode(version)))
    if not fits:
        raise BadSample(
            "too_long",
            f"sample {whole.sample_id} has {len(whole)} positions, more than {max_length}, and no whole turn or part "
            "can be left out: raise row_length or shorten the sample",
        )
    short = encode(versions[fits - 1])
    if turns[0].role == "document":
        left_out = len(turns[0].parts) - len(versions[fits - 1][0].parts)
        text_targets = short.text_targets.copy()
        text_targets[-1] = False  # the document went on, so its end is not to be learnt here
        return replace(short, text_targets=text_targets, left_out=left_out)
    return replace(short, left_out=len(turns) - len(versions[fits - 1]))


def _encode(
    sample_id: str,
    form: str,
    segments: Sequence[Segment],
    tokenizer: Any,
    template: ChatTemplate,
    positions_per_frame: int,
    draws: bool,
    said: bool = False,
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
        said_here: Sequence[bool] = ()
        if segment.kind == "visual":
            new = [placeholder] * (len(segment.frames) * positions_per_frame)
            frames.extend(segment.frames)
            text_start = template.text_start
        elif segment.kind == "special":
            new = [special_id(tokenizer, segment.text)]
            text_start = text_start if segment.text == template.begin else ""
        else:
            words, bare = segment.text, bool(template.text_start)
            new = encode_bare_text(tokenizer, text_start + words) if bare else encode_text(tokenizer, words)
            if said and segment.said:
                said_here = _said_tokens(tokenizer, segment, text_start if bare else None)
            text_start = "" if bare else text_start
        ids.extend(new)
        visual.extend([segment.kind == "visual"] * len(new))
        if said and segment.said and segment.kind != "text":
            said_here = [True] * len(new)
        target.extend(segment.target or mark for mark in said_here or [False] * len(new))
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


def _said_tokens(tokenizer: Any, segment: Segment, text_start: str | None) -> list[bool]:
    """For each token of a text segment, whether it holds a character that a user said."""
    if text_start is None:
        spans = tokenizer(
            segment.text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        )["offset_mapping"]
    else:
        spans = _without_dummy_prefix(tokenizer).encode(text_start + segment.text, add_special_tokens=False).offsets
    skip = len(text_start or "")
    ranges = [(start + skip, end + skip) for start, end in segment.said]
    return [any(first < end and start < last for start, end in ranges) for first, last in spans]


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
