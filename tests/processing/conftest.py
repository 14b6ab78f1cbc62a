"""A small byte-fallback tokenizer with the layout of the shipped one, so that these tests need no trained model."""

from __future__ import annotations

import string
from collections.abc import Sequence

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

FIRST = ["<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"]
LAST = ["<image_start>", "<image_end>", "<video_start>", "<video_end>"]
SPECIAL = FIRST + LAST


def build_tokenizer(last: Sequence[str] = LAST) -> PreTrainedTokenizerFast:
    """Specials first, then bytes, characters and a few merges, the four visual tokens last."""
    characters = [*string.ascii_letters, *string.digits, *string.punctuation, "▁"]
    merges = [("r", "e"), ("re", "d"), ("▁", "a"), ("i", "m"), ("▁", "b")]
    words = FIRST + [f"<0x{byte:02X}>" for byte in range(256)] + characters + [a + b for a, b in merges]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: index for index, word in enumerate(words)},
            merges=merges,
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in [*FIRST, *last]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        padding_side="left",
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The small tokenizer; its last four ids are the visual tokens."""
    return build_tokenizer()
