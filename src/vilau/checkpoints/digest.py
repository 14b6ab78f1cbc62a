"""Which tower made these codes: one digest, wherever the tower stands and in whatever dtype it is held."""

from __future__ import annotations

import hashlib
import json
from typing import cast

import torch

from vilau.modeling.quantizer import Quantizer
from vilau.modeling.vision_tower import VisionTower

_NOT_DECODING = ("text_encoder.", "logit_", "image_encoder.head.", "image_encoder.post_layernorm.")
_DECODER = ("pixel_decoder.",)


def tower_digest(tower: VisionTower, decoder: bool = True) -> str:
    """Return the SHA-256 of everything that makes codes of pictures and pictures of codes.

    The same tower in its own folder and in a whole model has the same digest, in float32 and in bfloat16; its text
    encoder, its pooling head and the statistics that its codebook learns from do not count.

    Args:
        decoder: False for what makes codes alone: any decoder of the same encoder and codebook has that digest.
    """
    left_out = (*_NOT_DECODING, "quantizer.", *(() if decoder else _DECODER))
    tensors = {name: t.to(torch.bfloat16) for name, t in tower.state_dict().items() if not name.startswith(left_out)}
    if tower.quantizer.discrete:
        tensors["quantizer"] = cast(Quantizer, tower.quantizer).books()  # float32 in a model of any dtype
    facts = {name: getattr(tower.config, name) for name in ("image_size", "patch_size", "depth", "quantizer")}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + str(tuple(value.shape)).encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
