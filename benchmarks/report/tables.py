"""Tables from rows: nothing in them is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.cpu.contenders import ONNX_RUNTIME, OURS, TRANSFORMERS
from benchmarks.rows import ROOT, Row, read

# Here and not from the suite, which takes long to import.
TRITON, CHOSEN = "triton", "what the op chooses"

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
COLUMNS = {
    "cpu": ("implementation", "median", "range", "samples", "modernbert is", "others' CPU", "error", "settings"),
    "retrieval": ("", "way", "figure", "median", "bar", "range", "samples", "others' CPU", "error", "settings"),
    "kernels": (
        *("implementation", "median", "range", "samples", "triton is", "GB/s", "of copy", "TFLOP/s", "of matmul"),
        *("clocks and power", "error", "settings"),
    ),
}
FASTEST = ("", "fastest", "chosen by the op", "the fastest is")
UNCLEAN = "† marks a figure taken while other programs used more than 6 % of a core."
NOTES = {
    "cpu": "Factors above 1 say that modernbert is ahead: the median over rounds of both times within a round. "
    f"{UNCLEAN}",
    "retrieval": "Recall is that of the pre-filter against exact search. Synthetic vectors come from a seeded table in "
    f"place of the encoder, and their queries cost no encoding; all else is the code that everybody runs. {UNCLEAN}",
    "kernels": "GB/s and TFLOP/s are the least that a call must move and compute over its time, beside them the share "
    "of a copy and of a bfloat16 product measured in the same run. No call found its data in a cache. Errors are root "
    "mean squares, as shares of the truth.",
}


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


def rows_of(suite: str) -> list[Row]:
    """The rows of a suite in all folders of results, whichever they were written to."""
    return [one for folder in sorted(RESULTS.iterdir()) for one in read(folder) if one["suite"] == suite]


def write() -> list[Path]:
    """Write results/SUITE/README.md for each suite, and its table in the README of the project; the files written."""
    written, readme = [], README.read_text("utf-8")
    for suite in COLUMNS:
        if rows := latest(rows_of(suite)):
            full = RESULTS / suite / "README.md"
            full.parent.mkdir(exist_ok=True)
            full.write_text(markdown(rows), encoding="utf-8")
            if suite in README_TABLES:
                readme = replace_between(readme, README_TABLES[suite](rows), suite)
            written.append(full)
    if not written:
        command = f"python -m benchmarks cpu --output {(RESULTS / 'cpu').relative_to(ROOT)}"
        raise SystemExit(f"no rows in {RESULTS.relative_to(ROOT)}; make some with: {command}")
    README.write_text(readme, encoding="utf-8")
    return [*written, README]


def rich_table(rows: Sequence[Row]) -> Table:
    """The rows of one workload, for a terminal."""
    table = Table(*COLUMNS[rows[0]["suite"]], title=rows[0]["what"], title_justify="left", title_style="bold")
    for line in _lines(rows):
        table.add_row(*line)
    return table


def markdown(rows: Sequence[Row]) -> str:
    """Every row: a section for each machine, in it a table for each workload."""
    suite = rows[0]["suite"]
    parts = ["# Results", "Made by `python -m benchmarks report` from the rows in this folder.", NOTES[suite]]
    for machine in dict.fromkeys(_machine(one) for one in rows):
        here = [one for one in rows if _machine(one) == machine]
        parts.append(f"## {', '.join(machine)}")
        if suite == "kernels":
            parts += ["### The fastest", _table(FASTEST, fastest(here))]
        for group in _by_workload(here):
            parts += [f"### {group[0]['what']}", _table(COLUMNS[suite], _lines(group)), _origin(group[0])]
    return "\n\n".join(parts) + "\n"


def readme_table(rows: Sequence[Row]) -> str:
    """One line per workload on the machine measured last: ours, transformers at its fastest, other peers."""
    last, here = _newest_machine(rows)
    lines = []
    for group in _by_workload(here):
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
    return f"{_table(columns, lines)}\n\n{', '.join(_machine(last))}. {_origin(last, command=False)} {NOTES['cpu']}"


def retrieval_table(rows: Sequence[Row]) -> str:
    """One line per way to do a thing on the machine measured last, with all of its figures and their bars.

    Left out are what only helps to judge others, and searches that stand there with a bar already.
    """
    last, here = _newest_machine(rows)
    groups: dict[tuple[str, ...], list[Row]] = {}
    for one in here:
        groups.setdefault((one["workload"], one["corpus"], one["implementation"]), []).append(one)
    judged = {key for key, group in groups.items() if any(one["bar"] for one in group)}
    known = {key[1:] for key in judged}
    groups = {
        key: group
        for key, group in groups.items()
        if key in judged or (key[0] == "search-scale" and key[1:] not in known)
    }
    lines = [
        [
            ": ".join(filter(None, (way, corpus))),
            "; ".join(f"{one['figure']} **{value(one)}**{_bar(one, ' (bar {}, {})')}" for one in group),
            f"`python -m benchmarks retrieval --only {workload}`",
        ]
        for (workload, corpus, way), group in groups.items()
    ]
    text = f"{', '.join(_machine(last))}. {_origin(last, command=False)} {NOTES['retrieval']}"
    return f"{_table(('', 'measured', 'command'), lines)}\n\n{text}"


def fastest(rows: Sequence[Row]) -> Iterator[list[str]]:
    """One line per table of the `kernels` suite: which way is the fastest, what the op chooses, what that costs."""
    for group in _by_workload(rows):
        best = min(group, key=lambda one: one["median"])
        chosen = next((one for one in group if one["settings"].startswith(CHOSEN)), None)
        if chosen is None:
            continue
        factor = 1 if chosen is best else best["times_better_than"][chosen["implementation"]]
        cells = (f"{one['implementation']}, {value(one)}" for one in (best, chosen))
        yield [group[0]["what"], *cells, f"{factor:.2f}x"]


def rich_fastest(rows: Sequence[Row]) -> Table:
    table = Table(*FASTEST)
    for line in fastest(rows):
        table.add_row(*line)
    return table


README_TABLES = {"cpu": readme_table, "retrieval": retrieval_table}


def markers(suite: str) -> tuple[str, str]:
    """What stands before and behind the table of a suite in README.md."""
    return f"<!-- {suite}-table -->", f"<!-- /{suite}-table -->"


def replace_between(text: str, table: str, suite: str) -> str:
    """`text` with `table` between the markers of the suite."""
    start, end = markers(suite)
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"README.md must contain {start} and {end} once each")
    return re.sub(f"{start}.*{end}", lambda _: f"{start}\n{table}\n{end}", text, flags=re.DOTALL)


def value(one: Row) -> str:
    return f"{_number(one['median'])} {one['unit']}".rstrip() + ("" if one["clean"] else " †")


def _lines(group: Sequence[Row]) -> list[list[str]]:
    if group[0]["suite"] == "kernels":
        return [_kernel_line(group, one) for one in group]
    if group[0]["suite"] == "retrieval":
        return [
            [one["corpus"], one["implementation"], one["figure"], value(one), _bar(one, "{}: {}"), *_circumstances(one)]
            for one in group
        ]
    ours = _ours(group)
    return [
        [
            one["implementation"],
            value(one),
            *_circumstances(one)[:2],
            _factor(ours, one),
            *_circumstances(one)[2:],
        ]
        for one in group
    ]


def _kernel_line(group: Sequence[Row], one: Row) -> list[str]:
    ours = next((other for other in group if other["implementation"] == TRITON), None)
    factors = ours["times_better_than"] if ours else {}
    name, state = one["implementation"], one["state"]
    figures = [("gb_per_s", ""), ("percent_of_copy", " %"), ("tflop_per_s", ""), ("percent_of_matmul", " %")]
    units = {"sm_mhz": "MHz", "memory_mhz": "MHz", "watts": "W", "celsius": "°C"}
    range_, samples, _, error, settings = _circumstances(one)
    return [
        name,
        value(one),
        range_,
        samples,
        f"{factors[name]:.2f}x" if name in factors else "",
        *("" if one[figure] is None else _number(one[figure]) + unit for figure, unit in figures),
        ", ".join(f"{state[sensor]:g} {unit}" for sensor, unit in units.items() if state[sensor] is not None),
        error,
        settings,
    ]


def _circumstances(one: Row) -> list[str]:
    """Range, samples, the CPU of others, error and settings."""
    return [
        f"{_number(one['min'])} to {_number(one['max'])}",
        str(one["samples"]),
        "" if one["foreign_percent"] is None else f"{one['foreign_percent']:.1f} %",
        "" if one["max_error"] is None else f"{one['max_error']:.1e}",
        one["settings"],
    ]


def _bar(one: Row, form: str) -> str:
    """The bar of a figure and whether it is reached, or nothing if it has none."""
    return form.format(one["bar"], "met" if one["met"] else "missed") if one["bar"] else ""


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
    """The rows of one table each; a workload of the `kernels` suite has many."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for one in rows:
        key = (one["workload"], one["what"]) if one["suite"] == "kernels" else (one["workload"],)
        groups.setdefault(key, []).append(one)
    return list(groups.values())


def _newest_machine(rows: Sequence[Row]) -> tuple[Row, list[Row]]:
    """A row of the machine measured last, and all of its rows."""
    last = max(rows, key=lambda one: one["date"])
    return last, [one for one in rows if _machine(one) == _machine(last)]


def _machine(one: Row) -> tuple[str, ...]:
    if one.get("gpu"):
        return one["gpu"], f"compute capability {one['capability']}", f"driver {one['driver']}", one["system"]
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
