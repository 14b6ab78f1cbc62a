"""Films: a set number of frames read safely from a file, and frames written to one.

The container is told by its first bytes and opened by name, so that no playlist or device format is ever probed; sizes
and lengths are checked before frames are decoded, and only the frames that are kept are converted to RGB.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from PIL import Image

from vilau.files import atomic_path

from .images import (
    MAX_PIXELS,
    ImageSource,
    MediaError,
    SquareMode,
    check_pixels,
    load_image,
    open_media,
    resize_square,
    to_array,
    to_rgb,
)

CONTAINER_SUFFIXES: tuple[str, ...] = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
ANIMATION_SUFFIXES: tuple[str, ...] = (".gif", ".webp")
VIDEO_SUFFIXES: tuple[str, ...] = CONTAINER_SUFFIXES + ANIMATION_SUFFIXES
WRITABLE_SUFFIXES: tuple[str, ...] = (".mp4", ".webp", ".gif")

VideoSource = str | os.PathLike[str] | bytes | Sequence[ImageSource]


@dataclass(frozen=True)
class VideoLimits:
    """What a film may be; a server gives stricter ones. ``max_total_pixels`` holds for GIF and WebP, decoded frame by
    frame."""

    max_frames: int = 36_000
    max_seconds: float = 1_200.0
    max_pixels: int = 16_000_000
    max_total_pixels: int = 4_000_000_000


def frame_indices(count: int, num_frames: int) -> list[int]:
    """Which of ``count`` frames to take: ``round(linspace(0, count - 1, num_frames))``; short films repeat frames."""
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}: it must be at least 1")
    if count < 1:
        raise ValueError("the film has no frames")
    return [int(index) for index in np.round(np.linspace(0, count - 1, num_frames))]


def load_video(
    source: VideoSource,
    num_frames: int,
    size: int | None = None,
    mode: SquareMode = "squash",
    limits: VideoLimits | None = None,
) -> list[Image.Image]:
    """``num_frames`` RGB pictures of a film, evenly spread from its first to its last frame.

    source: path or bytes of a file (mp4, mov, webm, mkv, avi, gif, webp), or a sequence of pictures. With ``size`` each
    frame is brought to that square at once. ``FileNotFoundError`` for a missing file; ``ValueError`` for anything that
    is not a readable film within ``limits`` (truncated, without a video stream, too long, too large).
    """
    limits = limits or VideoLimits()
    if isinstance(source, list | tuple) or (isinstance(source, np.ndarray) and source.ndim == 4):
        if not len(source):
            raise ValueError("the film has no frames: give at least one picture")
        frames = [load_image(source[index]) for index in frame_indices(len(source), num_frames)]
        return [_squared(frame, size, mode) for frame in frames]
    name, file = open_media(source, "film")  # type: ignore[arg-type]
    with file:
        head = file.read(64)
        kind = _container(head)
        length = file.seek(0, os.SEEK_END)
        file.seek(0)
        if kind is None:
            message = f"cannot read {name} as a film: it is none of mp4, mov, webm, mkv, avi, gif, webp"
            raise MediaError(message, "wrong_type")
        declared = _declared_length(head, kind)
        if declared is not None and declared > length:
            raise ValueError(f"cannot read {name} as a film: it is truncated ({length} of {declared} bytes)")
        try:
            if kind in ("GIF", "WEBP"):
                return _load_animation(file, name, kind, num_frames, size, mode, limits)
            return _load_container(file, name, kind, num_frames, size, mode, limits)
        except ValueError as error:
            if str(error).startswith(("cannot read", name)):
                raise
            raise ValueError(f"cannot read {name} as a film: {_reason(error)}") from error
        except Exception as error:  # PyAV raises its own OSError-like classes; Pillow SyntaxError, EOFError ...
            raise ValueError(f"cannot read {name} as a film: {_reason(error)}") from error


def to_frames(source: VideoSource, num_frames: int, size: int, mode: SquareMode = "squash") -> np.ndarray:
    """A film -> frames ``(num_frames, size, size, 3)`` uint8."""
    if isinstance(source, list | tuple) and source:
        return np.stack([to_array(source[index], size, mode) for index in frame_indices(len(source), num_frames)])
    return np.stack([np.asarray(frame) for frame in load_video(source, num_frames, size, mode)])


def media_kind(path: str | os.PathLike[str]) -> Literal["image", "video"]:
    """Whether a file is to be shown as a film: the video containers, and GIF or WebP with more than one frame."""
    name, file = open_media(path, "picture or film")
    with file:
        kind = _container(file.read(16))
        file.seek(0)
        if kind is None:
            return "image"
        if kind in ("GIF", "WEBP"):
            try:
                return "video" if getattr(Image.open(file, formats=[kind]), "is_animated", False) else "image"
            except Exception as error:
                raise ValueError(f"cannot read {name} as a picture or film: {_reason(error)}") from error
        return "video"


def _container(head: bytes) -> str | None:
    """The demuxer or Pillow format that the first 16 bytes of a file call for."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mov"
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if head[:4] == b"RIFF" and head[8:11] == b"AVI":
        return "avi"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    return "GIF" if head[:4] == b"GIF8" else None


def _declared_length(head: bytes, kind: str) -> int | None:
    """The file length that a RIFF or Matroska header states, or None: FFmpeg reads a cut file as if it were a short
    one."""
    if kind in ("avi", "WEBP"):
        return int.from_bytes(head[4:8], "little") + 8
    at = head.find(b"\x18\x53\x80\x67") + 4 if kind == "matroska" else 0  # the Segment element
    if at < 4 or at >= len(head) or head[at] == 0:
        return None
    width = 9 - head[at].bit_length()  # an EBML number: leading zeros of the first byte tell its width
    value = int.from_bytes(head[at : at + width], "big") & ((1 << 7 * width) - 1)
    return None if value == (1 << 7 * width) - 1 or at + width > len(head) else at + width + value


def _reason(error: BaseException) -> str:
    """A decoder's message without paths."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _squared(image: Image.Image, size: int | None, mode: SquareMode) -> Image.Image:
    return image if size is None else resize_square(image, size, mode)


def _check_count(count: int, limits: VideoLimits, name: str) -> None:
    if count > limits.max_frames:
        message = f"{name} has more frames than the limit of {limits.max_frames}: cut it shorter"
        raise MediaError(message, "too_large")


def _load_animation(
    file: BinaryIO,
    name: str,
    kind: str,
    num_frames: int,
    size: int | None,
    mode: SquareMode,
    limits: VideoLimits,
) -> list[Image.Image]:
    if kind == "GIF" and not _gif_is_whole(file):
        raise ValueError(f"cannot read {name} as a film: it is truncated (its last frames or its end mark are missing)")
    image = Image.open(file, formats=[kind])
    check_pixels(image.size, min(limits.max_pixels, MAX_PIXELS), name)
    count = int(getattr(image, "n_frames", 1))
    _check_count(count, limits, name)
    if count * image.width * image.height > limits.max_total_pixels:
        raise MediaError(
            f"{name} has {count} frames of {image.width}x{image.height} pixels, more than the limit of "
            f"{limits.max_total_pixels / 1e9:g} thousand megapixels: make it smaller or shorter",
            "too_large",
        )
    indices = frame_indices(count, num_frames)
    kept: dict[int, Image.Image] = {}
    for index in sorted(set(indices)):
        image.seek(index)
        kept[index] = _squared(to_rgb(image.copy()), size, mode)
    return [kept[index] for index in indices]


def _gif_is_whole(file: BinaryIO) -> bool:
    """Walk a GIF's blocks to its end mark: Pillow takes a cut film for a shorter one."""

    def table(flags: int) -> int:
        return 3 << (flags & 7) + 1 if flags & 0x80 else 0

    try:
        header = file.read(13)
        file.seek(table(header[10]), os.SEEK_CUR)
        while (mark := file.read(1)) in (b"\x21", b"\x2c"):
            if mark == b"\x21":
                file.seek(1, os.SEEK_CUR)  # the extension's label
            else:
                file.seek(table(file.read(9)[8]) + 1, os.SEEK_CUR)  # descriptor, colours, code size
            while length := file.read(1)[0]:
                file.seek(length, os.SEEK_CUR)
        return mark == b"\x3b"
    except IndexError:  # a read behind the end
        return False
    finally:
        file.seek(0)


def _load_container(
    file: BinaryIO,
    name: str,
    kind: str,
    num_frames: int,
    size: int | None,
    mode: SquareMode,
    limits: VideoLimits,
) -> list[Image.Image]:
    import av

    with av.open(file, "r", format=kind, metadata_errors="replace") as container:
        if not container.streams.video:
            raise ValueError(f"cannot read {name} as a film: it has no video stream")
        stream = container.streams.video[0]
        check_pixels((stream.codec_context.width, stream.codec_context.height), limits.max_pixels, name)
        seconds = max((container.duration or 0) / av.time_base, float((stream.duration or 0) * (stream.time_base or 0)))
        if seconds > limits.max_seconds:
            raise MediaError(
                f"{name} is {seconds:.0f} seconds long, more than the limit of {limits.max_seconds:g}: cut it shorter",
                "too_large",
            )
        _check_count(stream.frames, limits, name)
        times, keys = _packet_times(container, stream, limits, name)
        if len(times) < stream.frames:
            raise ValueError(f"cannot read {name} as a film: it is truncated ({len(times)} of {stream.frames} frames)")
        indices = frame_indices(len(times), num_frames)
        decoded = _decode_at(container, stream, times, keys, sorted(set(indices)), limits.max_pixels, name)
        kept = {index: _squared(picture, size, mode) for index, picture in decoded}
    return [kept[index] for index in indices]


def _packet_times(container: Any, stream: Any, limits: VideoLimits, name: str) -> tuple[list[int], list[int]]:
    """Presentation times of all shown frames and of the key frames among them, in order, without decoding any."""
    times: list[int] = []
    keys: list[int] = []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard:
            stamp = packet.pts if packet.pts is not None else packet.dts
            times.append(len(times) if stamp is None else stamp)
            if packet.is_keyframe:
                keys.append(times[-1])
            _check_count(len(times), limits, name)
    if not times:
        raise ValueError(f"cannot read {name} as a film: its video stream has no frames")
    return sorted(times), sorted(keys)


def _decode_at(
    container: Any, stream: Any, times: list[int], keys: list[int], indices: list[int], max_pixels: int, name: str
) -> Iterator[tuple[int, Image.Image]]:
    """``(index, frame)`` for rising ``indices``: one pass that jumps ahead wherever a key frame allows it."""
    frames: Iterator[Any] = iter(())
    last, reached = None, None
    for index in indices:
        key = bisect_right(keys, times[index])
        if reached is None or (key and keys[key - 1] > reached):
            container.seek(times[index], stream=stream, backward=True, any_frame=False)
            frames, last = container.decode(stream), None
        while last is None or (last.pts is not None and last.pts < times[index]):
            following = next(frames, None)
            if following is None:
                break
            last = following
        if last is None:
            raise ValueError(f"cannot read {name} as a film: frame {index} of {len(times)} cannot be decoded")
        reached = times[index]
        check_pixels((last.width, last.height), max_pixels, name)
        picture = last.to_image()
        yield index, picture.rotate(last.rotation, expand=True) if last.rotation else picture


def save_video(frames: Sequence[Image.Image | np.ndarray], path: str | os.PathLike[str], fps: float = 8.0) -> Path:
    """Write frames of one size as .mp4 (H.264, yuv420p), .webp or .gif; the file appears whole or not at all.

    ``ValueError``: no frames, frames of different sizes, an fps outside (0, 1000], or an unknown suffix.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in WRITABLE_SUFFIXES:
        raise ValueError(f"cannot write a film as {target.name!r}: end it in {', '.join(WRITABLE_SUFFIXES)}")
    if not len(frames):
        raise ValueError("cannot write a film of no frames")
    if not 0 < fps <= 1000:
        raise ValueError(f"fps is {fps}: it must be above 0 and at most 1000")
    pictures = [load_image(frame) for frame in frames]
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        raise ValueError(f"cannot write a film of frames of different sizes: {sorted(sizes)}")
    with atomic_path(target) as temporary:
        if suffix == ".mp4":
            _write_mp4(pictures, temporary, fps)
        else:
            options: dict[str, Any] = {"quality": 95, "minimize_size": False} if suffix == ".webp" else {}
            pictures[0].save(
                temporary,
                format=suffix[1:].upper(),
                save_all=True,
                append_images=pictures[1:],
                duration=max(1, round(1000 / fps)),
                loop=0,
                **options,
            )
    return target


def _write_mp4(pictures: Sequence[Image.Image], path: Path, fps: float) -> None:
    from fractions import Fraction

    import av

    width, height = (side + side % 2 for side in pictures[0].size)  # yuv420p halves both sides
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for picture in pictures:
            pixels = np.asarray(picture)
            pixels = np.pad(pixels, ((0, height - pixels.shape[0]), (0, width - pixels.shape[1]), (0, 0)), mode="edge")
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode(None))
