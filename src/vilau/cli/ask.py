"""`vilau ask`: questions about pictures and films, descriptions of them, and text chat."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vilau.cli.common import DEVICE_HELP, JSON_HELP, MODEL_HELP, load_pipeline, print_json, say, shown_model, within

if TYPE_CHECKING:
    from vilau.pipeline import Pipeline

MEDIA_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".svg",
    ".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg",
)  # fmt: skip


def ask(
    arguments: list[str] = typer.Argument(
        ...,
        metavar='FILE... ["QUESTION"]',
        help="Pictures and films, and at most one question. Without a question "
        "they are described; without a file it is a chat.",
    ),
    max_new_tokens: int = typer.Option(128, callback=within(1, 100_000), help="Longest answer, in tokens."),
    frames: int | None = typer.Option(
        None, callback=within(1, 64), help="Frames looked at of a film; the model's own if absent."
    ),
    temperature: float | None = typer.Option(
        None, callback=within(0, 100, above=True), help="Sample the answer; if absent, always the likeliest word."
    ),
    seed: int | None = typer.Option(None, callback=within(0, 2**63 - 1), help="Seed of a sampled answer."),
    model: str | None = typer.Option(None, help=MODEL_HELP),
    device: str | None = typer.Option(None, help=DEVICE_HELP),
    draw_into: Path | None = typer.Option(
        None,
        metavar="FOLDER",
        help="Let the answer mix text with pictures and films, which are written into this folder; for models that "
        "were trained on such answers.",
    ),
    max_pictures: int = typer.Option(
        4, callback=within(0, 100), help="With --draw-into: most pictures and films of an answer."
    ),
    as_json: bool = typer.Option(False, "--json", help=JSON_HELP),
) -> None:
    """Answer a question about pictures and films, describe them, or just talk. Prints the answer alone."""
    files, question = sort_arguments(arguments)
    if draw_into is not None:
        check_folder(draw_into)
    check_media(files)
    if draw_into is not None:
        start = time.perf_counter()
        parts = _mixed_answer(
            load_pipeline(model, device), files, question, draw_into, frames, max_new_tokens, max_pictures,
            0.0 if temperature is None else temperature, seed or 0,
        )  # fmt: skip
        if not as_json:
            for part in parts:
                typer.echo(part["text"] if part["type"] == "text" else part["file"])
            return
        facts = {"parts": parts, "question": question, "files": files, "model": shown_model(model)}
        print_json(facts | {"seconds": round(time.perf_counter() - start, 3)})
        return
    generation: dict[str, Any] = {}
    if temperature is not None:
        generation = {"do_sample": True, "temperature": temperature}
    pipeline = load_pipeline(model, device)
    if temperature is not None and seed is not None:
        import torch

        torch.manual_seed(seed)
    start = time.perf_counter()
    answer = pipeline.ask(files, question, num_frames=frames, max_new_tokens=max_new_tokens, **generation)
    seconds = time.perf_counter() - start
    if not as_json:
        if not answer:
            say("the model had nothing to say")
        typer.echo(answer)
        return
    print_json(
        {
            "answer": answer,
            "question": question,
            "files": files,
            "model": shown_model(model),
            "seconds": round(seconds, 3),
        }
    )


def check_folder(folder: Path) -> None:
    """Refuse, before any work, a folder for an answer's pictures that is a file or holds something."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder for the answer's pictures")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name a new folder for the answer's pictures")


def _mixed_answer(
    pipeline: Pipeline,
    files: list[str],
    question: str | None,
    folder: Path,
    frames: int | None,
    max_new_tokens: int,
    max_pictures: int,
    temperature: float,
    seed: int,
) -> list[dict[str, str]]:
    """Answer and write the pictures; return the parts in order: texts, and files of pictures and films."""
    from vilau.pipeline import question_about
    from vilau.processing.images import save_image
    from vilau.processing.videos import save_video

    answer = pipeline.converse(
        question_about(files, question),
        num_frames=frames,
        max_new_tokens=max_new_tokens,
        max_pictures=max_pictures,
        text_temperature=temperature,
        seed=seed,
    )
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for number, part in enumerate(answer, 1):
        kind = part["type"]
        if kind == "text":
            parts.append({"type": kind, "text": part["text"]})
        elif kind == "image":
            parts.append({"type": kind, "file": str(save_image(part["image"], folder / f"{number}.png"))})
        else:
            parts.append({"type": kind, "file": str(save_video(part["video"], folder / f"{number}.gif"))})
    if not parts:
        say("the model had nothing to say")
    return parts


def sort_arguments(arguments: list[str]) -> tuple[list[str], str | None]:
    """Tell files from the question.

    Existing files are pictures or films. What ends in a media suffix, or holds a slash and no space, and does not exist
    is a missing file. At most one other argument is the question.

    Raises:
        FileNotFoundError: a file that is not there. ValueError: a folder.
        BadParameter: an empty question or more than one.
    """
    files: list[str] = []
    question: str | None = None
    for argument in arguments:
        if os.path.isdir(argument):
            raise ValueError(f"{argument} is a folder: name the pictures in it")
        if os.path.exists(argument):
            files.append(argument)
        elif looks_like_file(argument):
            raise FileNotFoundError(f"no such file: {argument}")
        elif question is not None:
            raise typer.BadParameter(
                f"two questions, {question!r} and {argument!r}: put one in quotes, and check the names of the files"
            )
        elif not argument.strip():
            raise typer.BadParameter("the question is empty: ask something, or leave it away to get a description")
        else:
            question = argument
    return files, question


def looks_like_file(argument: str) -> bool:
    """Whether a missing file is what was meant: a media suffix at the end, or a slash and no space."""
    if argument.lower().endswith(MEDIA_SUFFIXES):
        return True
    return ("/" in argument or os.sep in argument) and " " not in argument


def check_media(files: list[str]) -> None:
    """Decode every file once, before the model is loaded, so that a broken one fails in an instant.

    Raises:
        ValueError: a file that is not a readable picture or film, in one line that names it.
    """
    if not files:
        return
    from vilau.processing.images import load_image
    from vilau.processing.videos import load_video, media_kind

    for file in files:
        if media_kind(file) == "video":
            load_video(file, 1)
        else:
            load_image(file)
