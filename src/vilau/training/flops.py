"""How many floating-point operations training takes and how many the hardware can do."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vilau.configuration import VisionTowerConfig
from vilau.modeling.vila_u import VilaUModel
from vilau.modeling.vision_tower import VisionTower

# dense peaks in TFLOP/s by the makers' data sheets: bfloat16, float32; the first name that fits counts
GPU_PEAKS: dict[str, tuple[float, float]] = {
    "B200": (2250, 80),
    "H200": (989, 67),
    "H100 PCIe": (756, 51),
    "H100": (989, 67),
    "A100": (312, 19.5),
    "L40S": (362, 91.6),
    "L4": (121, 30.3),
    "A10": (125, 31.2),
    "RTX 4090": (165, 82.6),
}


def count_flops(work: Callable[[], object]) -> float:
    """Return the operations of matrix products, convolutions and attention in `work`, forward only or with backward.

    On tensors of the `meta` device nothing is computed and nothing takes memory. Attention runs as plain products
    meanwhile: the counter does not know the fused kernels of a CPU. Of a causal mask nothing is taken off.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def linear_flops(module: nn.Module) -> float:
    """Return the operations per position of all linear layers, forward and backward.

    Two per weight forward, two for the gradient of the input, two for the gradient of the weight if it is trained.
    """
    layers = [part for part in module.modules() if isinstance(part, nn.Linear)]
    return sum(part.weight.numel() * (6.0 if part.weight.requires_grad else 4.0) for part in layers)


def attention_flops(width: int, layers: int, pairs: float) -> float:
    """Return the operations of attention, forward and backward, for `pairs` of positions of which one sees the other.

    Scores and mixing take two operations per pair and channel each; the backward pass takes twice as many.
    """
    return 12.0 * width * layers * pairs


@dataclass(frozen=True)
class TowerFlops:
    """Operations per picture, forward only: of features, of the search, of the contrastive head, of drawing, of a text.

    The search has no backward pass.
    """

    features: float
    search: float
    embed: float
    draw: float
    text: float

    @property
    def encode(self) -> float:
        """Per picture: features and search."""
        return self.features + self.search

    @property
    def training_step(self) -> float:
        """Per picture with caption: three times the forward pass of what learns, the frozen text encoder once.

        Perceptual loss and discriminator are not counted.
        """
        return 3 * (self.features + self.embed + self.draw) + self.search + self.text


def tower_flops(config: Any) -> TowerFlops:
    """Return what a tower (a `VisionTowerConfig`) takes, counted on tensors without content, once for each."""
    return _tower_flops(config.to_json_string(use_diff=False))


@lru_cache(maxsize=16)
def _tower_flops(sizes: str) -> TowerFlops:
    config = VisionTowerConfig.from_dict(json.loads(sizes))
    with torch.device("meta"):
        tower = VisionTower(config)
        pixels = torch.empty(1, 3, config.image_size, config.image_size)
        z_q = torch.empty(1, config.num_positions, config.code_width)
        widths = {"rq": config.code_width * config.depth, "mcq": config.code_width, "none": 0}
        search = 2.0 * config.num_positions * config.codebook_size * widths[config.quantizer]
        text = config.text_encoder_config
        ids = torch.zeros(1, text.max_position_embeddings if text is not None else 1, dtype=torch.long)
    with torch.no_grad():
        return TowerFlops(
            count_flops(lambda: tower.features(pixels)),
            search,
            count_flops(lambda: tower.image_embeds(z_q)),
            count_flops(lambda: tower.decode_features(z_q)),
            count_flops(lambda: tower.text_embeds(ids)) if text is not None else 0.0,
        )


class LanguageFlops:
    """Operations of a language stage's batches, forward and backward, by what each batch holds.

    Args:
        model: the joined model; what of it is trained decides what the backward pass computes.
    """

    def __init__(self, model: VilaUModel) -> None:
        body: Any = model.language_model.base_model
        text: Any = model.config.text_config
        self.width, self.layers = text.hidden_size, text.num_hidden_layers
        self.per_token = linear_flops(body)
        self.per_text_target = linear_flops(model.get_output_embeddings())
        self.per_code = linear_flops(model.depth_transformer) if model.depth_transformer is not None else 0.0
        self.per_position = linear_flops(model.projector)
        self.per_picture = tower_flops(model.config.vision_config).encode

    def __call__(
        self, tokens: float, pairs: float, positions: float, text_targets: float, codes: float, pictures: float
    ) -> float:
        """Return the operations of a batch.

        Args:
            tokens: positions without padding.
            pairs: of positions of one sample of which the later sees the earlier, itself included.
            positions: visual ones.
            text_targets, codes: supervised.
            pictures: encoded here, not read as codes.
        """
        whole = self.per_token * tokens + attention_flops(self.width, self.layers, pairs)
        whole += self.per_position * positions + self.per_text_target * text_targets + self.per_code * codes
        return whole + self.per_picture * pictures


def peak_flops(device: torch.device, bf16: bool) -> float:
    """Return the operations per second that a device can do: by data sheet for a known GPU, measured on a CPU, or 0."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peaks = next((peaks for part, peaks in GPU_PEAKS.items() if part in name), (0.0, 0.0))
        return peaks[0 if bf16 else 1] * 1e12
    matrix = torch.ones(768, 768, dtype=torch.bfloat16 if bf16 else torch.float32)
    times = []
    for _ in range(4):
        started = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - started)
    return 2.0 * 768**3 / min(times)
