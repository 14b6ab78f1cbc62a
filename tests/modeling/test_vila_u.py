"""The joined network: both losses against explicit loops, packed rows kept apart, masks, saving and loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vilau.modeling.vila_u import VilaULosses, VilaUModel

T, V, PAD = 0, 1, 2


def sequence(seed: int, *parts: list[int] | str) -> dict[str, torch.Tensor]:
    """Build one sample: lists are text tokens, "image" is a supervised picture between its tokens, "seen" one that
    is not supervised. The last list's tokens are text targets. Random codes per picture."""
    generator = torch.Generator().manual_seed(seed)
    ids, kinds, text, visual, pictures = [], [], [], [], 0
    for number, part in enumerate(parts):
        if isinstance(part, str):
            pictures += 1
            ids += [36, 0, 0, 0, 0, 37]
            kinds += [T, V, V, V, V, T]
            text += [part == "image", 0, 0, 0, 0, part == "image"]
            visual += [0, *[part == "image"] * 4, 0]
        else:
            ids += part
            kinds += [T] * len(part)
            text += [number == len(parts) - 1] * len(part)
            visual += [0] * len(part)
    text[0] = 0
    return {
        "input_ids": torch.tensor(ids),
        "kinds": torch.tensor(kinds),
        "text_targets": torch.tensor(text, dtype=torch.bool),
        "visual_targets": torch.tensor(visual, dtype=torch.bool),
        "codes": torch.randint(16, (pictures, 4, 3), generator=generator),
    }


SAMPLES = [
    sequence(0, [1, 5, 6, 7], "image", [2]),
    sequence(1, [1, 8], "seen", [9, 10, 2]),
    sequence(2, [1, 11, 12, 13, 2]),
]


def padded(samples: list[dict[str, torch.Tensor]], side: str = "right") -> dict[str, torch.Tensor]:
    """Rows of one sample each, padded, with an attention mask."""
    length = max(len(sample["input_ids"]) for sample in samples)
    rows: dict[str, list[torch.Tensor]] = {
        name: [] for name in ("input_ids", "kinds", "text_targets", "visual_targets")
    }
    mask = []
    for sample in samples:
        missing = length - len(sample["input_ids"])
        place = (0, missing) if side == "right" else (missing, 0)
        for name, row in rows.items():
            fill = PAD if name == "kinds" else 0
            row.append(torch.nn.functional.pad(sample[name], place, value=fill))
        mask.append(torch.nn.functional.pad(torch.ones(length - missing, dtype=torch.long), place))
    batch = {name: torch.stack(row) for name, row in rows.items()}
    batch["attention_mask"] = torch.stack(mask)
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return batch | {"codes": torch.cat([sample["codes"] for sample in samples])}


def packed(samples: list[dict[str, torch.Tensor]], padding: int = 3) -> dict[str, torch.Tensor]:
    """All samples in one row with restarting positions, padding at the end, and no attention mask."""
    batch = {}
    for name in ("input_ids", "kinds", "text_targets", "visual_targets"):
        fill = PAD if name == "kinds" else 0
        row = torch.cat([sample[name] for sample in samples])
        batch[name] = torch.nn.functional.pad(row, (0, padding), value=fill).unsqueeze(0)
    places = [torch.arange(len(sample["input_ids"])) for sample in samples]
    batch["position_ids"] = torch.cat([*places, torch.arange(padding)]).unsqueeze(0)
    return batch | {"codes": torch.cat([sample["codes"] for sample in samples])}


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> VilaUModel:
    """The very small model."""
    return make_model()


def loop_losses(model: VilaUModel, sample: dict[str, torch.Tensor]) -> tuple[list[float], list[list[float]]]:
    """Eq. (5) and (7) for one sample alone, position by position and code by code, from the model's parts.

    Position j is predicted from the language model's output at j - 1, code d of it from the codes before d.
    """
    table = model.language_model.model.embed_tokens.weight
    book = model.vision_tower.quantizer.codebook[0]
    codes = sample["codes"].reshape(-1, 3)
    embeds, at = [], 0
    for token, kind in zip(sample["input_ids"], sample["kinds"], strict=True):
        if kind == V:
            z_q = sum(book[code] for code in codes[at])
            embeds.append(model.projector.fc2(torch.nn.functional.gelu(model.projector.fc1(z_q))))
            at += 1
        else:
            embeds.append(table[token])
    hidden = model.language_model.model(inputs_embeds=torch.stack(embeds).unsqueeze(0), use_cache=False)
    hidden = hidden.last_hidden_state[0]
    text, visual, at = [], [], -1
    for j, kind in enumerate(sample["kinds"].tolist()):
        at += kind == V
        if sample["text_targets"][j]:
            logits = model.language_model.lm_head(hidden[j - 1])
            text.append(float(torch.logsumexp(logits, 0) - logits[sample["input_ids"][j]]))
        if sample["visual_targets"][j]:
            row: list[float] = []
            cache = model.depth_transformer.new_cache(1)
            for d, code in enumerate(codes[at].tolist()):
                x = hidden[j - 1] if d == 0 else sum(book[c] for c in codes[at][:d])
                logits = model.depth_transformer.step(x.unsqueeze(0), d, cache)[0]
                row.append(float(torch.logsumexp(logits, 0) - logits[code]))
            visual.append(row)
    return text, visual


@torch.no_grad()
@pytest.mark.parametrize("number", range(3))
def test_losses_equal_an_explicit_loop(model: VilaUModel, number: int) -> None:
    """Text and visual losses, with their shift by one and their depth order, equal eq. (5) and (7) written out."""
    text, visual = loop_losses(model, SAMPLES[number])
    batch = padded([SAMPLES[number]])
    losses = model.losses(**batch)
    torch.testing.assert_close(losses.text, torch.tensor(text), rtol=1e-4, atol=1e-4)
    assert losses.visual.shape == (len(visual), 3)
    if visual:
        torch.testing.assert_close(losses.visual, torch.tensor(visual), rtol=1e-4, atol=1e-4)
    expected = sum(text) / len(text) + (torch.tensor(visual).mean() if visual else 0)
    torch.testing.assert_close(losses.total(), torch.as_tensor(expected).float(), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_rows_equal_padded_rows(model: VilaUModel, side: str) -> None:
    """Packing is an arrangement only: every loss equals that of the sample in a row of its own, padded either way."""
    one, two = model.losses(**packed(SAMPLES)), model.losses(**padded(SAMPLES, side))
    torch.testing.assert_close(one.text, two.text, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.visual, two.visual, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("changed", range(3))
def test_packed_samples_do_not_see_each_other(model: VilaUModel, changed: int) -> None:
    """Changing one packed sample changes nothing in another, bit for bit (METHOD's trap: a leak is silent)."""
    others = list(SAMPLES)
    sample = dict(SAMPLES[changed])
    sample["input_ids"] = torch.where(sample["kinds"] == T, (sample["input_ids"] + 7) % 36, sample["input_ids"])
    sample["codes"] = (sample["codes"] + 3) % 16
    others[changed] = sample
    starts = [0]
    for each in SAMPLES:
        starts.append(starts[-1] + len(each["input_ids"]))

    def states(samples: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        batch = packed(samples)
        embeds = model.embed(batch["input_ids"], batch["kinds"], batch["codes"])
        return model.hidden_states(embeds, position_ids=batch["position_ids"])[0]

    moved = (states(SAMPLES) - states(others)).abs().amax(1)
    inside = torch.zeros_like(moved, dtype=torch.bool)
    inside[starts[changed] : starts[changed + 1]] = True
    assert float(moved[~inside].max()) == 0.0
    assert float(moved[inside].min()) > 0


@torch.no_grad()
def test_unsupervised_positions_contribute_nothing(model: VilaUModel) -> None:
    """Where no mask is set, a token's or code's value as a target is irrelevant: only as an input can it matter."""
    batch = padded([SAMPLES[1]])
    assert len(model.losses(**batch).text) == 3 and not len(model.losses(**batch).visual)
    batch["text_targets"] = torch.zeros_like(batch["text_targets"])
    batch["text_targets"][0, 9] = True
    alone = model.losses(**batch).text
    assert len(alone) == 1
    later = {name: value.clone() for name, value in batch.items()}
    later["input_ids"][0, 10] = 30  # after the only target: neither input nor target of it
    assert torch.equal(model.losses(**later).text, alone)
    later["text_targets"][0, 9] = False
    with pytest.raises(ValueError, match="supervises no position"):
        model.losses(**later).total()


def test_unsupervised_parts_get_no_gradient(model: VilaUModel) -> None:
    """A batch without visual targets leaves the depth transformer alone, and frozen codes pass nothing to the tower."""
    model.zero_grad(set_to_none=True)
    model.losses(**padded([SAMPLES[1]])).total().backward()
    assert all(p.grad is None for p in model.depth_transformer.parameters())
    assert all(p.grad is None for p in model.vision_tower.parameters())
    assert all(p.grad is not None for p in model.projector.parameters())
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def test_the_past_alone_predicts(model: VilaUModel) -> None:
    """Causality over positions: changing the codes of visual position j moves no loss of positions before j."""
    batch = padded([SAMPLES[0]])
    before = model.losses(**batch)
    batch["codes"] = batch["codes"].clone()
    batch["codes"][0, 2] = (batch["codes"][0, 2] + 5) % 16
    after = model.losses(**batch)
    assert torch.equal(before.visual[:2], after.visual[:2])
    assert not torch.allclose(before.visual[3], after.visual[3])


@torch.no_grad()
def test_a_film_is_the_concatenation_of_its_frames(model: VilaUModel) -> None:
    """METHOD, section 2: two frames in a row embed as their positions one after another, in time order."""
    codes = torch.randint(16, (2, 4, 3), generator=torch.Generator().manual_seed(5))
    ids = torch.tensor([[1, 38, *[0] * 8, 39]])
    kinds = torch.tensor([[T, T, *[V] * 8, T]])
    embeds = model.embed(ids, kinds, codes=codes)
    frames = torch.cat([model.visual_embeds(frame) for frame in codes])
    torch.testing.assert_close(embeds[0, 2:10], frames)
    torch.testing.assert_close(embeds[0, [0, 1, 10]], model.get_input_embeddings()(ids[0, [0, 1, 10]]))


@torch.no_grad()
def test_pixels_and_their_codes_are_one_input(model: VilaUModel) -> None:
    """Training from pictures and from stored codes computes the same loss."""
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(6)) * 2 - 1
    batch = padded([SAMPLES[0]])
    del batch["codes"]
    from_pixels = model.losses(**batch, pixel_values=pixels)
    from_codes = model.losses(**batch, codes=model.vision_tower.encode(pixels))
    assert torch.equal(from_pixels.visual, from_codes.visual) and torch.equal(from_pixels.text, from_codes.text)


@torch.no_grad()
def test_ids_under_pictures_are_ignored(model: VilaUModel) -> None:
    """What id stands at a visual position has no effect, so user text may contain any token."""
    batch = padded([SAMPLES[0]])
    before = model.losses(**batch)
    batch["input_ids"] = torch.where(batch["kinds"] == V, 35, batch["input_ids"])
    after = model.losses(**batch)
    assert torch.equal(before.text, after.text) and torch.equal(before.visual, after.visual)


@torch.no_grad()
def test_pictures_must_match(model: VilaUModel) -> None:
    """Pictures without kinds, or too many for the visual positions, are refused."""
    ids, codes = torch.tensor([[1, 5]]), torch.zeros(1, 4, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="without kinds"):
        model.embed(ids, codes=codes)
    with pytest.raises(ValueError, match="0 visual positions but the pictures given bring 4"):
        model.embed(ids, torch.zeros_like(ids), codes)
    with pytest.raises(ValueError, match="1 visual positions but the pictures given bring 0"):
        model.embed(ids, torch.tensor([[T, V]]))


def test_total_is_the_sum_of_two_means() -> None:
    """`L = L_text + L_visual`: an absent part counts zero, not NaN."""
    text, visual, none = torch.tensor([1.0, 3.0]), torch.tensor([[4.0, 8.0]]), torch.zeros(0)
    at = torch.zeros(0, dtype=torch.long)
    assert float(VilaULosses(text, visual, at, at).total()) == 8.0
    assert float(VilaULosses(text, none.reshape(0, 2), at, at).total()) == 2.0
    assert float(VilaULosses(none, visual, at, at).total()) == 6.0


@pytest.mark.parametrize("changes", [{}, {"text": {"tie_word_embeddings": True}}, {"shared_codebook": False}])
def test_saving_and_loading(make_model: Callable[..., Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    """Every weight and buffer comes back, tied embeddings stay tied, a shared codebook saves; losses are equal."""
    model = make_model(**changes)
    model.vision_tower.quantizer.ema_count += 1
    model.save_pretrained(tmp_path)
    again, info = VilaUModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    one, two = model.state_dict(), again.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    tied = again.language_model.lm_head.weight is again.language_model.model.embed_tokens.weight
    assert tied == bool(changes.get("text"))
    with torch.no_grad():
        a, b = model.losses(**padded(SAMPLES)), again.eval().losses(**padded(SAMPLES))
    assert torch.equal(a.text, b.text) and torch.equal(a.visual, b.visual)


def test_another_language_model(make_model: Callable[..., Any]) -> None:
    """Any causal language model of the library fits: packed and padded losses agree for Qwen2 too."""
    model = make_model(text={"model_type": "qwen2"})
    with torch.no_grad():
        one, two = model.losses(**packed(SAMPLES)), model.losses(**padded(SAMPLES))
    torch.testing.assert_close(one.visual, two.visual, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.text, two.text, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_losses_in_pieces_are_those_of_whole_logits(make_model: Callable[..., Any], tied: bool) -> None:
    """Without ever holding the logits whole, losses and every gradient are the same, unevenly weighted rows too."""
    model = make_model(text={"tie_word_embeddings": tied}).eval()
    weights, found = torch.linspace(0.2, 2.0, 200), []
    for fused in (False, True):
        losses = model.losses(**padded(SAMPLES), fused=fused)
        values = torch.cat([losses.text, losses.visual.flatten()])
        (values * weights[: len(values)]).sum().backward()
        found.append((values.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
    (plain, gradients), (pieces, others) = found
    assert torch.allclose(plain, pieces, atol=1e-5) and gradients.keys() == others.keys()
    assert all(torch.allclose(gradients[name], others[name], atol=1e-5) for name in gradients)


@pytest.mark.parametrize("learning", ["ema", "gradient"])
@torch.no_grad()
def test_multi_codebooks_run_through_everything(make_model: Callable[..., Any], tmp_path: Path, learning: str) -> None:
    """Packing, losses from pixels and from codes, scores and saving need not know that a tower is `mcq`."""
    model = make_model(quantizer="mcq", code_dim=12, codebook_learning=learning)
    one, two = model.losses(**packed(SAMPLES)), model.losses(**padded(SAMPLES))
    torch.testing.assert_close(one.visual, two.visual, rtol=1e-4, atol=1e-4)
    batch = padded([SAMPLES[0]])
    other = {**batch, "codes": batch["codes"].clone()}
    other["codes"][0, 0, 1] = (other["codes"][0, 0, 1] + 1) % 16
    before, after = model.losses(**batch).visual, model.losses(**other).visual
    assert torch.equal(before[0, :1], after[0, :1]) and not torch.allclose(before[0, 2], after[0, 2])
    model.save_pretrained(tmp_path)
    again = VilaUModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again.losses(**batch).visual, before)


@pytest.fixture(scope="module")
def reader(make_model: Callable[..., Any]) -> VilaUModel:
    """The very small model with continuous tokens."""
    return make_model(quantizer="none")


def test_continuous_tokens_are_read(reader: VilaUModel) -> None:
    """`none`: pictures reach the text through projector(z_e); the text's loss trains language model and projector."""
    batch = padded([SAMPLES[1]])
    del batch["codes"]
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(6)) * 2 - 1
    losses = reader.losses(**batch, pixel_values=pixels)
    assert len(losses.text) == 3 and losses.visual.shape == (0, 3)
    with torch.no_grad():
        embeds = reader.embed(batch["input_ids"], batch["kinds"], pixel_values=pixels)
        expected = reader.projector(reader.vision_tower.features(pixels))[0]
        torch.testing.assert_close(embeds[batch["kinds"] == V], expected)
        assert not torch.equal(reader.losses(**batch, pixel_values=-pixels).text, losses.text)
        scores = reader.score(batch["input_ids"], batch["kinds"], batch["text_targets"], pixel_values=pixels)
    torch.testing.assert_close(scores.total()[0], -losses.text.sum().detach())
    losses.total().backward()
    assert reader.projector.fc1.weight.grad is not None
    assert reader.depth_transformer is None and not any("depth_transformer" in name for name in reader.state_dict())
    reader.zero_grad(set_to_none=True)


def test_continuous_tokens_have_no_visual_side(reader: VilaUModel) -> None:
    """Codes, visual targets and tokenizing are refused in words that say what to do instead."""
    pixels = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match="continuous tokens"):
        reader.vision_tower.encode(pixels)
    batch = padded([SAMPLES[1]])
    with pytest.raises(ValueError, match="Give pixel_values and ask for text"):
        reader.losses(**batch)
    del batch["codes"]
    batch["visual_targets"] = batch["kinds"] == V
    with pytest.raises(ValueError, match="trained or scored on visual positions"):
        reader.losses(**batch, pixel_values=pixels)
