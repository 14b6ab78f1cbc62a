"""Running the command line inside the test, with its exit code and both streams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@dataclass(frozen=True)
class Result:
    """Exit code, stdout and stderr of one command."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line on stderr that an error must be."""
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Call with the arguments of `vilau`; errors leave it exactly as they leave the program."""
    from vilau.cli.main import main

    monkeypatch.delenv("VILAU_DEBUG", raising=False)

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A small PNG of a red square on blue."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:] = (40, 60, 220)
    pixels[10:30, 20:40] = (220, 40, 40)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """A GIF of four different frames."""
    frames = [Image.new("RGB", (48, 32), (60 * index, 80, 120)) for index in range(4)]
    path = tmp_path / "film.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    return path
