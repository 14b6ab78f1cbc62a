"""Which attention a language stage trains with, and that samples in one row do not see each other under it.

Packed rows have restarting `position_ids`, no mask and no cache. Of these the library makes masks of whole rows (sdpa,
eager), masks of blocks (flex_attention), or lengths of sequences (flash_attention_2).
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from vilau.errors import first_line
from vilau.modeling.vila_u import packed_lengths

_REMEDY = "set scale.attention to sdpa"
_FLAGS = {
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}


def use_attention(model: PreTrainedModel, name: str, device: torch.device, bf16: bool) -> None:
    """Let a language model compute attention by `name` from now on.

    Args:
        model: on any device.
        device: where it will train.
        bf16: under autocast to bfloat16.

    Raises:
        ValueError: this machine or this model cannot, or packed samples would see each other.
    """
    _refuse_machine(name, device, bf16)
    kind = type(model).__name__
    if not getattr(model, "_supports_attention_backend", False) or not getattr(model, _FLAGS.get(name, ""), True):
        raise ValueError(f"scale.attention is {name}, but {kind} of transformers cannot switch to it; leave it out")
    dropout = getattr(model.config, "attention_dropout", 0.0)
    if name == "flex_attention" and dropout:
        raise ValueError(
            f"scale.attention is flex_attention, which has no dropout, but the language model's attention_dropout is "
            f"{dropout:g}: set it to 0 in model.text_config, or {_REMEDY}"
        )
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise ValueError(f"scale.attention {name}: {first_line(error)}; {_REMEDY}") from error
    refuse_leak(model.config, device, bf16)


def _refuse_machine(name: str, device: torch.device, bf16: bool) -> None:
    if name == "flash_attention_2":
        if not bf16:
            raise ValueError(
                "scale.attention is flash_attention_2, which computes in bfloat16 only, but scale.precision is "
                f"float32: set scale.precision to bf16, or {_REMEDY}"
            )
        if device.type != "cuda":
            raise ValueError(f"scale.attention is flash_attention_2, but there is no GPU here: {_REMEDY}")
        if find_spec("flash_attn") is None:
            raise ValueError(
                "scale.attention is flash_attention_2, but the package flash-attn is not installed: install it, "
                "or set scale.attention to flex_attention or sdpa"
            )
    if name == "flex_attention" and device.type == "cpu":
        raise ValueError(f"scale.attention is flex_attention, which has no backward pass on a CPU: {_REMEDY}")


@torch.no_grad()
def refuse_leak(config: Any, device: torch.device, bf16: bool) -> None:
    """Raise ValueError where a sample of a packed row sees the one before it.

    It is tried out on one layer of each kind that a configuration names, of random weights, under the configuration's
    own attention: two rows of two samples and padding, the first sample of each row changed.
    """
    body = _one_of_each_layer(config, device)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, 16, config.hidden_size, generator=generator).to(device)
    changed = states.clone()
    changed[:, :6] = states[:, :6].flip(1) - 1
    position_ids = torch.cat([torch.arange(6), torch.arange(7), torch.arange(3)]).expand(2, 16).to(device)
    found = []
    for embeds in (states, changed):
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            more = packed_lengths(config, position_ids)
            out = body(inputs_embeds=embeds, position_ids=position_ids, use_cache=False, **more)
        found.append(out.last_hidden_state[:, 6:13].float())
    if not torch.allclose(found[0], found[1], rtol=1e-5, atol=1e-5):
        raise ValueError(
            f"with attention {config._attn_implementation!r} samples of one row see each other in a language model of "
            f"type {config.model_type!r}: choose another scale.attention, or another language model"
        )


def _one_of_each_layer(config: Any, device: torch.device) -> Any:
    small = copy.deepcopy(config)
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ["layer"]))
    small.num_hidden_layers, small.vocab_size = len(kinds), 8
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    if getattr(config, "layer_types", None):
        small.layer_types = kinds
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(small, attn_implementation="eager")
    model.config._attn_implementation = config._attn_implementation  # the library said before that it can
    return model.eval().base_model
