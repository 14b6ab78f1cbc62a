"""The visual loop against a recomputation without caches: guidance, batches, seeds, cancellation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vilau.generation.sampling import SamplingOptions, draw_codes, filter_logits, row_seeds
from vilau.generation.visual import Cancelled, generate_codes

GREEDY = SamplingOptions(guidance_scale=1.0, temperature=0)


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    """The very small model."""
    return make_model()


def prompts(model: Any, *lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded prompts of random tokens that end with the image start token: embeddings and attention mask."""
    generator = torch.Generator().manual_seed(4)
    longest = max(lengths)
    ids, mask = torch.zeros(len(lengths), longest, dtype=torch.long), torch.zeros(len(lengths), longest).long()
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = torch.randint(3, 36, (length,), generator=generator)
        ids[row, -1] = model.config.image_start_id
        mask[row, longest - length :] = 1
    return model.embed(ids), mask


@torch.no_grad()
def slow_codes(
    model: Any, prompt: torch.Tensor, empty: torch.Tensor | None, positions: int, options: SamplingOptions, seed: int
) -> torch.Tensor:
    """Codes (positions, D) of one prompt (L, H) by running everything anew for every code: no cache, no padding."""
    rows, codes = [prompt] if empty is None else [prompt, empty], []
    for position in range(positions):
        hidden = [model.hidden_states(row.unsqueeze(0))[:, -1] for row in rows]
        own: list[int] = []
        for depth in range(3):
            filled = torch.tensor([own + [0] * (3 - len(own))])
            partial = model.vision_tower.quantizer.partial_z_q(filled)  # codes not drawn yet cannot be seen
            logits = [model.depth_transformer(h, partial)[:, depth] for h in hidden]
            mixed = logits[0] if empty is None else logits[1] + options.guidance_scale * (logits[0] - logits[1])
            drawn = draw_codes(filter_logits(mixed, options), torch.tensor([seed]), position, depth)
            own.append(int(drawn))
        codes.append(own)
        new = model.visual_embeds(torch.tensor([own]))
        rows = [torch.cat([row, new]) for row in rows]
    return torch.tensor(codes)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_cached_loop_equals_recomputation(model: Any, scale: float, temperature: float) -> None:
    """Caches of both transformers, positions and guidance change no code: all is as if computed from scratch."""
    options = SamplingOptions(scale, temperature, 10, 0.9)
    embeds, mask = prompts(model, 5)
    empty, _ = prompts(model, 5)
    empty = empty[:, [0, -1]]
    expected = slow_codes(model, embeds[0], None if scale == 1 else empty[0], 6, options, 77)
    if scale != 1:
        embeds = torch.cat([embeds, torch.nn.functional.pad(empty, (0, 0, 3, 0))])
        mask = torch.cat([mask, torch.tensor([[0, 0, 0, 1, 1]])])
    out = generate_codes(model, embeds, mask, 6, options, torch.tensor([77]))
    assert out.shape == (1, 6, 3)
    assert torch.equal(out[0], expected)
    assert len(torch.unique(out)) > 3  # the small model does not say one thing only


@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(1.0, 1.0, 0, 1.0)])
def test_alone_or_in_a_batch(model: Any, options: SamplingOptions) -> None:
    """A request gives the same codes alone and beside prompts of other lengths, greedy or sampled by its seed."""
    lengths = (3, 9, 5)
    embeds, mask = prompts(model, *lengths)
    seeds = torch.tensor([1, 2, 3])
    together = generate_codes(model, embeds, mask, 8, options, seeds)
    for row, length in enumerate(lengths):
        own, left = slice(row, row + 1), 9 - length
        alone = generate_codes(model, embeds[own, left:], mask[own, left:], 8, options, seeds[own])
        assert torch.equal(alone[0], together[row])
    assert not torch.equal(together[0], together[1])


def test_seeds_decide(model: Any) -> None:
    """Equal seeds give equal codes in one batch, other seeds others; torch's own generator plays no part."""
    embeds, mask = prompts(model, 4)
    embeds, mask = embeds.expand(3, -1, -1), mask.expand(3, -1)
    options = SamplingOptions(1.0, 1.0, 0, 1.0)
    torch.manual_seed(0)
    one = generate_codes(model, embeds, mask, 4, options, torch.tensor([5, 6, 5]))
    torch.manual_seed(1)
    two = generate_codes(model, embeds, mask, 4, options, torch.tensor([5, 6, 5]))
    assert torch.equal(one, two) and torch.equal(one[0], one[2]) and not torch.equal(one[0], one[1])


def test_guidance_of_one_runs_no_unconditional_rows(model: Any) -> None:
    """QUALITY: guidance off must not pay for unconditional rows. Counted at the language model and the depth head."""
    seen: list[int] = []
    hooks = [
        model.language_model.model.layers[0].register_forward_hook(lambda m, a, out: seen.append(len(a[0]))),
        model.depth_transformer.head.register_forward_hook(lambda m, a, out: seen.append(len(out))),
    ]
    try:
        embeds, mask = prompts(model, 4, 4)
        generate_codes(model, embeds, mask, 3, GREEDY, row_seeds(0, 2, "cpu"))
        assert seen == [2] * (3 + 3 * 3)
        seen.clear()
        both, masks = torch.cat([embeds, embeds]), torch.cat([mask, mask])
        generate_codes(model, both, masks, 3, SamplingOptions(2.0, 0), row_seeds(0, 2, "cpu"))
        assert seen == [4] * (3 + 3 * 3)
    finally:
        for hook in hooks:
            hook.remove()


def test_guidance_with_equal_prompts_changes_nothing(model: Any) -> None:
    """Where the unconditional prompt is the prompt itself, any scale gives the codes of no guidance."""
    embeds, mask = prompts(model, 6)
    plain = generate_codes(model, embeds, mask, 5, GREEDY, torch.tensor([0]))
    options = SamplingOptions(5.0, 0)
    guided = generate_codes(model, embeds.expand(2, -1, -1), mask.expand(2, -1), 5, options, torch.tensor([0]))
    assert torch.equal(plain, guided)


def test_wrong_number_of_rows_is_refused(model: Any) -> None:
    """Guidance needs two rows a picture; fewer would pair the wrong ones."""
    embeds, mask = prompts(model, 4, 4)
    with pytest.raises(ValueError, match="2 prompt rows for 2 pictures; 4 were expected"):
        generate_codes(model, embeds, mask, 2, SamplingOptions(), row_seeds(0, 2, "cpu"))


def test_progress_counts_and_cancels(model: Any) -> None:
    """The callback hears of every position; `False` stops the work at once, anything else does not."""
    embeds, mask = prompts(model, 4)
    calls: list[tuple[int, int]] = []
    generate_codes(model, embeds, mask, 4, GREEDY, torch.tensor([0]), lambda done, total: calls.append((done, total)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    calls.clear()

    def stop_at_two(done: int, total: int) -> bool:
        calls.append((done, total))
        return done < 2

    with pytest.raises(Cancelled, match="2 of 4"):
        generate_codes(model, embeds, mask, 4, GREEDY, torch.tensor([0]), stop_at_two)
    assert calls == [(1, 4), (2, 4)]


def test_longer_runs_begin_like_shorter_ones(model: Any) -> None:
    """A film's first positions are those of a shorter run: noise is counted by position, not by length."""
    embeds, mask = prompts(model, 4)
    options = SamplingOptions(1.0, 1.0, 0, 1.0)
    short = generate_codes(model, embeds, mask, 4, options, torch.tensor([3]))
    long = generate_codes(model, embeds, mask, 9, options, torch.tensor([3]))
    assert torch.equal(short[0], long[0, :4])
