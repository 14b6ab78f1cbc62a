"""Checks of the vision tower and the depth transformer: features, codes, pixels, logits, filters."""

from __future__ import annotations

import copy
import re

import torch

from vilau.evaluation.parity.compare import Outcome
from vilau.evaluation.parity.subject import Subject
from vilau.generation.sampling import SamplingOptions, filter_logits


def _first(subject: Subject, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """As many pictures as the golden tensor keeps."""
    return tensor[: len(subject.golden.expected(name))]


def hidden(subject: Subject, found: re.Match[str]) -> Outcome:
    """``z_e``, or its quantised version, as maps."""
    features = subject.features if found[0] == "c.hidden" else subject.z_q
    return Outcome(_first(subject, found[0], features.unflatten(1, (subject.grid, subject.grid))))


def codes(subject: Subject, found: re.Match[str]) -> Outcome:
    """Codes of both pictures as maps."""
    maps = subject.codes.unflatten(1, (subject.grid, subject.grid))
    note = f"rounding decides {subject.ties} positions, where the reference's codes are taken" if subject.ties else ""
    return Outcome(_first(subject, found[0], maps), "equal", note=note)


def projector(subject: Subject, found: re.Match[str]) -> Outcome:
    """Visual embeddings."""
    return Outcome(_first(subject, found[0], subject.model.visual_embeds(subject.codes)))


def tokens(subject: Subject, found: re.Match[str]) -> Outcome:
    """Codes in the reference's numbering, first positions."""
    kept = subject.golden.expected(found[0]).shape[1]
    offset = subject.config.text_config.vocab_size
    return Outcome(subject.codes[:, :kept] + offset, "equal", True, "codes counted from the vocabulary's end")


def film_codes(subject: Subject, found: re.Match[str]) -> Outcome:
    """Codes of the film's frames: all of them, or those named."""
    maps = subject.film_codes.unflatten(1, (subject.grid, subject.grid))
    if found["chosen"]:
        maps = maps[[int(number) for number in found["chosen"].split("_")]]
    return Outcome(maps, "equal")


def depth_vectors(subject: Subject, found: re.Match[str]) -> Outcome:
    """Code vectors per depth of picture a, or their running sums."""
    kept = subject.golden.expected(found[0]).shape[1]
    quantizer = subject.model.vision_tower.quantizer
    chosen = subject.codes[:1, :kept]
    return Outcome(quantizer.embed(chosen) if found["what"] == "embed" else quantizer.partial_z_q(chosen))


def decoded(subject: Subject, found: re.Match[str]) -> Outcome:
    """Decoded pixels, not clamped: picture a, or b if ``image1``; whole, or the central square."""
    number = int(found["image"] or 0)
    pixels = subject.model.vision_tower.decode_features(subject.z_q[number : number + 1])
    return Outcome(centre(pixels, int(found["side"])) if found["side"] else pixels)


def decoded_crop(subject: Subject, found: re.Match[str]) -> Outcome:
    """Pixels of the first rows and columns of picture a's map, in float32 or as the reference does in bfloat16."""
    rows, columns = int(found["rows"]), int(found["columns"])
    maps = subject.z_q[:1].unflatten(1, (subject.grid, subject.grid))[:, :rows, :columns]
    decoder = copy.deepcopy(subject.model.vision_tower.pixel_decoder)
    decoder.latent_side = rows  # a map that is small on purpose is not to be stretched
    half = found["dtype"] == "bf16_unpatched"
    dtype = torch.bfloat16 if half else torch.float32
    pixels = decoder.to(dtype)(maps.permute(0, 3, 1, 2).to(dtype)).float()
    return Outcome(pixels, "bf16" if half else "abs", half, "decoder in bfloat16" if half else "")


def depth_logits(subject: Subject, found: re.Match[str]) -> Outcome:
    """Logits of given hidden states and teacher-forced codes, first positions."""
    kept = subject.golden.expected(found[0]).shape[1]
    states = subject.golden.given("f.hidden")[0, :kept].to(subject.device)
    chosen = subject.golden.given("f.codes")[0, :kept].to(subject.device)
    partial = subject.model.vision_tower.quantizer.partial_z_q(chosen)
    return Outcome(subject.model.depth_transformer(states, partial).unsqueeze(0))


def probabilities(subject: Subject, found: re.Match[str]) -> Outcome:
    """What is left of given logits after both filters, as probabilities."""
    logits = subject.golden.given("f.sampling_logits").to(subject.device)
    top_p = float(f"{found['p'][0]}.{found['p'][1:]}")
    options = SamplingOptions(temperature=1.0, top_k=int(found["k"]), top_p=top_p)
    return Outcome(filter_logits(logits, options).softmax(-1))


def centre(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """The central square of ``(I, 3, S, S)``."""
    top, left = ((size - side) // 2 for size in pixels.shape[-2:])
    return pixels[..., top : top + side, left : left + side]


CHECKS = (
    (r"c\.(hidden|z_q)", hidden),
    (r"c\.codes", codes),
    (r"c\.projector", projector),
    (r"c\.tokens_plus_vocab", tokens),
    (r"c\.video_codes(_frames(?P<chosen>\d+(_\d+)*))?", film_codes),
    (r"d\.depth_(?P<what>embed|cumsum)", depth_vectors),
    (r"e\.decode_crop(?P<rows>\d+)x(?P<columns>\d+)_(?P<dtype>fp32|bf16_unpatched)", decoded_crop),
    (r"e\.decode_fp32(_image(?P<image>\d))?(_center(?P<side>\d+))?", decoded),
    (r"f\.logits", depth_logits),
    (r"f\.sampling_probs_top_k(?P<k>\d+)_top_p(?P<p>\d+)", probabilities),
)
