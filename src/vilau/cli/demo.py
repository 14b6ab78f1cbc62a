"""`vilau demo`: the main job on things not seen in training, shown on one page and one contact sheet."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vilau.cli.common import DEVICE_HELP, JSON_HELP, MODEL_HELP, load_pipeline, print_json, say, shown_model, within

if TYPE_CHECKING:
    from PIL import Image

    from vilau.data.nano import World
    from vilau.data.nano.draw import Draw
    from vilau.pipeline import Pipeline

PAGE = "index.html"
SHEET = "contact-sheet.png"

CREDIT = (
    "Emoji art: Noto Emoji by Google (Apache-2.0) and Twemoji by Twitter, Inc and other contributors (CC-BY 4.0), "
    "scaled and placed on colours. Shapes: easy-VQA by Victor Zhou (MIT)."
)


@dataclass(frozen=True)
class Item:
    """One thing the model did.

    kind: a key of `TITLES`. shown: what the model was given, pictures or the frames of a film. made: what it drew.
    wanted: what the data say is right, where there is such a thing.
    """

    kind: str
    prompt: str = ""
    shown: list[list[Image.Image]] = field(default_factory=list)
    made: list[Image.Image] = field(default_factory=list)
    answer: str = ""
    wanted: str = ""
    seconds: float = 0.0


TITLES = {
    "picture": "Pictures from text",
    "film": "Films from text",
    "description": "What it says about pictures and films",
    "answer": "What it answers about pictures and films",
    "easy_vqa": "What it answers on easy-VQA, a data set by others",
    "chat": "What it says without a picture",
}


def demo(
    out: Path = typer.Option(Path("demo"), "--out", help="Folder to write to; created if absent."),
    seed: int = typer.Option(1, callback=within(0, 2**31), help="Seed of the drawings and of the choice of questions."),
    model: str | None = typer.Option(None, help=MODEL_HELP),
    device: str | None = typer.Option(None, help=DEVICE_HELP),
    as_json: bool = typer.Option(False, "--json", help=JSON_HELP),
) -> None:
    """Draw, film, describe, answer and talk; prints the paths of one HTML page and one contact sheet."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"cannot write the demo to {out}: it is a file")
    start = time.perf_counter()
    pipeline = load_pipeline(model, device)
    loading = time.perf_counter() - start
    out.mkdir(parents=True, exist_ok=True)
    items = []
    for number, item in enumerate(perform(pipeline, seed), 1):
        items.append(item)
        say(f"{number:3} {item.kind:<11} {item.seconds:6.2f} s  {_short(item)}")
    facts = {
        "model": shown_model(model),
        "parameters": sum(p.numel() for p in pipeline.model.parameters()),
        "device": str(pipeline.model.device),
        "seed": seed,
        "loading_seconds": round(loading, 2),
        "total_seconds": round(time.perf_counter() - start, 2),
        "peak_memory_mb": peak_memory_mb(),
        "items": len(items),
        "mean_seconds": mean_seconds(items),
    }
    from vilau.cli.demo_page import page, sheet
    from vilau.files import write_text
    from vilau.processing.images import save_image

    write_text(page(items, facts, TITLES, CREDIT), out / PAGE)
    save_image(sheet(items, facts, TITLES, CREDIT), out / SHEET)
    say(
        f"{facts['items']} items in {facts['total_seconds']} s, of which {facts['loading_seconds']} s loading; "
        f"peak memory {facts['peak_memory_mb']} MB; mean seconds: "
        + ", ".join(f"{kind} {seconds}" for kind, seconds in mean_seconds(items).items())
    )
    if as_json:
        print_json({"page": str(out / PAGE), "sheet": str(out / SHEET), **facts})
        return
    typer.echo(str(out / PAGE))
    typer.echo(str(out / SHEET))


def perform(pipeline: Pipeline, seed: int) -> Iterator[Item]:
    """Yield everything the demo shows, one item after another.

    The prompts, pictures and questions are chosen from the held-out split by the seed before the model sees any:
    nothing is picked for how well it went.
    """
    from vilau.data.nano import World
    from vilau.data.nano.draw import Draw

    world = World.load()
    draw = Draw(2026, seed)
    used: set[str] = set()
    pipeline.draw("a red apple", seed=0)  # the first call pays for buffers and caches
    yield from _pictures(pipeline, world, draw, seed, used)
    yield from _films(pipeline, world, draw, seed, used)
    yield from _descriptions(pipeline, world, draw)
    yield from _answers(pipeline, world, draw)
    yield from _easy_vqa(pipeline, draw)
    yield from _chat(pipeline, world, draw)


def _pictures(pipeline: Pipeline, world: World, draw: Draw, seed: int, used: set[str]) -> Iterator[Item]:
    from vilau.data.nano import scenes, texts

    planned = [scenes.single(*pair) for pair in _different(world, draw, 9, used)]
    planned += [
        scenes.count(name, 2 + number, colour) for number, (name, colour) in enumerate(_different(world, draw, 2, used))
    ]
    one, other = draw.among(world.pairs("heldout"))
    planned.append(scenes.relation(one, "left of", other, draw.among(world.colours)))
    for number, scene in enumerate(planned):
        words = texts.caption(scene, world)
        drawn, seconds = timed(pipeline.draw, words, seed=seed + number)
        yield Item("picture", words, made=drawn, seconds=seconds)


def _films(pipeline: Pipeline, world: World, draw: Draw, seed: int, used: set[str]) -> Iterator[Item]:
    from vilau.data.nano import texts
    from vilau.data.nano.scenes import Film

    motions = ("right", "up", "growing", "left")
    for number, ((name, colour), motion) in enumerate(zip(_different(world, draw, 4, used), motions, strict=True)):
        words = texts.film_caption(Film(colour, name, motion))
        films, seconds = timed(pipeline.film, words, seed=seed + number)
        yield Item("film", words, made=films[0], seconds=seconds)


def _descriptions(pipeline: Pipeline, world: World, draw: Draw) -> Iterator[Item]:
    from vilau.data.nano import scenes, texts
    from vilau.data.nano.scenes import Film, render_film

    used: set[str] = set()
    planned = [scenes.single(*pair) for pair in _different(world, draw, 4, used)]
    planned += [scenes.count(name, 3, colour) for name, colour in _different(world, draw, 1, used)]
    for scene in planned:
        shown = _render(scene, world, pipeline)
        said, seconds = timed(pipeline.ask, shown)
        yield Item("description", "", [shown], answer=said, wanted=texts.caption(scene, world), seconds=seconds)
    ((name, colour),) = _different(world, draw, 1, used)
    film = Film(colour, name, "down")
    processor = pipeline.processor
    frames = _pil(render_film(film, world, processor.image_size, processor.num_frames))
    said, seconds = timed(pipeline.ask, [frames])
    yield Item("description", "", [frames], answer=said, wanted=texts.film_caption(film), seconds=seconds)


def _answers(pipeline: Pipeline, world: World, draw: Draw) -> Iterator[Item]:
    from vilau.data.nano import questions, scenes
    from vilau.data.nano.scenes import Film, render_film

    used: set[str] = set()
    planned = [scenes.single(*pair) for pair in _different(world, draw, 3, used)]
    planned += [scenes.count(name, 2 + draw.below(3), colour) for name, colour in _different(world, draw, 1, used)]
    one, other = draw.among(world.pairs("heldout"))
    planned.append(scenes.relation(one, "above", other, draw.among(world.colours)))
    for scene in planned:
        asked = questions.ask(scene, world, draw)
        shown = _render(scene, world, pipeline)
        said, seconds = timed(pipeline.ask, shown, asked.question)
        yield Item("answer", asked.question, [shown], answer=said, wanted=asked.answer, seconds=seconds)
    ((name, colour),) = _different(world, draw, 1, used)
    film = Film(colour, name, "left")
    asked = questions.ask_film(film, world, draw)
    processor = pipeline.processor
    frames = _pil(render_film(film, world, processor.image_size, processor.num_frames))
    said, seconds = timed(pipeline.ask, [frames], asked.question)
    yield Item("answer", asked.question, [frames], answer=said, wanted=asked.answer, seconds=seconds)


def _easy_vqa(pipeline: Pipeline, draw: Draw) -> Iterator[Item]:
    from vilau.data.nano.easy import EasyVqa

    easy = EasyVqa("test", pipeline.processor.image_size)
    for question, answer, number in draw.some(easy.questions, 6):
        shown = _pil([easy.picture(number)])
        said, seconds = timed(pipeline.ask, shown, question)
        yield Item("easy_vqa", question, [shown], answer=said, wanted=answer, seconds=seconds)


def _chat(pipeline: Pipeline, world: World, draw: Draw) -> Iterator[Item]:
    from vilau.data.nano.dialogues import talk

    asked: set[str] = set()
    while len(asked) < 6:
        _, question, answer = talk(world, draw, "heldout")
        if question in asked:
            continue
        asked.add(question)
        said, seconds = timed(pipeline.ask, (), question)
        yield Item("chat", question, answer=said, wanted=answer, seconds=seconds)


def _different(world: World, draw: Draw, number: int, used: set[str]) -> list[tuple[str, str]]:
    """Held-out combinations (object, background) with new objects, and no background twice before all were used."""
    chosen: list[tuple[str, str]] = []
    colours: list[str] = []
    for name, colour in draw.some(world.combinations("heldout"), len(world.combinations("heldout"))):
        if len(chosen) == number:
            break
        if name in used or colour in colours:
            continue
        used.add(name)
        chosen.append((name, colour))
        colours.append(colour)
        if len(colours) == len(world.colours):
            colours.clear()
    return chosen


def _render(scene: Any, world: World, pipeline: Pipeline) -> list[Image.Image]:
    from vilau.data.nano.scenes import render

    return _pil([render(scene, world, pipeline.processor.image_size)])


def _pil(frames: Any) -> list[Image.Image]:
    from PIL import Image

    return [Image.fromarray(frame) for frame in frames]


def timed(work: Callable[..., Any], *arguments: Any, **named: Any) -> tuple[Any, float]:
    """What the work gives for these arguments, and the seconds it took."""
    start = time.perf_counter()
    result = work(*arguments, **named)
    return result, time.perf_counter() - start


def mean_seconds(items: list[Item]) -> dict[str, float]:
    """Mean seconds of each kind of item."""
    kinds = {kind: [item.seconds for item in items if item.kind == kind] for kind in TITLES}
    return {kind: round(sum(times) / len(times), 3) for kind, times in kinds.items() if times}


def peak_memory_mb() -> int:
    """Peak resident memory of this process, in megabytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1e6 if sys.platform == "darwin" else 1e3 / 1.024))


def _short(item: Item) -> str:
    return f"{item.prompt or '(describe)'} -> {item.answer}" if item.answer else item.prompt
