"""LoRA on the language model and the depth transformer: few weights learn, the rest stays as it is (Hu et al. 2021).

The adapters are PEFT's, so what is saved loads with `peft.PeftModel.from_pretrained` onto the base model.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vilau.errors import first_line
from vilau.training.config import LoraConfig


class Adapters:
    """The adapters of one model: inserts them at once, saves them, and gives the weights with them merged in.

    Args:
        model: gets adapters in place; everything else of it is frozen, but for what `config.also` matches.
        config: rank, scale, dropout and which linear layers.

    Raises:
        ValueError: PEFT is not installed, or the pattern matches no linear layer.
    """

    def __init__(self, model: PreTrainedModel, config: LoraConfig) -> None:
        try:
            import peft
        except ImportError as error:
            raise ValueError("`lora` needs the package peft: pip install 'vilau[lora]'") from error
        settings = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=config.layers,
            modules_to_save=list(config.also) or None,
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # between two libraries, of no concern to users
                self.peft: Any = peft.PeftModel(model, settings)
        except ValueError as error:
            raise ValueError(f"lora: {first_line(error)} (layers: {config.layers!r})") from error

    def save(self, folder: Path) -> None:
        """Write the adapters alone, as PEFT reads them."""
        self.peft.save_pretrained(folder)

    @torch.no_grad()
    def merged_state(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return the weights of `model` under their ordinary names, with the adapters added in; nothing is changed."""
        from peft.tuners.lora import LoraLayer
        from peft.utils import ModulesToSaveWrapper

        layers: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
        whole = [name for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
        merged: dict[str, torch.Tensor] = {}
        for name, tensor in model.state_dict().items():
            if ".lora_" in name or any(name.startswith(f"{place}.original_module.") for place in whole):
                continue
            plain = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
            owner = layers.get(plain.rpartition(".")[0])
            if owner is not None and plain.endswith(".weight"):
                tensor = tensor + owner.get_delta_weight("default").to(tensor.dtype)
            merged[plain] = tensor
        return merged
