"""Checks of training: losses, labels, gradients of the batches that ``meta.json`` describes."""

from __future__ import annotations

import math
import re
from functools import lru_cache

import torch

from vilau.checkpoints.keys import to_released
from vilau.configuration import PositionKind
from vilau.data.collate import Batch, collate_padded
from vilau.evaluation.parity.compare import Outcome
from vilau.evaluation.parity.subject import Subject
from vilau.processing.encode import placeholder_id

IGNORED = -100
_REFERENCE_NAMES = (
    ("vision_tower.vision_tower.", "vision_tower:"),
    ("llm.", "llm:"),
    ("mm_projector.", "mm_projector:"),
)


@lru_cache(maxsize=4)
def _batch(subject: Subject, samples: tuple[str, ...]) -> tuple[Batch, torch.Tensor | None]:
    """The padded batch of named samples and its codes ``(I, P, D)``."""
    encoded = [subject.encoded(name) for name in samples]
    batch = collate_padded(encoded, placeholder_id(subject.processor.tokenizer)).to(subject.device)
    if not len(batch.frames):
        return batch, None
    return batch, subject.model.vision_tower.encode(subject.pixel_values(list(batch.frames.cpu().numpy())))


def _samples(subject: Subject, case: str) -> tuple[str, ...]:
    key = f"h.batch.{case}"
    if key in subject.golden.meta:
        return tuple(subject.golden.meta[key]["samples"])
    if f"h.sample.{case}.decoded" in subject.golden.meta:
        return (case,)
    raise ValueError(f"meta.json describes no batch {case!r}")


def _rule(subject: Subject, case: str) -> tuple[bool, str]:
    """Whether the batch follows a rule of the reference, and which."""
    cropped = subject.cropped_by_reference(_samples(subject, case))
    return cropped, "top crop of portraits" if cropped else ""


@lru_cache(maxsize=8)
def _loss(subject: Subject, case: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """``[total, text, visual]`` of a batch, visual NaN if there is none, and the gradients by our names.

    The model is in eval mode: the reference was run with every dropout at 0.
    """
    batch, codes = _batch(subject, _samples(subject, case))
    trained = {
        name: parameter.requires_grad_(True)
        for name, parameter in subject.model.named_parameters()
        if not name.startswith("vision_tower.")
    }
    with torch.enable_grad():
        losses = subject.model.losses(
            batch.input_ids,
            batch.kinds,
            batch.text_targets,
            batch.visual_targets,
            codes=codes,
            attention_mask=(batch.kinds != PositionKind.PAD).long(),
        )
        total = losses.total()
        gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    parts = [part.mean().item() if part.numel() else math.nan for part in (losses.text, losses.visual)]
    found = {name: grad for name, grad in zip(trained, gradients, strict=True) if grad is not None}
    return torch.tensor([total.item(), *parts]), found


def loss(subject: Subject, found: re.Match[str]) -> Outcome:
    """Total, text and visual loss of a batch."""
    return Outcome(_loss(subject, found["case"])[0], "relative", *_rule(subject, found["case"]))


def labels(subject: Subject, found: re.Match[str]) -> Outcome:
    """Labels after expansion in the reference's numbering: ``(B, L, D)``, or those of one depth."""
    batch, codes = _batch(subject, _samples(subject, found["case"]))
    config = subject.config
    depth, offset = config.vision_config.depth, config.text_config.vocab_size
    text = batch.input_ids.masked_fill(~batch.text_targets, IGNORED)
    expanded = text.unsqueeze(-1).repeat(1, 1, depth)
    if codes is not None:
        visual = torch.zeros_like(expanded)
        visual[batch.kinds == PositionKind.VISUAL] = codes.flatten(0, 1) + offset
        expanded = torch.where(batch.visual_targets.unsqueeze(-1), visual, expanded)
    chosen = expanded if found["depth"] is None else expanded[..., int(found["depth"])]
    return Outcome(chosen, "equal", True, "codes counted from the vocabulary's end")


def gradient(subject: Subject, found: re.Match[str]) -> Outcome:
    """The gradient of one parameter on a batch."""
    gradients = _loss(subject, found["case"])[1]
    name = _our_name(subject, found["parameter"])
    if name not in gradients:
        raise ValueError(f"no gradient of {found['parameter']!r} ({name})")
    grad = gradients[name]
    if name == "depth_transformer.position_embedding":
        grad = grad.unsqueeze(0)
    return Outcome(grad, "of_largest", *_rule(subject, found["case"]))


def gradient_norms(subject: Subject, case: str) -> tuple[torch.Tensor, Outcome]:
    """Norms of all gradients on a batch: the reference's and ours, in the order of its file."""
    stored = subject.golden.gradient_norms(case)
    gradients = _loss(subject, case)[1]
    ours = {released: grad.norm().item() for name, grad in gradients.items() if (released := _released(subject, name))}
    got = [ours.get(_part_key(name), 0.0) for name in stored]
    left_out = sorted(set(ours) - {_part_key(name) for name in stored})
    cropped, rule = _rule(subject, case)
    notes = [f"{len(got)} parameters", rule, f"not in the file: {', '.join(left_out)}" if left_out else ""]
    outcome = Outcome(torch.tensor(got, dtype=torch.float64), "norm", cropped, "; ".join(filter(None, notes)))
    return torch.tensor([float(value or 0.0) for value in stored.values()], dtype=torch.float64), outcome


def _released(subject: Subject, name: str) -> str | None:
    return to_released(name, len(subject.config.vision_config.decoder_multipliers))


def _part_key(reference: str) -> str:
    for prefix, part in _REFERENCE_NAMES:
        if reference.startswith(prefix):
            return part + reference.removeprefix(prefix)
    return reference


def _our_name(subject: Subject, short: str) -> str:
    """``llm.layers.0.q_proj``, ``mm_projector.layers.0.bias``, ``rqtransformer.pos_emb_d`` -> our parameter."""
    wanted = short.split(".")
    for name, _ in subject.model.named_parameters():
        released = _released(subject, name)
        if released is None:
            continue
        part, key = released.split(":", 1)
        words = [part, *key.split(".")]
        if all(word in words for word in wanted) and words[-1] in (wanted[-1], "weight"):
            return name
    raise ValueError(f"no parameter is called {short!r}")


CHECKS = (
    (r"h\.loss\.(?P<case>\w+)", loss),
    (r"h\.(?P<case>\w+)\.expanded_labels(_depth(?P<depth>\d+))?", labels),
    (r"h\.(?P<case>\w+)\.grad\.(?P<parameter>.+)", gradient),
)
