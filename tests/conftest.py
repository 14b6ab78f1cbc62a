"""Fixtures that more than one room's tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs a network

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of random weights and its processor, as `save_pretrained` writes them.

    Its sizes are those of the `debug` configuration: 32 px, 4x4 positions, depth 4, 4 frames.
    """
    import torch
    from transformers import AutoTokenizer

    from vilau.data.nano.world import ASSETS
    from vilau.model import VilaUForConditionalGeneration
    from vilau.processing.processor import build_processor
    from vilau.training.config import load_config
    from vilau.training.model_config import build_config

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tokenizer")
    config = build_config(load_config(ROOT / "configs" / "nano" / "debug.yaml"), tokenizer)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    VilaUForConditionalGeneration(config).save_pretrained(folder)
    build_processor(tokenizer, config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shipped_model_dir() -> Path:
    """The folder of the model that ships with the package; a named skip while there is none."""
    from vilau.shipped import SHIPPED_MODEL

    if not (SHIPPED_MODEL / "config.json").is_file():
        pytest.skip("no model ships with this checkout yet")
    return SHIPPED_MODEL
