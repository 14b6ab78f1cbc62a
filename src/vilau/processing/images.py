"""Pictures: decoded safely, brought to the model's square, and back to files.

Everything that comes from outside passes ``load_image``: only the listed formats, the size checked from the header
before a pixel is decoded, and every failure of a decoder turned into one ``ValueError`` line. Colours are converted to
RGB before resizing.
"""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps

from vilau.files import atomic_path

IMAGE_FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
IMAGE_SUFFIXES: dict[str, str] = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".bmp": "BMP",
}
MAX_PIXELS = 64_000_000

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
SquareMode = Literal["squash", "crop"]
MediaFault = Literal["empty", "wrong_type", "too_large", "broken"]


class MediaError(ValueError):
    """A picture or film cannot be used; ``kind`` says in one word why."""

    def __init__(self, message: str, kind: MediaFault) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[MediaError], tuple[str, MediaFault]]:
        return MediaError, (str(self), self.kind)


def load_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture as RGB, upright, transparent parts over white.

    source: a path, the bytes of a file, a PIL image, or an array ``(H, W, 3)`` or ``(H, W)`` uint8. Of an animation the
    first frame. ``FileNotFoundError`` for a missing file; ``ValueError`` for anything that is not a readable picture of
    at most ``max_pixels`` pixels.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        check_pixels(source.size, max_pixels, "the picture")
        return _decode(source, "the picture")
    name, file = open_media(source, "picture")
    with file:
        return _decode(_open(file, name, max_pixels), name)


def open_media(source: str | os.PathLike[str] | bytes, what: str) -> tuple[str, BinaryIO]:
    """Open a path or bytes for reading, with a name for messages; refuses folders, special files and empty files."""
    if isinstance(source, bytes | bytearray | memoryview):
        if not len(source):
            raise MediaError(f"cannot read the given data as a {what}: it is empty", "empty")
        return "the given data", io.BytesIO(source)
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"a {what} must be a path, bytes, a PIL image or an array: {type(source).__name__} given")
    path = Path(source)
    if "\0" in str(path):
        raise ValueError(f"cannot read the {what}: its name holds a NUL character")
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if not path.is_file():
        raise MediaError(f"cannot read {path} as a {what}: it is not a regular file", "wrong_type")
    if path.stat().st_size == 0:
        raise MediaError(f"cannot read {path} as a {what}: the file is empty", "empty")
    return str(path), open(path, "rb")


def check_pixels(size: tuple[int, int], max_pixels: int, name: str) -> None:
    """``ValueError`` for a picture with no or too many pixels."""
    width, height = size
    if width < 1 or height < 1:
        raise MediaError(f"cannot read {name}: it is {width}x{height} pixels", "empty")
    if width * height > max_pixels:
        raise MediaError(
            f"{name} has {width}x{height} pixels ({width * height / 1e6:.0f} megapixels), more than the limit of "
            f"{max_pixels / 1e6:g} megapixels: make it smaller",
            "too_large",
        )


def _open(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():  # Pillow's own size warning; the check below is stricter
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        message = f"cannot read {name} as a picture: over {max_pixels / 1e6:g} megapixels ({error})"
        raise MediaError(message, "too_large") from error
    except Image.UnidentifiedImageError as error:
        raise MediaError(
            f"cannot read {name} as a picture: it is none of JPEG, PNG, WebP, GIF, BMP, or its header is broken",
            "wrong_type",
        ) from error
    except Exception as error:
        raise MediaError(f"cannot read {name} as a picture: {error}", "broken") from error
    check_pixels(image.size, max_pixels, name)
    return image


def _decode(image: Image.Image, name: str) -> Image.Image:
    try:
        image.load()
        return to_rgb(_upright(image))
    except Exception as error:  # decoders raise OSError, SyntaxError, EOFError, struct.error ... on broken files
        raise MediaError(f"cannot read {name} as a picture: {error or type(error).__name__}", "broken") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a broken EXIF block says nothing about the pixels
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB: palettes resolved, alpha composited over white, 16-bit grey scaled to 8 bits, CMYK converted."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image).astype(np.float64), 0, 65535) / 257
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    if (
        array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or (array.ndim == 3 and array.shape[2] != 3)
        or not array.size
    ):
        raise ValueError(f"an array as picture must be (H, W, 3) or (H, W) uint8: {array.dtype} {array.shape} given")
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def resize_square(image: Image.Image, size: int, mode: SquareMode = "squash") -> Image.Image:
    """RGB picture -> ``size`` x ``size``.

    ``squash`` (understanding): the whole picture, aspect ratio not kept. ``crop`` (training to draw): the centre
    square. A picture that has the size already is returned as it is. Bicubic, as the released checkpoints expect.
    """
    if size < 1:
        raise ValueError(f"image size is {size}: it must be at least 1")
    if mode not in ("squash", "crop"):
        raise ValueError(f"unknown mode {mode!r}: choose 'squash' or 'crop'")
    if image.size == (size, size):
        return image
    if mode == "crop":  # cut first: the filter of a resize with a box would look beyond the square's border
        side = min(image.size)
        left, top = round((image.width - side) / 2), round((image.height - side) / 2)
        image = image.crop((left, top, left + side, top + side))
    return image.resize((size, size), Image.Resampling.BICUBIC)


def to_array(source: ImageSource, size: int, mode: SquareMode = "squash") -> np.ndarray:
    """Any picture -> a frame ``(size, size, 3)`` uint8; an array that is one already is returned unchanged."""
    if isinstance(source, np.ndarray) and source.shape == (size, size, 3) and source.dtype == np.uint8:
        return source
    return np.asarray(resize_square(load_image(source), size, mode)).copy()


def normalise(frames: np.ndarray) -> np.ndarray:
    """Frames ``(F, S, S, 3)`` uint8 -> ``pixel_values`` ``(F, 3, S, S)`` float32 in [-1, 1] (mean and deviation
    0.5)."""
    return np.ascontiguousarray(np.moveaxis(frames.astype(np.float32) / 127.5 - 1.0, -1, 1))


def to_pixels(pixel_values: np.ndarray) -> np.ndarray:
    """``pixel_values`` ``(I, 3, S, S)`` in [-1, 1] -> frames ``(I, S, S, 3)`` uint8: clamped and rounded."""
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
        raise ValueError(f"pixel values must be (I, 3, S, S): {pixel_values.shape} given")
    values = np.asarray(pixel_values, dtype=np.float32)
    if np.isnan(values).any():
        raise ValueError("pixel values hold NaN: the model's weights or its inputs are broken")
    rounded = np.rint((np.clip(values, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(rounded, 1, -1))


def to_pil(frames: np.ndarray) -> list[Image.Image]:
    """Frames ``(F, S, S, 3)`` uint8 -> pictures."""
    return [Image.fromarray(frame) for frame in frames]


def save_image(image: Image.Image | np.ndarray, path: str | os.PathLike[str]) -> Path:
    """Write a picture; the suffix chooses the format. The file appears whole or not at all. ``ValueError``: unknown
    suffix."""
    target = Path(path)
    if target.suffix.lower() not in IMAGE_SUFFIXES:
        raise ValueError(f"cannot write a picture as {target.name!r}: end it in {', '.join(IMAGE_SUFFIXES)}")
    picture = _from_array(image) if isinstance(image, np.ndarray) else image
    name = IMAGE_SUFFIXES[target.suffix.lower()]
    options = {"quality": 95} if name in ("JPEG", "WEBP") else {}
    with atomic_path(target) as temporary:
        (to_rgb(picture) if name in ("JPEG", "BMP") else picture).save(temporary, format=name, **options)
    return target
