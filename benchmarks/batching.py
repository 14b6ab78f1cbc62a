"""Continuous batching beside batches that start and end together: throughput, the pace of text, first previews.

    python benchmarks/batching.py [--models nano,midsize] [--slots 16] [--repeat 3] [--json]

Every figure is a ratio of two works done in turn in this run, by the processor time of the one thread that does them,
so that other programs disturb it little.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads that spin would be counted as work

import torch

from vilau.evaluation.generation_speed import preset_model
from vilau.evaluation.machine import machine_name
from vilau.generation.batching import ContinuousBatch, Policy
from vilau.generation.position import VisualStep
from vilau.generation.prepared import prepare
from vilau.generation.requests import (
    Event,
    Handle,
    Prompt,
    TextRequest,
    TextToken,
    VisualPosition,
    VisualSequenceRequest,
)
from vilau.generation.sampling import SamplingOptions
from vilau.generation.visual import VisualRequest, begin, run_codes
from vilau.model import VilaUForConditionalGeneration
from vilau.shipped import SHIPPED_MODEL

PROMPT = 32
OPTIONS = SamplingOptions()  # those of the released checkpoints: guidance 3, top-k 900, top-p 0.96
POSITIONS = {"nano": 64, "midsize": 8}  # of each picture or film that is timed
TOKENS = {"nano": 200, "midsize": 30}
CPU = torch.device("cpu")
LIMITS = (Policy().text_pace, float("inf"))


class Bench:
    """One model, its prompts and its static and running batches."""

    def __init__(self, name: str, slots: int) -> None:
        self.name, self.slots = name, slots
        self.model: Any = (
            VilaUForConditionalGeneration.from_pretrained(SHIPPED_MODEL).eval()
            if name == "nano"
            else preset_model(name, CPU, torch.float32)
        )
        self.positions, self.tokens = POSITIONS[name], TOKENS[name]
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, self.model.config.text_config.vocab_size - 8, (64, PROMPT), generator=generator)
        self.ids[:, -1] = self.model.config.image_start_id
        self.empty_ids = torch.tensor([[1, self.model.config.image_start_id]])
        with torch.no_grad():
            self.embeds = self.model.embed(self.ids)
            self.empty = Prompt.of(self.model.embed(self.empty_ids)[0], key="empty")

    def batch(self, slots: int, text_pace: float = float("inf")) -> ContinuousBatch:
        """An idle batch."""
        return ContinuousBatch(self.model, slots, 512, policy=Policy(text_pace=text_pace, queue_limit=1000))

    def picture(self, number: int, positions: int | None = None) -> VisualSequenceRequest:
        """Request number so and so for a picture."""
        count = positions or self.positions
        prompt = Prompt.of(self.embeds[number % len(self.embeds)])
        return VisualSequenceRequest(prompt, count, count, OPTIONS, number, 1, self.empty)

    def static_work(self, count: int) -> tuple[VisualStep, VisualRequest]:
        """So many pictures for one batch that starts and ends together."""
        request = self.model.visual_request(
            self.embeds[:count],
            torch.ones_like(self.ids[:count]),
            False,
            unconditional_ids=self.empty_ids,
            guidance_scale=OPTIONS.guidance_scale,
            temperature=OPTIONS.temperature,
            top_k=OPTIONS.top_k,
            top_p=OPTIONS.top_p,
            seed=list(range(count)),
        )
        object.__setattr__(request, "positions", self.positions)
        object.__setattr__(request, "per_picture", self.positions)
        kernel = None if self.name == "nano" else "mkldnn"  # that of the running batch
        return VisualStep(prepare(self.model, 2 * count, kernel)), request

    def static(self, count: int) -> torch.Tensor:
        """Codes of such a batch, its prompts read too."""
        return run_codes(*self.static_work(count))

    def reading(self, count: int) -> None:
        """Its beginning alone: the prompts are read and copied into its rows."""
        step, request = self.static_work(count)
        with torch.no_grad():
            begin(step.networks, request)

    def continuous(self, batch: ContinuousBatch, count: int) -> torch.Tensor:
        """The same pictures as requests that arrive together."""
        handles = [batch.submit(self.picture(number)) for number in range(count)]
        while batch.step():
            pass
        return torch.cat([handle.codes() for handle in handles])


def spent(work: Callable[..., Any], *arguments: Any) -> float:
    """Processor seconds of this thread."""
    start = time.thread_time()
    work(*arguments)
    return time.thread_time() - start


def throughput(bench: Bench, repeat: int) -> list[dict[str, Any]]:
    """Positions per processor second: static, arriving together, and one after another in a batch that stays full.

    `joining_and_leaving` compares with the static batch as it is, `like_for_like` with the time that static batches
    take for as many prompts and as many positions: the time of their beginning for each prompt, the rest for each
    position.
    """
    rows = []
    for count in sorted({1, 4, bench.slots}):
        batch = bench.batch(count)
        same = torch.equal(bench.static(count), bench.continuous(batch, count))
        pairs = []
        for _ in range(repeat):
            static, read = spent(bench.static, count), min(spent(bench.reading, count) for _ in range(3))
            together = spent(bench.continuous, batch, count)
            time_taken, positions, prompts = churn(bench, batch, count)
            each = static / (count * bench.positions)
            floor = prompts * read / count + positions * (static - read) / (count * bench.positions)
            shares = static / together, each * positions / time_taken, floor / time_taken
            pairs.append((1 / each, *shares, prompts / positions * bench.positions))
        middle = [statistics.median(values) for values in zip(*pairs, strict=True)]
        rows.append(
            {
                "pictures": count,
                "static_positions_per_s": middle[0],
                "together": middle[1],
                "joining_and_leaving": middle[2],
                "like_for_like": middle[3],
                "prompts_for_one": middle[4],
                "same_codes": same,
            }
        )
    return rows


def churn(bench: Bench, batch: ContinuousBatch, count: int) -> tuple[float, int, int]:
    """Processor seconds, positions and prompts of a batch whose pictures begin and end at different times, always full.

    Each one that ends is followed by a new one, whose prompt is read in between; it runs for as many positions as two
    static batches have. Prompts are those whose picture has begun.
    """
    generator = torch.Generator().manual_seed(1)
    number = 0
    running: list[Handle] = []
    for _ in range(count):
        part = int(torch.randint(bench.positions // 4, bench.positions + 1, (1,), generator=generator))
        running.append(batch.submit(bench.picture(number, part)))
        number += 1
    made, prompts, goal, start = 0, 0, 2 * count * bench.positions, time.thread_time()
    while made < goal:
        batch.step()
        for place, handle in enumerate(running):
            positions = [event.done for event in handle.poll() if isinstance(event, VisualPosition)]
            made += len(positions)
            prompts += 1 in positions
            if handle.done:
                running[place] = batch.submit(bench.picture(number))
                number += 1
    taken = time.thread_time() - start
    batch.cancel_all()
    while batch.step():
        pass
    return taken, made, prompts


def quantile(values: list[float], share: float) -> float:
    """The value below which so many of the others lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def gaps(bench: Bench, batch: ContinuousBatch, texts: int, pictures: int) -> tuple[list[float], float]:
    """Processor seconds between the tokens of texts while pictures run, and the pictures' positions per second."""
    drawn = [batch.submit(bench.picture(number, 400)) for number in range(pictures)]
    for _ in range(4 if pictures else 0):
        batch.step()
    request = TextRequest(Prompt.of(bench.embeds[40]), bench.tokens)
    written = [batch.submit(request) for _ in range(texts)]
    while not all(any(isinstance(event, TextToken) for event in handle.poll()) for handle in written):
        batch.step()
    for handle in drawn:
        handle.poll()
    times: list[float] = []
    emit = written[0].emit

    def timed(event: Event) -> None:
        if isinstance(event, TextToken):
            times.append(time.thread_time())
        emit(event)

    written[0].emit = timed  # type: ignore[method-assign]
    begun = time.thread_time()
    while not written[0].done:
        batch.step()
    length = time.thread_time() - begun
    found = [after - before for before, after in itertools.pairwise(times)]
    made = sum(isinstance(event, VisualPosition) for handle in drawn for event in handle.poll())
    batch.cancel_all()
    while batch.step():
        pass
    return found, made / length


def text_pace(bench: Bench, repeat: int) -> list[dict[str, Any]]:
    """How much longer tokens take beside pictures, with the default limit and without."""
    rows = []
    cases = [(texts, pictures, pace) for texts, pictures in ((1, 4), (4, 4), (4, bench.slots)) for pace in LIMITS]
    if bench.name != "nano":
        cases = [(4, 4, LIMITS[0]), (4, 4, LIMITS[1]), (4, bench.slots, LIMITS[0])]  # the others take long
    for texts, pictures, limit in cases:
        batch = bench.batch(bench.slots + texts, limit)
        alone: list[float] = []
        beside: list[float] = []
        rates = []
        for _ in range(repeat):
            alone += gaps(bench, batch, texts, 0)[0]
            more, rate = gaps(bench, batch, texts, pictures)
            beside += more
            rates.append(rate)
        free = pictures * bench.positions / spent(bench.continuous, bench.batch(pictures), pictures)
        rows.append(
            {
                "texts": texts,
                "pictures": pictures,
                "text_pace": limit,
                "ms_alone_p50": quantile(alone, 0.5) * 1e3,
                "p50_ratio": quantile(beside, 0.5) / quantile(alone, 0.5),
                "p99_ratio": quantile(beside, 0.99) / quantile(alone, 0.99),
                "picture_rate": statistics.median(rates) / free,
            }
        )
    return rows


def first_preview(bench: Bench) -> list[dict[str, Any]]:
    """When the first row of a 16 x 16 picture is complete, as a share of the picture's whole time, from `submit` on."""
    rows = []
    for others in (0, bench.slots - 1):
        batch = bench.batch(bench.slots)
        for number in range(others):
            batch.submit(bench.picture(number, 400))
        for _ in range(4 if others else 0):
            batch.step()
        length = 256 if bench.name == "nano" else 32
        start, row, made = time.thread_time(), None, 0
        handle = batch.submit(bench.picture(50, length))
        while not handle.done:
            batch.step()
            made += sum(isinstance(event, VisualPosition) for event in handle.poll())
            if row is None and made >= length // 16:
                row = time.thread_time() - start
        assert row is not None
        rows.append({"others": others, "share": row / (time.thread_time() - start)})
        batch.cancel_all()
        while batch.step():
            pass
    return rows


def text_throughput(bench: Bench, repeat: int) -> dict[str, Any]:
    """Greedy tokens per processor second: the library's static `generate` and the running batch."""
    count, tokens = bench.slots, bench.tokens // 2
    ids = bench.ids[:count]
    batch = bench.batch(count)

    def static() -> torch.Tensor:
        return bench.model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, use_cache=True)

    def continuous() -> torch.Tensor:
        handles = [batch.submit(TextRequest(Prompt.of(e), tokens)) for e in bench.embeds[:count]]
        while batch.step():
            pass
        return torch.tensor([handle.tokens()[0] for handle in handles])

    same = bool(torch.equal(static(), continuous()))
    ratios = [spent(static) / spent(continuous) for _ in range(repeat)]
    return {"texts": count, "ratio": statistics.median(ratios), "same_tokens": same}


def run(names: list[str], slots: int, repeat: int) -> dict[str, Any]:
    """Measure everything and return plain values."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {"machine": machine_name(CPU), "torch": torch.__version__, "models": {}}
    for name in names:
        bench = Bench(name, slots)
        found["models"][name] = {
            "throughput": throughput(bench, repeat),
            "text_throughput": text_throughput(bench, repeat),
            "text_pace": text_pace(bench, repeat),
            "first_preview": first_preview(bench),
        }
        print(tables(name, found["models"][name]), flush=True)
    found["load"] = os.getloadavg()[0]
    return found


def tables(name: str, part: dict[str, Any]) -> str:
    """Return the figures of a model as Markdown."""
    lines = [
        f"\n### {name}\n",
        "| pictures | static, positions/s | together | joining and leaving | like for like | prompts | same codes |",
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in part["throughput"]:
        lines.append(
            f"| {row['pictures']} | {row['static_positions_per_s']:.1f} | {row['together']:.2f} "
            f"| {row['joining_and_leaving']:.2f} | {row['like_for_like']:.2f} | {row['prompts_for_one']:.2f} "
            f"| {'yes' if row['same_codes'] else 'up to rounding'} |"
        )
    written = part["text_throughput"]
    lines.append(
        f"\n{written['texts']} texts: {written['ratio']:.2f} times the tokens of `generate` "
        f"({'the same' if written['same_tokens'] else 'others'}).\n"
    )
    lines.append("| texts | pictures | text_pace | token alone, ms | p50 ratio | p99 ratio | pictures' rate |")
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in part["text_pace"]:
        lines.append(
            f"| {row['texts']} | {row['pictures']} | {row['text_pace']:g} | {row['ms_alone_p50']:.1f} "
            f"| {row['p50_ratio']:.2f} | {row['p99_ratio']:.2f} | {row['picture_rate']:.2f} |"
        )
    for row in part["first_preview"]:
        lines.append(f"\nFirst row beside {row['others']} other pictures: {row['share']:.1%} of the picture's time.")
    return "\n".join(lines)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="nano,midsize")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = run(arguments.models.split(","), arguments.slots, arguments.repeat)
    print(f"\n{found['machine']}, one thread, torch {found['torch']}, load {found['load']:.1f}")
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
