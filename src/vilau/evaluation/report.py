"""Results of a suite as a table and as Markdown: ``python -m vilau.evaluation.report RESULT.json -o FILE.md``"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Goal:
    """The least that a shipped nano model must reach: `least`, or that share of the metric's ceiling."""

    least: float
    of_ceiling: bool = False

    def bound(self, ceiling: float | None) -> float | None:
        """Return the bound as a figure; None where it depends on a ceiling that is not there."""
        if not self.of_ceiling:
            return self.least
        return None if ceiling is None else self.least * ceiling


GOALS: dict[str, Goal] = {
    "caption_object": Goal(0.90),
    "caption_background": Goal(0.98),
    "draw_object": Goal(0.60, of_ceiling=True),
    "draw_background": Goal(0.95),
    "film_motion": Goal(0.55),
}

MEANINGS: dict[str, str] = {
    "caption_object": "descriptions that name the object and no other",
    "caption_background": "descriptions that name the background and no other",
    "caption_exact": "descriptions in the standard wording, word for word",
    "caption_small_object": "the same, small objects",
    "caption_small_background": "",
    "caption_small_exact": "",
    "caption_shifted_object": "the same, objects off the middle",
    "caption_shifted_background": "",
    "caption_shifted_exact": "",
    "draw_object": "drawings in which the judge sees the object asked for",
    "draw_background": "drawings in which the judge sees the background asked for",
    "draw_object_nearest": "drawings whose nearest real render shows the object (second judge)",
    "draw_judges_agree": "drawings in which both judges see the same object",
    "film_motion": "films that move, grow or shrink as asked",
    "film_object": "films in which the judge sees the object asked for",
    "film_background": "films in which the judge sees the background asked for",
    "questions": "right answers on pictures, all kinds",
    "multi_image": "right answers on two pictures",
    "video_text": "right answers on films",
    "chat": "right answers to questions without pictures, none of them seen in training",
    "easy_vqa": "right answers, all test questions of easy-VQA",
    "easy_vqa_open": "right answers, those that are not yes or no",
    "reconstruction_psnr": "decibels, mean over pictures, vision tower alone",
    "reconstruction_psnr_scenes": "renders of held-out combinations",
    "reconstruction_psnr_easy_vqa": "test pictures of easy-VQA",
    "code_usage": "share of the codebook that these pictures use",
    "visual_cross_entropy": "nats per code, true prompts",
    "text_gap": "nats per code, shuffled minus true prompts",
}


@dataclass(frozen=True)
class Row:
    """One line of a report."""

    name: str
    value: str
    ceiling: str
    wanted: str
    items: str
    meaning: str
    reached: bool | None


def rows(result: Result) -> list[Row]:
    """Return one row per metric, in the suite's order; questions by kind come last."""
    ceilings, samples = result.get("ceilings", {}), result.get("samples", {})
    names = sorted(result["metrics"], key=lambda name: name.startswith("question_"))
    out = []
    for name in names:
        value, ceiling, goal = result["metrics"][name], ceilings.get(name), GOALS.get(name)
        bound = goal.bound(ceiling) if goal else None
        reached = None if bound is None or value is None else value >= bound
        out.append(
            Row(
                name,
                _figure(name, value),
                _figure(name, ceiling),
                "" if bound is None else _figure(name, bound),
                str(samples.get(name, "")),
                MEANINGS.get(name, ""),
                reached,
            )
        )
    return out


def table(result: Result) -> Any:
    """Return a `rich` table of a result."""
    from rich.table import Table

    out = Table(title="nano suite", title_justify="left")
    for heading in ("metric", "value", "ceiling", "wanted", "items"):
        out.add_column(heading, justify="left" if heading == "metric" else "right", no_wrap=True)
    out.add_column("meaning", overflow="fold")
    for row in rows(result):
        style = {True: "green", False: "red", None: None}[row.reached]
        out.add_row(row.name, row.value, row.ceiling, row.wanted, row.items, row.meaning, style=style)
    return out


def markdown(result: Result, command: str = "vilau eval --suite nano --json") -> str:
    """Return a page for docs/results."""
    protocol = result["protocol"]
    world, judge, sampling = protocol["world"], protocol["judge"], protocol["sampling"]
    held = world["combinations"].get("heldout", 0)
    total = sum(world["combinations"].values())
    lines = [
        "# The nano suite",
        "",
        f"Written by a command from what `{command}` printed; not edited by hand.",
        "",
        f"The world has {world['objects']} objects and {world['backgrounds']} background colours. "
        f"{held} of the {total} combinations are held out: training never shows them. "
        f"The figures are on the `{protocol['split']}` combinations.",
        "",
        "| metric | value | ceiling | wanted | items | what it is |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    lines += [f"| {r.name} | {_bold(r)} | {r.ceiling} | {r.wanted} | {r.items} | {r.meaning} |" for r in rows(result)]
    loose = {name: value for name, value in result["ceilings"].items() if name not in result["metrics"]}
    lines += ["", "## Beside the scores", "", "| figure | value |", "| --- | ---: |"]
    lines += [f"| judge on real renders: {name} | {value:.3f} |" for name, value in loose.items()]
    lines += [f"| without looking: {name} | {value:.3f} |" for name, value in result.get("baselines", {}).items()]
    lines += [
        "",
        "A ceiling is what the judge says of real scenes after the model's own vision tower has encoded and decoded "
        "them: a perfect drawer would score that much. A bold figure is below what is wanted.",
        "",
        "## The judge",
        "",
        f"SHA-256 `{judge['sha256']}`, seed {judge['seed']}. Shares of right answers when it was trained:",
        "",
        "| pictures | share |",
        "| --- | ---: |",
    ]
    lines += [f"| {name} | {value:.3f} |" for name, value in judge.get("accuracies", {}).items()]
    lines += [
        "",
        "## Protocol",
        "",
        f"Model `{protocol['model_sha256']}` ({protocol['model_parameters']:,} parameters), seed {protocol['seed']}, "
        f"limit {protocol['limit'] or 'none'}, "
        + ", ".join(f"{name} {_setting(value)}" for name, value in sampling.items())
        + f"; text by {protocol['text']['decoding']} decoding; {protocol['device']}, {protocol['threads']} threads; "
        + ", ".join(f"{name} {number}" for name, number in protocol["versions"].items())
        + ".",
        "",
    ]
    return "\n".join(lines)


def _setting(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " to ".join(map(_setting, value))
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if "psnr" in name else f"{value:.3f}"


def _bold(row: Row) -> str:
    return f"**{row.value}**" if row.reached is False else row.value


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the Markdown page of a result; without ``-o`` print it."""
    parser = argparse.ArgumentParser(prog="vilau.evaluation.report", description="Results of a suite as Markdown.")
    parser.add_argument("result", help="what `vilau eval --json` printed")
    parser.add_argument("-o", "--output", help="file to write")
    options = parser.parse_args(arguments)
    try:
        page = markdown(json.loads(Path(options.result).read_text(encoding="utf-8")))
        if options.output is None:
            print(page)
        else:
            target = Path(options.output)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(page, encoding="utf-8")
    except (OSError, json.JSONDecodeError, KeyError) as error:
        print(f"error: {options.result} is not a result of the nano suite: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
