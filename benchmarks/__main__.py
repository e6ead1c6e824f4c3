"""`python -m benchmarks SUITE` measures, prints and writes rows; `all` runs every suite; `report` shows the rows."""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks import breakdown, cpu, drop_in, encoder, late_interaction, report, retrieval, tasks, training
from benchmarks.harness import Run, Suite
from benchmarks.rows import ROOT, Row, append, circumstances, read

SUITES: dict[str, Suite] = {
    **tasks.SUITES,
    **breakdown.SUITES,
    **encoder.SUITES,
    **training.SUITES,
    **late_interaction.SUITES,
    **drop_in.SUITES,
    **cpu.SUITES,
    **retrieval.SUITES,
}

RESERVE, LEAST, OVERSTAY = 15.0, 15.0, 1.5
"""Of `all`: seconds for the report; least seconds of a suite; the part of its time at which one ends."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--list", action="store_true", help="explain every suite and its workloads")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, suite in SUITES.items():
        command = commands.add_parser(name, help=f"a suite: {suite.what}")
        command.add_argument("--quick", action="store_true", help="try the whole path in a minute or two: no results")
        command.add_argument("--minutes", type=amount, default=math.inf, help="begin nothing new after these")
        command.add_argument("--output", type=Path, help="write the rows to a new .jsonl file in this folder")
        command.add_argument("--only", nargs="+", choices=suite.workloads, metavar="WORKLOAD", help="see --list")
        command.add_argument("--compare", type=Path, metavar="FOLDER", help="fail if rows are worse than those there")
        command.add_argument("--threshold", type=amount, default=5.0, metavar="PERCENT", help="by more (default: 5)")
        if name == "kernels":
            command.add_argument("--profile", metavar="NAME", help="one call of one kernel, as ncu and nsys record it")
        if name == "cpu":
            command.add_argument("--against", type=Path, help="another checkout, in turns with this one")
        if name in ("training", "drop-in"):
            command.add_argument("--texts", type=Path, help="JSON lines with a text, in place of the demo corpus")
            command.add_argument("--pairs", type=Path, help="JSON lines with a query and a positive")
            command.add_argument("--packages", type=Path, help="where `pip install --target` has put PyLate")
        if name == "retrieval":
            command.add_argument("--work", type=Path, help="keep the stores in this folder, and use what it has")
    command = commands.add_parser("all", help="every suite but `retrieval`, and a report with plots")
    command.add_argument("--output", type=Path, required=True, help="the folder of the report and its rows")
    command.add_argument("--minutes", type=amount, default=60.0, help="for all of it (default: 60)")
    command.add_argument("--quick", action="store_true", help="a try-out on any machine: no results")
    command = commands.add_parser("report", help="write tables and plots from rows")
    command.add_argument("folder", type=Path, nargs="?", help="of `all`; without one: docs and benchmarks/results")
    command.add_argument("--check", action="store_true", help="write nothing, and fail if a page differs from the rows")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n\n".join(described(name, suite) for name, suite in SUITES.items()))
    elif arguments.command == "all":
        run_all(arguments.output.resolve(), arguments.minutes, quick=arguments.quick)
    elif getattr(arguments, "profile", None):
        tasks.profile(arguments.profile, arguments.only or list(tasks.TASKS), quick=arguments.quick)
    elif arguments.command == "report" and arguments.folder and not read(arguments.folder):
        sys.exit(f"{arguments.folder} has no rows")
    elif arguments.command == "report" and arguments.check:
        sys.exit("\n".join(f"{file} is not what the rows say" for file in report.stale(arguments.folder)) or 0)
    elif arguments.command == "report":
        for file in report.write(arguments.folder):
            print(f"wrote {file}")
    elif arguments.command:
        run_suite(arguments.command, arguments)
    else:
        parser.print_help()


def amount(text: str) -> float:
    """A number that is not negative, as of minutes and percent."""
    if not 0 <= (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number from 0, got {text}")
    return number


def described(name: str, suite: Suite) -> str:
    width = max(map(len, suite.workloads))
    lines = [f"  {workload:{width}}  {words}" for workload, words in suite.workloads.items()]
    return "\n".join([name, f"  {suite.what}", f"  against {suite.against}", f"  {suite.on}", "", *lines])


def run_suite(name: str, arguments: argparse.Namespace) -> None:
    """Print and write the rows of every table when it is done, and why an implementation has none."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)  # a file or a pipe has no width of its own
    file = arguments.output and arguments.output / f"{datetime.now(timezone.utc):%Y-%m-%d-%H%M%S}.jsonl"
    if SUITES[name].needs_gpu and not (arguments.quick or torch.cuda.is_available()):
        sys.exit(f"the suite `{name}` needs a GPU, and there is none here (--quick tries it on the CPU)")
    known = {"quick": arguments.quick, "device": "cuda" if torch.cuda.is_available() else "cpu"}
    known |= {"minutes": arguments.minutes, "until": time.monotonic() + 60 * arguments.minutes}
    paths = ("against", "texts", "pairs", "packages", "work")
    given = {name: path.resolve() for name in paths if (path := getattr(arguments, name, None))}
    before = read(arguments.compare) if arguments.compare else []
    if arguments.compare and not before:
        sys.exit(f"{arguments.compare} has no rows to compare with")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        here = Run(name, given.pop("work", Path(scratch).resolve()), **known, **given)
        for result in SUITES[name].measure(here, arguments.only or list(SUITES[name].workloads)):
            for group in report.tables_of(result.rows):
                titles, lines = report.lines_of(group)
                shown = Table(*titles, title=group[0]["what"], title_justify="left")
                for line in lines:
                    shown.add_row(*line)
                console.print(shown)
            for implementation, reason in result.refused.items():
                console.print(f"{result.workload}: {implementation}: {reason}", style="red")
            rows += result.rows
            if file:
                refused = {"kind": "refused", "suite": name, "workload": result.workload} | circumstances(here.device)
                lines = [{"implementation": one, "reason": why} | refused for one, why in result.refused.items()]
                append([*result.rows, *lines], file)
    if file and file.exists():
        console.print(f"wrote {file}")
    if arguments.compare:
        compared, worse = report.worse(rows, before, arguments.threshold)
        console.print(f"{compared} of our rows have one in {arguments.compare}", *worse, sep="\n")
        sys.exit(bool(worse) or not compared)


def run_all(folder: Path, minutes: float, *, quick: bool) -> None:
    """Every suite in a process of its own, so that a crash costs that suite alone, and a report of what came out.

    Each gets its share of the time that is left, by its weight, and is ended if it takes much longer. `folder` gets
    rows/, suites.txt, README.md and plots/.
    """
    until = time.monotonic() + 60 * minutes - RESERVE
    folder.mkdir(parents=True, exist_ok=True)
    waiting = {name: suite for name, suite in SUITES.items() if suite.weight}
    for name, suite in list(waiting.items()):
        left = until - time.monotonic()
        seconds = max(0.0, left) * suite.weight / sum(other.weight for other in waiting.values())
        del waiting[name]
        if suite.needs_gpu and not (quick or torch.cuda.is_available()):
            outcome = "skipped: it needs a GPU, and there is none here"
        elif left < LEAST:
            outcome = "left out: no time was left"
        else:
            # What it has begun at the end takes time too.
            command = suite_command(name, 0.9 * seconds / 60, folder / "rows", quick)
            outcome = ended(command, min(max(20 + seconds, OVERSTAY * seconds), left))
        with (folder / "suites.txt").open("a", encoding="utf-8") as out:
            out.write(f"- {name}: {outcome}\n")
        print(f"{name}: {outcome}", flush=True)
    for file in report.write(folder):
        print(f"wrote {file}")


def suite_command(name: str, minutes: float, rows: Path, quick: bool) -> list[str]:
    options = ["--quick"] if quick else []
    return [sys.executable, "-m", "benchmarks", name, "--minutes", f"{minutes:.2f}", *options, "--output", str(rows)]


def ended(command: list[str], limit: float) -> str:
    """The outcome of a command, which is ended after `limit` seconds with all its children: they hold the GPU."""
    started = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        status = started.wait(limit)
    except subprocess.TimeoutExpired:
        return "ended because it took too long; its rows until then are kept"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    return "done" if status == 0 else f"failed with status {status}"


if __name__ == "__main__":
    main()
