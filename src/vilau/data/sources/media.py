"""Pictures and films that records name: files in a folder, bytes, base64, data URLs, rows of frames."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...processing.images import IMAGE_SUFFIXES
from ...processing.videos import VIDEO_SUFFIXES, frame_indices
from ..sample import Part, image, video
from .source import BadSample, ReadOptions, decode_image, decode_video


class Media:
    """Reads what records name.

    Args:
        folder: that relative names are relative to.
        options: how many frames a film becomes, and the limits.
    """

    def __init__(self, folder: Path, options: ReadOptions) -> None:
        self.folder, self.options = folder, options

    def image(self, named: Any, where: str) -> Part:
        """Return the picture of a file name, bytes, a data URL, or a mapping with ``bytes`` or ``path``.

        Raises:
            BadSample: missing_file, remote_file, bad_record, and whatever is wrong with the picture.
        """
        return image(decode_image(self._resolve(named, where), where, self.options))

    def base64_image(self, text: Any, where: str) -> Part:
        """Return the picture of a base64 text.

        Raises:
            BadSample: broken_image, bad_record, and whatever is wrong with the picture.
        """
        if not isinstance(text, str):
            raise BadSample("bad_record", f"{where}: base64 is {type(text).__name__}, not text")
        return image(decode_image(_from_base64(text.rpartition(",")[2], where), where, self.options))

    def video(self, named: Any, where: str) -> Part:
        """Return the film of a file name or id (its ending may be left out), bytes, or a folder or list of frames.

        Raises:
            BadSample: missing_file, remote_file, bad_record, and whatever is wrong with the film.
        """
        if isinstance(named, list | tuple) and named:
            return self._frames(named, where)
        source = self._resolve(named, where)
        if not isinstance(source, bytes):
            path = self._with_ending(Path(source))
            if path.is_dir():
                names = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
                if not names:
                    raise BadSample("missing_file", f"{where}: there are no frames in {path}")
                return self._frames(names, where)
            source = str(path)
        return video(decode_video(source, where, self.options))

    def _frames(self, named: Sequence[Any], where: str) -> Part:
        chosen = frame_indices(len(named), self.options.num_frames)
        decoded = {
            index: decode_image(self._resolve(named[index], where), f"{where}, frame {index}", self.options)
            for index in sorted(set(chosen))
        }
        return video(tuple(decoded[index] for index in chosen))

    @staticmethod
    def _with_ending(path: Path) -> Path:
        if not path.suffix or not path.exists():
            for suffix in VIDEO_SUFFIXES:
                longer = path.with_name(path.name + suffix)
                if longer.is_file():
                    return longer
        return path

    def _resolve(self, named: Any, where: str) -> str | bytes:
        if isinstance(named, Mapping):
            named = named.get("bytes") or named.get("path")
        if isinstance(named, int) and not isinstance(named, bool):
            named = str(named)  # an id: 6513 for 6513.mp4
        if isinstance(named, bytes) and named:
            return named
        if not isinstance(named, str | Path) or not str(named) or "\0" in str(named):
            raise BadSample("bad_record", f"{where}: {str(named)[:40]!r} names no file")
        if isinstance(named, str):
            if named.startswith("data:"):
                head, _, body = named.partition(",")
                if not head.endswith(";base64"):
                    raise BadSample("bad_record", f"{where}: a data URL that is not base64")
                return _from_base64(body, where)
            if "://" in named[:12] and not named.startswith("file://"):
                return named  # an address, which the decoder refuses by name
            named = named.removeprefix("file://")
        return str(self.folder / named)


def _from_base64(text: str, where: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample("broken_image", f"{where}: not base64 ({error})") from error
