"""What the model sees of a sample and what it learns from it, position by position, for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..configuration import PositionKind
from .encode import EncodedSample


@dataclass(frozen=True)
class Span:
    """Positions ``first ... last`` of a sequence: one token, or the positions of one picture or frame.

    shown: the token as it is written, or ``picture 1``.
    learnt: whether the model is trained to predict it.
    """

    first: int
    last: int
    shown: str
    token_id: int | None
    learnt: bool


def explain(encoded: EncodedSample, tokenizer: Any, positions_per_frame: int) -> list[Span]:
    """Return the spans of an encoded sample in order; together they are all its positions."""
    spans: list[Span] = []
    visual = encoded.kinds == int(PositionKind.VISUAL)
    at, picture = 0, 0
    while at < len(encoded):
        if visual[at]:
            picture += 1
            last = at + positions_per_frame - 1
            learnt = encoded.visual_targets[at : last + 1]
            assert learnt.all() or not learnt.any(), f"sample {encoded.sample_id}: half of a picture is a target"
            spans.append(Span(at, last, f"picture {picture}", None, bool(learnt[0])))
        else:
            last, token = at, int(encoded.input_ids[at])
            spans.append(Span(at, at, written(tokenizer, token), token, bool(encoded.text_targets[at])))
        at = last + 1
    return spans


def written(tokenizer: Any, token_id: int) -> str:
    """Return a token as text that shows its blanks and breaks; tokens of parts of a character by their name."""
    text = tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    name = str(tokenizer.convert_ids_to_tokens(token_id))
    if not text or "\ufffd" in text:
        return name
    if token_id in set(tokenizer.all_special_ids) or name == text:
        return name
    leading = " " if name[:1] in ("▁", "Ġ") and not text.startswith(" ") else ""  # decoding drops the first blank
    return repr(leading + text)[1:-1]


def describe(encoded: EncodedSample, tokenizer: Any, positions_per_frame: int) -> list[str]:
    """Return lines: a head with the counts, then a line per span, learnt ones marked with ``*``."""
    texts, pictures = int(encoded.text_targets.sum()), int(encoded.visual_targets.sum())
    head = f"{encoded.sample_id}: {encoded.form}, {len(encoded)} positions; learnt: {texts} of text, {pictures} visual"
    lines = [head]
    for span in explain(encoded, tokenizer, positions_per_frame):
        place = f"{span.first}" if span.first == span.last else f"{span.first}-{span.last}"
        number = "" if span.token_id is None else f"{span.token_id}"
        lines.append(f"  {place:>9} {'*' if span.learnt else ' '} {number:>7}  {span.shown}")
    return lines
