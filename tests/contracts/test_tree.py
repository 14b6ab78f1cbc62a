"""What is tracked: its size, what it must not mention, and that its configurations and commands are real."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MEGABYTE = 1_000_000


def tracked() -> list[Path]:
    """Files that git tracks; of an unpacked archive, everything outside the usual caches."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if done.returncode == 0 and done.stdout:
        return [ROOT / name for name in done.stdout.decode().split("\0") if name and (ROOT / name).is_file()]
    skipped = {".git", ".venv", ".pytest_cache", ".ruff_cache", ".mypy_cache", "__pycache__", ".hypothesis"}
    return [path for path in ROOT.rglob("*") if path.is_file() and not skipped & set(path.relative_to(ROOT).parts)]


def texts() -> list[tuple[Path, str]]:
    """Tracked files that hold text."""
    found = []
    for path in tracked():
        data = path.read_bytes()
        if b"\0" not in data[:8192] and len(data) < 5 * MEGABYTE:
            found.append((path, data.decode("utf-8", errors="replace")))
    return found


def test_tracked_tree_stays_small() -> None:
    """A clone takes seconds: the tree stays under 50 MB."""
    sizes = {path: path.stat().st_size for path in tracked()}
    largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
    assert sum(sizes.values()) < 50 * MEGABYTE, f"largest: {[str(path.relative_to(ROOT)) for path in largest]}"


def test_no_file_names_a_machine_or_a_registry_host() -> None:
    """What is committed holds on any machine: no absolute paths of one, no addresses of package registries."""
    home, work = "/ro" + "ot/", "/wo" + "rk/"
    hosts = [
        "registry." + "npmjs",
        "pypi." + "org",
        "pythonhosted." + "org",
        "deb." + "debian",
        "download." + "pytorch",
    ]
    pattern = re.compile(
        "|".join(re.escape(word) for word in [home, work, *hosts]) + r"|/home/[a-z]+/|/Users/[A-Za-z]+/"
    )
    found = [f"{path.relative_to(ROOT)}: {match.group()}" for path, text in texts() if (match := pattern.search(text))]
    assert found == []


def test_licence_and_notices_are_there() -> None:
    """The licence is whole, and whoever's work is in the package is named."""
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    notice = (ROOT / "NOTICE").read_text()
    for name in ("Noto", "Twemoji", "easy-VQA", "CC-BY 4.0", "MIT"):
        assert name in notice


def test_pins_cover_every_dependency() -> None:
    """`constraints.txt` pins each dependency of the package and of its tests, torch without a local version."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.split(r"[<>=\[ ]", line)[0].lower() for line in wanted}
    assert sorted(names - {name.lower() for name in pins}) == []
    assert not any("+" in version for version in pins.values())


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_parses_and_builds(path: Path) -> None:
    """A shipped configuration with a wrong key, or sizes that do not fit together, fails here and not after hours."""
    from transformers import AutoTokenizer

    from vilau.data.nano.world import ASSETS
    from vilau.training.config import load_config
    from vilau.training.model_config import build_config

    built = build_config(load_config(path), AutoTokenizer.from_pretrained(ASSETS / "tokenizer"))
    assert built.vision_config.num_positions > 0


def commands(text: str) -> list[list[str]]:
    """The `vilau ...` lines of a document's shell blocks."""
    found, language = [], None
    for line in text.splitlines():
        if line.startswith("```"):
            language = line[3:].strip() if language is None else None
        elif language in ("bash", "sh", "console", "") and line.removeprefix("$ ").startswith("vilau "):
            found.append(shlex.split(line.removeprefix("$ "), comments=True))
    return found


def documents() -> list[Path]:
    """The README and everything under docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_documented_commands_exist() -> None:
    """Every `vilau VERB --option` in the README and docs is one that the command line knows."""
    from typer.main import get_command

    from vilau.cli.main import app

    root = get_command(app)
    checked = 0
    for document in documents():
        for words in commands(document.read_text(encoding="utf-8")):
            command, rest = root, words[1:]
            while rest and getattr(command, "commands", None) and not rest[0].startswith("-"):
                assert rest[0] in command.commands, f"{document.name}: no such command: {' '.join(words)}"
                command, rest = command.commands[rest[0]], rest[1:]
            known = {option for parameter in command.params for option in parameter.opts} | {"-h", "--help"}
            for word in rest:
                if word.startswith("-") and not word.lstrip("-")[:1].isdigit():
                    assert word.split("=")[0] in known, f"{document.name}: no such option: {' '.join(words)}"
            checked += 1
    assert checked >= 5


def test_documented_make_targets_exist() -> None:
    """Every `make TARGET` in the README and CONTRIBUTING is in the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    for name in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"`make ([a-z-]+)`", (ROOT / name).read_text()))
        assert named <= targets, f"{name}: {named - targets}"


def test_paths_in_the_readme_exist() -> None:
    """The README shows no picture and links no file that is not there."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    linked += re.findall(r'src="([^"]+)"', text)
    assert [target for target in linked if not (ROOT / target).exists()] == []


def test_module_entry_points_agree() -> None:
    """`python -m vilau` is the same program as the `vilau` script."""
    import os

    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-m", "vilau", "--version"], capture_output=True, text=True, env=environment, check=False
    )
    import vilau

    assert (done.returncode, done.stdout.strip()) == (0, f"vilau {vilau.__version__}")
