"""Checks of reading: embeddings, text logits, greedy answers."""

from __future__ import annotations

import re
from typing import Any

import torch
from PIL import Image

from vilau.configuration import PositionKind
from vilau.evaluation.parity.chats import prompt_turns
from vilau.evaluation.parity.compare import Outcome
from vilau.evaluation.parity.subject import Subject


def _questions(subject: Subject) -> tuple[torch.Tensor, torch.Tensor]:
    return subject.expand(subject.golden.given("g.input_ids"), subject.golden.given("g.attention_mask"))


def embeddings(subject: Subject, found: re.Match[str]) -> Outcome:
    """Input embeddings of one question, first positions."""
    ids, kinds = _questions(subject)
    embeds = subject.model.embed(ids, kinds, pixel_values=subject.pixels[: len(ids)])
    return Outcome(embeds[int(found["row"]), : int(found["kept"])])


def text_logits(subject: Subject, found: re.Match[str]) -> Outcome:
    """Text logits of a row of the padded batch, or of the first row alone: all, or the last so many."""
    ids, kinds = _questions(subject)
    pixels = subject.pixels[: len(ids)]
    row = int(found["row"] or 0)
    if found["row"] is None:
        length = int((kinds[0] != PositionKind.PAD).sum())
        ids, kinds, pixels = ids[:1, :length], kinds[:1, :length], pixels[:1]
    mask = (kinds != PositionKind.PAD).long()
    logits = subject.model(ids, kinds, pixel_values=pixels, attention_mask=mask).logits
    valid = logits[row, : int(mask[row].sum())]
    return Outcome(valid[-int(found["kept"]) :] if found["kept"] else valid)


def greedy(subject: Subject, found: re.Match[str]) -> Outcome:
    """The greedy answer to a prompt over picture a or the film, with the begin token that the reference returns."""
    turns, _ = prompt_turns(subject.golden.prompts[found["case"]])
    pictures = sum(part.kind == "image" for part in turns[0].parts)
    words = " ".join(part.text for part in turns[0].parts if part.kind == "text")
    if pictures > 1:
        medium: dict[str, Any] = {"type": "video", "video": [_picture(path) for path in subject.golden.film]}
    else:
        medium = {"type": "image", "image": subject.golden.picture("a")}
    message = {"role": "user", "content": [medium, {"type": "text", "text": words}]}
    inputs = subject.processor.apply_chat_template([message]).to(subject.device)
    new = subject.golden.expected(found[0]).shape[1] - 1
    answer = subject.model.generate(**inputs, generation_mode="text", do_sample=False, max_new_tokens=max(new, 1))
    begin = answer.new_full((1, 1), subject.processor.tokenizer.bos_token_id)
    return Outcome(torch.cat([begin, answer], 1), "equal", True, "begins with <s>")


def _picture(path: object) -> Image.Image:
    with Image.open(path) as file:  # type: ignore[arg-type]
        return file.convert("RGB")


CHECKS = (
    (r"g\.inputs_embeds_row(?P<row>\d+)_first(?P<kept>\d+)", embeddings),
    (r"g\.logits_(row(?P<row>\d+)|single)(_last(?P<kept>\d+))?", text_logits),
    (r"i\.greedy\.(?P<case>\w+)", greedy),
)
