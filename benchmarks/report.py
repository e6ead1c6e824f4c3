"""Tables from rows: nothing in them is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.backends import ONNX_RUNTIME, OURS, TRANSFORMERS
from benchmarks.rows import ROOT, Row, read

RESULTS = ROOT / "benchmarks" / "results" / "cpu"
README = ROOT / "README.md"
START, END = "<!-- cpu-table -->", "<!-- /cpu-table -->"
COLUMNS = (
    "implementation",
    "median",
    "range",
    "samples",
    "modernbert is",
    "others' CPU",
    "error",
    "settings",
)
NOTE = (
    "Factors above 1 say that modernbert is ahead: the median over rounds of both times within a round. "
    "† marks a figure taken while other programs used more than 6 % of a core."
)


def latest(rows: Iterable[Row]) -> list[Row]:
    """The rows of the newest run of each workload on each machine.

    A run is taken or left as a whole, because its factors compare samples of the same minutes.
    """
    newest: dict[tuple[str, ...], list[Row]] = {}
    for one in sorted(rows, key=lambda one: one["date"]):
        key = (one["workload"], *_machine(one))
        if key in newest and newest[key][0]["date"] == one["date"]:
            newest[key].append(one)
        else:
            newest[key] = [one]
    return [one for run in newest.values() for one in run]


def write() -> list[Path]:
    """Write README.md beside the rows, and the table in the README of the project; the files written."""
    rows = latest(read(RESULTS))
    if not rows:
        command = f"python -m benchmarks cpu --output {RESULTS.relative_to(ROOT)}"
        raise SystemExit(f"no rows in {RESULTS.relative_to(ROOT)}; make some with: {command}")
    full = RESULTS / "README.md"
    full.write_text(markdown(rows), encoding="utf-8")
    README.write_text(replace_between(README.read_text("utf-8"), readme_table(rows)), encoding="utf-8")
    return [full, README]


def rich_table(rows: Sequence[Row]) -> Table:
    """The rows of one workload, for a terminal."""
    table = Table(*COLUMNS, title=rows[0]["what"], title_justify="left", title_style="bold")
    for line in _lines(rows):
        table.add_row(*line)
    return table


def markdown(rows: Sequence[Row]) -> str:
    """Every row: a section for each machine, in it a table for each workload."""
    parts = ["# Results", "Made by `python -m benchmarks report` from the rows in this folder.", NOTE]
    for machine in dict.fromkeys(_machine(one) for one in rows):
        here = [one for one in rows if _machine(one) == machine]
        parts.append(f"## {', '.join(machine)}")
        for group in _by_workload(here):
            parts += [f"### {group[0]['what']}", _table(COLUMNS, _lines(group)), _origin(group[0])]
    return "\n\n".join(parts) + "\n"


def readme_table(rows: Sequence[Row]) -> str:
    """One line per workload on the machine measured last: ours, transformers at its fastest, other peers."""
    last = max(rows, key=lambda one: one["date"])
    lines = []
    for group in _by_workload(one for one in rows if _machine(one) == _machine(last)):
        ours = _ours(group)
        if ours is None:
            continue
        factors = ours["times_better_than"]
        cells = {
            one["implementation"]: f"{value(one)} ({factors[one['implementation']]:.2f}x)"
            for one in group
            if one is not ours
        }
        of_transformers = [name for name in cells if name.startswith(TRANSFORMERS)]
        fastest = cells[min(of_transformers, key=lambda name: factors[name])] if of_transformers else "-"
        others = [name for name in cells if name not in of_transformers and name != ONNX_RUNTIME]
        lines.append(
            [
                ours["what"],
                f"**{value(ours)}**",
                fastest,
                cells.get(ONNX_RUNTIME, "-"),
                "; ".join(f"{name} {cells[name]}" for name in others) or "-",
                f"`python -m benchmarks {ours['suite']} --only {ours['workload']}`",
            ]
        )
    columns = ("", "modernbert", "transformers, fastest of its ways", "ONNX Runtime", "others", "command")
    return f"{_table(columns, lines)}\n\n{', '.join(_machine(last))}. {_origin(last, command=False)} {NOTE}"


def replace_between(text: str, table: str) -> str:
    """`text` with `table` between the markers."""
    if text.count(START) != 1 or text.count(END) != 1:
        raise ValueError(f"README.md must contain {START} and {END} once each")
    return re.sub(f"{START}.*{END}", lambda _: f"{START}\n{table}\n{END}", text, flags=re.DOTALL)


def value(one: Row) -> str:
    return f"{_number(one['median'])} {one['unit']}" + ("" if one["clean"] else " †")


def _lines(group: Sequence[Row]) -> list[list[str]]:
    ours = _ours(group)
    return [
        [
            one["implementation"],
            value(one),
            f"{_number(one['min'])} to {_number(one['max'])}",
            str(one["samples"]),
            _factor(ours, one),
            "" if one["foreign_percent"] is None else f"{one['foreign_percent']:.1f} %",
            f"{one['max_error']:.1e}",
            one["settings"],
        ]
        for one in group
    ]


def _factor(ours: Row | None, one: Row) -> str:
    """How many times better ours is, and what we mean it to be."""
    name = one["implementation"]
    if ours is None or name == OURS:
        return ""
    goal = f" (goal {ours['goals'][name]:g}x)" if name in ours["goals"] else ""
    return f"{ours['times_better_than'][name]:.2f}x{goal}"


def _ours(group: Sequence[Row]) -> Row | None:
    return next((one for one in group if one["implementation"] == OURS), None)


def _by_workload(rows: Iterable[Row]) -> list[list[Row]]:
    groups: dict[str, list[Row]] = {}
    for one in rows:
        groups.setdefault(one["workload"], []).append(one)
    return list(groups.values())


def _machine(one: Row) -> tuple[str, ...]:
    return one["cpu"], f"{one['threads']} threads", one["system"]


def _origin(one: Row, *, command: bool = True) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items() if version)
    changed = " with uncommitted changes" if one["dirty"] else ""
    text = f"{one['dtype']}, {one['date'][:10]}, commit {one['commit'][:10]}{changed}, {versions}."
    return f"{text} Command: `{one['command']}`" if command else text


def _number(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, ["---"] * len(columns), *lines])
