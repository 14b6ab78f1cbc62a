"""Checks of drawing pictures and films with the most likely codes, guided or not.

Codes feed back, so one code decided by rounding changes everything after it. The visual loop is therefore followed up
to the first position where the two best logits lie closer than ``NEAR_TIE``; from there on the reference's own codes
are fed (teacher forcing), and only near-ties may differ.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import torch

from vilau.evaluation.parity.compare import NEAR_TIE, Outcome
from vilau.evaluation.parity.subject import Subject
from vilau.evaluation.parity.tower import centre
from vilau.generation.guidance import guided_logits
from vilau.generation.sampling import SamplingOptions, row_seeds
from vilau.generation.visual import generate_codes
from vilau.processing.templates import GenerationMode

_CHUNK = 256  # positions whose logits are held at once


@dataclass(frozen=True)
class Drawing:
    """One generation of the reference: ``j.cfg3``, ``j.cfg3_x2``, ``k.video_cfg3``."""

    key: str

    @property
    def video(self) -> bool:
        """A film instead of a picture."""
        return "video" in self.key

    @property
    def guidance(self) -> float:
        """The guidance scale in the name."""
        found = re.search(r"cfg(\d+(?:\.\d+)?)", self.key)
        if found is None:
            raise ValueError(f"{self.key!r} names no guidance scale")
        return float(found[1])

    @property
    def copies(self) -> int:
        """Pictures of one prompt."""
        found = re.search(r"_x(\d+)", self.key)
        return int(found[1]) if found else 1

    @property
    def mode(self) -> GenerationMode:
        """As our processor calls it."""
        return "video" if self.video else "image"


def caption(subject: Subject, drawing: Drawing) -> str:
    """What is drawn: as the folder's README.md says, else the prompt of that kind; of two, the second sample's."""
    readme = subject.golden.folder / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8")
        said = re.search(rf"^\* {re.escape(drawing.key)}: \w+\('([^']+)'", text, re.MULTILINE)
        if said:
            return said[1]
    if drawing.copies > 1:
        return subject.sample("text_image_2").turns[0].parts[0].text
    return str(subject.golden.prompts[f"{drawing.mode}_generation"]["messages"][0]["value"])


@lru_cache(maxsize=2)
def _prompt(subject: Subject, drawing: Drawing) -> dict[str, torch.Tensor]:
    message = {"role": "user", "content": caption(subject, drawing)}
    frames = (
        subject.golden.expected(f"{drawing.key}.codes").shape[1] // subject.positions
        if _told(subject, drawing)
        else None
    )
    inputs = subject.processor.apply_chat_template(
        [message], drawing.mode, num_frames=frames if drawing.video else None
    )
    return dict(inputs.to(subject.device))


def _told(subject: Subject, drawing: Drawing) -> bool:
    return f"{drawing.key}.codes" in subject.golden.names


def _rows(subject: Subject, drawing: Drawing) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt embeddings ``(2 n, L, H)`` and mask, conditional rows first, unconditional ones second."""
    inputs = _prompt(subject, drawing)
    embeds = subject.model.embed(inputs["input_ids"], inputs["kinds"]).repeat_interleave(drawing.copies, 0)
    mask = inputs["attention_mask"].repeat_interleave(drawing.copies, 0)
    return subject.model._add_unconditional(embeds, mask, inputs["unconditional_ids"])


@dataclass(frozen=True)
class Forced:
    """States and choices when given codes are fed: `hidden` (2n, P, H), `best` and `margin` (n, P, D)."""

    hidden: torch.Tensor
    best: torch.Tensor
    margin: torch.Tensor


@lru_cache(maxsize=2)
def _forced(subject: Subject, drawing: Drawing) -> Forced:
    codes = _fed_codes(subject, drawing)
    embeds, mask = _rows(subject, drawing)
    start = embeds.shape[1]
    visual = subject.model.visual_embeds(codes[:, :-1])
    embeds = torch.cat([embeds, torch.cat([visual, visual])], 1)
    mask = torch.cat([mask, mask.new_ones((len(mask), codes.shape[1] - 1))], 1)
    places = (mask.cumsum(1) - 1).clamp_min(0)
    hidden = subject.model.hidden_states(embeds, mask, places)[:, start - 1 :]
    best, margin = [], []
    for at in range(0, codes.shape[1], _CHUNK):
        logits = _mixed(subject, drawing, hidden[:, at : at + _CHUNK], codes[:, at : at + _CHUNK])
        two = logits.topk(2, -1)
        best.append(two.indices[..., 0])
        margin.append(two.values[..., 0] - two.values[..., 1])
    return Forced(hidden, torch.cat(best, 1), torch.cat(margin, 1))


def _mixed(subject: Subject, drawing: Drawing, hidden: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Guided depth logits ``(n, P, D, K)`` of states ``(2n, P, H)`` and fed codes ``(n, P, D)``."""
    partial = subject.model.vision_tower.quantizer.partial_z_q(codes).repeat(2, 1, 1, 1)
    logits = subject.model.depth_transformer(hidden.flatten(0, 1), partial.flatten(0, 1))
    return guided_logits(logits, drawing.guidance).unflatten(0, codes.shape[:2])


@lru_cache(maxsize=4)
def _fed_codes(subject: Subject, drawing: Drawing) -> torch.Tensor:
    """The reference's codes ``(n, P, D)``, or those of our own loop where the folder does not hold them."""
    if _told(subject, drawing):
        return subject.golden.expected(f"{drawing.key}.codes").to(subject.device)
    return _whole_loop(subject, drawing)


@lru_cache(maxsize=4)
def _whole_loop(subject: Subject, drawing: Drawing) -> torch.Tensor:
    """Codes ``(n, P, D)`` as users get them: `generate` at temperature 0."""
    drawn = subject.model.generate(
        **_prompt(subject, drawing),
        generation_mode=drawing.mode,
        guidance_scale=drawing.guidance,
        temperature=0.0,
        num_images_per_prompt=drawing.copies,
    )
    return drawn.codes.flatten(1, 2) if drawing.video else drawn.codes  # type: ignore[union-attr]


def _part_of_loop(subject: Subject, drawing: Drawing, positions: int) -> torch.Tensor:
    """The first codes of the loop."""
    embeds, mask = _rows(subject, drawing)
    if drawing.guidance == 1:
        embeds, mask = embeds[: drawing.copies], mask[: drawing.copies]
    options = SamplingOptions(drawing.guidance, 0.0)
    seeds = row_seeds(0, drawing.copies, subject.device)
    return generate_codes(subject.model, embeds, mask, positions, options, seeds)


def drawn_codes(subject: Subject, found: re.Match[str]) -> Outcome:
    """Codes of all positions: the loop's up to the first near-tie, teacher-forced after it."""
    drawing = Drawing(found["key"])
    fed, forced = _fed_codes(subject, drawing), _forced(subject, drawing)
    positions = fed.shape[1]
    tied = (forced.margin < NEAR_TIE).any(-1).any(0)
    loop = int(tied.nonzero()[0]) if bool(tied.any()) else positions
    loop = min(loop, subject.loop_limit or positions)
    loose = forced.margin < NEAR_TIE
    got = torch.where(loose, fed, forced.best)
    if loop == positions and not drawing.video:
        got = _whole_loop(subject, drawing)
    elif loop:
        got[:, :loop] = _part_of_loop(subject, drawing, loop)
    note = f"loop of {positions} positions"
    if loop < positions:
        note = f"loop of {loop} positions, {positions - loop} teacher-forced, {int(loose.sum())} near-ties"
    return Outcome(got, "equal", False, note)


def states(subject: Subject, found: re.Match[str]) -> Outcome:
    """Hidden states of the first positions, conditional and unconditional rows."""
    drawing = Drawing(found["key"])
    unguided = drawing.guidance == 1
    note = "unconditional rows, which we do not compute at guidance 1" if unguided else ""
    return Outcome(_forced(subject, drawing).hidden[:, : int(found["kept"])], "abs", unguided, note)


def mixed_logits(subject: Subject, found: re.Match[str]) -> Outcome:
    """Guided depth logits of the first positions."""
    drawing, kept = Drawing(found["key"]), int(found["kept"])
    hidden = _forced(subject, drawing).hidden[:, :kept]
    return Outcome(_mixed(subject, drawing, hidden, _fed_codes(subject, drawing)[:, :kept]))


def pixels(subject: Subject, found: re.Match[str]) -> Outcome:
    """The picture on the scale 0 to 255: its centre as numbers, or whole and truncated to uint8."""
    drawing = Drawing(found["key"])
    drawn = subject.model.vision_tower.decode(_fed_codes(subject, drawing))
    scaled = ((drawn + 1) * 127.5).clamp(0, 255)
    if found["side"]:
        return Outcome(centre(scaled, int(found["side"])), "pixel255")
    return Outcome(scaled.to(torch.uint8), "levels", True, "truncated to uint8")


_KEY = r"(?P<key>[jk]\.(video_)?cfg[\d.]*\d(_x\d+)?)"
CHECKS = (
    (_KEY + r"\.codes", drawn_codes),
    (_KEY + r"\.hidden_first(?P<kept>\d+)", states),
    (_KEY + r"\.mixed_logits_first(?P<kept>\d+)", mixed_logits),
    (_KEY + r"\.pixels_255_(center(?P<side>\d+)|u8floor)", pixels),
)
