"""Tables and plots from rows: nothing in them is typed by hand.

python -m benchmarks report             rewrite the tables of docs/, and the pages and plots of benchmarks/results
python -m benchmarks report --check     only say which of these differ from the rows
python -m benchmarks report FOLDER      README.md and plots of a folder of `all`
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import FOREIGN_LIMIT
from benchmarks.peers import INT8, ONNX_RUNTIME, OURS, SESSION, TRANSFORMERS
from benchmarks.rows import ROOT, Row, read

RESULTS = ROOT / "benchmarks" / "results"
DOCS = {"cpu": ROOT / "docs" / "speed.md", "gpu": ROOT / "docs" / "speed.md", "retrieval": ROOT / "docs" / "search.md"}
"""The page of each generated table."""

MINE = (SESSION, OURS, INT8, "modernbert, graphs", "triton")
"""Our names; factors are those of the first that a table has."""

UNCLEAN = f"† marks a figure taken while other programs used more than {FOREIGN_LIMIT:g} % of a core."
NOTES = {
    "cpu": "Factors above 1 say that modernbert is ahead: the median over rounds of both times within a round. "
    f"{UNCLEAN}",
    "retrieval": "Recall is that of the pre-filter against exact search. Synthetic vectors come from a seeded table in "
    f"place of the encoder, and their queries cost no encoding; all else is the code that everybody runs. {UNCLEAN}",
}
NO_GPU = (
    "No GPU has been measured yet. On a machine with one, `python -m benchmarks all --output FOLDER` measures "
    "everything within an hour, and with `--minutes 10` the most of it within ten minutes."
)


# Reading rows.


def refused(one: Row) -> bool:
    return one["kind"] == "refused"


def latest(rows: Iterable[Row]) -> list[Row]:
    """The rows of the newest run of each workload on each machine, and what that run refused.

    A run is taken or left as a whole, because its factors compare samples of the same minutes. A run without figures
    replaces none that has some.
    """
    runs: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for one in sorted(rows, key=lambda one: one["date"]):
        runs.setdefault((one["suite"], one["workload"], *machine(one)), {}).setdefault(one["date"], []).append(one)
    kept = []
    for by_date in runs.values():
        with_figures = [run for run in by_date.values() if not all(map(refused, run))]
        kept += (with_figures or list(by_date.values()))[-1]
    return kept


def tables_of(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of one table each; the tables of `cpu` and `retrieval` have a whole workload."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for one in rows:
        what = "" if one["suite"] in ("cpu", "retrieval") else one["what"]
        groups.setdefault((one["suite"], one["workload"], what, *machine(one)), []).append(one)
    return list(groups.values())


def machine(one: Row) -> tuple[str, ...]:
    if one.get("gpu"):
        return one["gpu"], f"compute capability {one['capability']}", f"driver {one['driver']}", one["system"]
    return one["cpu"], f"{one['threads']} threads", one["system"]


def by_machine(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each machine, the one that was measured last first."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for one in sorted(rows, key=lambda one: one["date"], reverse=True):
        groups.setdefault(machine(one), [])
    for one in rows:
        groups[machine(one)].append(one)
    return list(groups.values())


def ours(group: Sequence[Row]) -> Row | None:
    return next((one for name in MINE for one in group if one["implementation"] == name), None)


def value(one: Row) -> str:
    """The figure of a row in its unit, marked where others used the machine."""
    return f"{number(one['median'])} {one['unit']}".rstrip() + ("" if one["clean"] else " †")


def number(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"


def footer(here: Sequence[Row], note: str) -> str:
    one = max(here, key=lambda one: one["date"])
    versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items() if version)
    commit = f"commit {one['commit'][:10]}{' with uncommitted changes' if one['dirty'] else ''}"
    return f"{', '.join(machine(one))}. {one['dtype']}, {one['date'][:10]}, {commit}, {versions}. {note}".strip()


# Tables.


def table(titles: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [titles, ["---"] * len(titles), *cells])


COLUMNS: dict[str, Callable[[Sequence[Row], Row], str]] = {
    "implementation": lambda group, one: one["implementation"],
    "corpus": lambda group, one: one.get("corpus") or "",
    "figure": lambda group, one: " ".join(map(str, [one.get("figure") or "", *(one.get("x") or {}).values()])).strip(),
    "median": lambda group, one: value(one),
    "bar": lambda group, one: bar(one, "{}: {}"),
    "range": lambda group, one: f"{number(one['min'])} to {number(one['max'])}",
    "samples": lambda group, one: str(one["samples"]),
    "ours is": lambda group, one: factor(group, one),
    "GB/s": lambda group, one: known(one, "gb_per_s"),
    "TFLOP/s": lambda group, one: known(one, "tflop_per_s"),
    "of copy": lambda group, one: known(one, "percent_of_copy", " %"),
    "of matmul": lambda group, one: known(one, "percent_of_matmul", " %"),
    "of datasheet": lambda group, one: known(one, "percent_of_datasheet", " %"),
    "of roofline": lambda group, one: known(one, "percent_of_roofline", " %"),
    "clocks": lambda group, one: ", ".join(f"{name} {x:g}" for name, x in (one.get("state") or {}).items() if x),
    "others' CPU": lambda group, one: known(one, "foreign_percent", " %"),
    "error": lambda group, one: "" if one["max_error"] is None else f"{one['max_error']:.1e}",
    "settings": lambda group, one: one["settings"],
}
"""Of a page of all rows; a column that is empty is left out."""


def known(one: Row, figure: str, unit: str = "") -> str:
    return "" if one.get(figure) is None else number(one[figure]) + unit


def bar(one: Row, form: str) -> str:
    """The bar of a figure and whether it is reached, or nothing if it has none."""
    return form.format(one["bar"], "met" if one["met"] else "missed") if one.get("bar") else ""


def factor(group: Sequence[Row], one: Row) -> str:
    """How many times better ours is than this row, of the same figure."""
    mine = ours(
        [other for other in group if (other.get("figure"), other.get("x")) == (one.get("figure"), one.get("x"))]
    )
    factors = mine["times_better_than"] if mine else {}
    return f"{factors[one['implementation']]:.2f}x" if one["implementation"] in factors else ""


def lines_of(group: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """The titles and cells of a table of all rows of a group."""
    columns = {title: [cell(group, one) for one in group] for title, cell in COLUMNS.items()}
    filled = {title: cells for title, cells in columns.items() if any(cells)}
    return list(filled), [list(line) for line in zip(*filled.values(), strict=True)]


def page(rows: Sequence[Row], title: str, pictures: Sequence[str] = ()) -> str:
    """Every row, and what was refused, by machine and workload."""
    parts = [f"# {title}", "Made by `python -m benchmarks report` from the rows in this folder.", UNCLEAN]
    parts += [f"![]({file})" for file in pictures]
    for here in by_machine(rows):
        figures = [one for one in here if not refused(one)]
        parts.append(f"## {', '.join(machine(here[0]))}")
        for group in tables_of(figures):
            one = group[0]
            parts.append(f"### {one['suite']}, {one['workload']}: {one['what']}")
            parts += [table(*lines_of(group)), f"{footer(group, '')} Command: `{one['command']}`"]
        reasons = {f"{one['workload']}: {one['implementation']}: {one['reason']}" for one in here if refused(one)}
        parts += ["### Without a row", "\n".join(f"- {line}" for line in sorted(reasons))] if reasons else []
    return "\n\n".join(parts) + "\n"


def cpu_table(rows: Sequence[Row]) -> str:
    """For each machine a plot, and one line per workload: ours, transformers at its fastest, others."""
    return "\n\n".join(part for here in by_machine(rows) for part in _cpu_parts(here))


def _cpu_parts(here: Sequence[Row]) -> Iterator[str]:
    lines = []
    for group in tables_of(here):
        mine = ours(group)
        if mine is None or not (factors := mine["times_better_than"]):
            continue
        cells = {
            one["implementation"]: f"{value(one)} ({factors[one['implementation']]:.2f}x)"
            for one in group
            if one["implementation"] in factors
        }
        theirs = [name for name in cells if name.startswith(TRANSFORMERS)]
        fastest = cells[min(theirs, key=lambda name: factors[name])] if theirs else "-"
        others = [f"{name} {cell}" for name, cell in cells.items() if name not in theirs and name != ONNX_RUNTIME]
        ort, command = cells.get(ONNX_RUNTIME, "-"), f"`python -m benchmarks cpu --only {mine['workload']}`"
        lines.append([mine["what"], f"**{value(mine)}**", fastest, ort, "; ".join(others) or "-", command])
    yield "\n\n".join(f"![{title}](../benchmarks/results/plots/{name})" for name, title, _ in cpu_plot(here))
    yield table(("", "modernbert", "transformers, fastest of its ways", "ONNX Runtime", "others", "command"), lines)
    yield footer(here, NOTES["cpu"])


def retrieval_table(rows: Sequence[Row]) -> str:
    """One line per way to do a thing on the machine measured last, with all of its figures and their bars.

    Left out is what only helps to judge others, and searches that are there with a bar already.
    """
    here = by_machine(rows)[0]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for one in here:
        groups.setdefault((one["workload"], one["corpus"], one["implementation"]), []).append(one)
    judged = {key for key, group in groups.items() if any(one.get("bar") for one in group)}
    shown = {key[1:] for key in judged}
    lines = [
        [
            ": ".join(filter(None, (way, corpus))),
            "; ".join(f"{one['figure']} **{value(one)}**{bar(one, ' (bar {}, {})')}" for one in group),
            f"`python -m benchmarks retrieval --only {workload}`",
        ]
        for (workload, corpus, way), group in groups.items()
        if (workload, corpus, way) in judged or (workload == "search-scale" and (corpus, way) not in shown)
    ]
    return f"{table(('', 'measured', 'command'), lines)}\n\n{footer(here, NOTES['retrieval'])}"


def gpu_table(rows: Sequence[Row]) -> str:
    """Two models on the GPU measured last: a line for each table and figure."""
    suites, models = ("throughput", "latency", "training", "colbert"), ("modernbert-base", "ettin-17m")
    found = [one for one in rows if one.get("gpu") and one["suite"] in suites and one["model"] in models]
    if not found:
        return NO_GPU
    here, lines = by_machine(found)[0], []
    for group in tables_of(here):
        for figure in dict.fromkeys(one["figure"] for one in group):
            alike = [one for one in group if one["figure"] == figure]
            if (mine := ours(alike)) is None:
                continue
            factors = mine["times_better_than"]
            others = sorted((one for one in alike if one is not mine), key=lambda one: factors[one["implementation"]])
            cells = [f"{one['implementation']} {value(one)} ({factors[one['implementation']]:.2f}x)" for one in others]
            what = f"{mine['what']}, {mine['pass']}: {figure}"
            command = f"`python -m benchmarks {mine['suite']} --only {mine['workload']}`"
            share = known(mine, "percent_of_matmul", " %")
            lines.append([what, f"**{value(mine)}**", share, "; ".join(cells) or "-", command])
    columns = ("", "modernbert", "of matmul", "others, the fastest first", "command")
    return f"{table(columns, lines)}\n\n{footer(here, UNCLEAN)}"


# Plots: (file, title, a function that draws on new axes).

Plot = tuple[str, str, Callable[[Any], None]]


def file_of(here: Sequence[Row], name: str) -> str:
    """Such as amd-epyc-cpu-factors.svg."""
    words = re.sub(r"\(.*?\)|NVIDIA", "", here[0].get("gpu") or here[0]["cpu"])
    return re.sub(r"[^a-z0-9]+", "-", f"{words} {name}".lower()).strip("-") + ".svg"


def plots(rows: Sequence[Row]) -> Iterator[Plot]:
    """Factors on a CPU, latencies of search, and medians of other tables: curves where rows have an x, else bars."""
    for here in by_machine(rows):
        yield from cpu_plot(here)
        groups: dict[str, list[Row]] = {}
        for one in here:
            if (
                one["suite"] == "retrieval"
                and one["workload"].startswith("search-")
                and one["figure"] in ("p50", "p99")
            ):
                passages, _, vectors = one["corpus"].partition(" passages, ")
                x, name = int(passages.replace(",", "")), f"{one['implementation']}, {vectors}, {one['figure']}"
                found = one | {"x": {"name": "passages", "value": x}, "implementation": name}
                groups.setdefault("retrieval search", []).append(found)
            elif one["suite"] not in ("cpu", "retrieval"):
                parts = (one["suite"], one.get("model"), one.get("figure"), one.get("pass"))
                parts += (one["workload"] if one.get("x") else one["what"],)
                groups.setdefault(" ".join(filter(None, parts))[:100], []).append(one)
        for name, group in groups.items():
            yield file_of(here, name), name, partial(draw_medians, group)


def cpu_plot(here: Sequence[Row]) -> Iterator[Plot]:
    factors: dict[str, float] = {}
    for group in tables_of(one for one in here if one["suite"] == "cpu"):
        if mine := ours(group):
            factors |= {f"{mine['what'][:70]}: {name}": found for name, found in mine["times_better_than"].items()}

    def draw(axes: Any) -> None:
        axes.figure.set_size_inches(10, 1 + 0.2 * len(factors))
        axes.barh(list(factors), [found - 1 for found in factors.values()], left=1)
        axes.set_xscale("log")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_xlabel("right of 1: modernbert is ahead")

    if factors:
        yield file_of(here, "cpu factors"), "On a CPU: how many times faster (or leaner) modernbert is", draw


def draw_medians(group: Sequence[Row], axes: Any) -> None:
    for name in dict.fromkeys(one["implementation"] for one in group):
        alike = [one for one in group if one["implementation"] == name]
        if not alike[0].get("x"):
            axes.barh([name], [alike[0]["median"]], color="tab:blue")
            axes.set_xlabel(alike[0]["unit"])
            continue
        points = sorted((one["x"]["value"], one["median"]) for one in alike)
        axes.loglog(*zip(*points, strict=True), "o-", label=name)
        axes.set(xlabel=alike[0]["x"]["name"], ylabel=alike[0]["unit"])
        axes.legend(fontsize=7)


def drawn(found: Iterable[Plot], folder: Path) -> list[Path]:
    """Draw the plots into a folder that has nothing else; the same rows and matplotlib give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.svg"):
        file.unlink()
    files = []
    with matplotlib.rc_context({"svg.hashsalt": "rows", "svg.fonttype": "none", "font.size": 8}):
        for name, title, draw in found:
            figure = Figure(figsize=(8, 4), layout="constrained")
            draw(axes := figure.add_subplot(title=title))
            axes.grid(alpha=0.3)
            figure.savefig(folder / name, metadata={"Date": None})
            files.append(folder / name)
    return files


# Writing.


def generated() -> dict[Path, str]:
    """The text of every generated page, and of the pages of docs/ with their generated tables."""
    folders = [folder for folder in sorted(RESULTS.iterdir()) if any(folder.glob("*.jsonl"))]
    rows = latest(one for folder in folders for one in read(folder))
    figures = [one for one in rows if not refused(one)]
    found = {
        RESULTS / suite / "README.md": page([one for one in rows if one["suite"] == suite], f"Results of `{suite}`")
        for suite in dict.fromkeys(one["suite"] for one in rows)
    }
    tables: dict[str, str] = {"gpu": gpu_table(figures)}
    for name, make in (("cpu", cpu_table), ("retrieval", retrieval_table)):
        if of_suite := [one for one in figures if one["suite"] == name]:
            tables[name] = make(of_suite)
    for name, text in tables.items():
        file = DOCS[name]
        if file.exists():
            found[file] = replace_between(found.get(file) or file.read_text("utf-8"), text, name)
    return found


def replace_between(text: str, made: str, name: str) -> str:
    """`text` with this table between its markers."""
    start, end = f"<!-- {name}-table -->", f"<!-- /{name}-table -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"{DOCS[name].name} must contain {start} and {end} once each")
    return re.sub(f"{start}.*{end}", lambda _: f"{start}\n{made}\n{end}", text, flags=re.DOTALL)


def stale() -> list[Path]:
    """The pages whose text is not that of the rows."""
    return [file for file, text in generated().items() if not file.exists() or file.read_text("utf-8") != text]


def write() -> list[Path]:
    files = generated()
    for file, text in files.items():
        file.write_text(text, encoding="utf-8")
    rows = [one for folder in sorted(RESULTS.iterdir()) for one in latest(read(folder)) if not refused(one)]
    return [*files, *drawn(plots(rows), RESULTS / "plots")]


def write_folder(folder: Path) -> list[Path]:
    """README.md and plots of a folder of `all`, whose rows are in `rows/`."""
    rows = latest(read(folder / "rows"))
    pictures = drawn(plots([one for one in rows if not refused(one)]), folder / "plots")
    text = (
        page(rows, "Benchmarks", [f"plots/{file.name}" for file in pictures]) if rows else "# Benchmarks\n\nNo rows.\n"
    )
    outcomes = folder / "suites.txt"
    text += f"\n## Suites\n\n{outcomes.read_text('utf-8')}" if outcomes.exists() else ""
    (folder / "README.md").write_text(text, encoding="utf-8")
    return [folder / "README.md", *pictures]
