"""`vilau generate`: pictures and films from text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vilau.cli.common import (
    DEVICE_HELP,
    JSON_HELP,
    MODEL_HELP,
    Ticker,
    check_targets,
    load_pipeline,
    print_json,
    say,
    shown_model,
    within,
)

if TYPE_CHECKING:
    from PIL import Image

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FILM_SUFFIXES = (".mp4", ".webp", ".gif")
FRAMES_PER_SECOND = 4.0
SHOWN_SIDE = 256  # small pictures are enlarged to at least this many pixels
MAX_SEED = 2**63 - 1


def generate(
    prompt: str = typer.Argument(..., help='What to draw, as "a red apple on a blue background".'),
    output: Path = typer.Option(
        ...,
        "--output",
        "-o",
        help="File to write; its suffix is the format: .png .jpg .webp for a picture, .mp4 .webp .gif for a film.",
    ),
    n: int = typer.Option(
        1, "--n", callback=within(1, 64), help="How many, up to 64; above 1, apple.png becomes apple-1.png ..."
    ),
    video: bool = typer.Option(False, "--video", help="Make a film instead of a picture."),
    frames: int | None = typer.Option(
        None, callback=within(1, 64), help="Frames of the film; the model's own if absent."
    ),
    guidance_scale: float | None = typer.Option(
        None,
        callback=within(0, 100),
        help="How closely to follow the prompt; 1 is plain sampling. The model's own if absent.",
    ),
    temperature: float | None = typer.Option(
        None,
        callback=within(0, 100),
        help="Above 1 wilder, below 1 tamer, 0 always the likeliest code. The model's own if absent.",
    ),
    top_k: int | None = typer.Option(
        None, callback=within(0, 1 << 31), help="Sample among the k likeliest codes; 0: all. The model's own if absent."
    ),
    top_p: float | None = typer.Option(
        None,
        callback=within(0, 1, above=True),
        help="Sample among the likeliest codes of this joint probability. The model's own if absent.",
    ),
    seed: int | None = typer.Option(
        None, callback=within(0, MAX_SEED), help="The same seed draws the same; random if absent."
    ),
    upscale: int | None = typer.Option(
        None,
        callback=within(1, 64),
        help="Enlarge by this factor, each pixel a square. If "
        f"absent: the smallest that brings the side to {SHOWN_SIDE} pixels.",
    ),
    force: bool = typer.Option(False, "--force", help="Overwrite existing files."),
    model: str | None = typer.Option(None, help=MODEL_HELP),
    device: str | None = typer.Option(None, help=DEVICE_HELP),
    as_json: bool = typer.Option(False, "--json", help=JSON_HELP),
) -> None:
    """Draw pictures, or with --video make films, from text. Prints the files written."""
    check_request(prompt, output, video, frames)
    targets = numbered(output, n)
    check_targets(targets, force)
    seed = fresh_seed() if seed is None else seed
    pipeline = load_pipeline(model, device)
    sampling: dict[str, Any] = {
        "guidance_scale": guidance_scale,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    start = time.perf_counter()
    results: list[list[Image.Image]]
    if video:
        results = pipeline.film(prompt, n=n, num_frames=frames, progress=Ticker("filming"), **sampling)
    else:
        pictures = pipeline.draw(prompt, n=n, progress=Ticker("drawing"), **sampling)
        results = [[picture] for picture in pictures]
    seconds = time.perf_counter() - start
    factor = upscale or shown_factor(min(results[0][0].size))
    for frames_of_one, target in zip(results, targets, strict=True):
        write(enlarge(frames_of_one, factor), target, video)
    say(f"seed {seed}, {seconds:.1f} s, {results[0][0].width}x{results[0][0].height} px enlarged {factor} times")
    if as_json:
        print_json(
            {
                "files": [str(target) for target in targets],
                "prompt": prompt,
                "kind": "video" if video else "image",
                "model": shown_model(model),
                "seed": seed,
                "settings": {name: value for name, value in sampling.items() if name != "seed" and value is not None},
                "size": list(results[0][0].size),
                "frames": len(results[0]),
                "upscale": factor,
                "seconds": round(seconds, 3),
            }
        )
        return
    for target in targets:
        typer.echo(str(target))


def check_request(prompt: str, output: Path, video: bool, frames: int | None) -> None:
    """Raise ``BadParameter`` (exit code 2) for an empty prompt or an output that cannot hold what is asked for."""
    if not prompt.strip():
        raise typer.BadParameter("the prompt is empty: say what to draw")
    if frames is not None and not video:
        raise typer.BadParameter("--frames is for films: add --video")
    if output.is_dir():
        raise ValueError(f"{output} is a folder: name a file in it")
    allowed = FILM_SUFFIXES if video else PICTURE_SUFFIXES
    suffix = output.suffix.lower()
    if suffix not in allowed:
        hint = ", or add --video for a film" if not video and suffix in FILM_SUFFIXES else ""
        kind = "film" if video else "picture"
        raise typer.BadParameter(f"cannot write a {kind} as {output.name!r}: end it in {', '.join(allowed)}{hint}")


def numbered(output: Path, n: int) -> list[Path]:
    """Return ``n`` targets: the output itself, or ``apple-1.png``, ``apple-2.png`` ... for more than one."""
    if n == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{index}{output.suffix}") for index in range(1, n + 1)]


def fresh_seed() -> int:
    """A seed nobody chose, short enough to be typed again."""
    import secrets

    return secrets.randbelow(10**6)


def shown_factor(side: int, wanted: int = SHOWN_SIDE) -> int:
    """The smallest whole factor that brings ``side`` to at least ``wanted`` pixels."""
    return max(1, -(-wanted // side))


def enlarge(pictures: list[Image.Image], factor: int) -> list[Image.Image]:
    """Pictures whose every pixel has become a square of ``factor`` pixels: nothing is invented between them."""
    from PIL import Image

    if factor == 1:
        return pictures
    return [p.resize((p.width * factor, p.height * factor), Image.Resampling.NEAREST) for p in pictures]


def write(pictures: list[Image.Image], target: Path, video: bool) -> None:
    """Write a picture or a film; the file appears whole or not at all."""
    if video:
        from vilau.processing.videos import save_video

        save_video(pictures, target, FRAMES_PER_SECOND)
    else:
        from vilau.processing.images import save_image

        save_image(pictures[0], target)
