"""`python -m benchmarks SUITE` measures, prints and writes rows; `all` runs every suite; `report` shows the rows."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from threading import Timer
from typing import Any

import torch

from benchmarks import cpu, encoder, harness, late_interaction, ops, report, retrieval, training, work
from benchmarks.harness import MUST, Result, Suite
from benchmarks.rows import ROOT, Row, append, circumstances

SUITES: dict[str, Suite] = {
    **ops.SUITES,
    **encoder.SUITES,
    **training.SUITES,
    **late_interaction.SUITES,
    **cpu.SUITES,
    **retrieval.SUITES,
}
FOLDERS = {
    "data": ("cpu", "sets in BEIR's layout, for the workload int8-retrieval"),
    "against": ("cpu", "another checkout of this project, in turns with this one"),
    "work": ("retrieval", "keep the stores in this folder, and use what it has"),
}
"""Options of one suite each."""

RESERVE, LEAST, OVERSTAY = 15.0, 15.0, 1.5
"""Of `all`: seconds for the report; least seconds of a suite; the part of its time at which one ends."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--list", action="store_true", help="explain every suite and its workloads")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, suite in SUITES.items():
        command = commands.add_parser(name, help=f"a suite: {suite.what}")
        command.add_argument("--quick", action="store_true", help="try the whole path in a minute or two: no results")
        command.add_argument("--minutes", type=float, help="begin nothing new after these")
        command.add_argument("--output", type=Path, help="write the rows to a new .jsonl file in this folder")
        command.add_argument("--only", nargs="+", choices=suite.workloads, metavar="WORKLOAD", help="see --list")
        for option, (owner, words) in FOLDERS.items():
            if owner == name:
                command.add_argument(f"--{option}", type=Path, help=words)
    command = commands.add_parser("all", help="every suite but `retrieval`, and a report with plots")
    command.add_argument("--output", type=Path, required=True, help="the folder of the report and its rows")
    command.add_argument("--minutes", type=float, default=60.0, help="for all of it (default: 60)")
    command.add_argument("--quick", action="store_true", help="a try-out on any machine: no results")
    command = commands.add_parser("report", help="write tables and plots from rows")
    command.add_argument("folder", type=Path, nargs="?", help="of `all`; without one: docs and benchmarks/results")
    command.add_argument(
        "--check", action="store_true", help="write nothing, and fail if a page is not that of the rows"
    )
    command = commands.add_parser("roofline", help="project a GPU from its datasheet")
    command.add_argument("--gpu", default="NVIDIA GeForce RTX 4090", choices=work.DATASHEETS, metavar="NAME")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n\n".join(described(name, suite) for name, suite in SUITES.items()))
    elif arguments.command == "all":
        # A request to end also ends the suite that runs.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
        run_all(arguments.output.resolve(), arguments.minutes, quick=arguments.quick)
    elif arguments.command == "roofline":
        work.show_roofline(arguments.gpu)
    elif arguments.command == "report" and arguments.check:
        sys.exit("\n".join(f"{file} is not what the rows say" for file in report.stale()) or 0)
    elif arguments.command == "report":
        for file in report.write_folder(arguments.folder) if arguments.folder else report.write():
            print(f"wrote {file}")
    elif arguments.command:
        options = {name: getattr(arguments, name) for name in FOLDERS if name in arguments}
        run_suite(arguments.command, arguments, options)
    else:
        parser.print_help()


def described(name: str, suite: Suite) -> str:
    width = max(map(len, suite.workloads))
    lines = [f"  {workload:{width}}  {words}" for workload, words in suite.workloads.items()]
    return "\n".join(
        [name, f"  {suite.what}", f"  against {suite.against}", f"  {suite.gpu}; {suite.minutes}", "", *lines]
    )


def results_of(name: str, *, quick: bool, only: Sequence[str] | None, minutes: float | None, **options: Any) -> Any:
    """Yield the results of a suite as they are done."""
    with harness.run(name, quick=quick, minutes=minutes) as here:
        yield from SUITES[name].measure(here, only or list(SUITES[name].workloads), **options)


def run_suite(name: str, arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Print and write the rows of every table when it is done, and why an implementation has none."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no width of its own
    file = arguments.output and arguments.output / f"{datetime.now(timezone.utc):%Y-%m-%d-%H%M%S}.jsonl"
    known = {"quick": arguments.quick, "only": arguments.only, "minutes": arguments.minutes}
    for result in results_of(name, **known, **options):
        for group in report.tables_of(result.rows):
            titles, lines = report.lines_of(group)
            shown = Table(*titles, title=group[0]["what"], title_justify="left")
            for line in lines:
                shown.add_row(*line)
            console.print(shown)
        for implementation, reason in result.refused.items():
            console.print(f"{result.workload}: {implementation}: {reason}", style="red")
        if file:
            append([*result.rows, *refusals(name, result)], file)
    if file and file.exists():
        console.print(f"wrote {file}")


def refusals(suite: str, result: Result) -> list[Row]:
    """A line for every refusal of a result: no figure, but where and when it was."""
    where = {name: result.rows[0].get(name) for name in ("gpu", "driver", "capability") if result.rows}
    known = {"kind": "refused", "suite": suite, "workload": result.workload}
    return [
        known | {"implementation": name, "reason": reason} | circumstances() | where
        for name, reason in result.refused.items()
    ]


def run_all(folder: Path, minutes: float, *, quick: bool, command: Callable[..., list[str]] | None = None) -> None:
    """Every suite in a process of its own, so that a crash costs that suite alone, and a report of what came out.

    Each gets its share of the time that is left, by its weight, and is ended if it takes much longer. `folder` gets
    rows/, logs/, suites.txt, README.md and plots/.
    """
    until = time.monotonic() + 60 * minutes - RESERVE
    folder.mkdir(parents=True, exist_ok=True)
    waiting = {name: suite for name, suite in SUITES.items() if suite.weight}
    outcomes = folder / "suites.txt"
    for name, suite in list(waiting.items()):
        left = until - time.monotonic()
        seconds = max(0.0, left) * suite.weight / sum(other.weight for other in waiting.values())
        del waiting[name]
        if suite.gpu == MUST and not (quick or torch.cuda.is_available()):
            outcome = "skipped: it needs a GPU, and there is none here"
        elif left < LEAST:
            outcome = "left out: no time was left"
        else:
            # What it has begun at the end takes time too.
            asked = (command or suite_command)(name, 0.9 * seconds / 60, folder / "rows", quick)
            outcome = watched(asked, folder / "logs" / f"{name}.txt", min(max(20 + seconds, OVERSTAY * seconds), left))
        with outcomes.open("a", encoding="utf-8") as out:
            out.write(f"- {name}: {outcome}\n")
        print(f"{name}: {outcome}", flush=True)
    for file in report.write_folder(folder):
        print(f"wrote {file}")


def suite_command(name: str, minutes: float, rows: Path, quick: bool) -> list[str]:
    options = ["--quick"] if quick else []
    return [sys.executable, "-m", "benchmarks", name, "--minutes", f"{minutes:.2f}", *options, "--output", str(rows)]


def watched(command: Sequence[str], log: Path, limit: float) -> str:
    """Run a command, show and keep what it prints, and end it and its children after `limit` seconds; the outcome."""
    log.parent.mkdir(parents=True, exist_ok=True)
    ended: list[bool] = []
    with log.open("w", encoding="utf-8") as kept:
        started = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

        def kill() -> None:
            try:
                os.killpg(started.pid, signal.SIGKILL)
            except ProcessLookupError:
                return

        timer = Timer(limit, lambda: (ended.append(True), kill()))
        timer.start()
        try:
            assert started.stdout is not None
            for line in started.stdout:
                print(line, end="", flush=True)
                kept.write(line)
            status = started.wait()
        finally:
            timer.cancel()
            kill()  # children that outlive it hold the GPU
    if ended:
        return "ended because it took too long; its rows until then are kept"
    return "done" if status == 0 else f"failed with status {status}, see logs/{log.name}"


if __name__ == "__main__":
    main()
