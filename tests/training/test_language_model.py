"""Stage 2 from a pretrained language model: nothing that it knows is lost, new tokens are usable at once."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

from vilau.processing.templates import OURS, VICUNA_V1
from vilau.training.language_model import add_rows, load_language_model, load_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, vocab_size=400, num_key_value_heads=4, max_position_embeddings=64),
    "qwen3": Qwen3Config(**SIZES, vocab_size=512, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True),
}


def save_pretrained(folder: Path, config: Any) -> None:
    """A language model with its tokenizer, as the hub has them: no visual token, no pad token."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *string.ascii_letters, "▁"]
    words += [str(number) for number in range(10, 400 - len(words) + 10)]
    vocab = {word: index for index, word in enumerate(words[:400])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.mark.parametrize("template", [OURS, VICUNA_V1], ids=lambda template: template.name)
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_what_it_knows_stays_and_new_tokens_are_ordinary(family: str, template: Any, tmp_path: Path) -> None:
    """Old logits are unchanged; each new token has a row of its own whose logit lies among the others."""
    save_pretrained(tmp_path, CONFIGS[family])
    tokenizer = load_tokenizer(tmp_path, template)
    model = load_language_model(tmp_path, tokenizer).eval()
    visual = [template.image_start, template.image_end, template.video_start, template.video_end]
    ids = tokenizer.convert_tokens_to_ids(visual)
    assert ids == list(range(len(tokenizer) - 4, len(tokenizer))) and tokenizer.pad_token is not None
    assert all(token in tokenizer.all_special_tokens for token in template.special_tokens)
    before = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    text = torch.tensor([tokenizer("hello there")["input_ids"]])
    old, new = before(text).logits, model(text).logits
    assert torch.equal(new[..., :400], old[..., :400]) and new.shape[-1] == max(len(tokenizer), old.shape[-1])
    added, known = new[..., ids], old[..., :400]
    assert added.min() > known.min() and added.max() < known.max()
    rows = model.get_input_embeddings().weight[ids]  # type: ignore[union-attr, index]
    assert len(torch.unique(rows, dim=0)) == 4


def test_rows_are_never_taken_away() -> None:
    """Models with spare rows keep them: their checkpoints must go on loading elsewhere."""
    model = AutoModelForCausalLM.from_config(CONFIGS["qwen3"])
    before = model.get_input_embeddings().weight.clone()
    add_rows(model, 100, 100)
    assert torch.equal(model.get_input_embeddings().weight, before)
    add_rows(model, 100, 104)
    assert torch.equal(model.get_input_embeddings().weight[104:], before[104:]) and len(before) == 512


def test_settings_change_the_configuration_or_are_refused(tmp_path: Path) -> None:
    """Longer contexts are a matter of configuration; a misspelt field is not passed over."""
    save_pretrained(tmp_path, CONFIGS["llama"])
    tokenizer = load_tokenizer(tmp_path, VICUNA_V1)
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    longer = load_language_model(tmp_path, tokenizer, {"rope_parameters": rope})
    assert longer.config.rope_parameters["factor"] == 2.0
    with pytest.raises(ValueError, match="has no rope_parametres"):
        load_language_model(tmp_path, tokenizer, {"rope_parametres": rope})
    with pytest.raises(ValueError, match="no language model could be loaded"):
        load_language_model(tmp_path, tokenizer, {"hidden_size": 48})
    with pytest.raises(ValueError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path / "nowhere", VICUNA_V1)
