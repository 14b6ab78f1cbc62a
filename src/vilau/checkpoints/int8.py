"""int8 through the library's quantizer classes: quantised while loading, saved, and loaded again.

``config.json`` gains ``"quantization_config": {"quant_method": "vilau_int8", "version": 1}``; of every quantised layer
the weights hold ``NAME.weight`` (O, I) int8 and ``NAME.scale`` (O,) float32, the bias as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from vilau.modeling.int8 import Int8Linear, is_int8, quantize_weight, replace_linears

METHOD = "vilau_int8"
VERSION = 1
QUANTIZATIONS = ("int8",)


@register_quantization_config(METHOD)
@dataclass
class Int8Config(QuantizationConfigMixin):
    """What ``config.json`` says of a quantised model.

    Raises:
        ValueError: a version of the layout that this package does not know.
    """

    quant_method: Any = METHOD
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(f"this int8 model has layout version {self.version}; this package reads {VERSION}")


class QuantizeOnLoad(ConversionOps):
    """Turns one float weight into an int8 weight and its scales as it is read; no other is in memory meanwhile."""

    def __init__(self, hf_quantizer: HfQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Return ``{NAME.weight, NAME.scale}``."""
        ((name, found),) = input_dict.items()
        quantized = quantize_weight(found[0] if isinstance(found, list) else found)
        return {name: quantized.weight, name.removesuffix("weight") + "scale": quantized.scale}


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):
    """The library's loading and saving of int8 models."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not hasattr(model, "language_model"):
            raise ValueError(f"int8 is for the whole model; {type(model).__name__} has no language model")
        with torch.device("meta"):
            replace_linears(model, _empty)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model.requires_grad_(False)
        return model.eval()

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Return whether a tensor of a float checkpoint becomes int8."""
        module, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(module), Int8Linear)

    @property
    def quantized_element_size(self) -> float:
        """Bytes of one number of a quantised weight."""
        return 1

    def get_quantize_ops(self) -> QuantizeOnLoad:
        """Return what turns a float weight into int8."""
        return QuantizeOnLoad(self)

    def is_serializable(self) -> bool:
        """A quantised model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """A quantised model cannot be trained."""
        return False


def _empty(linear: nn.Linear) -> Int8Linear:
    return Int8Linear(linear.in_features, linear.out_features, linear.bias is not None, linear.weight.dtype)


def is_ours(config: Any) -> bool:
    """Return whether a quantization configuration, as a dict or an object, is of this method."""
    found = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
    return bool(found == METHOD)


def check_quantization(name: str) -> None:
    """Raise ValueError for a quantisation that there is not."""
    if name not in QUANTIZATIONS:
        raise ValueError(f"quantize is {name!r}; it must be {' or '.join(QUANTIZATIONS)}")


def quantize_model(model: Any, name: str = "int8") -> None:
    """Quantise a model in memory, layer by layer; it then saves and behaves as one that was loaded quantised.

    Raises:
        ValueError: an unknown quantisation, a model that is quantised already, or one with layers of adapters.
    """
    check_quantization(name)
    if is_int8(model) or getattr(model, "is_quantized", False):
        raise ValueError("the model is quantised already")
    if any("lora_" in part for part, _ in model.named_parameters()):
        raise ValueError("the model has LoRA adapters: merge them first (merge_and_unload), then quantise")
    replace_linears(model)
    quantizer = Int8Quantizer(Int8Config(), pre_quantized=False)
    model.hf_quantizer = quantizer
    model.is_quantized, model.quantization_method = True, METHOD
    quantizer.postprocess_model(model)
