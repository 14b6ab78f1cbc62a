"""`vilau experiments`: many small training runs, measured alike, on one page."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import typer

from vilau.cli.common import quiet_libraries, say, within

if TYPE_CHECKING:
    from vilau.evaluation.tower_cells import Cell

CONFIGS, OUT = Path("configs/nano"), Path("docs/experiments/tower")
STATUS_SECONDS = 60.0
STOPPED = (-signal.SIGTERM, -signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGINT)

app = typer.Typer(
    name="experiments",
    help="Small training runs that compare recipes: resumable cell by cell, with a table, curves and pictures.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def _root() -> None:
    """Keep `tower` a verb of its own while it is the only one."""


@app.command("tower", short_help="Train and compare vision towers.")
def tower(
    cells: str | None = typer.Option(
        None, "--cells", metavar="A,B", help="Only these cells and those they start from; all if absent."
    ),
    budget_minutes: float = typer.Option(
        10.0, callback=within(0, 10**6, above=True), help="CPU minutes of training per cell; it stops there."
    ),
    out: Path = typer.Option(OUT, "--out", help="Folder of the results; the page lies beside it, as DIR.md."),
    configs: Path = typer.Option(CONFIGS, "--configs", help="Folder with the cells, files mini-NAME.yaml."),
    jobs: int = typer.Option(1, callback=within(1, 64), help="Cells at a time, one thread each."),
    again: bool = typer.Option(False, "--again", help="Repeat cells that have a result; the old one is kept."),
    report: bool = typer.Option(False, "--report", help="Train nothing: write the page from the results there are."),
    show: bool = typer.Option(False, "--list", help="Train nothing: list the cells and what became of them."),
    one: str | None = typer.Option(None, "--one", hidden=True, help="Run one cell in this process."),
) -> None:
    """Train and measure vision towers that differ in one thing each, and write docs/experiments/tower.md.

    A cell is a configuration file mini-NAME.yaml. Each keeps its checkpoints in its `output`, and its result
    as NAME.json and NAME.png in the folder of --out. Cells that have a result are left alone, so the same
    command goes on after a stop (Ctrl-C, SIGTERM, a crash): at most the steps since the last checkpoint are
    lost. A cell whose `init_from` lies in another cell's output waits for it; so one `align` run serves all.

    \b
      vilau experiments tower --list                    what there is
      vilau experiments tower --cells rq,mcq            two cells and what they start from
      vilau experiments tower --jobs 2                  everything, two at a time
      vilau experiments tower --report                  the page again, from the JSON files
    """
    from vilau.evaluation.tower_cells import find_cells

    quiet_libraries()
    known = find_cells(configs)
    if one is not None:
        raise typer.Exit(_run_one(_named(one, known), out, budget_minutes * 60))
    if show:
        for line in _listing(known, out):
            typer.echo(line)
        return
    code = 0
    if not report:
        wanted = [cell.strip() for cell in cells.split(",") if cell.strip()] if cells else list(known)
        arguments = ["--out", str(out), "--configs", str(configs), "--budget-minutes", str(budget_minutes)]
        code = _Schedule(known, _with_needs(wanted, known), out, arguments, jobs, set(wanted) if again else set()).run()
    from vilau.evaluation.tower_page import write_page

    typer.echo(str(write_page(known, out)))
    if code:
        raise typer.Exit(code)


def _named(name: str, known: dict[str, Cell]) -> Cell:
    if name not in known:
        raise typer.BadParameter(f"there is no cell {name!r}: there are {', '.join(known)}")
    return known[name]


def _with_needs(wanted: list[str], known: dict[str, Cell]) -> list[str]:
    """Return the wanted cells and all that they start from, in an order in which they can run."""
    found: set[str] = set()
    pending = list(wanted)
    while pending:
        cell = _named(pending.pop(), known)
        if cell.name not in found:
            found.add(cell.name)
            pending += cell.needs
    return [name for name in known if name in found]


def _listing(known: dict[str, Cell], out: Path) -> list[str]:
    from vilau.evaluation.tower_cells import read_result

    lines = [f"{'cell':<16} {'starts from':<16} result"]
    for cell in known.values():
        result: dict[str, Any] = read_result(cell, out) or {}
        told = result.get("status", "-")
        if told == "done":
            told = (
                f"done: {result['steps']} of {result['steps_planned']} steps, {result['cpu_seconds'] / 60:.1f} CPU min"
            )
        lines.append(f"{cell.name:<16} {', '.join(cell.needs) or '-':<16} {told}")
    return lines


def _run_one(cell: Cell, out: Path, budget_seconds: float) -> int:
    from vilau.evaluation.tower_cells import run_cell
    from vilau.training.stopping import StopRequested

    try:
        result = run_cell(cell, out, budget_seconds, say)
    except StopRequested as stopped:
        say(f"{cell.name}: {stopped}")
        return stopped.exit_code
    return 0 if result["status"] == "done" else 1


@dataclass
class _Schedule:
    """Runs cells in processes of their own, each after those it needs; passes a request to stop on to them."""

    known: dict[str, Cell]
    wanted: list[str]
    out: Path
    arguments: list[str]
    jobs: int
    repeat: set[str]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    stopping: int = 0

    def run(self) -> int:
        """Return 0 when every wanted cell has a result, 1 when one has not, 128 + signal after a stop."""
        from vilau.evaluation.tower_cells import put_aside, read_result

        done = set()
        for name in self.wanted:
            cell = self.known[name]
            if name in self.repeat:
                put_aside(cell, self.out, force=True)
            elif (result := read_result(cell, self.out)) is not None:
                if result["status"] == "done":
                    done.add(name)
                else:
                    self.failed.add(name)
                    say(f"{name}: failed before ({result.get('error')}); --again repeats it")
        if done:
            say(f"there already: {', '.join(sorted(done))}")
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._loop(done)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.stopping:
            say("stopped; the same command goes on from here")
            return 128 + self.stopping
        return 1 if self.failed else 0

    def _loop(self, done: set[str]) -> None:
        told = time.monotonic()
        while True:
            waiting = [name for name in self.wanted if name not in done | self.failed | set(self.running)]
            ready = [name for name in waiting if set(self.known[name].needs) <= done]
            while ready and len(self.running) < self.jobs and not self.stopping:
                self._start(ready.pop(0))
            if not self.running:
                if waiting and not self.stopping:
                    say(f"not run, as what they start from failed: {', '.join(waiting)}")
                    self.failed |= set(waiting)
                return
            time.sleep(0.2)
            for name, process in list(self.running.items()):
                if process.poll() is not None:
                    del self.running[name]
                    self._ended(name, process.returncode, done)
            if time.monotonic() - told > STATUS_SECONDS:
                told = time.monotonic()
                for name in self.running:
                    say(_status(self.known[name]))

    def _start(self, name: str) -> None:
        folder = Path(self.known[name].config.output)
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_name(f"{folder.name}.log")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "vilau", "experiments", "tower", "--one", name, *self.arguments]
        with log.open("ab") as sink:
            self.running[name] = subprocess.Popen(
                command, stdout=sink, stderr=sink, env=environment, start_new_session=True
            )
        say(f"{name}: started, log in {log}")

    def _ended(self, name: str, code: int, done: set[str]) -> None:
        from vilau.evaluation.tower_cells import read_result

        result = read_result(self.known[name], self.out)
        if result is not None and result["status"] == "done":
            done.add(name)
            figures = result["metrics"]
            shown = [
                f"{key} {figures[key]:.3f}" for key in ("psnr", "rfid_judge", "zero_shot_objects") if key in figures
            ]
            early = ", stopped at the budget" if result["stopped_at_budget"] else ""
            say(
                f"{name}: done, {result['steps']} steps, {result['cpu_seconds'] / 60:.1f} CPU minutes{early}; "
                + ", ".join(shown)
            )
        elif self.stopping and code in STOPPED:
            say(f"{name}: stopped")
        elif code in STOPPED:
            self._stop(128 - code if code > 0 else -code, None)  # somebody stopped it alone: stop as a whole
            self.stopping = abs(code) % 128
        else:
            self.failed.add(name)
            log = Path(self.known[name].config.output)
            reason = result.get("error") if result else f"exit code {code}, see {log.with_name(f'{log.name}.log')}"
            say(f"{name}: failed: {reason}")

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = number
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)


def _status(cell: Cell) -> str:
    from vilau.evaluation.tower_cells import progress_of

    step, seconds = progress_of(cell)
    return f"{cell.name}: step {step} of {cell.steps}, {seconds / 60:.1f} CPU minutes"
