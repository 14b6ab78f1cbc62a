"""Fixtures that more than one room's tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    """The folder of the model that ships with the package."""
    from vilau.shipped import SHIPPED_MODEL

    assert (SHIPPED_MODEL / "config.json").is_file(), "the package ships without its model"
    return SHIPPED_MODEL


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Any]:
    """A function that returns a very small `VilaUConfig`: 16 px, 2x2 positions, depth 3, 16 codes of width 8.

    Keyword arguments named after a field of the vision tower or of the whole model replace it; `text` and `depths`
    hold fields of the language model and of the depth transformer. The weights it starts from are large, so that every
    input matters visibly.
    """
    from vilau.configuration import VilaUConfig

    def build(text: dict[str, Any] | None = None, depths: dict[str, Any] | None = None, **changes: Any) -> VilaUConfig:
        encoder = {
            "image_size": 16,
            "patch_size": 8,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        vision: dict[str, Any] = {
            "image_encoder_config": encoder,
            "code_dim": 8,
            "depth": 3,
            "codebook_size": 16,
            "decoder_channels": 8,
            "decoder_groups": 4,
            "decoder_multipliers": [1, 1, 1, 1],
            "decoder_blocks": 1,
            "decoder_attention": [2],
            "decoder_latent_channels": 8,
        }
        whole: dict[str, Any] = {"num_frames": 2}
        for name, value in changes.items():
            (whole if name in VilaUConfig.__dataclass_fields__ else vision)[name] = value
        language = {
            "model_type": "llama",
            "vocab_size": 40,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "initializer_range": 0.2,
        }
        depth = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "dropout": 0.0}
        return VilaUConfig(
            vision_config=vision, text_config=language | (text or {}), depth_config=depth | (depths or {}), **whole
        )

    return build


@pytest.fixture(scope="session")
def make_model(make_config: Callable[..., Any]) -> Callable[..., Any]:
    """A function that returns a `VilaUForConditionalGeneration` of `make_config`'s size in evaluation mode."""
    import torch

    from vilau.model import VilaUForConditionalGeneration

    def build(seed: int = 0, **changes: Any) -> VilaUForConditionalGeneration:
        torch.manual_seed(seed)
        model = VilaUForConditionalGeneration(make_config(**changes)).eval()
        if model.depth_transformer is not None:
            torch.nn.init.normal_(model.depth_transformer.position_embedding)
            torch.nn.init.normal_(model.depth_transformer.head.weight, std=0.5)
        return model

    return build


@pytest.fixture
def mini_cells(tmp_path: Path) -> Path:
    """A folder with two experiment cells of the smallest size: `align`, and `unified` that starts from it."""
    import yaml

    whole = yaml.safe_load((ROOT / "configs" / "nano" / "debug.yaml").read_text())
    stages = whole.pop("stages")
    whole |= {"validation_samples": 12, "validate_every": 3, "save_every": 2, "log_every": 2, "sample_every": 1000}
    whole["data"]["objects"] = 4
    start = str(tmp_path / "runs" / "align" / "align" / "final")
    cells = {
        "align": {"align": stages["align"] | {"steps": 2}},
        "unified": {"vision_tower": stages["vision_tower"] | {"steps": 6, "init_from": start, "weight_ema": 0.5}},
    }
    folder = tmp_path / "configs"
    folder.mkdir()
    for name, part in cells.items():
        config = whole | {"name": f"mini-{name}", "output": str(tmp_path / "runs" / name), "stages": part}
        (folder / f"mini-{name}.yaml").write_text(yaml.safe_dump(config))
    return folder
