"""Who joins a running batch and when: bounded queue, fairness, draining, errors of one request, many threads."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vilau.generation.batching import ContinuousBatch, Policy
from vilau.generation.budget import RequestTooLarge
from vilau.generation.requests import Closed, Handle, Prompt, QueueFull, RequestFailed, TextRequest
from vilau.generation.requests import VisualSequenceRequest as Drawn
from vilau.generation.sampling import SamplingOptions
from vilau.generation.visual import Cancelled

PLAIN = SamplingOptions(guidance_scale=1.0, top_k=12, top_p=0.9)


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    """The very small model."""
    return make_model()


def prompt(model: Any, seed: int, length: int = 4) -> Prompt:
    """A prompt of random tokens, which does not hold the last one of the text vocabulary."""
    ids = torch.randint(3, 35, (1, length), generator=torch.Generator().manual_seed(seed))
    return Prompt.of(model.embed(ids)[0])


def film(model: Any, seed: int, positions: int = 24, n: int = 1) -> Drawn:
    """A long film without guidance."""
    return Drawn(prompt(model, seed), positions, 4, PLAIN, seed, n)


def text(model: Any, seed: int, tokens: int = 6, **changes: Any) -> TextRequest:
    """A short text."""
    return TextRequest(prompt(model, seed), tokens, **changes)


def drain(batch: ContinuousBatch) -> None:
    """Step until nothing is left."""
    for _ in range(3000):
        if not batch.step():
            return
    raise AssertionError("not done after 3000 steps")


def test_the_queue_is_bounded(model: Any) -> None:
    """Beyond its limit requests are turned away at once, and taken again when there is room."""
    batch = ContinuousBatch(model, slots=1, policy=Policy(queue_limit=2, text_slots=0))
    for seed in range(2):
        batch.submit(film(model, seed))
    with pytest.raises(QueueFull, match="2 requests wait"):
        batch.submit(film(model, 2))
    batch.step()
    batch.submit(film(model, 2))
    drain(batch)
    assert batch.idle


def test_requests_that_can_never_fit_are_refused(model: Any) -> None:
    """What would not run even alone is refused when it is submitted; what does not fit now waits and runs later."""
    each = ContinuousBatch(model, slots=1, max_positions=32).budget.position_bytes
    policy = Policy(text_slots=0)
    batch = ContinuousBatch(model, slots=3, max_positions=32, memory_limit=each * 64, policy=policy)
    with pytest.raises(RequestTooLarge, match="40 positions, its prompt included, but a row holds 32"):
        batch.submit(film(model, 0, 36))
    with pytest.raises(RequestTooLarge, match="3 rows with 96 positions"):
        batch.submit(film(model, 0, 24, n=3))
    handles = [batch.submit(film(model, seed)) for seed in range(3)]
    batch.step()
    state = batch.state()
    assert (state.running, state.waiting, state.cache_bytes) == (2, 1, each * 64)
    assert batch._engine.taken * each <= state.cache_limit
    drain(batch)
    assert all(handle.codes().shape == (1, 24, 3) for handle in handles)


def test_films_do_not_starve_texts(model: Any) -> None:
    """With all slots taken by films and more of them waiting, a text starts with the next step in a slot of its own."""
    batch = ContinuousBatch(model, slots=2, policy=Policy(text_slots=1))
    films = [batch.submit(film(model, seed)) for seed in range(5)]
    batch.step()
    for seed in range(3):
        short = batch.submit(text(model, seed))
        steps = 0
        while not short.done:
            batch.step()
            steps += 1
        assert steps <= 6 + 2
    assert not any(handle.done for handle in films[2:])
    drain(batch)
    assert all(handle.reasons() == ["length"] for handle in films)


def test_texts_do_not_starve_films(model: Any) -> None:
    """Texts that keep coming leave the common slots to a film that came before them."""
    batch = ContinuousBatch(model, slots=2, policy=Policy(text_slots=1))
    texts = [batch.submit(text(model, seed, 3)) for seed in range(4)]
    pair = batch.submit(film(model, 1, 4, n=2))
    for number in range(60):
        if pair.done:
            break
        if len([handle for handle in texts if not handle.done]) < 6:
            texts.append(batch.submit(text(model, number, 3)))
        batch.step()
    assert pair.done
    drain(batch)


@pytest.mark.parametrize("overtakes", [0, 3])
def test_a_large_request_is_overtaken_only_so_often(model: Any, overtakes: int) -> None:
    """Small pictures may use what a large request leaves free, but not for ever."""
    batch = ContinuousBatch(model, slots=4, policy=Policy(text_slots=0, overtakes=overtakes))
    small = [batch.submit(film(model, 0, 4))]
    batch.step()
    large = batch.submit(film(model, 9, 4, n=4))
    later = [batch.submit(film(model, seed, 4)) for seed in range(1, 7)]
    before = 0
    while not large.done:
        batch.step()
        before = before if large._codes[0] else sum(bool(handle._codes[0]) for handle in later)
    drain(batch)
    assert before == overtakes
    assert all(handle.reasons() == ["length"] for handle in small + later)


def test_draining_finishes_what_is_there(model: Any) -> None:
    """After `drain` nothing new is taken, what runs and what waits is finished, and `run` returns."""
    batch = ContinuousBatch(model, slots=1, policy=Policy(text_slots=0))
    handles = [batch.submit(text(model, seed)) for seed in range(3)]
    batch.step()
    batch.drain()
    with pytest.raises(Closed):
        batch.submit(text(model, 9))
    batch.run()
    assert all(len(handle.tokens(0)[0]) == 6 for handle in handles)


def test_an_error_of_one_request_ends_it_alone(model: Any) -> None:
    """Prompts that cannot be made, have another shape than announced or hold NaN fail with their own error; neighbours
    never notice."""
    reference = ContinuousBatch(model, slots=1)
    calm = reference.submit(film(model, 5))
    drain(reference)
    good = prompt(model, 1).embeds()

    def broken() -> torch.Tensor:
        return model.visual_embeds(torch.tensor([[99, 0, 0]]))  # a code that does not exist

    batch = ContinuousBatch(model, slots=3)
    neighbour = batch.submit(film(model, 5))
    batch.step()
    bad = [
        batch.submit(Drawn(Prompt(1, broken), 4, 4, PLAIN)),
        batch.submit(TextRequest(Prompt(3, lambda: good), 4)),
        batch.submit(TextRequest(Prompt.of(torch.full_like(good, float("nan"))), 4)),
    ]
    drain(batch)
    for handle, message in zip(bad, ("index", r"shape \(4, 32\); \(3, 32\) was announced", "NaN"), strict=True):
        with pytest.raises(RequestFailed, match=message):
            handle.wait(0)
    assert torch.equal(neighbour.codes(), calm.codes())
    assert batch.state().sequences == 0 and batch._engine._store.positions == 0


def test_a_poisoned_neighbour_changes_nothing(make_model: Callable[..., Any]) -> None:
    """A request whose states become NaN fails by itself; those beside it, and those that get its memory after it, give
    what they give alone."""
    model = make_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[35] = float("nan")
    everything = tuple(token for token in range(40) if token != 35)

    def poison(seed: int) -> TextRequest:  # writes the token whose embedding is NaN, and leaves it at place 7
        return TextRequest(prompt(model, seed, 7), 17, never=everything)

    alone = []
    for seed in range(4):
        batch = ContinuousBatch(model, slots=1)
        alone.append(batch.submit(film(model, seed, 20)))
        drain(batch)
    batch = ContinuousBatch(model, slots=4, policy=Policy(text_slots=1, text_pace=float("inf")))
    handles = [batch.submit(film(model, 0, 20))]
    bad = [batch.submit(poison(0))]
    for seed in range(1, 4):
        for _ in range(4):
            batch.step()
        handles.append(batch.submit(film(model, seed, 20)))
        bad.append(batch.submit(poison(seed)))
    drain(batch)
    for handle in bad:
        with pytest.raises(RequestFailed, match="not finite"):
            handle.tokens(0)
    for handle, other in zip(handles, alone, strict=True):
        assert torch.equal(handle.codes(), other.codes())


def test_an_error_of_the_step_ends_what_runs_and_no_more(model: Any) -> None:
    """When a pass itself fails, as for want of memory, what ran fails with that error; what waits runs, and all memory
    is free again."""
    batch = ContinuousBatch(model, slots=1, policy=Policy(text_slots=0))
    first, second = batch.submit(film(model, 1)), batch.submit(text(model, 2))
    batch.step()

    def fail(*_: Any) -> None:
        raise MemoryError("no memory left")

    hook = model.depth_transformer.head.register_forward_pre_hook(fail)
    batch.step()
    hook.remove()
    with pytest.raises(RequestFailed, match="no memory left") as caught:
        first.codes(0)
    assert isinstance(caught.value.__cause__, MemoryError)
    drain(batch)
    assert len(second.tokens(0)[0]) == 6 and batch.state().sequences == 0


def test_models_of_continuous_tokens_write_and_do_not_draw(make_model: Callable[..., Any]) -> None:
    """A model without codes can be served for understanding; pictures are refused."""
    model = make_model(quantizer="none")
    batch = ContinuousBatch(model, slots=1)
    with pytest.raises(ValueError, match="cannot draw"):
        batch.submit(film(model, 0))
    handle = batch.submit(text(model, 0))
    drain(batch)
    assert len(handle.tokens(0)[0]) == 6


def test_many_threads(model: Any) -> None:
    """Eight threads that submit, listen and cancel at random while another runs the batch: every request ends, each
    result is the one of the request alone, and nothing is left."""
    requests: list[TextRequest | Drawn] = [text(model, 1), text(model, 2, 9), film(model, 3, 8), film(model, 4, 4, n=2)]
    expected = []
    for request in requests:
        batch = ContinuousBatch(model, slots=2)
        handle = batch.submit(request)
        drain(batch)
        expected.append(handle.tokens() if isinstance(request, TextRequest) else handle.codes().tolist())
    batch = ContinuousBatch(model, slots=3, policy=Policy(queue_limit=5))
    worker = threading.Thread(target=batch.run)
    worker.start()
    problems: queue.SimpleQueue[str] = queue.SimpleQueue()
    ended: queue.SimpleQueue[Handle] = queue.SimpleQueue()

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(6):
            number = rng.randrange(len(requests))
            try:
                handle = batch.submit(requests[number])
            except QueueFull:
                continue
            cancel_after = rng.choice((0, 2, 5, 99))
            heard = 0
            for heard, _event in enumerate(handle.events(60)):
                if heard == cancel_after:
                    handle.cancel()
            ended.put(handle)
            try:
                request = handle.request
                got = handle.tokens(0) if isinstance(request, TextRequest) else handle.codes(0).tolist()
            except Cancelled:
                continue
            except Exception as error:
                problems.put(repr(error))
                continue
            if got != expected[number]:
                problems.put(f"request {number} gave another result after {heard} events")

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(8)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(120)
    batch.drain()
    worker.join(60)
    assert not worker.is_alive()
    assert problems.empty(), problems.get()
    assert ended.qsize() >= 8
    assert batch.idle and batch.state().sequences == 0 and batch._engine._store.positions == 0


def test_cancelling_everything_stops_the_work(model: Any) -> None:
    """`cancel_all` ends what waits and what runs, for a server that must stop now."""
    batch = ContinuousBatch(model, slots=1, policy=Policy(text_slots=0))
    handles = [batch.submit(film(model, seed)) for seed in range(3)]
    batch.step()
    batch.cancel_all()
    drain(batch)
    for handle in handles:
        with pytest.raises(Cancelled):
            handle.wait(0)
    with pytest.raises(TimeoutError):
        batch.submit(text(model, 1)).wait(0)
