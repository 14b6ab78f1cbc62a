"""`vilau demo`: one page that needs nothing else, one contact sheet, and the facts it states."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vilau.cli.demo import CREDIT, TITLES, Item, mean_seconds
from vilau.cli.demo_page import data_url, page, same, sheet
from vilau.shipped import SHIPPED_MODEL

FACTS = {
    "model": "shipped",
    "parameters": 5_000_000,
    "device": "cpu",
    "seed": 1,
    "loading_seconds": 1.0,
    "total_seconds": 20.0,
    "peak_memory_mb": 500,
    "items": 6,
    "mean_seconds": {"picture": 0.5, "film": 2.0, "answer": 0.1},
}


def drawn(seed: int, frames: int = 1) -> list[Image.Image]:
    """Pictures of noise."""
    noise = np.random.default_rng(seed).integers(0, 255, (frames, 32, 32, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in noise]


def colours(image: Image.Image) -> set[int]:
    """The colours that occur in a picture."""
    return set(np.unique(np.asarray(image.convert("RGB")).astype(np.int64) @ (65536, 256, 1)).tolist())


def items() -> list[Item]:
    """One item of each kind, with texts that would break a careless page."""
    return [
        Item("picture", 'a <b>bold</b> "apple" & pear', made=drawn(1), seconds=0.5),
        Item("film", "a frog", made=drawn(2, 4), seconds=2.0),
        Item("description", "", [drawn(3)], answer="<script>alert(1)</script>", wanted="a dog", seconds=0.1),
        Item("answer", "how many?", [drawn(4, 4)], answer="Two.", wanted="two", seconds=0.1),
        Item("easy_vqa", "what shape?", [drawn(5)], answer="", wanted="circle", seconds=0.1),
        Item("chat", "w" * 300, answer="x" * 2000, seconds=0.2),
    ]


def test_page_is_self_contained_and_escaped() -> None:
    """The page opens from a disk without a network: data URLs only, no scripts, and text is text."""
    text = page(items(), FACTS, TITLES, CREDIT)
    addresses = re.findall(r'(?:src|href)="([^"]*)"', text) + re.findall(r"url\(([^)]*)\)", text)
    assert addresses and all(address.startswith("data:image/") for address in addresses)
    assert "<script" not in text and "http" not in text and "@import" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "a &lt;b&gt;bold&lt;/b&gt;" in text
    for words in (*TITLES.values(), "Noto", "CC-BY 4.0", "easy-VQA", "500 MB", "image-rendering: pixelated"):
        assert words in text, words
    assert text.count('class="said good"') == 1 and "in the data: a dog" in text


def test_data_urls_hold_the_exact_pixels() -> None:
    """What the page shows is what the model drew."""
    import base64
    import io

    frames = drawn(7, 3)
    with Image.open(io.BytesIO(base64.b64decode(data_url(frames[:1]).partition(",")[2]))) as still:
        assert still.convert("RGB").tobytes() == frames[0].tobytes()
    with Image.open(io.BytesIO(base64.b64decode(data_url(frames).partition(",")[2]))) as moving:
        assert moving.n_frames == 3
        moving.seek(2)
        small = moving.convert("RGB").resize((32, 32), Image.Resampling.NEAREST)
        assert small.tobytes() == frames[2].tobytes()


def test_sheet_shows_everything() -> None:
    """The sheet grows with its content and shows the drawn pixels."""
    few, many = (sheet(items() * times, FACTS, TITLES, CREDIT) for times in (1, 3))
    assert few.width == many.width == 1280 and many.height > few.height
    assert colours(drawn(1)[0]) <= colours(few)


def test_comparing_answers() -> None:
    """Case and a full stop do not make an answer wrong; anything else does."""
    assert same(" Two. ", "two") and not same("two dogs", "two")
    assert mean_seconds(items())["film"] == 2.0


@pytest.mark.parametrize("name", ["demo", "new/deeper"])
def test_a_file_in_the_way(cli, tmp_path: Path, name: str) -> None:
    """A file where the folder should be is told before anything is loaded."""
    (tmp_path / name.split("/")[0]).write_text("x")
    result = cli("demo", "--out", tmp_path / name, "--model", "not-loaded")
    assert result.code == 1


def test_the_whole_demo(cli, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """`vilau demo` ends with two files and prints their paths; facts are there as JSON."""
    there = (SHIPPED_MODEL / "config.json").is_file()
    model = SHIPPED_MODEL if there else request.getfixturevalue("tiny_model_dir")
    result = cli("demo", "--out", tmp_path / "out", "--model", model, "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["contact-sheet.png", "index.html"]
    assert set(told["mean_seconds"]) == set(TITLES)
    assert told["peak_memory_mb"] > 100 and told["items"] >= 30
    assert Path(told["page"]).read_text(encoding="utf-8").count("<figure") == told["items"]


def browser() -> str | None:
    """A headless browser, if there is one."""
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


def test_the_page_looks_like_something_in_a_browser(tmp_path: Path) -> None:
    """A real browser lays the page out and shows the drawn pixels as squares."""
    found = browser()
    if found is None:
        assert os.environ.get("CI") != "true", "CI installs a browser (scripts/system-deps.sh), yet there is none"
        pytest.skip("no chromium: the page is not looked at")
    (tmp_path / "index.html").write_text(page(items(), FACTS, TITLES, CREDIT), encoding="utf-8")
    shot = tmp_path / "shot.png"
    command = [
        found,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path}/p",
    ]
    command += ["--window-size=1180,1400", f"--screenshot={shot}", (tmp_path / "index.html").as_uri()]
    subprocess.run(command, capture_output=True, timeout=240, check=True)
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (1400, 1180, 3)
    wanted = colours(drawn(1)[0])
    assert len(wanted & colours(Image.fromarray(pixels))) > 0.9 * len(wanted)
