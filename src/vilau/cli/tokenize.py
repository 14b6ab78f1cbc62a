"""`vilau tokenize` and `vilau detokenize`: the vision tower alone, from pictures to codes and back."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from vilau.cli.common import DEVICE_HELP, JSON_HELP, Ticker, check_targets, print_json, quiet_libraries, say, within

if TYPE_CHECKING:
    from vilau.modeling.vision_tower import VisionTower

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
TOWER_HELP = "Folder or hub id of a vision tower or a whole model; the shipped model if absent."


def tokenize(
    images: list[str] = typer.Argument(
        ..., metavar="IMAGE...", help="Pictures, folders (searched through), or patterns such as 'photos/*.jpg'."
    ),
    output: Path = typer.Option(..., "--output", "-o", help="File to write, such as codes.safetensors."),
    model: str | None = typer.Option(None, "--model", help=TOWER_HELP),
    crop: bool = typer.Option(
        False, "--crop", help="Cut out the middle square; otherwise the whole picture is squashed into a square."
    ),
    batch_size: int = typer.Option(32, callback=within(1, 65536), help="Pictures encoded at a time."),
    skip_bad: bool = typer.Option(False, "--skip-bad", help="Leave out pictures that cannot be read, and count them."),
    device: str | None = typer.Option(None, help=DEVICE_HELP),
    force: bool = typer.Option(False, "--force", help="Overwrite an existing file."),
    as_json: bool = typer.Option(False, "--json", help=JSON_HELP),
) -> None:
    """Turn pictures into codes: what the language model reads and writes in place of pixels.

    The file holds `codes`, a table of (pictures, positions, depth) whole numbers, and in its metadata the
    pictures' names and sizes and the digest of the tower, without which codes mean nothing. `vilau
    detokenize` draws them again; Python reads them with safetensors:

    \b
      vilau tokenize cat.jpg photos/ -o codes.safetensors
      vilau tokenize 'photos/*.png' -o codes.safetensors --model runs/my-tower/vision_tower/final
      vilau detokenize codes.safetensors -o seen/

    \b
      from safetensors.torch import load_file
      codes = load_file("codes.safetensors")["codes"]         # (N, P, D)
      tower = vilau.VisionTower.from_pretrained("runs/my-tower/vision_tower/final")
      pixels = tower.decode(codes.long())                     # (N, 3, S, S) in [-1, 1]
    """
    if output.suffix != ".safetensors":
        raise typer.BadParameter(f"cannot write codes as {output.name!r}: end it in .safetensors")
    files = find_pictures(images)
    check_targets([output], force)
    tower = _load(model, device)
    from vilau.visual_tokens import encode_pictures, write_codes

    done = encode_pictures(tower, files, batch_size, "crop" if crop else "squash", skip_bad, Ticker("encoding"))
    write_codes(done, output)
    for name, reason in done.bad:
        say(f"left out {name}: {reason}")
    count, positions, depth = done.codes.shape
    size = output.stat().st_size
    say(
        f"{count} pictures of {positions} positions x {depth} codes out of {tower.config.codebook_size}, {size:,} bytes"
    )
    if as_json:
        print_json(
            {
                "file": str(output),
                "pictures": count,
                "positions": positions,
                "depth": depth,
                "codebook_size": tower.config.codebook_size,
                "bad": [{"name": name, "reason": reason} for name, reason in done.bad],
                "tower_sha256": done.tower,
            }
        )
        return
    typer.echo(str(output))


def detokenize(
    codes: Path = typer.Argument(..., metavar="CODES", help="A file that `vilau tokenize` wrote."),
    output: Path = typer.Option(..., "--output", "-o", help="Folder for the pictures; it is made if need be."),
    model: str | None = typer.Option(None, "--model", help=TOWER_HELP + " It must be the one that made the codes."),
    depth: int | None = typer.Option(
        None, callback=within(1, 1024), help="Draw from the first so many codes of each position only; all if absent."
    ),
    original_size: bool = typer.Option(
        False, "--original-size", help="Resize each picture to the size it came in; otherwise the tower's square."
    ),
    format: str = typer.Option("png", help="png, jpg or webp."),
    batch_size: int = typer.Option(32, callback=within(1, 65536), help="Pictures decoded at a time."),
    device: str | None = typer.Option(None, help=DEVICE_HELP),
    force: bool = typer.Option(False, "--force", help="Overwrite existing files."),
    as_json: bool = typer.Option(False, "--json", help=JSON_HELP),
) -> None:
    """Draw pictures from codes. Prints the files written.

    \b
      vilau detokenize codes.safetensors -o seen/
      vilau detokenize codes.safetensors -o coarse/ --depth 1     what the first code of each position tells
    """
    if format not in ("png", "jpg", "webp"):
        raise typer.BadParameter(f"cannot write pictures as {format!r}: choose png, jpg or webp")
    if not codes.is_file():
        raise FileNotFoundError(f"no such file: {codes}")
    if output.exists() and not output.is_dir():
        raise ValueError(f"cannot write pictures into {output}: it is a file, and a folder is wanted")
    from vilau.visual_tokens import decode_pictures, file_names, read_codes

    stored = read_codes(codes)
    targets = [output / f"{name}.{format}" for name in file_names(stored.names)]
    taken = [target for target in targets if target.exists()]
    if taken and not force:
        raise FileExistsError(f"{taken[0]} exists: add --force to overwrite it")
    tower = _load(model, device)
    output.mkdir(parents=True, exist_ok=True)
    decode_pictures(tower, stored, targets, batch_size, depth, original_size, Ticker("drawing"))
    if as_json:
        print_json({"files": [str(target) for target in targets], "tower_sha256": stored.tower})
        return
    for target in targets:
        typer.echo(str(target))


def find_pictures(arguments: list[str]) -> list[Path]:
    """Return the pictures that arguments name: files as they are, folders searched through, patterns expanded.

    A file named twice is taken once.

    Raises:
        FileNotFoundError: a file or folder is not there, or a pattern matches nothing.
        ValueError: a folder holds no picture.
    """
    found: dict[Path, None] = {}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not inside:
                raise ValueError(f"the folder {path} holds no picture ({', '.join(SUFFIXES)})")
            found |= dict.fromkeys(inside)
        elif not path.exists() and re.search(r"[*?\[]", argument):
            matching = sorted(Path(name) for name in glob.glob(argument, recursive=True) if Path(name).is_file())
            if not matching:
                raise FileNotFoundError(f"no file matches the pattern {argument!r}")
            found |= dict.fromkeys(matching)
        elif not path.exists():
            raise FileNotFoundError(f"no such file or folder: {argument}")
        else:
            found[path] = None
    return list(found)


def _load(model: str | None, device: str | None) -> VisionTower:
    """Return a tower on its device."""
    from vilau.shipped import find_tower

    find_tower(model)
    quiet_libraries()
    from vilau.cli.common import use_one_thread_if_small
    from vilau.evaluation.tower_suite import load_tower
    from vilau.pipeline import choose_device

    target = choose_device(device)
    tower: Any = load_tower(model).to(target)  # type: ignore[arg-type]
    if target.type == "cpu":
        use_one_thread_if_small(sum(parameter.numel() for parameter in tower.parameters()))
    return tower
