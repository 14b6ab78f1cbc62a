"""`vilau`: the verbs, and how errors leave the program.

The verb modules import nothing heavy at their top, so that `vilau --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

from vilau import __version__
from vilau.cli import ask, bench, convert, data, demo, evaluate, experiments, generate, info, parity, tokenize
from vilau.cli.common import one_line

INTERRUPTED = 130
_UsageError = typer.BadParameter.__mro__[1]  # typer carries click inside and shows only this much of its errors
_CommandError: type[Exception] = _UsageError.__mro__[1]

app = typer.Typer(
    name="vilau",
    help="One model that reads and makes pictures and films: an open implementation of VILA-U.",
    epilog="Results go to stdout, progress and logs to stderr. VILAU_DEBUG=1 shows tracebacks.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and stop.", is_eager=True),
) -> None:
    if version:
        typer.echo(f"vilau {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command("generate")(generate.generate)
app.command("ask", short_help="Describe or answer about pictures and films, or talk.")(ask.ask)


@app.command("train", short_help="Train what a configuration says, or go on with it.")
def train(
    config: Path = typer.Argument(..., metavar="CONFIG", help="A YAML file such as configs/nano/debug.yaml."),
    overrides: list[str] = typer.Argument(
        None, metavar="[KEY=VALUE]...", help="Changes to it, as stages.sft.steps=100."
    ),
) -> None:
    """Train the stages of a configuration; a run that was stopped goes on where it was."""
    if not config.is_file():
        raise ValueError(f"there is no configuration file {config}")
    from vilau.cli.settings import read_settings

    settings = read_settings(config, overrides or [])
    from vilau.cli.train import train as start

    start(settings)


app.add_typer(data.app, name="data")
app.add_typer(experiments.app, name="experiments", short_help="Compare recipes in small, resumable runs.")
app.command("convert", short_help="Turn one checkpoint layout into another, or into int8.")(convert.convert)
app.command("info", short_help="Show a model's parts, shapes, memory and licence.")(info.info)
app.command("eval", short_help="Measure a model: metrics beside their ceilings.")(evaluate.evaluate)
app.command("parity", short_help="Compare with the published reference, by tensor.")(parity.parity)
app.command("tokenize", short_help="Turn pictures into codes.")(tokenize.tokenize)
app.command("detokenize")(tokenize.detokenize)
app.command("demo", short_help="Draw, film, describe and talk, on one page.")(demo.demo)
app.add_typer(bench.app, name="bench")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 well, 1 it failed, 2 wrong usage, 130 interrupted.

    Every error is one line on stderr; VILAU_DEBUG=1 lets the traceback through.
    """
    debug = os.environ.get("VILAU_DEBUG", "") not in ("", "0")
    try:
        result = app(args=None if arguments is None else list(arguments), prog_name="vilau", standalone_mode=False)
        sys.stdout.flush()
        if result == INTERRUPTED:  # what typer makes of Ctrl-C
            return _fail("stopped", INTERRUPTED)
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _fail("stopped", INTERRUPTED)
    except _CommandError as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "vilau"
        code = int(getattr(error, "exit_code", 1))
        return _fail(error.format_message(), code, where)  # type: ignore[attr-defined]
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: say nothing more
        return 1
    except (ValueError, OSError) as error:
        if debug:
            raise
        return _fail(one_line(error), 1)
    except Exception as error:
        if debug:
            raise
        return _fail(f"unexpected {type(error).__name__}: {one_line(error)} (VILAU_DEBUG=1 shows where)", 1)


def run() -> None:
    """Entry point of the console script."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # busy waiting costs a factor of four on shared cores
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())


def _fail(message: str, code: int, where: str = "vilau") -> int:
    print(f"{where}: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    run()
