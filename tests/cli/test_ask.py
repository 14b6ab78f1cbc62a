"""`vilau ask`: which arguments are files, which is the question, and what broken files do."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest
import typer

from vilau.cli.ask import looks_like_file, sort_arguments


def test_an_answer_stands_alone_on_stdout(cli, tiny_model_dir: Path, picture: Path, film: Path) -> None:
    """Pictures, films and a question in any order; stdout can be piped on."""
    common = ("--model", tiny_model_dir, "--max-new-tokens", 4)
    result = cli("ask", picture, "what is it?", film, *common)
    assert result.code == 0 and result.out.count("\n") == 1
    told = json.loads(cli("ask", picture, "what is it?", film, "--json", *common).out)
    assert told["answer"] == result.out.strip()
    assert told["files"] == [str(picture), str(film)] and told["question"] == "what is it?"


def test_describing_and_chatting(cli, tiny_model_dir: Path, picture: Path, film: Path) -> None:
    """Without a question it describes, without a file it talks."""
    common = ("--model", tiny_model_dir, "--max-new-tokens", 2)
    assert [cli("ask", argument, *common).code for argument in (picture, film, "hello there")] == [0, 0, 0]


def test_sampled_answers_repeat_with_their_seed(cli, tiny_model_dir: Path) -> None:
    """A sampled answer can be had again."""
    common = ("ask", "hello", "--model", tiny_model_dir, "--max-new-tokens", 8, "--temperature", 5)
    first, second = (cli(*common, "--seed", 7).out for _ in range(2))
    assert first == second


def test_an_answer_with_pictures(cli, shipped_model_dir: Path, tmp_path: Path) -> None:
    """Text is printed and pictures are written, in order. The shipped model never learnt such answers: what is shown is
    that a prompt of its training is drawn."""
    out = tmp_path / "answer"
    common = ("ask", "a red apple on a blue background", "--draw-into", out, "--max-new-tokens", 8, "--max-pictures", 1)
    result = cli(*common, "--json")
    parts = json.loads(result.out)["parts"]
    assert result.code == 0
    written = [Path(part["file"]) for part in parts if part["type"] != "text"]
    assert len(written) == 1 and sorted(out.iterdir()) == written
    (out / "mine.txt").write_text("kept")
    again = cli(*common)
    assert again.code == 1 and "not empty" in again.error


def test_sorting_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Existing files are media whatever their name; what looks like a file and is none is an error, not a question."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "what is this").write_bytes(b"x")
    (tmp_path / "a.png").write_bytes(b"x")
    assert sort_arguments(["a.png", "what is this", "and this?"]) == (["a.png", "what is this"], "and this?")
    for missing in ("b.png", "B.JPG", "no/such/thing", "my film.mp4", "../x"):
        with pytest.raises(FileNotFoundError, match="no such file"):
            sort_arguments([missing])
    for question in ("is it a dog/cat ?", "really?", "a.b.c", "etc."):
        assert sort_arguments([question]) == ([], question)
    with pytest.raises(typer.BadParameter, match="two questions"):
        sort_arguments(["one?", "two?"])
    with pytest.raises(typer.BadParameter, match="empty"):
        sort_arguments(["a.png", " "])
    with pytest.raises(ValueError, match="folder"):
        sort_arguments([str(tmp_path)])
    assert looks_like_file("x" * 5000 + ".png") and not looks_like_file("?" * 5000)


def huge_png(side: int) -> bytes:
    """A few hundred bytes that claim ``side`` x ``side`` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("name", "data", "named"),
    [
        ("empty.png", b"", "empty"),
        ("words.png", b"these are words, not a picture", "cannot read"),
        ("cut.png", huge_png(64)[:-20], "cannot read"),
        ("huge.png", huge_png(30_000), "megapixels"),
        ("cut.gif", b"GIF89a\x10\0", "cannot read"),
        ("cut.mp4", b"\0\0\0\x18ftypisom\0\0\0\0isomiso2", "cannot read"),
        ("page.jpg", b"<html></html>", "cannot read"),
    ],
)
def test_broken_files_are_one_line_that_names_them(cli, tmp_path: Path, name: str, data: bytes, named: str) -> None:
    """A broken file fails before any model is loaded, with its name and no traceback."""
    path = tmp_path / name
    path.write_bytes(data)
    result = cli("ask", path, "what is it?", "--model", "not-loaded")
    assert (result.code, result.out) == (1, "")
    assert named in result.error and name in result.error


@pytest.mark.parametrize(
    "arguments",
    [("--max-new-tokens", "0"), ("--temperature", "0"), ("--temperature", "nan"), ("--frames", "0"), ("--seed", "-1")],
)
def test_out_of_range_numbers(cli, arguments: tuple[str, ...]) -> None:
    """Wrong usage, told before the model is loaded."""
    result = cli("ask", "hello", *arguments)
    assert result.code == 2 and arguments[0] in result.error


def test_no_argument_is_wrong_usage(cli) -> None:
    """There is nothing to ask."""
    assert cli("ask").code == 2


def test_a_question_longer_than_the_context(cli, tiny_model_dir: Path) -> None:
    """The limit is named."""
    result = cli("ask", "why " * 5000, "--model", tiny_model_dir)
    assert result.code == 1 and "context" in result.error


def test_an_answer_never_runs_past_the_context(cli, tiny_model_dir: Path) -> None:
    """A request for more tokens than there is room for gets the room there is."""
    result = cli("ask", "w " * 480, "--model", tiny_model_dir, "--max-new-tokens", 100_000)
    assert result.code == 0
