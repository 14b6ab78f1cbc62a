"""`vilau data inspect` and `vilau data check`: people see what is there and what is wrong before they train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from cli.conftest import Cli

DEBUG = Path(__file__).resolve().parents[2] / "configs" / "nano" / "debug.yaml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight pictures with captions."""
    root = tmp_path / "pets"
    root.mkdir()
    for number in range(8):
        Image.new("RGB", (40 + number, 30), (number * 30, 90, 200)).save(root / f"{number}.png")
        (root / f"{number}.txt").write_text(f"a cat on a {'red' if number % 2 else 'blue'} background")
    return root


def config_for(folder: Path, **stages: dict) -> Path:
    """The debug configuration over a folder."""
    raw = yaml.safe_load(DEBUG.read_text())
    raw["data"] = {"sources": [{"format": "folder", "path": str(folder)}], "workers": 0}
    raw["stages"] = {name: raw["stages"][name] | {"mixture": {}} | changes for name, changes in stages.items()}
    path = folder.parent / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_inspect_shows_what_is_there(cli: Cli, folder: Path, tmp_path: Path) -> None:
    """Counts, sizes, a contact sheet, and the tokens with marks at what is learnt."""
    sheet = tmp_path / "sheet.png"
    done = cli("data", "inspect", folder, "--samples", 8, "-o", sheet)
    assert done.code == 0, done.err
    assert "pets: 8 samples; of 8 read:" in done.out
    assert "width 40 to 47, 43.5 on average; height 30;" in done.out
    assert "picture 1" in done.out
    marked = [line.split() for line in done.out.splitlines() if " * " in line]
    assert any(words[-1] == "<image_end>" for words in marked)  # drawn in some samples
    assert any(words[-1] == "cat" for words in marked)  # said in others
    with Image.open(sheet) as picture:
        assert picture.width > 500
    again = cli("data", "inspect", folder, "-o", sheet)
    assert again.code == 1 and "--force" in again.error


def test_inspect_as_json(cli: Cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as JSON, nothing else on stdout; the sheet has a name by default."""
    monkeypatch.chdir(tmp_path)
    done = cli("data", "inspect", folder, "--json", "--samples", 1)
    facts = json.loads(done.out)
    assert facts["sheet"] == "contact-sheet.png" and (tmp_path / "contact-sheet.png").is_file()
    assert facts["sources"][0]["samples"] == 8 and facts["sources"][0]["bad"] == {}
    assert len(facts["sources"][0]["positions"]) == 1


def test_inspect_of_a_configuration_shows_the_text_encoder(cli: Cli, folder: Path, tmp_path: Path) -> None:
    """With stages of the tower, the caption's tokens that the text encoder reads, cut as it cuts them."""
    path = config_for(folder, align={})
    done = cli("data", "inspect", path, "--set", "text_encoder.max_position_embeddings=3", "-o", tmp_path / "s.png")
    assert "reads 3 of 6 tokens (its limit is 3): a | cat | on" in done.out
    assert "positions" not in done.out


def test_the_nano_world_is_looked_at_like_other_sources(cli: Cli, folder: Path, tmp_path: Path) -> None:
    """In a configuration of all stages its forms, pictures and tokens are shown, and all of it is checked."""
    path = config_for(folder, align={"mixture": {"pets": 1}}, sft={})
    nano = {"format": "nano", "samples": 40, "forms": {"question": 1, "text_image": 1}}
    raw = yaml.safe_load(path.read_text())
    raw["data"]["sources"].append(nano)
    path.write_text(yaml.safe_dump(raw))
    done = cli("data", "inspect", path, "-o", tmp_path / "s.png")
    assert done.code == 0, done.err
    assert "nano: 40 samples; of 40 read:" in done.out and "width 32; height 32; frames a sample 1" in done.out
    checked = cli("data", "check", path)
    assert (checked.code, checked.out.splitlines()) == (
        0,
        ["pets: 8 of 8 samples can be used", "nano: 40 of 40 samples can be used"],
    )


def test_check_finds_every_problem(cli: Cli, folder: Path) -> None:
    """All samples are read; problems come by kind and file, and the exit code says that there are some."""
    clean = cli("data", "check", folder)
    assert (clean.code, clean.out.splitlines()[0]) == (0, "pets: 8 of 8 samples can be used")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])
    (folder / "3.txt").unlink()
    (folder / "4.txt").write_text("a cat " * 200)
    done = cli("data", "check", config_for(folder, pretrain={"row_length": 64}))
    assert done.code == 1
    assert "pets: 5 of 8 samples can be used" in done.out
    for kind in ("broken_image", "missing_text", "too_long"):
        assert f"pets: {kind} 1 (in . 1)" in done.out
    assert "neither 3.txt nor 3.json is beside it" in done.out
    as_json = cli("data", "check", folder, "--json")
    facts = json.loads(as_json.out)["sources"]["pets"]
    assert as_json.code == 1 and facts["bad"] == {"broken_image": 1, "missing_text": 1}


def test_check_of_whole_sources_that_are_wrong(cli: Cli, folder: Path, tmp_path: Path) -> None:
    """A source that is not there is one of the problems; the others are read all the same."""
    path = config_for(folder, pretrain={})
    raw = yaml.safe_load(path.read_text())
    raw["data"]["sources"].append({"format": "webdataset", "path": str(tmp_path / "none")})
    path.write_text(yaml.safe_dump(raw))
    done = cli("data", "check", path)
    assert done.code == 1
    assert "pets: 8 of 8" in done.out and "there is no such file or folder" in done.out


def test_a_sample_that_does_not_fit_the_stage_is_one_problem(cli: Cli, folder: Path) -> None:
    """A question among pairs for the tower is counted with its reason, and the rest of its source is read."""
    rows = [("draw it", "<image>"), ("what is <image> this?", "a cat"), ("draw another", "<image>")]
    said = [
        {"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": other}], "images": ["0.png"]}
        for one, other in rows
    ]
    table = folder / "chats.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in said))
    path = config_for(folder, align={})
    raw = yaml.safe_load(path.read_text())
    raw["data"]["sources"] = [{"format": "messages", "path": str(table)}]
    path.write_text(yaml.safe_dump(raw))
    done = cli("data", "check", path)
    assert done.code == 1
    assert "chats.jsonl: 2 of 3 samples can be used" in done.out and "bad_record 1" in done.out
    assert "chats.jsonl/1 has form question" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/none"], "no such file or folder"),
        (["{folder}", "--format", "foldr"], "did you mean 'folder'?"),
        (["{folder}", "--set", "tempates=[a]"], "format folder has the fields"),
        (["{folder}", "--set", "min_side=0"], "min_side"),
        ([str(DEBUG)], "reads the nano world"),
        (["{folder}/0.txt"], "looks like none of the formats"),
        (["{folder}/empty"], "is empty: there is no data in it"),
    ],
)
def test_wrong_usage_is_one_line(cli: Cli, folder: Path, arguments: list[str], message: str) -> None:
    """Paths, formats and fields that do not exist are named, with the remedy."""
    (folder / "empty").mkdir()
    done = cli("data", "check", *[argument.format(folder=folder) for argument in arguments])
    assert done.code == 1 and message in done.error
