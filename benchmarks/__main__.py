"""`python -m benchmarks SUITE` measures, prints and writes rows; `all` runs every suite; `report` shows the rows."""

from __future__ import annotations

import argparse
import signal
import sys
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.suites import MUST, SUITES, described, load


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--list", action="store_true", help="explain every suite and its workloads")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, suite in SUITES.items():
        command = commands.add_parser(name, help=f"a suite: {suite.minutes}{', on a GPU' if suite.gpu == MUST else ''}")
        command.add_argument("--quick", action="store_true", help="try the whole path in a minute or two: no results")
        command.add_argument("--minutes", type=float, help="begin nothing new after these")
        command.add_argument("--output", type=Path, help="write the rows to a new .jsonl file in this folder")
        command.add_argument("--only", nargs="+", default=[], metavar="WORKLOAD", help="see --list")
        if name == "cpu":
            command.add_argument("--data", type=Path, help="sets in BEIR's layout, for the workload int8-retrieval")
        if name == "retrieval":
            command.add_argument("--work", type=Path, help="keep the stores in this folder, and use what it holds")
    command = commands.add_parser("all", help="every suite but `retrieval`, and a report with plots")
    command.add_argument("--output", type=Path, required=True, help="the folder of the report and its rows")
    command.add_argument("--minutes", type=float, default=60.0, help="for all of it (default: 60)")
    command.add_argument("--quick", action="store_true", help="a try-out on any machine: no results")
    command = commands.add_parser("report", help="write tables and plots from rows")
    command.add_argument("folder", type=Path, nargs="?", help="of `all`; without one: README.md and benchmarks/results")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n\n".join(described(name) for name in SUITES))
    elif arguments.command == "all":
        from benchmarks import everything

        # Whoever is asked to end, ends the suite that runs.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
        everything.run(arguments.output, arguments.minutes, quick=arguments.quick)
    elif arguments.command == "report":
        from benchmarks.report import folder, readme

        for file in folder.write(arguments.folder) if arguments.folder else readme.write():
            print(f"wrote {file}")
    elif arguments.command:
        known = load(arguments.command).WORKLOADS
        if unknown := set(arguments.only) - set(known):
            parser.error(f"{arguments.command} has no workload {', '.join(sorted(unknown))}: {', '.join(known)}")
        run(arguments.command, arguments)
    else:
        parser.print_help()


def run(name: str, arguments: argparse.Namespace) -> None:
    """Print and write the rows of every table when it is done, and why somebody has none."""
    from rich.console import Console

    from benchmarks.harness import FOREIGN_LIMIT
    from benchmarks.report.reading import measured, refused_lines, tables_of
    from benchmarks.report.tables import rich_fastest, rich_table
    from benchmarks.rows import append

    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has no width of its own
    file = arguments.output and arguments.output / f"{datetime.now(timezone.utc):%Y-%m-%d-%H%M%S}.jsonl"
    options = {option: getattr(arguments, option) for option in ("data", "work") if option in arguments}
    rows = []
    for result in load(name).run(quick=arguments.quick, only=arguments.only, minutes=arguments.minutes, **options):
        for table in tables_of(result.rows):
            console.print(rich_table(table))
        for implementation, reason in result.refused.items():
            console.print(f"{result.workload}: {implementation}: {reason}", style="red")
        rows += result.rows
        if file:
            append([*result.rows, *refused_lines(name, result, rows)], file)
    if name == "kernels":
        console.print(rich_fastest(rows))
    if not all(row["clean"] for row in measured(rows)):
        console.print(f"† taken while other programs used more than {FOREIGN_LIMIT:g} % of a core")
    if file:
        console.print(f"wrote {file}")


if __name__ == "__main__":
    main()
