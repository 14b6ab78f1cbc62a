"""Rows that come and go under a forward pass over any mix of them: nothing leaks, nothing is lost."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vilau.generation.slots import Prefix, Row, SlotStore, StoreLanguage, check_language, copy_row, plan


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    """The very small model, with two query heads to a key head."""
    return make_model()


def store_of(model: Any, limit: int = 1000) -> SlotStore:
    """A store for its language model."""
    return SlotStore(model.config.text_config, model.get_input_embeddings().weight.detach(), limit)


@torch.no_grad()
def advance(
    language: StoreLanguage, fed: dict[Row, torch.Tensor], steps: list[Row], pieces: list[tuple[Row, int]]
) -> dict[Row, torch.Tensor]:
    """One pass over some rows of sequences ``fed`` (L, H); the last state of each row."""
    like = next(iter(fed.values()))
    work, ordered = plan(steps, pieces, like)
    parts = [fed[row][row.length : row.length + 1] for row in ordered]
    parts += [fed[row][row.length : row.length + count] for row, count in pieces]
    hidden = language.forward(torch.cat(parts), work)
    last = {row: hidden[number] for number, row in enumerate(ordered)}
    at = len(ordered)
    for row, count in [*((row, 1) for row in ordered), *pieces]:
        row.length += count
    for row, count in pieces:
        at += count
        last[row] = hidden[at - 1]
    return last


@pytest.mark.parametrize("seed", range(4))
def test_any_mix_of_rows_equals_whole_sequences(model: Any, seed: int) -> None:
    """Rows of several lengths and capacities, stepping, reading in pieces, leaving and joining: every state is that
    of the whole sequence run alone without a cache."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    store, language = store_of(model), StoreLanguage(model.language_model.base_model)
    fed: dict[Row, torch.Tensor] = {}
    checked = 0
    for _ in range(30):
        while len(fed) < 6:
            fed[store.reserve(rng.choice((24, 32, 48)))] = torch.randn(24, 32)
        pieces = [(row, min(rng.randint(2, 9), 24 - row.length)) for row in fed if row.length < 4 or rng.random() < 0.2]
        pieces = [(row, count) for row, count in pieces if count > 0]
        reading = {row for row, _ in pieces}
        steps = [row for row in fed if row not in reading and 0 < row.length < 24 and rng.random() < 0.8]
        rng.shuffle(steps)
        if not pieces and not steps:
            steps = [next(row for row in fed if row.length < 24)]
        for row, state in advance(language, fed, steps, pieces).items():
            whole = model.hidden_states(fed[row][None, : row.length])[0, -1]
            torch.testing.assert_close(state, whole, atol=1e-5, rtol=1e-4)
            checked += 1
        for row in [row for row in fed if row.length == 24 or rng.random() < 0.15]:
            del fed[row]
            store.release(row)
    assert checked > 60
    for row in list(fed):
        store.release(row)
    assert store.positions == 0 and not store.slabs


def test_free_places_are_zero(model: Any) -> None:
    """What a row leaves behind is wiped, also where another row was moved: NaN in a masked place would be seen."""
    store = store_of(model)
    rows = [store.reserve(16) for _ in range(3)]
    slab = rows[0].slab
    for number, row in enumerate(rows):
        for layer in (*slab.keys, *slab.values):
            layer[row.index] = float("nan") if number == 0 else float(number)
    store.release(rows[0])
    assert [row.index for row in slab.used] == [0, 1] and slab.used[0] is rows[2]
    for layer in (*slab.keys, *slab.values):
        assert (layer[rows[2].index] == 2).all() and (layer[rows[1].index] == 1).all()
        assert (layer[2:] == 0).all()


def test_memory_stays_within_the_limit(model: Any) -> None:
    """Slabs grow ahead of need only while there is room; when another size needs it, they give it back."""
    store = store_of(model, 100)
    small = [store.reserve(10) for _ in range(5)]
    assert store.positions == 80  # doubled ahead of need
    large = store.reserve(50)
    assert store.positions == 100 and len(small[0].slab.used) == 5
    store.release(large)
    for row in small:
        store.release(row)
    assert store.positions == 0


def test_copies_and_kept_prompts_continue_alike(model: Any) -> None:
    """A prompt read once serves every row that it is copied to, within a batch and later."""
    torch.manual_seed(0)
    store, language = store_of(model), StoreLanguage(model.language_model.base_model)
    sequence = torch.randn(12, 32)
    first = store.reserve(16)
    state = advance(language, {first: sequence}, [], [(first, 8)])[first]
    kept = Prefix.of(first, 8, state)
    second, third = store.reserve(24), store.reserve(16)
    copy_row(first, second, 8)
    store.release(first)
    kept.fill(third)
    assert kept.length == second.length == third.length == 8
    fed = {second: sequence, third: sequence}
    whole = model.hidden_states(sequence[None, :9])[0, -1]
    for out in advance(language, fed, [second, third], []).values():
        torch.testing.assert_close(out, whole, atol=1e-5, rtol=1e-4)


def test_the_model_keeps_its_own_attention(model: Any) -> None:
    """The running batch works on a twin: the model itself can generate beside it as before."""
    StoreLanguage(model.language_model.base_model)
    assert model.language_model.config._attn_implementation == "sdpa"
    assert model.language_model.base_model.layers[0].self_attn.config._attn_implementation == "sdpa"


def test_language_models_that_cannot_run_are_named(make_model: Callable[..., Any]) -> None:
    """Positions that depend on the longest row would make a request depend on its company."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = make_model(text={"rope_parameters": rope}).language_model.config
    with pytest.raises(ValueError, match="dynamic positions depend on the longest row"):
        check_language(config, 64)
