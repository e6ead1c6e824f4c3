"""What the rows say in the README of the project, and the pages and plots of benchmarks/results."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.cpu.contenders import ONNX_RUNTIME, TRANSFORMERS
from benchmarks.report.lines import NOTES, REPORTED, bar, note, ours
from benchmarks.report.plot import Plot
from benchmarks.report.plots import plots
from benchmarks.report.reading import (
    RESULTS,
    latest,
    machine,
    measured,
    newest_machine,
    origin,
    rows_of,
    tables_of,
    value,
)
from benchmarks.report.svg import written
from benchmarks.report.tables import markdown, table
from benchmarks.rows import ROOT, Row

README = ROOT / "README.md"
PLOTS = RESULTS / "plots"
README_SUITES = ("throughput", "latency", "training", "colbert")
README_MODELS = ("modernbert-base", "ettin-17m")
NO_GPU = (
    "No GPU has been measured yet. On a machine with one, `python -m benchmarks all --output FOLDER` measures "
    "everything within an hour, and with `--minutes 10` the most of it within ten minutes."
)


def write() -> list[Path]:
    """Write results/SUITE/README.md for each suite, the plots, and the tables in the README of the project.

    Returns:
        The files written.
    """
    found = {suite: rows for suite in REPORTED if measured(rows := latest(rows_of(suite)))}
    if not found:
        command = f"python -m benchmarks cpu --output {(RESULTS / 'cpu').relative_to(ROOT)}"
        raise SystemExit(f"no rows in {RESULTS.relative_to(ROOT)}; make some with: {command}")
    files = written(committed_plots(), PLOTS)
    for suite, rows in found.items():
        full = RESULTS / suite / "README.md"
        full.parent.mkdir(exist_ok=True)
        full.write_text(markdown(rows), encoding="utf-8")
        files.append(full)
    README.write_text(with_tables(README.read_text("utf-8"), found), encoding="utf-8")
    return [*files, README]


def committed_plots() -> list[Plot]:
    return plots([one for suite in REPORTED for one in measured(latest(rows_of(suite)))])


def with_tables(readme: str, found: dict[str, list[Row]]) -> str:
    """`readme` with its tables made from these rows of each suite; the table of a suite without rows stays."""
    for name, make in README_TABLES.items():
        if name in found:
            readme = replace_between(readme, make(measured(found[name])), name)
    return replace_between(readme, gpu_table([one for rows in found.values() for one in measured(rows)]), "gpu")


def readme_table(rows: Sequence[Row]) -> str:
    """A plot, and one line per workload on the machine measured last: ours, transformers at its fastest, others."""
    last, here = newest_machine(rows)
    lines = []
    for group in tables_of(here):
        mine = ours(group)
        if mine is None or not mine["times_better_than"]:
            continue
        factors = mine["times_better_than"]
        cells = {
            one["implementation"]: f"{value(one)} ({factors[one['implementation']]:.2f}x)"
            for one in group
            if one["implementation"] in factors
        }
        of_transformers = [name for name in cells if name.startswith(TRANSFORMERS)]
        fastest = cells[min(of_transformers, key=lambda name: factors[name])] if of_transformers else "-"
        others = [name for name in cells if name not in of_transformers and name != ONNX_RUNTIME]
        lines.append(
            [
                mine["what"],
                f"**{value(mine)}**",
                fastest,
                cells.get(ONNX_RUNTIME, "-"),
                "; ".join(f"{name} {cells[name]}" for name in others) or "-",
                _command(mine),
            ]
        )
    columns = ("", "modernbert", "transformers, fastest of its ways", "ONNX Runtime", "others", "command")
    pictures = "\n\n".join(_picture(plot) for plot in plots(here))
    return f"{pictures}\n\n{table(columns, lines)}\n\n{_footer(last, NOTES['cpu'])}"


def retrieval_table(rows: Sequence[Row]) -> str:
    """One line per way to do a thing on the machine measured last, with all of its figures and their bars.

    Left out are what only helps to judge others, and searches that stand there with a bar already.
    """
    last, here = newest_machine(rows)
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
            "; ".join(f"{one['figure']} **{value(one)}**{bar(one, ' (bar {}, {})')}" for one in group),
            f"`python -m benchmarks retrieval --only {workload}`",
        ]
        for (workload, corpus, way), group in groups.items()
    ]
    return f"{table(('', 'measured', 'command'), lines)}\n\n{_footer(last, NOTES['retrieval'])}"


def gpu_table(rows: Sequence[Row]) -> str:
    """Two models on the GPU measured last: a line for each set of lengths, and of a curve the smallest batch."""
    on_gpu = [one for one in rows if one.get("gpu") and one["kind"] == "measured" and one["suite"] in README_SUITES]
    if not on_gpu:
        return NO_GPU
    last, here = newest_machine(on_gpu)
    shown: dict[tuple[str, ...], list[Row]] = {}
    for group in sorted(tables_of(here), key=lambda group: group[0]["x"]["value"] if group[0]["x"] else 0.0):
        one = group[0]
        where = "" if one["x"] else one["what"]
        shown.setdefault((one["suite"], one["workload"], one["model"], one["pass"], where), group)
    lines = [
        line
        for suite in README_SUITES
        for (of_suite, _, model, *_), group in shown.items()
        if of_suite == suite and model in README_MODELS
        for figure in dict.fromkeys(one["figure"] for one in group)
        for line in _gpu_line([one for one in group if one["figure"] == figure])
    ]
    columns = ("", "modernbert", "of matmul", "others, the fastest first", "command")
    pictures = "\n\n".join(_picture(plot) for plot in plots(here) if plot.opens)
    return f"{pictures}\n\n{table(columns, lines)}\n\n{_footer(last, note(last['suite']))}"


def _gpu_line(rows: Sequence[Row]) -> Iterator[list[str]]:
    """Ours and everybody else, of rows with one figure; none if we have none."""
    mine = ours(rows, rows[0]["figure"])
    if mine is None:
        return
    factors = mine["times_better_than"]
    others = sorted((one for one in rows if one["implementation"] in factors), key=lambda one: _factor(mine, one))
    cells = [f"{one['implementation']} {value(one)} ({_factor(mine, one):.2f}x)" for one in others]
    share = "" if mine["percent_of_matmul"] is None else f"{mine['percent_of_matmul']:.0f} %"
    what = f"{mine['what']}, {mine['pass']}: {mine['figure']}"
    yield [what, f"**{value(mine)}**", share, "; ".join(cells) or "-", _command(mine)]


def _factor(mine: Row, one: Row) -> float:
    return mine["times_better_than"][one["implementation"]]


def _picture(plot: Plot) -> str:
    return f"![{plot.title}]({(PLOTS / plot.file).relative_to(ROOT).as_posix()})"


def _command(one: Row) -> str:
    return f"`python -m benchmarks {one['suite']} --only {one['workload']}`"


def _footer(last: Row, text: str) -> str:
    return f"{', '.join(machine(last))}. {origin(last, command=False)} {text}"


README_TABLES: dict[str, Callable[[Sequence[Row]], str]] = {"cpu": readme_table, "retrieval": retrieval_table}


def markers(suite: str) -> tuple[str, str]:
    """What stands before and behind the table of a suite in README.md."""
    return f"<!-- {suite}-table -->", f"<!-- /{suite}-table -->"


def replace_between(text: str, table: str, suite: str) -> str:
    """`text` with `table` between the markers of the suite."""
    start, end = markers(suite)
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"README.md must contain {start} and {end} once each")
    return re.sub(f"{start}.*{end}", lambda _: f"{start}\n{table}\n{end}", text, flags=re.DOTALL)
