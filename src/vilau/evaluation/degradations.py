"""Ways in which a picture gets worse, which the judge of drawings must see through: pure functions of a seed."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from vilau.data.nano.draw import Draw

Degradation = Callable[[np.ndarray, Draw], np.ndarray]


def _uniform(draw: Draw, low: float, high: float) -> float:
    return float(draw.generator.uniform(low, high))


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def blur(pixels: np.ndarray, draw: Draw) -> np.ndarray:
    """Gaussian blur with a radius of 1 to 4 % of the side."""
    radius = _uniform(draw, 0.01, 0.04) * pixels.shape[0]
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def jpeg(pixels: np.ndarray, draw: Draw) -> np.ndarray:
    """JPEG compression of quality 15 to 80."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=15 + draw.below(66))
    return np.asarray(Image.open(file).convert("RGB"))


def noise(pixels: np.ndarray, draw: Draw) -> np.ndarray:
    """Gaussian noise with a deviation of 3 to 20 of 255."""
    deviation = _uniform(draw, 3.0, 20.0)
    return _to_uint8(pixels + draw.generator.normal(0.0, deviation, pixels.shape))


def colour_jitter(pixels: np.ndarray, draw: Draw) -> np.ndarray:
    """Each channel scaled by 0.92 to 1.08 and moved by up to 10 of 255, contrast changed by up to 15 %."""
    scale, offset = draw.generator.uniform(0.92, 1.08, 3), draw.generator.uniform(-10.0, 10.0, 3)
    mean = pixels.mean((0, 1))
    return _to_uint8((pixels - mean) * _uniform(draw, 0.85, 1.15) * scale + mean * scale + offset)


def rescale(pixels: np.ndarray, draw: Draw) -> np.ndarray:
    """Down to 45 to 80 % of the side and up again."""
    side = pixels.shape[0]
    small = max(4, round(_uniform(draw, 0.45, 0.8) * side))
    how = draw.among((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.BOX))
    down = Image.fromarray(pixels).resize((small, small), how)
    return np.asarray(down.resize((side, side), Image.Resampling.BICUBIC))


DEGRADATIONS: dict[str, Degradation] = {
    "blur": blur,
    "jpeg": jpeg,
    "noise": noise,
    "colour_jitter": colour_jitter,
    "rescale": rescale,
}


def degrade(pixels: np.ndarray, draw: Draw, share: float = 0.75, most: int = 2) -> np.ndarray:
    """Return a picture ``(S, S, 3)`` uint8, made worse in one to `most` ways with probability `share`."""
    if not draw.chance(share):
        return pixels
    for name in draw.some(tuple(DEGRADATIONS), 1 + draw.below(most)):
        pixels = DEGRADATIONS[name](pixels, draw)
    return pixels
