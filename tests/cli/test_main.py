"""How errors leave the program: exit codes, one line, no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from vilau.cli import main as program

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src")}


def vilau(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The real program in a process of its own."""
    environment = {**ENVIRONMENT, **more}
    command = [sys.executable, "-m", "vilau", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("group", [[], ["data"], ["bench"], ["experiments"]])
def test_help_says_in_whole_sentences_what_each_command_does(cli, group: list[str]) -> None:
    """A list of commands is read in a narrow terminal too: none of its lines is cut."""
    result = cli(*group, "--help")
    listed = result.out.split("Commands:")[1].splitlines()
    assert result.code == 0 and len(listed) > 1
    assert not [line for line in listed if line.endswith("...")]


def test_no_command_shows_help_on_stdout(cli) -> None:
    """A stranger who types `vilau` learns the verbs."""
    result = cli()
    assert result.code == 0 and result.err == ""
    for verb in ("generate", "ask", "train", "data", "info", "eval", "demo"):
        assert verb in result.out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("generat",), "generate"),
        (("generate", "x", "-o", "x.png", "--guidance", "3"), "--guidance-scale"),
        (("generate",), "prompt"),
        (("generate", "x"), "--output"),
        (("data",), "command"),
        (("generate", "x", "-o", "x.png", "--n", "many"), "--n"),
    ],
)
def test_wrong_usage_is_exit_2_in_one_line(cli, arguments: tuple[str, ...], named: str) -> None:
    """Scripts can tell wrong usage from failure, people see what was wrong and what was meant."""
    result = cli(*arguments)
    assert result.code == 2 and result.out == ""
    assert named in result.error


def raising(error: BaseException) -> typer.Typer:
    """A program whose one verb fails."""
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a\nlong\nstory"), 1, "vilau: a long story"),
        (FileNotFoundError(2, "No such file or directory", "x.png"), 1, "vilau: x.png: No such file or directory"),
        (KeyboardInterrupt(), 130, "vilau: stopped"),
        (RuntimeError("broken"), 1, "vilau: unexpected RuntimeError: broken (VILAU_DEBUG=1 shows where)"),
        (ValueError(), 1, "vilau: ValueError"),
        (typer.Exit(143), 143, ""),
    ],
)
def test_each_kind_of_error(cli, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str) -> None:
    """No error, foreseen or not, shows a traceback or more than one line."""
    monkeypatch.setattr(program, "app", raising(error))
    result = cli()
    assert (result.code, result.out) == (code, "")
    assert result.err == (line + "\n" if line else "")


def test_debug_lets_the_traceback_through(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever hunts an error can see where it came from."""
    monkeypatch.setattr(program, "app", raising(ValueError("here")))
    monkeypatch.setenv("VILAU_DEBUG", "1")
    with pytest.raises(ValueError, match="here"):
        program.main([])


def test_very_long_messages_are_cut(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pasted novel as a prompt must not come back as the error."""
    monkeypatch.setattr(program, "app", raising(ValueError("word " * 10_000)))
    assert len(cli().error) < 700


def test_the_real_program_ends_with_the_same_codes(tmp_path: Path) -> None:
    """What the tests above see inside holds for the process: code, one line on stderr, nothing on stdout."""
    missing = vilau("ask", str(tmp_path / "missing.png"))
    assert (missing.returncode, missing.stdout) == (1, "")
    assert missing.stderr.count("\n") == 1 and "no such file" in missing.stderr
    wrong = vilau("generate", "an apple", "-o", "apple.exe")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.count("\n") == 1 and ".png" in wrong.stderr


@pytest.mark.skipif(os.name != "posix", reason="interrupts are sent by signal")
def test_interrupt_is_one_line_and_130(tmp_path: Path) -> None:
    """Ctrl-C in the middle of the work ends it quietly, with nothing left behind."""
    code = (
        "import os, signal, vilau.cli.generate as g\n"
        "g.load_pipeline = lambda *a: os.kill(os.getpid(), signal.SIGINT)\n"
        "from vilau.cli.main import run\nrun()"
    )
    command = [sys.executable, "-c", code, "generate", "x", "-o", str(tmp_path / "x.png")]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "vilau: stopped\n"
    assert list(tmp_path.iterdir()) == []
