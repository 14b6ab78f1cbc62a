"""Mixed answers in the running batch: each is what interleaved generation gives alone, in any company, and leaves
nothing behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from vilau.generation.batching import ContinuousBatch, Policy
from vilau.generation.budget import RequestTooLarge, row_capacity
from vilau.generation.interleaved import AnswerRules
from vilau.generation.requests import (
    Handle,
    InterleavedRequest,
    PictureEnd,
    PictureStart,
    Prompt,
    RequestEnd,
    RequestFailed,
    SequenceEnd,
    TextRequest,
    TextToken,
    VisualPosition,
    VisualSequenceRequest,
)
from vilau.generation.sampling import SamplingOptions
from vilau.generation.visual import Cancelled

FRAMES = 2
WARM = SamplingOptions(1.0, 0.7, 30, 0.98)
CODES = SamplingOptions(3.0, 1.0, 12, 0.9)
TOGETHER = Policy(text_pace=float("inf"))


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    """The very small model, which likes to begin pictures."""
    model = make_model(num_frames=FRAMES)
    model.generation_config.eos_token_id = 2
    return model


def rules_of(model: Any, pictures: int = 3) -> AnswerRules:
    """What its answers may hold."""
    return AnswerRules.of(model, FRAMES * model.config.vision_config.num_positions, pictures)


def ids_of(seed: int, length: int) -> torch.Tensor:
    """Ids (1, L) of a prompt."""
    return torch.randint(3, 36, (1, length), generator=torch.Generator().manual_seed(seed))


def empty_ids(model: Any, kind: str = "image") -> torch.Tensor:
    """Ids (1, 2) of the prompt without text of a kind."""
    return torch.tensor([[1, model.config.image_start_id if kind == "image" else model.config.video_start_id]])


def mixed(
    model: Any, seed: int, length: int = 5, tokens: int = 24, pictures: int = 3, n: int = 1, **codes: Any
) -> InterleavedRequest:
    """A request for mixed answers; ``codes`` change how pictures are drawn."""
    empty = {
        kind: Prompt.of(model.embed(empty_ids(model, kind))[0], key=("empty", kind)) for kind in ("image", "video")
    }
    options = replace(CODES, **codes)
    return InterleavedRequest(
        Prompt.of(model.embed(ids_of(seed, length))[0]),
        rules_of(model, pictures),
        tokens,
        WARM,
        options,
        seed,
        n,
        {} if options.guidance_scale == 1 else empty,  # type: ignore[arg-type]
    )


def plain(answers: Any) -> list[tuple[bool, list[Any]]]:
    """Answers as plain values: whether the model ended them, and each part's kind with its tokens or codes."""
    return [
        (answer.finished, [(p.kind, (p.codes if p.token_ids is None else p.token_ids).tolist()) for p in answer.parts])
        for answer in answers
    ]


def alone(model: Any, request: InterleavedRequest, length: int = 5) -> list[tuple[bool, list[Any]]]:
    """The same answers by `generate`, one prompt after the other, each picture with a cache of its own."""
    options = request.visual_sampling
    return plain(
        model.generate(
            ids_of(request.seed, length).expand(request.n, -1),
            generation_mode="interleaved",
            unconditional_ids=empty_ids(model),
            max_new_tokens=request.max_new_tokens,
            max_pictures=request.rules.max_pictures,
            text_temperature=request.sampling.temperature,
            text_top_k=request.sampling.top_k,
            text_top_p=request.sampling.top_p,
            seed=request.seed,
            num_frames=FRAMES,
            guidance_scale=options.guidance_scale,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            guidance_schedule=options.guidance_schedule,
            guidance_interval=options.guidance_interval,
            kernel="plain",
        )
    )


def drain(batch: ContinuousBatch) -> None:
    """Step until nothing is left."""
    for _ in range(3000):
        if not batch.step():
            return
    raise AssertionError("not done after 3000 steps")


def assert_empty(batch: ContinuousBatch) -> None:
    """Everything was given back."""
    state = batch.state()
    assert (state.sequences, state.running, state.cache_bytes) == (0, 0, 0)
    assert batch._engine._store.positions == 0 and not batch._engine._store.slabs


@dataclass(frozen=True)
class Known:
    """A request with what it gives alone."""

    request: Any
    answers: list[tuple[bool, list[Any]]] | None = None
    tokens: list[list[int]] | None = None
    codes: torch.Tensor | None = None

    def check(self, handle: Handle) -> None:
        """The result is the request's own."""
        if self.answers is not None:
            assert plain(handle.answers(0)) == self.answers
        elif self.tokens is not None:
            assert handle.tokens(0) == self.tokens
        else:
            assert self.codes is not None and torch.equal(handle.codes(0), self.codes)

    def check_beginning(self, handle: Handle) -> None:
        """What a cancelled answer had made is the beginning of the whole."""
        if self.answers is None:
            return
        for made, (_, whole) in zip(handle._parts, self.answers, strict=True):
            got = plain([replace_parts(made)])[0][1]
            assert got == whole[: len(got)]
            rest = whole[len(got)][1] if len(got) < len(whole) else []
            assert made.words == rest[: len(made.words)]
            if made.codes:
                flat = [codes for frame in rest for codes in frame]
                assert torch.stack(made.codes).tolist() == flat[: len(made.codes)]


def replace_parts(made: Any) -> Any:
    """An unfinished answer as an output."""
    from vilau.generation.interleaved import InterleavedOutput

    return InterleavedOutput(tuple(made.parts), made.finished)


@pytest.fixture(scope="module")
def pool(model: Any) -> list[Known]:
    """Mixed answers of many kinds, texts and pictures, with what each gives alone."""
    requests = [
        mixed(model, 1),
        mixed(model, 4, n=2),
        mixed(model, 6, pictures=1),
        mixed(model, 7, guidance_scale=1.0),
        mixed(model, 8, guidance_interval=(0.0, 0.5)),
        mixed(model, 9, guidance_schedule="cosine", temperature=0.0),
        mixed(model, 11, tokens=9),
    ]
    known = [Known(request, answers=alone(model, request)) for request in requests]
    kinds = {kind for each in known for _, parts in each.answers or [] for kind, _ in parts}
    assert kinds == {"text", "image", "video"}
    several = [sum(kind != "text" for kind, _ in parts) for each in known for _, parts in each.answers or []]
    assert max(several) >= 2 and any(finished for each in known for finished, _ in each.answers or [])
    prompt = Prompt.of(model.embed(ids_of(20, 6))[0])
    empty = Prompt.of(model.embed(empty_ids(model))[0], key=("empty", "image"))
    for request in (TextRequest(prompt, 12, sampling=WARM), VisualSequenceRequest(prompt, 8, 4, CODES, 3, 1, empty)):
        batch = ContinuousBatch(model, slots=1)
        handle = batch.submit(request)
        drain(batch)
        text = isinstance(request, TextRequest)
        known.append(Known(request, tokens=handle.tokens()) if text else Known(request, codes=handle.codes()))
    return known


@pytest.mark.parametrize("seed", range(6))
def test_company_changes_nothing(model: Any, pool: list[Known], seed: int) -> None:
    """Mixed answers, texts and pictures that join, leave and are cancelled at random: each gives what it gives alone,
    a cancelled one the beginning of that, and all memory is free at the end."""
    rng = random.Random(seed)
    policy = Policy(
        text_slots=rng.choice((0, 2)), prefill=rng.choice((1, 4, 64)), text_pace=rng.choice((1.0, 1.5, float("inf")))
    )
    batch = ContinuousBatch(model, slots=rng.choice((2, 3, 5)), policy=policy)
    todo = [rng.choice(pool) for _ in range(12)]
    running: list[tuple[Handle, Known]] = []
    cancelled: list[Handle] = []
    while todo or not batch.idle:
        for _ in range(rng.randint(0, 3)):
            if todo:
                known = todo.pop()
                running.append((batch.submit(known.request), known))
        if rng.random() < 0.05:
            handle = rng.choice(running)[0]
            handle.cancel()
            cancelled.append(handle)
        batch.step()
        assert batch._engine._store.positions <= batch._engine._store.limit
    complete = 0
    for handle, known in running:
        assert handle.end is not None
        if handle.end.reason == "cancelled":
            assert handle in cancelled
            known.check_beginning(handle)
        else:
            assert handle.end.reason == "finished"
            known.check(handle)
            complete += 1
    assert complete >= 5
    assert_empty(batch)


def test_events_tell_every_part_in_order(model: Any, pool: list[Known]) -> None:
    """Tokens, the start of a picture in place of its token, its positions, its end, tokens again, and the ends: put
    together they are the answer."""
    batch = ContinuousBatch(model, slots=2, policy=TOGETHER)
    handle = batch.submit(pool[1].request)
    drain(batch)
    heard = list(handle.events(0))
    assert isinstance(heard[-1], RequestEnd) and heard[-1].reason == "finished"
    assert pool[1].answers is not None
    for number, (finished, parts) in enumerate(pool[1].answers):
        told: list[Any] = []
        own = [event for event in heard[:-1] if event.sequence == number]  # type: ignore[union-attr]
        drawn, picture = 0, -1
        for event in own[:-1]:
            if isinstance(event, TextToken):
                drawn += 1
                assert event.done == drawn
                if not told or told[-1][0] != "text":
                    told.append(("text", []))
                if event.token not in pool[1].request.rules.stops:
                    told[-1][1].append(event.token)
            elif isinstance(event, PictureStart):
                drawn, picture = drawn + 1, picture + 1
                assert event.picture == picture and event.positions == (4 if event.kind == "image" else 8)
                told.append((event.kind, []))
            elif isinstance(event, VisualPosition):
                told[-1][1].append(event.codes.tolist())
                assert (event.picture, event.done) == (picture, len(told[-1][1]))
            else:
                assert isinstance(event, PictureEnd) and (event.picture, event.kind) == (picture, told[-1][0])
                assert len(told[-1][1]) == (4 if event.kind == "image" else 8)
        told = [part for part in told if part[1]]
        flat = [(k, v if k == "text" else [codes for frame in v for codes in frame]) for k, v in parts]
        assert told == flat
        assert own[-1] == SequenceEnd(number, "stop" if finished else "length")
    assert handle.poll() == []


def test_cancelling_at_every_step(model: Any, pool: list[Known]) -> None:
    """Whenever an answer is given up, while it reads, writes or draws, a neighbour never notices and its memory is
    free with the next step."""
    longest = pool[0]
    steps = 0
    while True:
        batch = ContinuousBatch(model, slots=2, policy=replace(TOGETHER, prefill=2))
        neighbour, victim = batch.submit(pool[4].request), batch.submit(longest.request)
        for _ in range(steps):
            batch.step()
        if victim.done:
            break
        victim.cancel()
        batch.step()
        assert victim.done and batch.state().sequences <= 1
        longest.check_beginning(victim)
        with pytest.raises(Cancelled):
            victim.answers(0)
        drain(batch)
        pool[4].check(neighbour)
        assert_empty(batch)
        steps += 3
    assert steps > 20


def test_only_what_is_due_is_run(model: Any, pool: list[Known]) -> None:
    """The text head sees an answer while it writes and not while it draws; the depth transformer the other way round;
    what was written and drawn is never read again."""
    passes: list[tuple[str, int]] = []
    hooks = [
        model.language_model.model.layers[0].mlp.register_forward_hook(
            lambda m, a, out: passes.append(("language", out.shape[-2]))
        ),
        model.get_output_embeddings().register_forward_hook(lambda m, a, out: passes.append(("text", len(out)))),
        model.depth_transformer.head.register_forward_hook(lambda m, a, out: passes.append(("depth", len(out)))),
    ]
    try:
        batch = ContinuousBatch(model, slots=1, policy=TOGETHER)
        handle = batch.submit(pool[2].request)
        drain(batch)
    finally:
        for hook in hooks:
            hook.remove()
    (answer,) = handle.answers()
    drawn = [part.codes.flatten(0, 1) for part in answer.parts if part.codes is not None]
    assert len(drawn) == 1
    positions = len(drawn[0])
    tokens = sum(len(part.token_ids) for part in answer.parts if part.token_ids is not None)
    assert passes.count(("text", 1)) == tokens + 1 + answer.finished and ("text", 2) not in passes
    assert passes.count(("depth", 2)) == 3 * positions
    read = sum(count for kind, count in passes if kind == "language")
    fed = 5 + tokens + 1 + positions + 1  # prompt, words, start, codes, end
    last = not answer.finished and answer.parts[-1].kind == "text"
    assert read == fed - last + 2 + positions - 1  # and the prompt without text, with all codes but the last


def test_limits_are_those_of_generation_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every limit of tokens, pictures and context ends an answer where it ends alone, and no row is too short."""
    cases = [(tokens, pictures, None) for tokens in (1, 2, 7, 30) for pictures in (0, 1, 4)]
    cases += [(40, 3, context) for context in (6, 9, 13, 14, 20, 33)]
    drew = 0
    for seed, (tokens, pictures, context) in enumerate(cases, 30):
        monkeypatch.setattr(type(model.config), "context_length", context or 128, raising=False)
        request = mixed(model, seed, 5, tokens, pictures, n=2)
        batch = ContinuousBatch(model, slots=2, policy=TOGETHER)
        handle = batch.submit(request)
        longest = 0
        while batch.step():
            longest = max(
                [longest, *(row.length for job in batch._jobs.values() for s in job.sequences for row in s.rows)]
            )
        assert longest <= request.row_lengths[0] <= (context or 128)
        expected = alone(model, request)
        assert plain(handle.answers()) == expected
        drew += sum(kind != "text" for _, parts in expected for kind, _ in parts)
        assert_empty(batch)
    assert drew > 5


def test_memory_is_known_beforehand(model: Any) -> None:
    """A request is charged with the most it can need, is refused with the numbers where that can never be had, and
    waits where it cannot be had now."""
    request = mixed(model, 1, tokens=10, pictures=2)
    assert request.row_lengths == (5 + 10 + 2 * 9, 2 + 8)
    assert mixed(model, 1, tokens=1, pictures=9).row_lengths == (5 + 1 + 9, 2 + 8)
    assert mixed(model, 1, tokens=10, guidance_scale=1.0).row_lengths == (5 + 10 + 3 * 9,)
    assert mixed(model, 1, tokens=500).row_lengths[0] == rules_of(model).context
    with pytest.raises(RequestTooLarge, match="33 positions, its prompt included, but a row holds 32"):
        ContinuousBatch(model, slots=2, max_positions=32).submit(request)
    each = ContinuousBatch(model, slots=1).budget.position_bytes
    needed = sum(row_capacity(length, 64) for length in request.row_lengths)
    policy = Policy(text_slots=0)
    with pytest.raises(RequestTooLarge, match=f"2 rows with {needed} positions"):
        ContinuousBatch(model, 2, 64, each * (needed - 1), policy).submit(request)
    batch = ContinuousBatch(model, 3, 64, each * (2 * needed), policy)
    handles = [batch.submit(request) for _ in range(3)]
    batch.step()
    state = batch.state()
    assert (state.running, state.waiting, state.cache_bytes) == (2, 1, each * 2 * needed)
    drain(batch)
    assert plain(handles[2].answers()) == plain(handles[0].answers()) == alone(model, request)
    assert_empty(batch)


def test_an_answer_without_pictures_is_a_text(model: Any) -> None:
    """It takes a place that is kept for texts; one that may draw does not, though it has not begun to."""
    batch = ContinuousBatch(model, slots=1, policy=Policy(text_slots=1))
    draws, writes, late = (batch.submit(mixed(model, 3, pictures=pictures)) for pictures in (2, 0, 2))
    batch.step()
    assert batch.state().running == 2 and not late.poll()
    drain(batch)
    assert all(handle.answers() for handle in (draws, writes, late))


def test_text_keeps_its_pace_while_an_answer_draws(model: Any) -> None:
    """A text beside an answer gets a token with every step, whatever the answer does; and the answer goes on."""
    batch = ContinuousBatch(model, slots=2, policy=Policy(text_pace=1.0))
    request = mixed(model, 1)
    answering = batch.submit(request)
    written = batch.submit(TextRequest(Prompt.of(model.embed(ids_of(3, 2))[0]), 60))
    while not written.poll():
        batch.step()
    while not written.done and not answering.done:
        batch.step()
        assert any(isinstance(event, TextToken) for event in written.poll())
    assert sum(isinstance(event, VisualPosition) for event in answering.poll()) > 4
    drain(batch)
    assert plain(answering.answers()) == alone(model, request)


def test_errors_end_the_answer_alone(model: Any, pool: list[Known]) -> None:
    """A prompt without text that cannot be made, which is found when the picture begins, ends that answer; neighbours
    never notice. One whose states explode cannot hurt them either."""
    good = mixed(model, 1)

    def broken() -> torch.Tensor:
        raise OSError("no such picture")

    bad = replace(good, unconditional={kind: Prompt(2, broken) for kind in ("image", "video")})
    poisoned = Prompt.of(torch.full((2, 32), 1e38), key=None)
    unsound = replace(good, unconditional=dict.fromkeys(("image", "video"), poisoned))
    batch = ContinuousBatch(model, slots=4, policy=TOGETHER)
    neighbour, failing, late = batch.submit(pool[0].request), batch.submit(bad), batch.submit(unsound)
    drain(batch)
    with pytest.raises(RequestFailed, match="no such picture"):
        failing.answers(0)
    assert late.end is not None
    pool[0].check(neighbour)
    assert_empty(batch)


def test_states_that_are_not_finite_end_the_answer_alone(make_model: Callable[..., Any]) -> None:
    """When what follows a picture poisons an answer, the picture is heard of, the answer fails, and a text beside it
    and one that gets its memory give what they give alone."""
    model = make_model(num_frames=FRAMES)
    request = mixed(model, 1)
    ends = (model.config.image_end_id, model.config.video_end_id)
    text = TextRequest(Prompt.of(model.embed(ids_of(3, 2))[0]), 20, sampling=WARM, never=ends)
    calm = ContinuousBatch(model, slots=1)
    wanted = calm.submit(text)
    drain(calm)
    with torch.no_grad():
        model.get_input_embeddings().weight[list(ends)] = float("nan")
    batch = ContinuousBatch(model, slots=2, policy=TOGETHER)
    handle, beside = batch.submit(request), batch.submit(text)
    drain(batch)
    after = batch.submit(text)
    drain(batch)
    with pytest.raises(RequestFailed, match="not finite"):
        handle.answers(0)
    assert [type(event) for event in handle.poll()].count(PictureEnd) == 1
    assert beside.tokens(0) == after.tokens(0) == wanted.tokens(0)
    assert_empty(batch)


def test_requests_are_checked(model: Any) -> None:
    """Wrong requests are refused with the value and the remedy."""
    good = mixed(model, 1)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        replace(good, max_new_tokens=0)
    with pytest.raises(ValueError, match="guidance_scale is 2"):
        replace(good, sampling=SamplingOptions(2.0))
    with pytest.raises(ValueError, match="guidance_scale 3 needs .* there is none for image and video; 1 does not"):
        replace(good, unconditional={})
    with pytest.raises(ValueError, match="max_pictures is -1"):
        replace(good.rules, max_pictures=-1)
    with pytest.raises(ValueError, match="kind video has 6 positions; it must be whole pictures of 4"):
        AnswerRules.of(model, 6)
    with pytest.raises(ValueError, match=r"5 positions fill the context of 5"):
        replace(good, rules=replace(good.rules, context=5))
