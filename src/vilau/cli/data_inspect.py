"""`vilau data inspect`: what is there, what it looks like, and what a model would see and learn of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from vilau.cli.common import JSON_HELP, check_targets, print_json, quiet_libraries, within
from vilau.cli.data_sources import FORMAT_HELP, SET_HELP, Reader, open_reader

if TYPE_CHECKING:
    from vilau.data.mixture import Entry
    from vilau.data.sample import Sample
    from vilau.data.survey import Survey

_CELL = 144  # pixels of a picture on the sheet
_PICTURED = 24  # samples on it


def inspect(
    path: Path = typer.Argument(..., metavar="PATH|CONFIG", help="Data of one format, or a training configuration."),
    format_name: str | None = typer.Option(None, "--format", help=FORMAT_HELP),
    settings: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help=SET_HELP),
    model: str | None = typer.Option(None, "--model", help="Model whose tokenizer and sizes are used; with a PATH."),
    samples: int = typer.Option(3, callback=within(0, 100), help="Samples of each source shown token by token."),
    probe: int = typer.Option(256, callback=within(1, 100_000), help="Samples of each source read for the figures."),
    sheet: Path | None = typer.Option(
        None, "--sheet", "-o", help="Picture of samples to write; contact-sheet.png, replaced if there, if absent."
    ),
    force: bool = typer.Option(False, "--force", help="Replace the --sheet that is there."),
    as_json: bool = typer.Option(False, "--json", help=JSON_HELP),
) -> None:
    """Show counts and sizes, draw a contact sheet, and list what the model sees and learns, token by token."""
    target = sheet or Path("contact-sheet.png")
    check_targets([target], force or sheet is None)
    quiet_libraries()
    from vilau.data.survey import survey_part

    reader = open_reader(path, format_name, settings, model)
    if reader.problems:
        raise ValueError("; ".join(reader.problems))
    shown: list[Sample] = []
    facts = []
    for entry in reader.entries:
        size = len(entry.source)
        count = min(probe, size)
        survey = survey_part(entry.source, reader, (number * size // count for number in range(count)))
        chosen, texts = _as_trained(reader, entry, max(samples, _PICTURED // len(reader.entries), 1))
        shown, texts = shown + chosen, texts[:samples]
        facts.append(_facts(entry, survey, texts))
        if not as_json:
            _print(entry, survey, texts)
    if any(sample.frames for sample in shown):
        _draw(shown, reader.processor.image_size, target)
    if as_json:
        print_json({"sources": facts, "sheet": str(target) if target.is_file() else None})
    elif target.is_file():
        typer.echo(f"pictures: {target}")


def _as_trained(reader: Reader, entry: Entry, count: int) -> tuple[list[Sample], list[list[str]]]:
    """The first samples of a mixture of this source alone at the model's size, and what is seen and learnt of each."""
    from vilau.data.mixture import Mixture
    from vilau.processing.augment import fit_sample

    mixture = Mixture([entry], seed=0)

    def use(sample: Sample) -> tuple[Sample, list[str]]:
        return fit_sample(sample, reader.processor.image_size), reader.describe(sample)

    drawn = [mixture.draw(number, use) for number in range(count)]
    return [sample for sample, _ in drawn], [lines for _, lines in drawn]


def _facts(entry: Entry, survey: Survey, texts: list[list[str]]) -> dict[str, object]:
    kinds: dict[str, int] = {}
    for (_, kind, _), count in survey.bad.items():
        kinds[kind] = kinds.get(kind, 0) + count
    return {
        "name": entry.source.name,
        "samples": len(entry.source),
        "probed": survey.read,
        "forms": dict(survey.forms),
        "width": str(survey.widths),
        "height": str(survey.heights),
        "frames_per_sample": str(survey.frames),
        "characters_per_sample": str(survey.characters),
        "bad": kinds,
        "positions": texts,
    }


def _print(entry: Entry, survey: Survey, texts: list[list[str]]) -> None:
    facts = _facts(entry, survey, [])
    typer.echo(f"{facts['name']}: {facts['samples']} samples; of {facts['probed']} read:")
    typer.echo(f"  forms       {', '.join(f'{name} {count}' for name, count in survey.forms.most_common()) or 'none'}")
    typer.echo(f"  pictures    width {facts['width']}; height {facts['height']}; frames a sample {survey.frames}")
    typer.echo(f"  characters  {survey.characters}")
    for kind, count in sorted(dict(facts["bad"]).items()):  # type: ignore[call-overload]
        typer.echo(f"  bad         {kind} {count}: {survey.examples[kind][0]}")
    if texts:
        typer.echo("what the model sees, * what it learns to say or draw:")
    for lines in texts:
        typer.echo("\n".join(lines))


def _draw(samples: list[Sample], size: int, target: Path) -> None:
    from vilau.data.nano.scenes import contact_sheet
    from vilau.processing.images import save_image

    pictures, captions = [], []
    for sample in samples:
        words = " / ".join(part.text for turn in sample.turns for part in turn.parts if part.text)
        for number, frame in enumerate(sample.frames):
            pictures.append(frame)
            captions.append(words[:200] if not number else f"({number + 1})")
    save_image(contact_sheet(pictures, captions, columns=6, scale=max(1, _CELL // size)), target)
