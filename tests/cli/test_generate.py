"""`vilau generate`: arguments, output files, and what is left behind when it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from vilau.cli.generate import enlarge, numbered, shown_factor


def left(folder: Path) -> list[str]:
    """Names in a folder, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


def test_one_picture(cli, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The path alone goes to stdout; the picture is enlarged so that one can see it."""
    target = tmp_path / "apple.png"
    result = cli("generate", "a red apple", "-o", target, "--model", tiny_model_dir, "--seed", 3)
    assert (result.code, result.out) == (0, f"{target}\n")
    assert left(tmp_path) == ["apple.png"]
    with Image.open(target) as image:
        assert (image.format, image.size, image.mode) == ("PNG", (256, 256), "RGB")


def test_many_pictures_are_numbered_and_told_as_json(cli, tiny_model_dir: Path, tmp_path: Path) -> None:
    """`--n 3` writes apple-1.jpg ..., and `--json` prints JSON alone with what is needed to repeat it."""
    common = ("generate", "a red apple", "--model", tiny_model_dir, "--n", 3, "--upscale", 1, "--json")
    result = cli(*common, "-o", tmp_path / "apple.jpg", "--guidance-scale", 1.5)
    assert result.code == 0
    told = json.loads(result.out)
    assert told["files"] == [str(tmp_path / f"apple-{index}.jpg") for index in (1, 2, 3)]
    assert left(tmp_path) == ["apple-1.jpg", "apple-2.jpg", "apple-3.jpg"]
    assert told["size"] == [32, 32] and told["settings"] == {"guidance_scale": 1.5}
    again = tmp_path / "again"
    again.mkdir()
    cli(*common, "-o", again / "apple.jpg", "--guidance-scale", 1.5, "--seed", told["seed"])
    assert (again / "apple-2.jpg").read_bytes() == (tmp_path / "apple-2.jpg").read_bytes()


@pytest.mark.parametrize("suffix", [".mp4", ".webp", ".gif"])
def test_films_in_every_format(cli, tiny_model_dir: Path, tmp_path: Path, suffix: str) -> None:
    """A film can be read back with the frames that were asked for."""
    from vilau.processing.videos import load_video, media_kind

    target = tmp_path / f"film{suffix}"
    result = cli("generate", "a frog", "--video", "-o", target, "--model", tiny_model_dir, "--frames", 2, "--seed", 1)
    assert (result.code, result.out) == (0, f"{target}\n")
    assert media_kind(target) == "video"
    first, second = load_video(target, 2)
    assert first.size == (256, 256) and first.tobytes() != second.tobytes()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("-o", "x.tiff"), (".png, .jpg, .jpeg, .webp",)),
        (("-o", "x"), (".png",)),
        (("-o", "x.mp4"), (".png", "--video")),
        (("-o", "x.png", "--video"), (".mp4, .webp, .gif",)),
        (("-o", "x.png", "--frames", "2"), ("--video",)),
        (("-o", "x.png", "--n", "0"), ("--n", "0", "from 1 to 64")),
        (("-o", "x.png", "--n", "1000000000"), ("1000000000", "64")),
        (("-o", "x.png", "--guidance-scale", "-1"), ("-1.0", "from 0 to 100")),
        (("-o", "x.png", "--guidance-scale", "nan"), ("nan", "100")),
        (("-o", "x.png", "--temperature", "1e309"), ("inf", "100")),
        (("-o", "x.png", "--top-p", "0"), ("above 0 and at most 1",)),
        (("-o", "x.png", "--top-p", "1.5"), ("1.5", "at most 1")),
        (("-o", "x.png", "--top-k", "-1"), ("-1",)),
        (("-o", "x.png", "--seed", "-1"), ("-1",)),
        (("-o", "x.png", "--upscale", "0"), ("0", "from 1 to 64")),
        (("-o", "x.gif", "--video", "--frames", "100"), ("100", "from 1 to 64")),
    ],
)
def test_wrong_values_name_the_value_and_the_limit(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], named: tuple[str, ...]
) -> None:
    """Exit code 2 before anything is loaded or written."""
    monkeypatch.chdir(tmp_path)
    result = cli("generate", "a red apple", *arguments)
    assert (result.code, result.out) == (2, "")
    assert all(word in result.error for word in named), result.error
    assert left(tmp_path) == []


@pytest.mark.parametrize("prompt", ["", "  \n\t "])
def test_empty_prompt(cli, tmp_path: Path, prompt: str) -> None:
    """Nothing to draw is wrong usage."""
    result = cli("generate", prompt, "-o", tmp_path / "x.png")
    assert result.code == 2 and "prompt is empty" in result.error


def test_targets_are_checked_before_the_work(cli, tiny_model_dir: Path, tmp_path: Path) -> None:
    """A missing folder, a folder in the way, or any existing file of several stops it before the model is loaded."""
    missing = cli("generate", "x", "-o", tmp_path / "no" / "x.png", "--model", "not-loaded")
    assert missing.code == 1 and "no folder" in missing.error
    (tmp_path / "dir.png").mkdir()
    folder = cli("generate", "x", "-o", tmp_path / "dir.png", "--model", "not-loaded", "--force")
    assert folder.code == 1 and "folder" in folder.error
    (tmp_path / "x-3.png").write_bytes(b"precious")
    taken = cli("generate", "x", "-o", tmp_path / "x.png", "--n", 3, "--model", "not-loaded")
    assert taken.code == 1 and "x-3.png" in taken.error and "--force" in taken.error
    assert (tmp_path / "x-3.png").read_bytes() == b"precious"
    forced = cli("generate", "x", "-o", tmp_path / "x.png", "--n", 3, "--model", tiny_model_dir, "--force")
    assert forced.code == 0
    assert left(tmp_path) == ["dir.png", "x-1.png", "x-2.png", "x-3.png"]


def test_a_prompt_longer_than_the_context(cli, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Too long a prompt says so, names the limit and writes nothing."""
    result = cli("generate", "apple " * 3000, "-o", tmp_path / "x.png", "--model", tiny_model_dir)
    assert result.code == 1 and "context" in result.error and "1024" in result.error
    assert left(tmp_path) == []


def test_special_tokens_and_unknown_letters_in_a_prompt(cli, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Any text is a prompt: special tokens in it are plain text, unknown letters are bytes."""
    words = "<image_start> </s> 🦖 Ωß \x07"
    assert cli("generate", words, "-o", tmp_path / "x.png", "--model", tiny_model_dir).code == 0


def test_a_failing_write_leaves_no_part_of_a_file(
    cli, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk in the middle of writing leaves neither half a picture nor a temporary file."""
    target = tmp_path / "x.png"
    target.write_bytes(b"old")

    def full(self: Image.Image, path: Path, *rest: object, **more: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", full)
    result = cli("generate", "x", "-o", target, "--model", tiny_model_dir, "--force")
    assert result.code == 1 and "No space left" in result.err
    assert left(tmp_path) == ["x.png"] and target.read_bytes() == b"old"


def test_numbering_and_enlarging() -> None:
    """Names keep their folder and suffix; each pixel becomes a square and nothing else."""
    assert numbered(Path("a/b.tar.png"), 2) == [Path("a/b.tar-1.png"), Path("a/b.tar-2.png")]
    assert [shown_factor(side) for side in (1, 32, 33, 255, 256, 1024)] == [256, 8, 8, 2, 1, 1]
    image = Image.new("RGB", (2, 1), "red")
    image.putpixel((1, 0), (0, 0, 255))
    (big,) = enlarge([image], 3)
    assert big.size == (6, 3) and big.getcolors() == [(9, (255, 0, 0)), (9, (0, 0, 255))]
