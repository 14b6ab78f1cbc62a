"""docs/finetune.md, followed: its commands as they stand, from a folder of pictures to a model of that style."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
from PIL import Image

import vilau

LEFT_OUT = ("a rabbit", "a lemon", "a gift", "a turtle")
STEPS = 100  # a quarter of the page's: enough to see the style


def commands(page: Path) -> list[list[str]]:
    """The shell commands of a page, in order."""
    blocks = re.findall(r"^```\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [shlex.split(line) for block in blocks for line in block.splitlines() if line]


def follow(command: list[str], folder: Path, root: Path) -> str:
    """Run one command in a folder; return what it printed."""
    first = {"python": [sys.executable], "vilau": [sys.executable, "-m", "vilau"]}[command[0]]
    more = [f"stages.sft.steps={STEPS}"] if command[1] == "train" else []
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [*first, *command[1:], *more], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr[-2000:]}"
    return done.stdout


def colour(picture: Image.Image) -> float:
    """Mean difference between a pixel's largest and smallest value."""
    pixels = np.asarray(picture).astype(float)
    return float((pixels.max(-1) - pixels.min(-1)).mean())


@pytest.fixture(scope="module")
def followed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The page's commands, run in a folder that has the project's examples and configurations; what each printed."""
    folder = tmp_path_factory.mktemp("finetune")
    for name in ("examples", "configs"):
        (folder / name).symlink_to(root / name)
    printed = {shlex.join(c): follow(c, folder, root) for c in commands(root / "docs" / "finetune.md")}
    return {**printed, "folder": str(folder)}


def test_the_page_has_the_whole_way(followed: dict[str, str]) -> None:
    """Data, a look at it, a check, training, a picture and an answer: each by one command that works."""
    verbs = [command.split()[1] for command in followed if command != "folder"]
    assert verbs == ["examples/gray_pictures.py", "data", "data", "train", "generate", "ask"]
    assert (Path(followed["folder"]) / "cat.png").is_file()
    answer = next(printed for command, printed in followed.items() if command.startswith("vilau ask"))
    assert answer.strip().startswith("a gray picture of ")


def test_style_reaches_what_the_folder_does_not_show(followed: dict[str, str]) -> None:
    """Things left out of the folder are drawn without colours, by the merged model and by base and adapter alike."""
    final = Path(followed["folder"]) / "runs" / "finetune-lora" / "sft" / "final"
    sampling = {"guidance_scale": 2.0, "temperature": 0.5, "seed": 1}
    base, merged, adapted = vilau.load(), vilau.load(final), vilau.load()
    peft.PeftModel.from_pretrained(adapted.model, final / "adapter")
    before, after, beside = (
        [model.draw(f"a gray picture of {thing}", **sampling)[0] for thing in LEFT_OUT]
        for model in (base, merged, adapted)
    )
    assert np.mean([colour(p) for p in after]) < 0.6 * np.mean([colour(p) for p in before])
    assert np.mean([colour(p) for p in beside]) < 0.6 * np.mean([colour(p) for p in before])
