"""What a tower starts from: another run's tower, a SigLIP checkpoint, parts of either, or nothing."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, SiglipModel, SiglipTextConfig

from vilau.configuration import VisionTowerConfig
from vilau.errors import first_line
from vilau.modeling.vision_tower import VisionTower
from vilau.training.config import TowerStageConfig, TrainConfig
from vilau.training.model_config import build_config, build_text_encoder_config, require_sizes

logger = logging.getLogger(__name__)

_SIZES = ("image_size", "patch_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class StartingTower:
    """A tower ready to train, the tokenizer of its captions, and whether its image encoder was trained before."""

    tower: VisionTower
    tokenizer: Any
    sees: bool


@dataclass(frozen=True)
class _Source:
    """Weights to start from: `name` for messages, `parts` the patterns of what is taken, `folder` of the tokenizer."""

    name: str
    folder: str
    state: Mapping[str, torch.Tensor]
    image_config: Any
    text_config: SiglipTextConfig | None
    parts: Sequence[str]

    def gives(self, part: str) -> bool:
        """Whether anything of `image_encoder` or `text_encoder` is among what is taken."""
        names = [name for name in self.state if name.startswith(f"{part}.")]
        return bool(names) and (not self.parts or any(re.search(p, name) for p in self.parts for name in names))


def starting_tower(
    config: TrainConfig, settings: TowerStageConfig, folder: Path | None, tokenizer: Any
) -> StartingTower:
    """Build the tower that `config` describes and give it the weights that `settings` name.

    First come the parts of the SigLIP checkpoint, then those of `folder`. The text encoder's sizes and the tokenizer of
    the captions are those of the last source that brings a text encoder.

    Args:
        config: sizes under `model.vision_config` and `text_encoder`.
        settings: of the stage.
        folder: of a finished tower stage, or None.
        tokenizer: of the captions where no source brings one.

    Raises:
        ValueError: a source cannot be read, sizes differ, or a pattern takes nothing.
    """
    require_sizes(config)
    tower_config = build_config(config, tokenizer).vision_config
    sources = []
    if settings.init_siglip is not None:
        sources.append(_read_siglip(settings.init_siglip, settings.siglip_parts))
    if folder is not None:
        sources.append(_read_tower(folder, settings.init_parts))
    for source in sources:
        if source.gives("image_encoder") and source.image_config is not None and tower_config.encoder_type == "siglip":
            _check_image_sizes(source, tower_config.image_encoder_config)
    speaker = next((source for source in reversed(sources) if source.gives("text_encoder")), None)
    if speaker is not None:
        tower_config.text_encoder_config = _checked_text_config(speaker, config.text_encoder)
        tokenizer = _read_tokenizer(speaker, tokenizer)
    elif config.text_encoder:
        text = build_text_encoder_config(config, tokenizer, tower_config.hidden_size)
        tower_config.text_encoder_config = text
    _check_widths(tower_config)
    tower = VisionTower(tower_config)
    for source in sources:
        _copy_parts(tower, source)
    return StartingTower(tower, tokenizer, any(source.gives("image_encoder") for source in sources))


def _read_tower(folder: Path, parts: Sequence[str]) -> _Source:
    tower = VisionTower.from_pretrained(folder, dtype=torch.float32)
    found = tower.config
    image = found.image_encoder_config if found.encoder_type == "siglip" else None
    state = tower.state_dict()
    return _Source(f"the tower {folder}", os.fspath(folder), state, image, found.text_encoder_config, parts)


def _read_siglip(where: str, parts: Sequence[str]) -> _Source:
    try:
        kind = AutoConfig.from_pretrained(where).model_type
    except (OSError, ValueError) as error:
        raise ValueError(
            f"init_siglip: {where!r} is neither a folder with a config.json nor a checkpoint that the hub gives "
            f"({first_line(error)})"
        ) from error
    if kind != "siglip":
        more = "; of SigLIP 2 only the checkpoints of one fixed resolution fit" if kind == "siglip2" else ""
        raise ValueError(f"init_siglip: {where!r} holds a model of type {kind!r}, not 'siglip'{more}")
    model = SiglipModel.from_pretrained(where, dtype=torch.float32)
    named = {"image_encoder": model.vision_model, "text_encoder": model.text_model}
    state = {f"{part}.{name}": t for part, module in named.items() for name, t in module.state_dict().items()}
    state |= {"logit_scale": model.logit_scale.detach(), "logit_bias": model.logit_bias.detach()}
    found: Any = model.config
    return _Source(f"the SigLIP checkpoint {where}", where, state, found.vision_config, found.text_config, parts)


def _check_image_sizes(source: _Source, wanted: Any) -> None:
    found = source.image_config
    different = [name for name in _SIZES if getattr(wanted, name) != getattr(found, name)]
    if different:
        listed = ", ".join(f"{name} {getattr(wanted, name)} instead of {getattr(found, name)}" for name in different)
        raise ValueError(f"model.vision_config.image_encoder_config does not have the sizes of {source.name}: {listed}")


def _checked_text_config(source: _Source, given: Mapping[str, Any]) -> SiglipTextConfig:
    """Return the source's text configuration, which `text_encoder` may repeat but not contradict."""
    assert source.text_config is not None
    for key, value in given.items():
        there = getattr(source.text_config, key, None)
        if there != value:
            raise ValueError(
                f"text_encoder.{key} is {value}, but the text encoder of {source.name} has {there}; leave the key out "
                "or take the text encoder from elsewhere"
            )
    return source.text_config


def _check_widths(tower_config: VisionTowerConfig) -> None:
    text = tower_config.text_encoder_config
    if text is not None and text.projection_size != tower_config.hidden_size:
        raise ValueError(
            f"the text encoder's embeddings have width {text.projection_size} and the image encoder's "
            f"{tower_config.hidden_size}; the contrast needs equal widths - take both from one checkpoint, or set "
            "text_encoder.projection_size"
        )


def _read_tokenizer(source: _Source, otherwise: Any) -> Any:
    """Return the tokenizer beside the text encoder's weights; the configured one if there is none in a folder."""
    try:
        return AutoTokenizer.from_pretrained(source.folder)
    except (OSError, ValueError) as error:
        assert source.text_config is not None
        if source.text_config.vocab_size == len(otherwise):
            return otherwise
        raise ValueError(
            f"{source.name} brings a text encoder of {source.text_config.vocab_size} tokens but no tokenizer for it "
            f"({first_line(error)})"
        ) from error


@torch.no_grad()
def _copy_parts(tower: VisionTower, source: _Source) -> None:
    """Copy what the patterns name; a name that one side lacks or of another shape is an error."""
    patterns = source.parts or [""]
    own = tower.state_dict()
    taken = {name for name in source.state if any(re.search(pattern, name) for pattern in patterns)}
    asked = {name for name in own if any(re.search(pattern, name) for pattern in patterns)}
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in source.state):
            raise ValueError(f"{source.name} has nothing that matches the pattern {pattern!r}")
    for name in sorted(taken ^ asked):
        lacking, having = (source.name, "this tower") if name in asked else ("this tower", source.name)
        raise ValueError(
            f"cannot start from {source.name}: {having} has {name!r}, which {lacking} has not; make "
            "model.vision_config fit, or name the parts to take (init_parts, siglip_parts)"
        )
    for name in sorted(taken):
        if source.state[name].shape != own[name].shape:
            raise ValueError(
                f"cannot start from {source.name}: its {name!r} has the shape {tuple(source.state[name].shape)}, this "
                f"tower's {tuple(own[name].shape)}; make model.vision_config fit, or name the parts to take "
                "(init_parts, siglip_parts)"
            )
        own[name].copy_(source.state[name])
    logger.info("%d of %d tensors come from %s", len(taken), len(own), source.name)
