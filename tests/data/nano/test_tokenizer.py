"""The nano tokenizer: exact for any text, one token for each word of its world, the same every time."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vilau.data.nano.dataset import FORM_OF, NanoDataset
from vilau.data.nano.tokenizer import FIRST_TOKENS, LAST_TOKENS, load_tokenizer, save_tokenizer, train_tokenizer
from vilau.data.nano.world import ASSETS, BACKGROUNDS, OBJECTS, World

TOKENIZER = load_tokenizer()


def ids(text: str) -> list[int]:
    """Token ids of user text, in which special tokens are plain letters."""
    return TOKENIZER(text, add_special_tokens=False, split_special_tokens=True).input_ids


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=60))
def test_any_text_survives(text: str) -> None:
    """Protects users of every script: what was encoded decodes to the very same text."""
    assert TOKENIZER.decode(ids(text)) == text


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from(
            [*FIRST_TOKENS, *LAST_TOKENS, "<0x41>", " ", "  ", "\n", "\r\n", "\t", "a", "▁", "dog", "é", "🐶"]
        ),
        max_size=9,
    )
)
def test_special_tokens_in_user_text_stay_text(pieces: list[str]) -> None:
    """Protects the template: a user who types a special token can not forge one, and gets it back letter by letter."""
    text = "".join(pieces)
    special = set(TOKENIZER.all_special_ids)
    encoded = ids(text)
    assert not special & set(encoded)
    assert TOKENIZER.decode(encoded) == text


def test_words_of_the_world_are_one_token() -> None:
    """Protects the sequence length: no word of the training text is split."""
    for spec in OBJECTS:
        for name in (spec.name, spec.plural):
            assert len(ids(name)) == len(name.split()), name
    for colour in BACKGROUNDS:
        assert len(ids(colour)) == 1
    dataset = NanoDataset(
        World.load(), {key: 1.0 for key in FORM_OF if key != "easy_vqa"}, "heldout", image_size=4, num_frames=1
    )
    for index in range(200):
        for part in (part for turn in dataset[index].turns for part in turn.parts if part.kind == "text"):
            words = part.text
            for mark in '?.!,:"':
                words = words.replace(mark, f" {mark} ")
            assert len(ids(part.text)) <= len(words.split()) + 1, part.text


def test_ids_of_special_tokens() -> None:
    """Protects stored models: padding is 0, and the four visual tokens close the vocabulary."""
    size = len(TOKENIZER)
    assert size <= 2048
    assert TOKENIZER.convert_tokens_to_ids(list(FIRST_TOKENS)) == list(range(7))
    assert TOKENIZER.convert_tokens_to_ids(list(LAST_TOKENS)) == list(range(size - 4, size))
    assert (TOKENIZER.pad_token, TOKENIZER.bos_token, TOKENIZER.eos_token, TOKENIZER.unk_token) == FIRST_TOKENS[:4]


def test_training_is_deterministic_and_order_free() -> None:
    """Protects `make nano`: the same texts in any order give the same vocabulary."""
    texts = ["a red apple on a blue background", "two dogs", "What is this?", "it grows."]
    first, second = train_tokenizer(texts, 600), train_tokenizer(reversed(texts), 600)
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_bad_sizes_are_refused() -> None:
    """Protects from a vocabulary that does not fit: the message names the limits."""
    with pytest.raises(ValueError, match="4096.*512 to 2048"):
        train_tokenizer(["a"], 4096)
    with pytest.raises(ValueError, match="no word"):
        train_tokenizer([" "])


@pytest.mark.long
def test_the_shipped_tokenizer_is_what_its_command_makes(tmp_path: Path) -> None:
    """Protects `make nano`: training again on the same texts gives the file that ships."""
    save_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == (ASSETS / "tokenizer" / "tokenizer.json").read_bytes()
