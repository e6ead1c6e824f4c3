"""`python -m benchmarks SUITE` measures, prints and writes rows; `report` makes tables from written rows."""

from __future__ import annotations

import argparse
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType

from rich.console import Console

from benchmarks.cpu import suite as cpu
from benchmarks.harness import FOREIGN_LIMIT
from benchmarks.kernels import suite as kernels
from benchmarks.report import tables as report
from benchmarks.retrieval import suite as retrieval
from benchmarks.rows import append

SUITES = {"cpu": cpu, "retrieval": retrieval, "kernels": kernels}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--list", action="store_true", help="say what every suite measures")
    commands = parser.add_subparsers(dest="command")
    for name, suite in SUITES.items():
        command = commands.add_parser(name, help=suite.__doc__)
        command.add_argument("--quick", action="store_true", help="about two minutes: fewer samples, fewer settings")
        command.add_argument("--output", type=Path, help="write the rows to a new .jsonl file in this folder")
        command.add_argument("--only", nargs="+", default=[], choices=suite.WORKLOADS, metavar="WORKLOAD")
        if suite is retrieval:
            command.add_argument("--work", type=Path, help="keep the stores in this folder, and use what it holds")
    commands.add_parser("report", help="write the tables of README.md and of benchmarks/results from the rows")
    arguments = parser.parse_args()
    if arguments.list:
        for name, suite in SUITES.items():
            print(f"{name:10} {suite.__doc__}\n{'':10} {', '.join(suite.WORKLOADS)}")
    elif arguments.command == "report":
        for file in report.write():
            print(f"wrote {file}")
    elif arguments.command:
        run(SUITES[arguments.command], arguments)
    else:
        parser.print_help()


def run(suite: ModuleType, arguments: argparse.Namespace) -> None:
    """Print and write the rows of every workload when it is done."""
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no width of its own
    file = arguments.output and arguments.output / f"{datetime.now(timezone.utc):%Y-%m-%d-%H%M%S}.jsonl"
    options = {"work": arguments.work} if "work" in arguments else {}
    clean, rows = True, []
    for result in suite.run(quick=arguments.quick, only=arguments.only, **options):
        if result.rows:
            console.print(report.rich_table(result.rows))
        for implementation, reason in result.refused.items():
            console.print(f"{result.workload}: {implementation} is refused, it {reason}", style="red")
        clean = clean and all(row["clean"] for row in result.rows)
        rows += result.rows
        if file:
            append(result.rows, file)
    if suite is kernels:
        console.print(report.rich_fastest(rows))
    if not clean:
        console.print(f"† taken while other programs used more than {FOREIGN_LIMIT:g} % of a core")
    if file:
        console.print(f"wrote {file}")


if __name__ == "__main__":
    main()
