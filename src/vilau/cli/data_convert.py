"""`vilau data convert`: pickle shards into files that are safe to read."""

from __future__ import annotations

from pathlib import Path

import typer

from vilau.cli.common import JSON_HELP, print_json, say


def convert(
    source: Path = typer.Argument(..., metavar="SRC", help="A .pkl shard, or a folder of them."),
    target: Path = typer.Argument(..., metavar="DST", help="Folder for the new shards; no file in it is replaced."),
    allow_pickle: bool = typer.Option(
        False, "--allow-pickle", help="Read pickle files: plain data only, nothing in them is run."
    ),
    as_json: bool = typer.Option(False, "--json", help=JSON_HELP),
) -> None:
    """Convert pickle shards of MMC4, COYO or VFLAN layout to JSONL or tar files.

    Documents become JSONL for the format mmc4, captioned pictures tar files for webdataset, questions JSONL for llava.
    A pickle that holds anything but plain data and numpy arrays is refused.
    """
    from vilau.data.pickle_convert import convert_pickles

    report = convert_pickles(source, target, allow_pickle, say)
    left_out = dict(sorted(report.left_out.items()))
    if as_json:
        print_json({"files": [str(path) for path in report.files], "records": report.records, "left_out": left_out})
        return
    for reason, count in left_out.items():
        say(f"left out {count}: {reason}")
    typer.echo(str(target))
