"""`vilau data check`: read everything once and say what is wrong, before a run does."""

from __future__ import annotations

from pathlib import Path

import typer

from vilau.cli.common import JSON_HELP, print_json, quiet_libraries, say, within
from vilau.cli.data_sources import FORMAT_HELP, SET_HELP, open_reader


def check(
    path: Path = typer.Argument(..., metavar="CONFIG|PATH", help="Training configuration, or data of one format."),
    format_name: str | None = typer.Option(None, "--format", help=FORMAT_HELP),
    settings: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help=SET_HELP),
    model: str | None = typer.Option(None, "--model", help="Model whose tokenizer reads the text; with a PATH."),
    workers: int = typer.Option(0, callback=within(0, 256), help="Processes that read beside this one."),
    as_json: bool = typer.Option(False, "--json", help=JSON_HELP),
) -> None:
    """Read every sample once and report all problems by kind and file; exit 1 if there are any."""
    quiet_libraries()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from vilau.data.mixture import describe_skips
    from vilau.data.survey import Survey, survey_source

    reader = open_reader(path, format_name, settings, model)
    problems = list(reader.problems)
    advice: list[str] = []
    surveys: dict[str, Survey] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for entry in reader.entries:
            source = entry.source
            problems += getattr(source, "faults", [])
            advice += getattr(source, "notes", [])
            survey = surveys[source.name] = Survey()
            task = progress.add_task(source.name, total=len(source))
            for part in survey_source(source, reader, workers):
                survey.merge(part)
                progress.update(task, completed=survey.read)
    bad = sum(sum(survey.bad.values()) for survey in surveys.values())
    if as_json:
        print_json({"sources": {name: _facts(survey) for name, survey in surveys.items()}, "problems": problems})
    else:
        for name, survey in surveys.items():
            typer.echo(f"{name}: {survey.good} of {survey.read} samples can be used")
            for line in describe_skips(survey.bad, survey.good)[1:]:
                typer.echo(line)
            for kind in sorted(survey.examples):
                for message in survey.examples[kind]:
                    typer.echo(f"    {kind}: {message}")
        for problem in problems:
            typer.echo(f"problem: {problem}")
    for line in advice:
        say(f"advice: {line}")
    if bad or problems:
        raise typer.Exit(1)


def _facts(survey: object) -> dict[str, object]:
    from vilau.data.survey import Survey

    assert isinstance(survey, Survey)
    kinds: dict[str, int] = {}
    shards: dict[str, dict[str, int]] = {}
    for (_, kind, shard), count in sorted(survey.bad.items()):
        kinds[kind] = kinds.get(kind, 0) + count
        shards.setdefault(kind, {})[shard] = count
    return {
        "read": survey.read,
        "good": survey.good,
        "forms": dict(survey.forms),
        "bad": kinds,
        "shards": shards,
        "examples": survey.examples,
    }
