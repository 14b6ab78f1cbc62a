"""Start from a language model of the Hugging Face hub's kind: its weights, its tokenizer, and rows for new tokens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from vilau.errors import first_line
from vilau.processing.templates import ChatTemplate

_SPREAD = 0.02  # of new rows around the mean, in standard deviations of the old rows


def extend_tokenizer(tokenizer: Any, template: ChatTemplate) -> Any:
    """Add the template's special tokens that the tokenizer lacks, the four visual ones last, and a pad token.

    Returns the same tokenizer, changed.
    """
    visual = [template.image_start, template.image_end, template.video_start, template.video_end]
    others = [token for token in template.special_tokens if token not in visual]
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": tokenizer.unk_token or tokenizer.eos_token})
    tokenizer.add_special_tokens({"additional_special_tokens": [*others, *visual]}, replace_extra_special_tokens=False)
    return tokenizer


def load_tokenizer(path: str | os.PathLike[str], template: ChatTemplate) -> Any:
    """Return the tokenizer of a folder or hub id, extended by the template's tokens.

    Raises:
        ValueError: there is no tokenizer.
    """
    try:
        return extend_tokenizer(AutoTokenizer.from_pretrained(path), template)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no tokenizer could be loaded from {path}: {first_line(error)}") from error


def load_language_model(
    path: str | os.PathLike[str], tokenizer: Any, settings: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """Return a pretrained causal language model in float32 with a row for every token of the tokenizer.

    Args:
        path: folder or hub id.
        tokenizer: already extended; rows are only added, never taken away, as many models have spare ones.
        settings: fields of the model's configuration to change, such as `rope_parameters` or
            `max_position_embeddings`.

    Raises:
        ValueError: there is no such model, or a changed field does not fit its weights.
    """
    try:
        config = AutoConfig.from_pretrained(path)
        unknown = [name for name in settings or {} if not hasattr(config, name)]
        if unknown:
            raise ValueError(f"its configuration has no {', '.join(unknown)}")
        for name, value in (settings or {}).items():
            setattr(config, name, value)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch.float32, output_loading_info=True
        )
        known = len(AutoTokenizer.from_pretrained(path))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"no language model could be loaded from {path}: {first_line(error)}") from error
    model, report = loaded
    absent = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if absent:
        raise ValueError(f"the language model in {path} lacks {len(absent)} tensors, the first is {absent[0]}")
    add_rows(model, known, len(tokenizer))
    return model


@torch.no_grad()
def add_rows(model: PreTrainedModel, known: int, size: int) -> None:
    """Make the rows from `known` to `size` of the model's vocabulary usable; what it says with the others stays.

    The vocabulary grows where it is smaller; many models have spare rows, which are used first and never taken away. A
    new row is the mean of the known ones plus a little of their spread: its logit is then an ordinary one. Rows far
    from the others, such as random ones, can draw all probability at the first step (Hewitt 2021).
    """
    tables: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    known = min(known, len(tables[0].weight))
    if size > len(tables[0].weight):
        model.resize_token_embeddings(size, mean_resizing=False)
        tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    generator = torch.Generator().manual_seed(0)
    for weight in {id(table.weight): table.weight for table in tables}.values():  # one where they are tied
        old = weight[:known].float()
        noise = torch.randn((max(0, size - known), old.shape[1]), generator=generator).to(old.device)
        weight[known:size] = (old.mean(0) + _SPREAD * old.std(0) * noise).to(weight.dtype)
    bias = getattr(tables[1], "bias", None)
    if bias is not None:
        bias[known:size] = bias[:known].mean()
