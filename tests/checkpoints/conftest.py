from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from vilau.model import VilaUForConditionalGeneration

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def released() -> Path:
    """A small random checkpoint in the released layout."""
    return GOLDEN / "tiny256" / "ckpt"


@pytest.fixture(scope="session")
def released_384() -> Path:
    """The same kind with 27x27 positions, depth 16, linear RoPE scaling and resized latents."""
    return GOLDEN / "tiny384" / "ckpt"


@pytest.fixture(scope="session")
def model(released: Path) -> VilaUForConditionalGeneration:
    return VilaUForConditionalGeneration.from_pretrained(released).eval()


@pytest.fixture
def copy(released: Path, tmp_path: Path) -> Path:
    """A copy of the released checkpoint that a test may break; its large files are links until they are replaced."""
    target = tmp_path / "ckpt"
    for file in released.rglob("*"):
        if file.is_file():
            place = target / file.relative_to(released)
            place.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".safetensors":
                os.symlink(file, place)
            else:
                shutil.copyfile(file, place)
    return target
