"""vilau: one model that reads and makes pictures and films, an open implementation of VILA-U.

Public names are loaded at their first use, so that ``import vilau`` costs nothing and pulls in neither torch nor
transformers. The first use also registers the model with transformers' Auto classes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "DepthTransformerConfig": "vilau.configuration",
    "VilaUConfig": "vilau.configuration",
    "VisionTowerConfig": "vilau.configuration",
    "VilaUForConditionalGeneration": "vilau.model",
    "VilaUModel": "vilau.modeling.vila_u",
    "VisionTower": "vilau.tower",
    "VilaUProcessor": "vilau.processing.processor",
    "load": "vilau.pipeline",
    "load_rqvae": "vilau.checkpoints.rqvae",
}

__all__ = ["__version__", *sorted(_PUBLIC)]

if TYPE_CHECKING:
    from vilau.checkpoints.rqvae import load_rqvae
    from vilau.configuration import DepthTransformerConfig, VilaUConfig, VisionTowerConfig
    from vilau.model import VilaUForConditionalGeneration
    from vilau.modeling.vila_u import VilaUModel
    from vilau.pipeline import load
    from vilau.processing.processor import VilaUProcessor
    from vilau.tower import VisionTower

_registered = False


def __getattr__(name: str) -> Any:
    """Load a public name from its module; the first one registers the Auto classes."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vilau' has no attribute {name!r}; public names are {', '.join(__all__)}")
    _register_once()
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def _register_once() -> None:
    global _registered
    if not _registered:
        importlib.import_module("vilau.model").register()
        _registered = True


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
