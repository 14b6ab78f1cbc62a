"""Batches in which every picture has its own settings: what each gives is what it would give alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from vilau.generation import position as position_module
from vilau.generation.compiled import visual_step
from vilau.generation.guidance import guidance_table, guided_logits, guided_rows
from vilau.generation.position import DynamicLanguage, left_aligned
from vilau.generation.sampling import (
    SamplingOptions,
    draw_codes,
    filter_logits,
    gumbel_noise,
    sample_codes,
    sampling_rows,
)
from vilau.generation.visual import run_codes

EMPTY = torch.tensor([[1, 3, 36]])
IDS = torch.tensor([[1, 3, 11, 12, 36], [0, 0, 7, 8, 36], [0, 9, 8, 8, 36]])


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    """The very small model."""
    return make_model()


def codes_of(model: Any, rows: list[int], **changes: Any) -> torch.Tensor:
    """Codes of some of the prompts."""
    ids = IDS[rows]
    settings = {"unconditional_ids": EMPTY, "temperature": 1.0, "top_k": 12, "top_p": 0.9} | changes
    request = model.visual_request(model.embed(ids), (ids != 0).long(), False, **settings)
    return run_codes(visual_step(model, len(request.prompts.rows)), request)


@pytest.mark.parametrize("size", [16, 2000])
@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(),
        SamplingOptions(temperature=0.3, top_k=5, top_p=1.0),
        SamplingOptions(temperature=2.0, top_k=0, top_p=0.5),
        SamplingOptions(top_k=1, top_p=0.01),
        SamplingOptions(top_k=0, top_p=1.0),
        SamplingOptions(temperature=0),
    ],
)
def test_sampling_of_the_likeliest_equals_the_plain_filters(options: SamplingOptions, size: int) -> None:
    """Sorting and noise for a few codes draw exactly what filters and noise over the whole codebook draw."""
    logits = torch.randn(300, size, generator=torch.Generator().manual_seed(size)) * 3
    seeds = torch.arange(300) * 17
    rows = sampling_rows([options] * 300, size, "cpu")
    expected = draw_codes(filter_logits(logits, options), seeds, 7, 2)
    assert torch.equal(sample_codes(logits, rows, seeds, 7, 2), expected)


def test_ties_at_the_edge_of_top_k_are_all_kept() -> None:
    """As the plain filter keeps them: whichever of the tied codes the noise prefers."""
    logits = torch.zeros(500, 40)
    logits[:, 0] = 1.0
    options, seeds = SamplingOptions(top_k=3, top_p=1.0), torch.arange(500)
    drawn = sample_codes(logits, sampling_rows([options] * 500, 40, "cpu"), seeds, 0, 0)
    assert torch.equal(drawn, draw_codes(filter_logits(logits, options), seeds, 0, 0))
    assert len(drawn.unique()) > 30


def test_every_row_has_its_own_filters_and_position() -> None:
    """Mixed greedy and drawn rows at different positions equal one call for each."""
    options = [
        SamplingOptions(temperature=0),
        SamplingOptions(top_k=4),
        SamplingOptions(temperature=0.5, top_k=0, top_p=1.0),
        SamplingOptions(temperature=3.0, top_k=50, top_p=0.7),
    ]
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    seeds, positions = torch.tensor([3, 1, 4, 1]), torch.tensor([9, 2, 6, 5])
    together = sample_codes(logits, sampling_rows(options, 100, "cpu"), seeds, positions, 1)
    for row, option in enumerate(options):
        alone = draw_codes(filter_logits(logits[row : row + 1], option), seeds[row : row + 1], int(positions[row]), 1)
        assert int(alone) == int(together[row])


def test_noise_of_some_columns() -> None:
    """Noise depends on the code, not on where among the candidates it stands."""
    seeds = torch.tensor([5, 6])
    whole = gumbel_noise(seeds, 3, 1, 50)
    some = torch.tensor([[4, 40, 7], [0, 49, 3]])
    assert torch.equal(gumbel_noise(seeds, 3, 1, some), whole.gather(1, some))


def test_guided_rows() -> None:
    """Each row with its own scale and its own unconditional row; at scale 1 its logits as they are."""
    logits = torch.randn(5, 8)
    mixed = guided_rows(logits, torch.tensor([3, 1, 4]), torch.tensor([[3.0], [1.0], [0.5]]))
    torch.testing.assert_close(mixed[0:1], guided_logits(logits[[0, 3]], 3.0))
    assert torch.equal(mixed[1], logits[1])
    torch.testing.assert_close(mixed[2:3], guided_logits(logits[[2, 4]], 0.5))


def test_schedules_and_intervals() -> None:
    """Constant, growing from 1, only inside the interval, and anew in every frame."""
    table = guidance_table([3.0, 1.0], 8, 4, "constant", (0.0, 1.0))
    assert table.tolist() == [[3.0, 1.0]] * 8
    linear = guidance_table([4.0], 8, 4, "linear", (0.0, 1.0))[:, 0]
    assert linear.tolist() == [1.0, 2.0, 3.0, 4.0] * 2
    cosine = guidance_table([3.0], 5, 5, "cosine", (0.0, 1.0))[:, 0]
    assert cosine[0] == 1 and cosine[2] == 2 and cosine[4] == 3 and cosine[1] - 1 < 0.5
    inside = guidance_table([3.0], 8, 4, "constant", (0.25, 0.75))[:, 0]
    assert inside.tolist() == [1.0, 3.0, 3.0, 1.0] * 2


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"guidance_schedule": "square"}, "guidance_schedule is 'square'; it must be one of constant, linear, cosine"),
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval is 0.5, 0.5"),
        ({"guidance_interval": (-0.1, 1.0)}, "guidance_interval is -0.1"),
        ({"guidance_scale": [1.0, 2.0, 3.0, 4.0]}, "guidance_scale has 4 values for 3 prompts"),
        ({"seed": [1]}, "seed has 1 values for 3 prompts"),
    ],
)
def test_wrong_settings(model: Any, bad: dict[str, Any], words: str) -> None:
    """Named with value and limit before any work."""
    with pytest.raises(ValueError, match=words):
        codes_of(model, [0, 1, 2], **bad)


def test_seeds_and_scales_per_prompt(model: Any) -> None:
    """Prompts of different lengths, seeds and scales in one batch: each as alone, unguided ones included."""
    seeds, scales = [5, -3, 2**40], [3.0, 1.0, 0.5]
    together = codes_of(model, [0, 1, 2], seed=seeds, guidance_scale=scales, num_images_per_prompt=2)
    for row in range(3):
        alone = codes_of(model, [row], seed=seeds[row], guidance_scale=scales[row], num_images_per_prompt=2)
        assert torch.equal(together[2 * row : 2 * row + 2], alone)
    assert len({tuple(row.flatten().tolist()) for row in together}) > 4


def test_prompts_are_read_once_and_unguided_rows_not_at_all(model: Any) -> None:
    """Four pictures of each of three prompts read three prompts and one unconditional one; scale 1 adds no row."""
    seen: list[int] = []
    hook = model.language_model.model.layers[0].register_forward_hook(lambda m, given, out: seen.append(len(given[0])))
    codes_of(model, [0, 1, 2], num_images_per_prompt=4, guidance_scale=3.0)
    assert seen == [4, 24, 24, 24]
    seen.clear()
    codes_of(model, [0, 1, 2], guidance_scale=[3.0, 1.0, 1.0])
    assert seen == [4, 4, 4, 4]
    seen.clear()
    codes_of(model, [0, 1, 2], guidance_scale=1.0)
    assert seen == [3, 3, 3, 3]
    seen.clear()
    codes_of(model, [0], guidance_scale=3.0, guidance_interval=(0.0, 0.5))
    hook.remove()
    assert seen == [2, 2, 1, 1]  # the unconditional row is dropped after its last guided position


def test_interval_and_schedule_change_only_what_they_cover(model: Any) -> None:
    """Before its interval, guidance changes nothing; a schedule that starts at 1 has the first codes of no guidance."""
    plain = codes_of(model, [0], guidance_scale=1.0, seed=6)
    late = codes_of(model, [0], guidance_scale=8.0, seed=6, guidance_interval=(0.5, 1.0))
    assert torch.equal(plain[:, :2], late[:, :2]) and not torch.equal(plain[:, 2:], late[:, 2:])
    grown = codes_of(model, [0], guidance_scale=8.0, seed=6, guidance_schedule="linear")
    assert torch.equal(plain[:, :1], grown[:, :1]) and not torch.equal(plain, grown)


def test_the_growing_cache_gives_the_same(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Language models that cannot have slots run over the library's own cache, to the same codes."""
    settings = {"seed": [5, 6, 7], "guidance_scale": [3.0, 1.0, 2.0], "guidance_interval": (0.0, 0.75)}
    expected = codes_of(model, [0, 1, 2], **settings)
    used: list[str] = []
    read = DynamicLanguage.read
    monkeypatch.setattr(position_module, "unsupported", lambda config, capacity: "its attention slides")
    monkeypatch.setattr(DynamicLanguage, "read", classmethod(lambda cls, *a: (used.append("dynamic"), read(*a))[1]))
    assert torch.equal(codes_of(model, [0, 1, 2], **settings), expected)
    assert used == ["dynamic"]


def test_left_aligned() -> None:
    """Padding moves from the left to the right, row by row."""
    embeds = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]).unsqueeze(-1)
    moved, lengths = left_aligned(embeds, torch.tensor([[0, 1, 1], [1, 1, 1]]))
    assert moved[..., 0].tolist() == [[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]] and lengths.tolist() == [2, 3]


def test_options_are_values() -> None:
    """A copy with another scale keeps the rest: requests build theirs from the model's defaults."""
    options = SamplingOptions(guidance_schedule="linear", guidance_interval=(0.1, 0.9))
    assert replace(options, guidance_scale=2.0).guidance_interval == (0.1, 0.9)
