"""What a language stage starts from: a finished model, a vision tower with a language model around it, or nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vilau.modeling.vila_u import VilaUModel
from vilau.modeling.vision_tower import VisionTower
from vilau.processing.processor import VilaUProcessor, build_processor
from vilau.processing.templates import ChatTemplate
from vilau.shipped import MODEL_TYPE, RELEASED_TYPE, find_model, model_type
from vilau.training import language_model
from vilau.training.config import LanguageStageConfig, TrainConfig
from vilau.training.data import load_tokenizer
from vilau.training.model_config import build_config, require_sizes

SHIPPED = "shipped"
_ITS_OWN = ("model_type", "vocab_size")  # of a pretrained language model: the tokenizer adds the rows that it needs
_VISUAL_IDS = ("image_start", "image_end", "video_start", "video_end")


@dataclass(frozen=True)
class StartingModel:
    """A joined model ready to train, and the processor that belongs to it."""

    model: VilaUModel
    processor: VilaUProcessor


def starting_folder(init_from: str | os.PathLike[str]) -> Path:
    """Return the folder that `init_from` names; `shipped` is the model that comes with the package.

    Raises:
        ValueError: there is no such folder.
    """
    if os.fspath(init_from) == SHIPPED:
        return Path(find_model(None))
    folder = Path(init_from)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    return folder


def starting_model(config: TrainConfig, settings: LanguageStageConfig, folder: Path | None) -> StartingModel:
    """Return the joined model of a stage.

    A folder with a joined model gives everything: sizes, weights, tokenizer and chat template. A folder with a tower
    gives that, and `init_language_model`, where it is set, the language model and its tokenizer; what is then left
    (projector and depth transformer, section 3.2) starts from random weights of the configured sizes.

    Raises:
        ValueError: the folder holds neither, or what is configured does not fit it.
    """
    kind = None if folder is None else model_type(folder)
    if folder is not None and kind == RELEASED_TYPE:
        raise ValueError(
            f"{folder} has the released layout, which training does not write: make a model of it with "
            f"`vilau convert {folder} DST` and start from that"
        )
    if folder is not None and kind == MODEL_TYPE:
        if settings.init_language_model is not None:
            raise ValueError(
                f"init_language_model {settings.init_language_model} and {folder}, which has a language model: "
                "start from a vision tower, or leave init_language_model out"
            )
        model = VilaUModel.from_pretrained(folder)
        return StartingModel(model, _own_processor(config, folder, model.config))
    require_sizes(config)
    if settings.init_language_model is not None:
        start = _around_language_model(config, settings.init_language_model)
    else:
        tokenizer = load_tokenizer(config)
        model = VilaUModel(build_config(config, tokenizer))
        start = StartingModel(model, build_processor(tokenizer, model.config, config.data.template))
    if folder is not None:
        _put_tower(start.model, folder)
    return start


def _own_processor(config: TrainConfig, folder: Path, model: Any) -> VilaUProcessor:
    """The model's own processor; the configured tokenizer's where the folder has none."""
    if (folder / "processor_config.json").is_file():
        return VilaUProcessor.from_pretrained(folder)
    return build_processor(load_tokenizer(config), model, config.data.template)


def _around_language_model(config: TrainConfig, path: str) -> StartingModel:
    """A model whose language model is pretrained; `model.text_config` only changes fields of its configuration."""
    template = ChatTemplate.from_dict(config.data.template)
    tokenizer = language_model.load_tokenizer(config.data.tokenizer or path, template)
    given: Mapping[str, Any] = config.model.get("text_config") or {}
    settings = {name: value for name, value in given.items() if name not in _ITS_OWN}
    speaker = language_model.load_language_model(path, tokenizer, settings)
    visual = {f"{name}_id": tokenizer.convert_tokens_to_ids(getattr(template, name)) for name in _VISUAL_IDS}
    fields = {name: value for name, value in config.model.items() if name != "text_config"} | visual
    joined = build_config(config.model_copy(update={"model": fields}), tokenizer)
    model = VilaUModel(joined, language_model=speaker)
    return StartingModel(model, build_processor(tokenizer, model.config, template))


def _put_tower(model: VilaUModel, folder: Path) -> None:
    tower = VisionTower.from_pretrained(folder)
    tower.text_encoder = None
    try:
        model.vision_tower.load_state_dict(tower.state_dict())
    except RuntimeError as error:
        raise ValueError(
            f"the vision tower in {folder} does not have the sizes of model.vision_config: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from error
