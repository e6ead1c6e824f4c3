"""`python -m benchmarks SUITE` measures, prints and writes rows."""

from __future__ import annotations

import argparse
from datetime import datetime, timezone
from pathlib import Path

from benchmarks import cpu
from benchmarks.rows import append


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", choices=["cpu"])
    parser.add_argument("--quick", action="store_true", help="try the whole path in a minute or two: no results")
    parser.add_argument("--minutes", type=float, help="begin nothing new after these")
    parser.add_argument("--output", type=Path, help="write the rows to a new .jsonl file in this folder")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORKLOAD", choices=cpu.WORKLOADS)
    parser.add_argument("--against", type=Path, help="another checkout, in turns with this one")
    arguments = parser.parse_args()
    file = arguments.output and arguments.output / f"{datetime.now(timezone.utc):%Y-%m-%d-%H%M%S}.jsonl"
    options = {name: getattr(arguments, name) for name in ("quick", "minutes", "only", "against")}
    for result in cpu.run(**options):
        print(f"{result.workload}: {result.rows[0]['what'] if result.rows else ''} {result.refused}")
        for row in result.rows:
            factors = ", ".join(f"{factor:.3f}x {name}" for name, factor in row["times_better_than"].items())
            mark = "" if row["clean"] else " †"
            print(f"  {row['implementation']}: {row['median']} {row['unit']}{mark} ({row['min']} to {row['max']}); {factors}")
        if file:
            append(result.rows, file)


if __name__ == "__main__":
    main()
