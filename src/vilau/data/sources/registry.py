"""The formats by name, and which of them a file or folder looks like.

A format is one module of this folder with a :class:`~vilau.data.sources.source.SourceConfig` of its own. To add one,
write the module and add its configuration to ``FORMATS``; more specific formats stand before more general ones, because
``detect_format`` takes the first that says yes.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from .chat import ChatConfig
from .folder import FolderConfig
from .generation import GenerationConfig
from .llava import LlavaConfig
from .messages import MessagesConfig
from .mmc4 import Mmc4Config
from .nano import NanoConfig
from .openvid import OpenVidConfig
from .parquet import ParquetConfig
from .source import SourceConfig
from .video_json import VideoJsonConfig
from .webdataset import WebdatasetConfig

FORMATS: tuple[type[SourceConfig], ...] = (
    NanoConfig,
    GenerationConfig,
    WebdatasetConfig,
    MessagesConfig,
    ParquetConfig,
    Mmc4Config,
    VideoJsonConfig,
    LlavaConfig,
    ChatConfig,
    OpenVidConfig,
    FolderConfig,
)


def format_names() -> list[str]:
    """Names of all formats, as they stand under ``format:``."""
    return [name_of(kind) for kind in FORMATS]


def name_of(kind: type[SourceConfig]) -> str:
    """Name of a format."""
    return str(kind.model_fields["format"].default)


def find_format(name: str) -> type[SourceConfig]:
    """Return the configuration class of a format.

    Raises:
        ValueError: there is none of that name; the nearest one is named.
    """
    for kind in FORMATS:
        if name_of(kind) == name:
            return kind
    near = difflib.get_close_matches(str(name), format_names(), 1, 0.0)
    raise ValueError(f"unknown format {name!r}; did you mean {near[0]!r}? There are: {', '.join(format_names())}")


def detect_format(path: Path) -> SourceConfig:
    """Return the configuration of the first format that the content of ``path`` looks like, all fields by default.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: no format knows it.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if path.is_dir() and not any(path.iterdir()):
        raise ValueError(f"{path} is empty: there is no data in it")
    for kind in FORMATS:
        if kind.detect(path):
            return kind.model_validate({"format": name_of(kind), "path": str(path)})
    raise ValueError(
        f"{path} looks like none of the formats {', '.join(format_names())}; name the one it is with --format"
    )
