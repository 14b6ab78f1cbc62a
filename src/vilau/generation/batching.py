"""Continuous batching: texts, pictures, films and mixed answers join a running batch and leave it at any position.

`ContinuousBatch` is what a server stands on. Requests come from any thread (`submit`); one thread calls `step`, or
`run`. A request's outcome depends on itself alone: its noise comes from its own seeds, attention sees its own rows, and
what others do changes only when a position is made.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from vilau.generation.budget import Budget, Demand, Usage, position_bytes
from vilau.generation.engine import Engine, ServedModel
from vilau.generation.requests import Closed, Handle, QueueFull, Request, RequestEnd, SequenceEnd
from vilau.generation.running import Job, Picture, Text
from vilau.generation.slots import check_language


@dataclass(frozen=True)
class Policy:
    """How a batch treats its requests.

    Args:
        queue_limit: requests that may wait; the next one is turned away.
        text_slots: sequences beyond the slots that only texts may be; absent, a quarter of the slots.
        overtakes: how many later requests may go before one that does not fit yet.
        prefill: positions of prompts read in one step at most.
        text_pace: how many times longer than alone a token of text may take while pictures are drawn and prompts are
            read beside it; pictures then advance by pieces of a position. Infinite: all advance together.
        free_rows: rows whose products cost as much as reading the weights, so that `text_pace` goes by weights; absent,
            a short trial measures what the pieces of work cost on this machine, and the batch corrects it as it runs.
    """

    queue_limit: int = 64
    text_slots: int | None = None
    overtakes: int = 16
    prefill: int = 256
    text_pace: float = 1.5
    free_rows: float | None = None

    def __post_init__(self) -> None:
        for name, value, low in (
            ("queue_limit", self.queue_limit, 1),
            ("overtakes", self.overtakes, 0),
            ("prefill", self.prefill, 1),
        ):
            if value < low:
                raise ValueError(f"{name} is {value}; it must be at least {low}")


@dataclass(frozen=True)
class BatchState:
    """A batch at one moment: requests `waiting` and `running`, sequences and bytes of cache taken and in all."""

    waiting: int
    running: int
    sequences: int
    slots: int
    cache_bytes: int
    cache_limit: int


@dataclass(eq=False)
class _Waiting:
    handle: Handle
    each: Demand
    demand: Demand
    visual: bool
    overtaken: int = 0


class ContinuousBatch:
    """A batch that requests join and leave while it runs.

    Args:
        model: the joined network, in evaluation mode. Its weights must stay as they are.
        slots: texts, pictures and films at once (`Policy.text_slots` come on top, for texts).
        max_positions: of one row, prompt and answer; absent, the model's context.
        memory_limit: bytes of keys and values; absent, what all slots take at full length with guidance.
        policy: queue, fairness and pace.
        kernel: how weights lie in memory on a CPU, see `prepare`; absent, blocked where that is worth a copy.

    Raises:
        ValueError: limits that do not fit each other, or a language model that cannot run continuously.
    """

    def __init__(
        self,
        model: ServedModel,
        slots: int = 8,
        max_positions: int | None = None,
        memory_limit: int | None = None,
        policy: Policy | None = None,
        kernel: str | None = None,
    ) -> None:
        self.model, self.policy = model, policy or Policy()
        weight = model.get_input_embeddings().weight
        context = model.config.context_length
        positions = max_positions or context
        if positions is None:
            raise ValueError("the model's context has no limit; give max_positions")
        if context is not None and positions > context:
            raise ValueError(f"max_positions is {positions}, but the model's context holds {context}")
        text_slots = -(-slots // 4) if self.policy.text_slots is None else self.policy.text_slots
        each = position_bytes(model.config.text_config, weight.dtype)
        limit = (2 * slots + text_slots) * positions * each if memory_limit is None else memory_limit
        self.budget = Budget(slots, text_slots, positions, limit, each)
        check_language(model.language_model.config, positions)
        self.usage = Usage()
        self._engine = Engine(
            model,
            limit // each,
            2 * slots,
            self.policy.text_pace,
            self.policy.free_rows,
            self.policy.prefill,
            kernel,
            self._finished,
            lambda job, error: self._end(job, RequestEnd("failed", error)),
        )
        self._wake = threading.Condition()
        self._stepping = threading.Lock()
        self._waiting: list[_Waiting] = []
        self._jobs: dict[Handle, Job] = {}
        self._cancelled: set[Handle] = set()
        self._closed = False

    # ---- from any thread

    def submit(self, request: Request) -> Handle:
        """Queue a request and return its handle.

        Raises:
            RequestTooLarge: it would not fit if it were alone; the message has the numbers.
            QueueFull: too many wait already.
            Closed: the batch is being drained.
            ValueError: pictures are asked of a model that cannot draw.
        """
        visual = request.visual
        if visual and self.model.depth_transformer is None:
            raise ValueError("this model reads continuous tokens and cannot draw pictures; ask it for text")
        each = self.budget.demand(request.row_lengths, 1)
        demand = Demand(request.n, each.capacities * request.n)
        self.budget.check(demand, visual)
        handle = Handle(request, self._cancel)
        with self._wake:
            if self._closed:
                raise Closed("the batch finishes what it has and takes no new requests")
            if len(self._waiting) >= self.policy.queue_limit:
                raise QueueFull(f"{len(self._waiting)} requests wait, which is the limit; try again later")
            self._waiting.append(_Waiting(handle, each, demand, visual))
            self._wake.notify_all()
        return handle

    def drain(self) -> None:
        """Take nothing new from now on; what waits and runs is finished."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()

    def cancel_all(self) -> None:
        """Cancel every request that waits or runs."""
        with self._wake:
            handles = [*(waiting.handle for waiting in self._waiting), *self._jobs]
        for handle in handles:
            handle.cancel()

    def state(self) -> BatchState:
        """Return how full the batch is."""
        with self._wake:
            return BatchState(
                len(self._waiting),
                len(self._jobs),
                self.usage.sequences,
                self.budget.slots + self.budget.text_slots,
                self.budget.bytes_of(self.usage.positions),
                self.budget.memory_limit,
            )

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        with self._wake:
            return not (self._waiting or self._jobs or self._cancelled)

    def _cancel(self, handle: Handle) -> None:
        with self._wake:
            kept = [waiting for waiting in self._waiting if waiting.handle is not handle]
            if len(kept) < len(self._waiting):
                self._waiting = kept
                handle.emit(RequestEnd("cancelled"))
            elif not handle.done:
                self._cancelled.add(handle)
            self._wake.notify_all()

    # ---- from the one thread that runs the batch

    def run(self) -> None:
        """Step as long as there is work and wait while there is none; return when drained and done."""
        while True:
            with self._wake:
                while not (self._waiting or self._jobs or self._cancelled):
                    if self._closed:
                        return
                    self._wake.wait()
            self.step()

    @torch.no_grad()
    def step(self) -> bool:
        """Let requests leave and join, and make one step; return whether there was anything to do.

        Every text gains a token. Every picture gains a position, unless texts run beside pictures: then as much of one
        as `Policy.text_pace` has room for. An error that concerns no single request ends all that run; those that wait
        go on.
        """
        with self._stepping:
            self._drop_cancelled()
            self._admit()
            if not self._jobs:
                return False
            try:
                self._engine.turn()
            except Exception as error:
                self._fail_all(error)
            return True

    def _drop_cancelled(self) -> None:
        with self._wake:
            cancelled, self._cancelled = self._cancelled, set()
        for handle in cancelled:
            job = self._jobs.get(handle)
            if job is not None:
                self._end(job, RequestEnd("cancelled"))

    def _admit(self) -> None:
        for job in self._chosen():
            try:
                self._engine.join(job)
            except Exception as error:
                self._end(job, RequestEnd("failed", error))

    def _chosen(self) -> list[Job]:
        """Take the requests that join now from the queue, in the order in which they came where that can be.

        One that does not fit may be overtaken by later ones, but only so often. A text behind a picture that waits may
        still take the places that are kept for texts, which costs the picture nothing.
        """
        chosen: list[Job] = []
        with self._wake:
            blocked: list[_Waiting] = []
            for waiting in self._waiting:
                behind_picture = not waiting.visual and any(other.visual for other in blocked)
                rivals = [b for b in blocked if not (behind_picture and b.visual)]
                if any(rival.overtaken >= self.policy.overtakes for rival in rivals):
                    blocked.append(waiting)
                elif self._fits(waiting, behind_picture):
                    self.usage.change(waiting.demand, waiting.visual, 1)
                    chosen.append(Job(waiting.handle, waiting.each, waiting.handle.request.n))
                    for rival in rivals:
                        rival.overtaken += 1
                else:
                    blocked.append(waiting)
            self._waiting = blocked
            self._jobs.update({job.handle: job for job in chosen})
        return chosen

    def _fits(self, waiting: _Waiting, behind_picture: bool) -> bool:
        usage, budget = self.usage, self.budget
        if not usage.fits(waiting.demand, waiting.visual, budget):
            return False
        if not behind_picture:
            return True
        texts = usage.sequences - usage.visual_sequences + waiting.demand.sequences
        taken = usage.positions - usage.visual_positions + waiting.demand.positions
        return texts <= budget.text_slots and budget.bytes_of(taken) <= budget.memory_limit - budget.visual_limit

    def _end(self, job: Job, event: RequestEnd) -> None:
        """Take what is left of a request out of the batch."""
        for sequence in job.sequences:
            self._engine.leave(sequence)
        with self._wake:
            if self._jobs.pop(job.handle, None) is not None:
                for _ in range(job.left):
                    self.usage.change(job.each, job.visual, -1)
        job.left = 0
        job.handle.emit(event)

    def _finished(self, sequence: Text | Picture, event: SequenceEnd) -> None:
        """Note that a sequence is complete, and end its request with the last one."""
        job = sequence.job
        job.handle.emit(event)
        job.left -= 1
        with self._wake:
            self.usage.change(job.each, job.visual, -1)
        if not job.left:
            self._end(job, RequestEnd("finished"))

    def _fail_all(self, error: BaseException) -> None:
        with self._wake:
            jobs = list(self._jobs.values())
            self._jobs.clear()
            self.usage = Usage()
        self._engine.reset()
        for job in jobs:
            job.handle.emit(RequestEnd("failed", error))


__all__ = ["BatchState", "ContinuousBatch", "Policy"]
