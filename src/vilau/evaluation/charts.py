"""Line charts as SVG, in rows of panels that share their lines' colours; no plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLOURS = ("#0b62a4", "#d1495b", "#2e933c", "#8d5a97", "#e08e1b", "#3d3d3d", "#17a2b8", "#a05a2c")
PANEL_WIDTH, PANEL_HEIGHT, LEGEND_WIDTH, MARGIN = 250, 150, 150, 44

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """One chart: `lines` by name, each points (x, y), and optionally a dashed horizontal `level`, such as chance."""

    title: str
    lines: Mapping[str, Points]
    level: float | None = None


def svg(rows: Sequence[tuple[str, Sequence[Panel]]], x_label: str) -> str:
    """Return an SVG with one titled row of panels after the other; a row's legend stands at its right."""
    columns = max((len(panels) for _, panels in rows), default=1)
    width = columns * (PANEL_WIDTH + MARGIN) + LEGEND_WIDTH + MARGIN
    row_height = PANEL_HEIGHT + 70
    height = len(rows) * row_height + 10
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, (title, panels) in enumerate(rows):
        top = number * row_height + 38
        parts.append(f'<text x="{MARGIN}" y="{top - 20}" font-size="13" font-weight="bold">{escape(title)}</text>')
        names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
        colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
        for column, panel in enumerate(panels):
            parts += _panel(panel, colours, MARGIN + column * (PANEL_WIDTH + MARGIN), top, x_label)
        left = MARGIN + columns * (PANEL_WIDTH + MARGIN) - 16
        for place, (name, colour) in enumerate(colours.items()):
            y = top + 12 + 16 * place
            parts.append(f'<line x1="{left}" y1="{y - 4}" x2="{left + 18}" y2="{y - 4}" {_stroke(colour)}/>')
            parts.append(f'<text x="{left + 24}" y="{y}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, colours: Mapping[str, str], left: float, top: float, x_label: str) -> list[str]:
    points = [point for line in panel.lines.values() for point in line if math.isfinite(point[1])]
    out = [
        f'<text x="{left}" y="{top - 5}">{escape(panel.title)}</text>',
        f'<rect x="{left}" y="{top}" width="{PANEL_WIDTH}" height="{PANEL_HEIGHT}" fill="none" stroke="#999"/>',
    ]
    if not points:
        return out
    heights = [y for _, y in points] + ([panel.level] if panel.level is not None else [])
    low, high = min(heights), max(heights)
    room = (high - low or 1.0) * 0.06
    low, high = low - room, high + room
    right = max(x for x, _ in points) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return left + PANEL_WIDTH * x / right, top + PANEL_HEIGHT * (1 - (y - low) / (high - low))

    for tick in _ticks(low, high):
        _, y = place(0, tick)
        out.append(f'<line x1="{left - 3}" y1="{y:.1f}" x2="{left}" y2="{y:.1f}" stroke="#999"/>')
        out.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end" font-size="9">{tick:g}</text>')
    ends = f'y="{top + PANEL_HEIGHT + 12}" font-size="9"'
    out.append(f'<text x="{left}" {ends}>0</text>')
    out.append(f'<text x="{left + PANEL_WIDTH}" {ends} text-anchor="end">{right:g} {escape(x_label)}</text>')
    if panel.level is not None:
        _, y = place(0, panel.level)
        span = f'x1="{left}" y1="{y:.1f}" x2="{left + PANEL_WIDTH}" y2="{y:.1f}"'
        out.append(f'<line {span} stroke="#999" stroke-dasharray="4 3"/>')
    for name, line in panel.lines.items():
        drawn = [place(x, y) for x, y in line if math.isfinite(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
        out.append(f'<polyline points="{path}" fill="none" {_stroke(colours[name])}/>')
        if drawn:
            out.append(f'<circle cx="{drawn[-1][0]:.1f}" cy="{drawn[-1][1]:.1f}" r="2.4" fill="{colours[name]}"/>')
    return out


def _stroke(colour: str) -> str:
    return f'stroke="{colour}" stroke-width="1.6"'


def _ticks(low: float, high: float) -> list[float]:
    """Return about four round numbers between two."""
    raw = (high - low) / 4
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step)
    return [round(number * step, 10) for number in range(first, math.floor(high / step) + 1)]
