"""The Auto classes of the library on folders of the released layout, whose `model_type` is not ours."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
from transformers.configuration_utils import PreTrainedConfig

from vilau.checkpoints.released_config import MODEL_TYPE


class ReleasedConfig(PreTrainedConfig):
    """Stands for a released ``config.json``; `from_pretrained` of the model reads the rest of the folder."""

    model_type = MODEL_TYPE


def register_released(model: type, processor: type) -> None:
    """Let ``AutoModel`` and ``AutoProcessor`` open released folders with these classes."""

    def from_pretrained(cls: type, name: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("config", None)
        return model.from_pretrained(name, *args, **kwargs)  # type: ignore[attr-defined]

    fields = {"config_class": ReleasedConfig, "from_pretrained": classmethod(from_pretrained)}
    stand_in = type(f"Released{model.__name__}", (model,), fields)
    AutoConfig.register(MODEL_TYPE, ReleasedConfig, exist_ok=True)
    AutoModel.register(ReleasedConfig, stand_in, exist_ok=True)
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto.register(ReleasedConfig, stand_in, exist_ok=True)
    AutoProcessor.register(ReleasedConfig, processor, exist_ok=True)
