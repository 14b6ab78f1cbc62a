"""Messages, pictures and films -> model inputs, and model outputs -> text, pictures and films."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .encode import EncodedSample, encode_prompt, encode_sample, encode_text
    from .images import load_image, save_image
    from .processor import VilaUProcessor
    from .templates import ChatTemplate
    from .videos import load_video, save_video

_WHERE = {
    "EncodedSample": "encode",
    "encode_prompt": "encode",
    "encode_sample": "encode",
    "encode_text": "encode",
    "load_image": "images",
    "save_image": "images",
    "VilaUProcessor": "processor",
    "ChatTemplate": "templates",
    "load_video": "videos",
    "save_video": "videos",
}
__all__ = [
    "ChatTemplate",
    "EncodedSample",
    "VilaUProcessor",
    "encode_prompt",
    "encode_sample",
    "encode_text",
    "load_image",
    "load_video",
    "save_image",
    "save_video",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
