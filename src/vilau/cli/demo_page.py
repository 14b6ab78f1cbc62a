"""The demo's HTML page and contact sheet: pure functions of what the model did."""

from __future__ import annotations

import base64
import html
import io
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from vilau.cli.demo import Item

FRAME_MS = 320

STYLE = """
:root { color-scheme: light dark; --paper: #faf8f5; --card: #ffffff; --ink: #23201c; --soft: #7a736a; --line: #e6e0d8;
  --good: #2f7d4f; --bad: #b4532a; --accent: #5b4bd6; }
@media (prefers-color-scheme: dark) { :root { --paper: #16151a; --card: #201f26; --ink: #ece9e4; --soft: #9a948b;
  --line: #33313b; --good: #6cc592; --bad: #e59a72; --accent: #a89cff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 48px 24px 64px; }
h1 { font-size: 40px; line-height: 1.1; margin: 0 0 12px; letter-spacing: -0.02em; }
h1 em { font-style: normal; color: var(--accent); }
.lead { font-size: 18px; color: var(--soft); max-width: 46em; margin: 0 0 24px; }
.facts { display: flex; flex-wrap: wrap; gap: 8px; margin: 0 0 8px; padding: 0; list-style: none; }
.facts li { background: var(--card); border: 1px solid var(--line); border-radius: 999px; padding: 4px 14px;
  font-size: 14px; }
.facts b { font-variant-numeric: tabular-nums; }
h2 { font-size: 22px; margin: 48px 0 4px; letter-spacing: -0.01em; }
.note { color: var(--soft); margin: 0 0 16px; font-size: 14px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(156px, 1fr)); gap: 16px; }
.wide { grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 14px; overflow: hidden; }
figure img { display: block; width: 100%; aspect-ratio: 1; image-rendering: pixelated; }
figcaption { padding: 10px 12px 12px; font-size: 14px; line-height: 1.35; }
.row { display: grid; grid-template-columns: 128px 1fr; }
.row img { width: 128px; height: 128px; align-self: center; }
.row figcaption { padding: 12px 14px; align-self: center; }
.asked { color: var(--soft); display: block; }
.said { display: block; font-size: 16px; font-weight: 600; margin: 2px 0 4px; overflow-wrap: anywhere; }
.good { color: var(--good); } .bad { color: var(--bad); }
.time { color: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; display: block; margin-top: 4px; }
footer { margin-top: 56px; padding-top: 16px; border-top: 1px solid var(--line); color: var(--soft); font-size: 13px; }
@media (prefers-reduced-motion: reduce) { .film { animation: none; } }
"""

NOTES = {
    "picture": "One try each, fixed seed, none left out. No object was seen on its background in training.",
    "film": "Combinations not seen in training; the frames repeat.",
    "description": "Real pictures and a film of combinations not used in training. Green: as the data have it.",
    "answer": "Real pictures and a film of combinations not used in training. Green: as the data have it.",
    "easy_vqa": "Pictures and questions of its untouched test set. Green: as the data have it.",
    "chat": "Questions held out of training. Green: as the data have it.",
}


def page(items: Sequence[Item], facts: Mapping[str, Any], titles: Mapping[str, str], credit: str) -> str:
    """One self-contained HTML page: data URLs, no scripts, no network."""
    sections = []
    for kind, title in titles.items():
        chosen = [item for item in items if item.kind == kind]
        if chosen:
            cards = "\n".join(_card(item) for item in chosen)
            wide = "" if kind in ("picture", "film") else " wide"
            sections.append(
                f'<section><h2>{html.escape(title)}</h2><p class="note">{html.escape(NOTES[kind])}</p>\n'
                f'<div class="grid{wide}">\n{cards}\n</div></section>'
            )
    chips = "".join(f"<li>{html.escape(name)} <b>{html.escape(value)}</b></li>" for name, value in _chips(facts))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>vilau: what one small model does</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>One model that <em>sees</em> and <em>draws</em></h1>
<p class="lead">The drawings, films and answers below all come from one network of
{facts["parameters"] / 1e6:.1f} million parameters: pictures become words of a visual language, and one language model
reads and writes both.</p>
<ul class="facts">{chips}</ul>
{chr(10).join(sections)}
<footer>{html.escape(credit)}<br>Made by <code>vilau demo</code>, seed {facts["seed"]}.</footer>
</main>
</body>
</html>
"""


def _chips(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = {"picture": "a picture", "film": "a film", "answer": "an answer"}
    chips = [(names[kind], f"{value:.2f} s") for kind, value in facts["mean_seconds"].items() if kind in names]
    return [
        *chips,
        ("items", str(facts["items"])),
        ("in all", f"{facts['total_seconds']:.0f} s"),
        ("peak memory", f"{facts['peak_memory_mb']} MB"),
        ("device", str(facts["device"])),
        ("model", str(facts["model"]).rstrip("/").rsplit("/", 1)[-1]),
    ]


def _card(item: Item) -> str:
    time = f'<span class="time">{item.seconds:.2f} s</span>'
    if item.made:
        words = html.escape(item.prompt)
        return f'<figure><img alt="{words}" src="{data_url(item.made)}"><figcaption>{words}{time}</figcaption></figure>'
    mark, hint = "", ""
    if item.wanted:
        right = same(item.answer, item.wanted)
        mark = " good" if right else " bad"
        hint = "" if right else f'<span class="asked">in the data: {html.escape(item.wanted)}</span>'
    asked = f'<span class="asked">{html.escape(item.prompt)}</span>' if item.prompt else ""
    said = f'<span class="said{mark}">{html.escape(item.answer) or "(nothing)"}</span>'
    shown = "".join(f'<img alt="" src="{data_url(frames)}">' for frames in item.shown)
    row = ' class="row"' if shown else ""
    return f"<figure{row}>{shown}<figcaption>{asked}{said}{hint}{time}</figcaption></figure>"


def same(answer: str, wanted: str) -> bool:
    """Whether two answers say the same, letters' case and a full stop aside."""
    return answer.strip().rstrip(".").lower() == wanted.strip().rstrip(".").lower()


def data_url(frames: Sequence[Image.Image]) -> str:
    """A picture as PNG, or the frames of a film as an endless GIF-like WebP, as a data URL."""
    out = io.BytesIO()
    if len(frames) == 1:
        frames[0].save(out, format="PNG")
        return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    big = [frame.resize((frame.width * 4, frame.height * 4), Image.Resampling.NEAREST) for frame in frames]
    big[0].save(out, format="WEBP", save_all=True, append_images=big[1:], duration=FRAME_MS, loop=0, lossless=True)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


# -- the contact sheet -------------------------------------------------------------------------------------------------

WIDTH, MARGIN, GAP = 1280, 36, 16
PAPER, INK, SOFT, GOOD, BAD = "#faf8f5", "#23201c", "#7a736a", "#2f7d4f", "#b4532a"


class _Sheet:
    """A page that grows downwards."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (WIDTH, 8000), PAPER)
        self.pen = ImageDraw.Draw(self.image)
        self.y = MARGIN

    def text(self, x: int, y: int, words: str, size: int, width: int, colour: str = INK, lines: int = 4) -> int:
        """Write wrapped words and return the height they took."""
        font = ImageFont.load_default(size)
        top = y
        for line in _wrap(words, font, width, lines):
            self.pen.text((x, y), line, font=font, fill=colour)
            y += round(size * 1.3)
        return y - top

    def picture(self, x: int, y: int, frame: Image.Image, side: int) -> None:
        self.image.paste(frame.resize((side, side), Image.Resampling.NEAREST), (x, y))

    def done(self) -> Image.Image:
        return self.image.crop((0, 0, WIDTH, min(self.y + MARGIN, self.image.height)))


def sheet(items: Sequence[Item], facts: Mapping[str, Any], titles: Mapping[str, str], credit: str) -> Image.Image:
    """Everything on one picture, 1280 px wide."""
    out = _Sheet()
    out.y += out.text(MARGIN, out.y, "vilau: one model that sees and draws", 34, WIDTH - 2 * MARGIN)
    chips = "  ·  ".join(f"{name} {value}" for name, value in _chips(facts))
    line = f"{facts['parameters'] / 1e6:.1f} million parameters  ·  {chips}"
    out.y += 6 + out.text(MARGIN, out.y + 6, line, 15, WIDTH - 2 * MARGIN, SOFT)
    for kind, title in titles.items():
        chosen = [item for item in items if item.kind == kind]
        if not chosen:
            continue
        out.y += 26
        out.y += 10 + out.text(MARGIN, out.y, title, 21, WIDTH - 2 * MARGIN)
        if kind == "picture":
            _grid(out, chosen, 6, _drawn_cell)
        elif kind == "film":
            _grid(out, chosen, 2, _film_cell)
        else:
            _grid(out, chosen, 3, _said_cell)
    out.y += 24
    out.y += out.text(MARGIN, out.y, credit, 13, WIDTH - 2 * MARGIN, SOFT)
    return out.done()


def _grid(out: _Sheet, items: Sequence[Item], columns: int, cell: Any) -> None:
    width = (WIDTH - 2 * MARGIN - (columns - 1) * GAP) // columns
    for first in range(0, len(items), columns):
        tall = 0
        for place, item in enumerate(items[first : first + columns]):
            tall = max(tall, cell(out, MARGIN + place * (width + GAP), out.y, width, item))
        out.y += tall + GAP


def _drawn_cell(out: _Sheet, x: int, y: int, width: int, item: Item) -> int:
    out.picture(x, y, item.made[0], width)
    words = out.text(x, y + width + 6, item.prompt, 15, width)
    return width + 6 + words + out.text(x, y + width + 6 + words, f"{item.seconds:.2f} s", 12, width, SOFT)


def _film_cell(out: _Sheet, x: int, y: int, width: int, item: Item) -> int:
    frames = item.made[:8]
    side = (width - 4 * (len(frames) - 1)) // len(frames)
    for place, frame in enumerate(frames):
        out.picture(x + place * (side + 4), y, frame, side)
    words = out.text(x, y + side + 6, f"{item.prompt}  ({item.seconds:.2f} s)", 15, width)
    return side + 6 + words


def _said_cell(out: _Sheet, x: int, y: int, width: int, item: Item) -> int:
    side = 112 if item.shown else 0
    if item.shown:
        frames = item.shown[0]
        if len(frames) == 1:
            out.picture(x, y, frames[0], side)
        else:
            for place, frame in enumerate(frames[:4]):
                out.picture(x + (place % 2) * (side // 2), y + (place // 2) * (side // 2), frame, side // 2)
    left, room, top = x + side + (12 if side else 0), width - side - 12, y
    if item.prompt:
        top += out.text(left, top, item.prompt, 14, room, SOFT, 3)
    right = not item.wanted or same(item.answer, item.wanted)
    top += out.text(left, top, item.answer or "(nothing)", 17, room, (GOOD if item.wanted else INK) if right else BAD)
    if not right:
        top += out.text(left, top, f"in the data: {item.wanted}", 13, room, SOFT, 2)
    top += out.text(left, top, f"{item.seconds:.2f} s", 12, room, SOFT)
    return max(side, top - y)


def _wrap(words: str, font: Any, width: int, lines: int) -> list[str]:
    """The first ``lines`` lines of a text; words too long for a line are cut. Costs the same however long the text."""
    found: list[str] = []
    for word in words[: lines * width].split():  # no letter is narrower than a pixel
        longer = f"{found[-1]} {word}" if found else word
        if found and font.getlength(longer) <= width:
            found[-1] = longer
            continue
        rest = word
        while rest and len(found) <= lines:
            cut = bisect_right(_Lengths(font, rest), width) or 1
            found.append(rest[:cut])
            rest = rest[cut:]
        if len(found) > lines:
            break
    return found[:lines]


class _Lengths(Sequence[float]):
    """Widths in pixels of the first 1, 2, 3 ... letters of a word, measured when asked for."""

    def __init__(self, font: Any, word: str) -> None:
        self.font, self.word = font, word

    def __len__(self) -> int:
        return len(self.word)

    def __getitem__(self, index: Any) -> Any:
        return self.font.getlength(self.word[: index + 1])
