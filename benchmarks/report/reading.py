"""What is taken from files of rows: the newest run of each workload, its tables, its machine, its figures in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.harness import Result
from benchmarks.rows import ROOT, Row, circumstances, read

RESULTS = ROOT / "benchmarks" / "results"
REFUSED = "refused"
"""The `kind` of a line that says why an implementation has no row."""

THE_REST = "the rest"
"""Who is refused where the time was over."""


def rows_of(suite: str) -> list[Row]:
    """The rows of a suite in all folders of results, whichever they were written to, and what was refused there."""
    return [one for folder in sorted(RESULTS.iterdir()) for one in read(folder) if one["suite"] == suite]


def latest(rows: Iterable[Row]) -> list[Row]:
    """The rows of the newest run of each workload on each machine, and what that run refused.

    A run is taken or left as a whole, because its factors compare samples of the same minutes. One that measured
    nothing (all was refused, or there was no time) replaces none that did.
    """
    runs: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for one in sorted(rows, key=lambda one: one["date"]):
        key = (one["suite"], one["workload"], *machine(one))
        runs.setdefault(key, {}).setdefault(one["date"], []).append(one)
    kept = []
    for by_date in runs.values():
        with_figures = [run for run in by_date.values() if measured(run)]
        kept += (with_figures or list(by_date.values()))[-1]
    return kept


def refused_lines(suite: str, result: Result, rows: Sequence[Row]) -> list[Row]:
    """A line for every refusal of a result: no figure, but where and when it was.

    Args:
        rows: of this run so far; they know its machine.
    """
    where = {name: rows[0][name] for name in ("gpu", "driver", "capability") if rows and name in rows[0]}
    known = {"kind": REFUSED, "suite": suite, "workload": result.workload}
    return [
        known | {"implementation": name, "reason": reason} | circumstances() | where
        for name, reason in result.refused.items()
    ]


def is_refused(one: Row) -> bool:
    return one["kind"] == REFUSED


def measured(rows: Iterable[Row]) -> list[Row]:
    """The rows that have a figure."""
    return [one for one in rows if not is_refused(one)]


def refusals(rows: Iterable[Row]) -> list[str]:
    """Who has no row, and why; what was not reached for lack of time is among it."""
    lines = (f"{one['suite']}, {one['workload']}: {one['implementation']}: {one['reason']}" for one in rows)
    return list(dict.fromkeys(lines))


def tables_of(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of one table each: those of one workload on one machine, by what exactly was measured.

    The tables of the suites `cpu` and `retrieval` hold a whole workload.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for one in rows:
        what = "" if one["suite"] in ("cpu", "retrieval") else one["what"]
        groups.setdefault((one["suite"], one["workload"], what, *machine(one)), []).append(one)
    return list(groups.values())


def newest_machine(rows: Sequence[Row]) -> tuple[Row, list[Row]]:
    """A row of the machine measured last, and all of its rows."""
    last = max(rows, key=lambda one: one["date"])
    return last, [one for one in rows if machine(one) == machine(last)]


def machine(one: Row) -> tuple[str, ...]:
    if one["kind"] == "projected":
        return one["gpu"], f"compute capability {one['capability']}", "projected, not measured"
    if one.get("gpu"):
        return one["gpu"], f"compute capability {one['capability']}", f"driver {one['driver']}", one["system"]
    return one["cpu"], f"{one['threads']} threads", one["system"]


def origin(one: Row, *, command: bool = True) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items() if version)
    text = f"{one['dtype']}, {one['date'][:10]}, {commit(one)}, {versions}."
    return f"{text} Command: `{one['command']}`" if command else text


def commit(one: Row) -> str:
    return f"commit {one['commit'][:10]}{' with uncommitted changes' if one['dirty'] else ''}"


def value(one: Row) -> str:
    """The figure of a row: in its unit, marked where others used the machine, and never a projection unmarked."""
    projected = " (projected)" if one["kind"] == "projected" else ""
    return f"{number(one['median'])} {one['unit']}".rstrip() + ("" if one["clean"] else " †") + projected


def number(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"
