"""The running batch against generation alone: any company, any time of joining, cancelled neighbours, errors."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from vilau.generation.batching import ContinuousBatch, Policy
from vilau.generation.requests import Handle, Prompt, Request, TextRequest, VisualSequenceRequest
from vilau.generation.sampling import SamplingOptions, draw_codes, filter_logits, gumbel_noise, row_seeds
from vilau.generation.visual import Cancelled

TOGETHER = Policy(text_pace=float("inf"))


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    """The very small model: 3 codes of 16 a position."""
    return make_model()


def prompt_of(model: Any, seed: int, length: int, image: bool = False) -> torch.Tensor:
    """Embeddings (L, H) of random tokens, ending with the image start token if asked."""
    ids = torch.randint(3, 36, (1, length), generator=torch.Generator().manual_seed(seed))
    if image:
        ids[0, -1] = model.config.image_start_id
    return model.embed(ids)[0]


def empty_prompt(model: Any) -> Prompt:
    """The prompt without text, by its key the same for all."""
    ids = torch.tensor([[1, model.config.image_start_id]])
    return Prompt.of(model.embed(ids)[0], key="empty")


def text(model: Any, number: int, length: int, tokens: int, **changes: Any) -> TextRequest:
    """A request for text; its prompt depends on ``number``."""
    return TextRequest(Prompt.of(prompt_of(model, number, length)), tokens, **changes)


def picture(
    model: Any, seed: int, length: int, positions: int = 4, scale: float = 3.0, n: int = 1, **sampling: Any
) -> VisualSequenceRequest:
    """A request for pictures, guided unless ``scale`` is 1."""
    options = SamplingOptions(**({"guidance_scale": scale, "top_k": 12, "top_p": 0.9} | sampling))
    prompt = Prompt.of(prompt_of(model, seed, length, True))
    return VisualSequenceRequest(prompt, positions, 4, options, seed, n, None if scale == 1 else empty_prompt(model))


def drain(batch: ContinuousBatch, limit: int = 2000) -> int:
    """Step until nothing is left; return the steps."""
    for steps in range(limit):
        if not batch.step():
            return steps
    raise AssertionError(f"not done after {limit} steps")


@dataclass(frozen=True)
class Expected:
    """What a request gives alone, `tokens` or `codes`, computed without any cache or batch."""

    request: Request
    tokens: list[list[int]] | None = None
    codes: torch.Tensor | None = None


@torch.no_grad()
def alone(model: Any, request: Request) -> Expected:
    """Make a request's result position by position, everything run anew each time."""
    seeds = row_seeds(request.seed, request.n, "cpu")
    if isinstance(request, TextRequest):
        return Expected(request, tokens=[slow_text(model, request, seed) for seed in seeds])
    return Expected(request, codes=torch.stack([slow_codes(model, request, seed) for seed in seeds]))


def slow_text(model: Any, request: TextRequest, seed: torch.Tensor) -> list[int]:
    """Tokens of one answer."""
    embeds, tokens = request.prompt.embeds(), []
    for step in range(request.max_new_tokens):
        logits = model.get_output_embeddings()(model.hidden_states(embeds[None])[:, -1])
        logits[:, list(request.never)] = float("-inf")
        tokens.append(int(draw_codes(filter_logits(logits, request.sampling), seed[None], step, 255)))
        if tokens[-1] in request.stop:
            break
        embeds = torch.cat([embeds, model.embed(torch.tensor([tokens[-1:]]))[0]])
    return tokens


def slow_logits(
    model: Any, request: VisualSequenceRequest, before: torch.Tensor, own: list[int], seed: torch.Tensor
) -> torch.Tensor:
    """Filtered logits (1, K) of the next depth of one position, after codes ``before`` (p, D) and ``own``."""
    position, depth = len(before), len(own)
    prompts = [request.prompt] if request.unconditional is None else [request.prompt, request.unconditional]
    partial = model.vision_tower.quantizer.partial_z_q(torch.tensor([own + [0] * (3 - depth)]))
    logits = []
    for prompt in prompts:
        row = torch.cat([prompt.embeds(), model.visual_embeds(before)])
        logits.append(model.depth_transformer(model.hidden_states(row[None])[:, -1], partial)[:, depth])
    scale = float(request.scales()[position])
    mixed = logits[0] if len(logits) == 1 else logits[1] + scale * (logits[0] - logits[1])
    return filter_logits(mixed, request.sampling)


def slow_codes(model: Any, request: VisualSequenceRequest, seed: torch.Tensor) -> torch.Tensor:
    """Codes (positions, D) of one picture."""
    codes = torch.zeros((0, 3), dtype=torch.int64)
    for position in range(request.positions):
        own: list[int] = []
        for depth in range(3):
            own.append(int(draw_codes(slow_logits(model, request, codes, own, seed), seed[None], position, depth)))
        codes = torch.cat([codes, torch.tensor([own])])
    return codes


@torch.no_grad()
def check(model: Any, handle: Handle, expected: Expected) -> None:
    """QUALITY's rule: the same result, up to the first choice whose perturbed logits are within 1e-4."""
    if expected.tokens is not None:
        assert handle.tokens(0) == expected.tokens
        return
    codes = handle.codes(0)
    assert expected.codes is not None and codes.shape == expected.codes.shape
    request = expected.request
    assert isinstance(request, VisualSequenceRequest)
    for got, wanted, seed in zip(codes, expected.codes, row_seeds(request.seed, request.n, "cpu"), strict=True):
        different = (got != wanted).nonzero()
        if len(different):
            position, depth = different[0].tolist()
            logits = slow_logits(model, request, wanted[:position], wanted[position, :depth].tolist(), seed)
            if request.sampling.temperature:
                logits = logits + gumbel_noise(seed[None], position, depth, logits.shape[1])
            gap = float(logits[0, wanted[position, depth]] - logits[0, got[position, depth]])
            assert abs(gap) < 1e-4, f"position {position}, depth {depth}: the logits differ by {gap}"


@pytest.fixture(scope="module")
def pool(model: Any) -> list[Expected]:
    """Requests of every kind with what they give alone."""
    warm = SamplingOptions(1.0, 1.0, 8, 0.9)
    written = alone(model, text(model, 1, 5, 12))
    assert written.tokens is not None
    requests: list[Request] = [
        text(model, 1, 5, 12),
        text(model, 1, 5, 12, stop=frozenset({written.tokens[0][4]})),
        text(model, 2, 17, 9, sampling=warm, seed=3, n=2),
        text(model, 3, 1, 20, sampling=warm, seed=-5, never=(4, 7, 9)),
        picture(model, 4, 3),
        picture(model, 5, 11, scale=1.0),
        picture(model, 6, 6, positions=8, n=2),
        picture(model, 7, 2, positions=12, guidance_interval=(0.0, 0.5)),
        picture(model, 8, 9, scale=2.0, temperature=0),
        picture(model, 9, 4, scale=5.0, guidance_schedule="cosine", top_k=0, top_p=1.0),
    ]
    return [alone(model, request) for request in requests]


@pytest.mark.parametrize("seed", range(6))
def test_company_changes_nothing(model: Any, pool: list[Expected], seed: int) -> None:
    """Requests of all kinds that join, leave and are cancelled at random: each result is the one of the request alone,
    what a cancelled one had is the beginning of it, and every slot is free at the end."""
    rng = random.Random(seed)
    policy = Policy(
        text_slots=rng.choice((0, 1, 3)),
        overtakes=rng.choice((0, 2, 16)),
        prefill=rng.choice((1, 4, 64)),
        text_pace=rng.choice((1.0, 1.5, float("inf"))),
    )
    batch = ContinuousBatch(model, slots=rng.choice((2, 3, 5)), max_positions=32, policy=policy)
    todo = [rng.choice(pool) for _ in range(14)]
    running: list[tuple[Handle, Expected]] = []
    cancelled: list[Handle] = []
    while todo or not batch.idle:
        for _ in range(rng.randint(0, 3)):
            if todo:
                expected = todo.pop()
                running.append((batch.submit(expected.request), expected))
        if rng.random() < 0.08:
            handle = rng.choice(running)[0]
            handle.cancel()
            cancelled.append(handle)
        batch.step()
    complete = 0
    for handle, expected in running:
        assert handle.end is not None
        if handle.end.reason == "cancelled":
            assert handle in cancelled
            for got, wanted in zip(handle._tokens, expected.tokens or [], strict=False):
                assert got == wanted[: len(got)]
        else:
            assert handle.end.reason == "finished"
            check(model, handle, expected)
            complete += 1
    assert complete >= 8
    assert batch.state().sequences == batch.state().cache_bytes == 0
    assert batch._engine._store.positions == 0


def test_equal_to_generate(model: Any) -> None:
    """The library's `generate` for text and our own for pictures give what the running batch gives."""
    ids = torch.randint(3, 36, (1, 6), generator=torch.Generator().manual_seed(0))
    drawn = ids.clone()
    drawn[0, -1] = model.config.image_start_id
    options = replace(model.visual_defaults(), top_k=9)
    batch = ContinuousBatch(model, slots=3, policy=TOGETHER)
    written = batch.submit(TextRequest(Prompt.of(model.embed(ids)[0]), 15, frozenset({2})))
    prompt = Prompt.of(model.embed(drawn)[0])
    made = batch.submit(VisualSequenceRequest(prompt, 8, 4, options, 11, 2, empty_prompt(model)))
    drain(batch)
    assert written.tokens() == model.generate(ids, max_new_tokens=15, do_sample=False).tolist()
    empty = torch.tensor([[1, model.config.video_start_id]])
    static = model.generate(
        drawn,
        generation_mode="video",
        num_frames=2,
        unconditional_ids=torch.where(empty == model.config.video_start_id, model.config.image_start_id, empty),
        seed=11,
        num_images_per_prompt=2,
        top_k=9,
    )
    assert torch.equal(made.codes(), static.codes.flatten(1, 2))


def test_events_come_in_order(model: Any, pool: list[Expected]) -> None:
    """A listener hears of each position once, of each sequence's end, and last of the request's."""
    batch = ContinuousBatch(model, slots=3, policy=TOGETHER)
    written, drawn = batch.submit(pool[1].request), batch.submit(pool[6].request)
    drain(batch)
    heard = list(written.events(0))
    assert [event.token for event in heard[:-2]] == pool[1].tokens[0]  # type: ignore[union-attr, index]
    assert [type(event).__name__ for event in heard[-2:]] == ["SequenceEnd", "RequestEnd"]
    assert written.reasons() == ["stop"] and drawn.reasons() == ["length", "length"]
    seen: dict[int, int] = {0: 0, 1: 0}
    for event in drawn.events(0):
        if type(event).__name__ == "VisualPosition":
            seen[event.sequence] += 1  # type: ignore[union-attr]
            assert event.done == seen[event.sequence]  # type: ignore[union-attr]
    assert seen == {0: 8, 1: 8} and written.poll() == []


def counted(model: Any) -> tuple[dict[str, list[int]], list[Any]]:
    """Rows that go through the language model, its text head and the depth head, and the hooks that note them."""
    rows: dict[str, list[int]] = {"language": [], "text": [], "depth": []}
    hooks = [
        model.language_model.model.layers[0].mlp.register_forward_hook(
            lambda m, a, out: rows["language"].append(out.shape[-2])
        ),
        model.get_output_embeddings().register_forward_hook(lambda m, a, out: rows["text"].append(len(out))),
        model.depth_transformer.head.register_forward_hook(lambda m, a, out: rows["depth"].append(len(out))),
    ]
    return rows, hooks


def test_nothing_is_run_for_nothing(model: Any) -> None:
    """One pass for texts and pictures together; the text head sees texts alone, the depth transformer pictures alone;
    a scale of 1 has no second row; copies and other requests share what was read."""
    batch = ContinuousBatch(model, slots=5, policy=replace(TOGETHER, text_slots=1))
    rows, hooks = counted(model)
    try:
        batch.submit(text(model, 1, 5, 3))
        batch.submit(picture(model, 4, 6, scale=1.0))
        batch.submit(picture(model, 6, 7, n=3))
        drain(batch)
        read = 5 + 6 + (7 + 2)  # each prompt once, however many pictures it is for
        assert rows["language"] == [read, 1 + 1 + 6, 1 + 1 + 6, 1 + 6]
        assert rows["text"] == [1, 1, 1]
        assert rows["depth"] == [1 + 6] * 4 * 3
        rows["language"].clear()
        batch.submit(picture(model, 7, 9, positions=1))
        drain(batch)
        assert rows["language"] == [9]  # the prompt without text was kept
    finally:
        for hook in hooks:
            hook.remove()


def test_guidance_ends_with_its_interval(model: Any) -> None:
    """After the last guided position the unconditional row leaves, and its memory with it."""
    batch = ContinuousBatch(model, slots=1, policy=TOGETHER)
    rows, hooks = counted(model)
    try:
        batch.submit(picture(model, 4, 3, guidance_interval=(0.0, 0.5)))
        drain(batch)
        assert rows["depth"] == [2] * 6 + [1] * 6
        assert rows["language"] == [3 + 2, 2, 1, 1]
    finally:
        for hook in hooks:
            hook.remove()


def test_prompts_are_read_in_pieces(model: Any) -> None:
    """A long prompt does not hold up what runs: a token of the running text comes with every step."""
    batch = ContinuousBatch(model, slots=2, policy=Policy(prefill=4, text_pace=float("inf")))
    rows, hooks = counted(model)
    try:
        running = batch.submit(text(model, 1, 2, 20))
        batch.step()
        running.poll()
        late = batch.submit(text(model, 2, 30, 2))
        while not late.done:
            batch.step()
            assert len(running.poll()) == 1
        assert max(rows["language"]) == 1 + 4
    finally:
        for hook in hooks:
            hook.remove()


def test_text_keeps_its_pace(model: Any) -> None:
    """Between two tokens there is one depth step at most when there is room for no more, and all without a limit; and
    the pictures go on all the same."""
    steps: dict[float, list[int]] = {}
    for pace in (1.0, float("inf")):
        batch = ContinuousBatch(model, slots=4, policy=Policy(text_pace=pace))
        rows, hooks = counted(model)
        try:
            running = batch.submit(text(model, 1, 2, 30))
            batch.step()
            handles = [batch.submit(picture(model, seed, 3)) for seed in (4, 5)]
            steps[pace] = []
            while not running.done:
                running.poll()
                rows["depth"].clear()
                batch.step()
                assert any(type(event).__name__ == "TextToken" for event in running.poll())
                steps[pace].append(len(rows["depth"]))
            if pace == 1.0:
                assert max(len(handle._codes[0]) for handle in handles) > 1
            drain(batch)
        finally:
            for hook in hooks:
                hook.remove()
    assert set(steps[1.0]) == {0, 1} and set(steps[float("inf")]) == {0, 3}


def test_cancelled_requests_leave_at_once(model: Any) -> None:
    """A waiting request is gone when `cancel` returns; a running one frees its slot in the next step, also in the
    middle of a prompt; the others' prompts go on, even where they were read together."""
    batch = ContinuousBatch(model, slots=2, max_positions=32, policy=Policy(text_slots=0, prefill=3))
    first, second = batch.submit(picture(model, 4, 12)), batch.submit(picture(model, 5, 12))
    waiting = batch.submit(picture(model, 6, 3))
    waiting.cancel()
    assert waiting.done and batch.state().waiting == 2
    batch.step()
    assert batch.state().sequences == 2
    first.cancel()  # its prompt without text was being read for both
    assert not first.done
    batch.step()
    assert first.done and batch.state().sequences == 1
    late = batch.submit(picture(model, 7, 2))
    drain(batch)
    with pytest.raises(Cancelled):
        first.codes(0)
    first.cancel()
    for handle in (second, late):
        check(model, handle, alone(model, handle.request))


def test_company_changes_nothing_in_int8(make_model: Callable[..., Any]) -> None:
    """Rows of int8 layers have scales of their own, so a quantised model too gives each request what it gives alone."""
    model = make_model().quantize("int8")
    requests = [text(model, 1, 5, 12), picture(model, 4, 3), text(model, 2, 9, 6), picture(model, 6, 6, n=2)]

    def made(together: list[Request]) -> list[Handle]:
        batch = ContinuousBatch(model, slots=8, max_positions=32, policy=TOGETHER)
        handles = [batch.submit(request) for request in together]
        drain(batch)
        return handles

    for one, other in zip(made(requests), (made([request])[0] for request in requests), strict=True):
        if isinstance(one.request, TextRequest):
            assert one.tokens(0) == other.tokens(0)
        else:
            assert torch.equal(one.codes(0), other.codes(0))
