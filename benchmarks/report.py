"""Tables and plots from rows: nothing in them is typed by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import FOREIGN_LIMIT
from benchmarks.ops import CHOSEN, WARM
from benchmarks.rows import ROOT, Row, read
from benchmarks.worker import ENGINES, OURS, SESSION

RESULTS = ROOT / "benchmarks" / "results"
DOCS = dict.fromkeys(("cpu", "training", "gpu"), ROOT / "docs/speed.md") | {"retrieval": ROOT / "docs/search.md"}
"""The page of each generated table."""

MINE = (next(iter(ENGINES)), SESSION, OURS, "modernbert, int8", "triton")
"""Our names; factors are those of the first that a table has."""

SHOWN = ("modernbert-base", "ettin-17m")
"""Models of the table of a GPU."""

UNCLEAN = f"† marks a figure taken while other programs used more than {FOREIGN_LIMIT:g} % of a core."
NOTES = {
    "cpu": f"Factors above 1 mean that modernbert is ahead: the median over rounds of both times in a round. {UNCLEAN}",
    "retrieval": "Recall is that of the pre-filter against exact search. Synthetic vectors come from a seeded table in "
    f"place of the encoder, and their queries cost no encoding; all else is the code that everybody runs. {UNCLEAN}",
}
NOTES["training"] = NOTES["gpu"] = NOTES["cpu"]
NO_GPU = (
    "No GPU has been measured yet. On a machine with one, `python -m benchmarks all --output FOLDER` measures "
    "everything within an hour, and with `--minutes 10` the most of it within ten minutes."
)


def refused(one: Row) -> bool:
    return one["kind"] == "refused"


def latest(rows: Iterable[Row]) -> list[Row]:
    """The rows of the newest run of each workload on each machine, and what that run refused.

    A run is taken or left as a whole, because its factors compare samples of the same minutes. A run without figures
    replaces none that has some.
    """
    kept = []
    for of_workload in grouped(sorted(rows, key=lambda one: one["date"]), "suite", "workload"):
        runs = grouped(of_workload, "date")
        kept += ([run for run in runs if not all(map(refused, run))] or runs)[-1]
    return kept


def grouped(rows: Iterable[Row], *fields: str) -> list[list[Row]]:
    """The rows of one machine with the same values of these fields, in the order of the first ones."""
    groups: dict[str, list[Row]] = {}
    for one in rows:
        groups.setdefault(str((*map(one.get, fields), *machine(one))), []).append(one)
    return list(groups.values())


def tables_of(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of one table each."""
    return grouped(rows, "suite", "workload", "what", "corpus")


def machine(one: Row) -> tuple[str, ...]:
    if one.get("gpu"):
        return one["gpu"], f"compute capability {one['capability']}", f"driver {one['driver']}", one["system"]
    return one["cpu"], f"{one['threads']} threads", one["system"]


def by_machine(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each machine, the one that was measured last first."""
    return sorted(grouped(rows), key=lambda group: max(one["date"] for one in group), reverse=True)


def ours(group: Sequence[Row]) -> Row:
    """The row that the others are compared with: ours, or the first."""
    return next((one for name in MINE for one in group if one["implementation"] == name), group[0])


def is_ours(one: Row) -> bool:
    return one["suite"] == "breakdown" or one["implementation"] in MINE or one["settings"].startswith(CHOSEN)


def worse(rows: Iterable[Row], before: Iterable[Row], percent: float) -> tuple[int, list[str]]:
    """How many of our rows have one of the same figure on the same GPU or CPU before, and which are worse by more."""

    def key(one: Row) -> str:
        names = ("suite", "workload", "what", "implementation", "figure", "pass", "dtype")
        return str((*map(one.get, names), machine(one)[0]))

    known = {key(one): one for one in latest(before) if not refused(one)}
    pairs = [(one, known[key(one)]) for one in rows if not refused(one) and is_ours(one) and key(one) in known]
    lines = []
    for one, other in pairs:
        times = one["median"] / other["median"]
        lost = 100 * ((1 / times if one["unit"].endswith("/s") else times) - 1)
        if lost > percent:
            lines.append(
                f"{one['what']}: {one['implementation']}: {value(one)}, before {value(other)}: {lost:.0f} % worse"
            )
    return len(pairs), lines


def value(one: Row) -> str:
    """The figure of a row in its unit, marked where others used the machine."""
    return f"{number(one['median'])} {one['unit']}".rstrip() + ("" if one["clean"] else " †")


def number(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"


def factor(group: Sequence[Row], one: Row) -> float | None:
    """How many times better ours is than this row, of the same figure."""
    alike = [other for other in group if other.get("figure") == one.get("figure")]
    return ours(alike)["times_better_than"].get(one["implementation"])


def footer(here: Sequence[Row], note: str) -> str:
    one = max(here, key=lambda one: one["date"])
    versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items() if version)
    commit = f"commit {one['commit'][:10]}{' with uncommitted changes' if one['dirty'] else ''}"
    return f"{', '.join(machine(one))}. {one['dtype']}, {one['date'][:10]}, {commit}, {versions}. {note}".strip()


def table(titles: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [titles, ["---"] * len(titles), *cells])


COLUMNS: dict[str, Callable[[Sequence[Row], Row], str]] = {
    "implementation": lambda group, one: one["implementation"],
    "figure": lambda group, one: one.get("figure") or "",
    "median": lambda group, one: value(one),
    "range": lambda group, one: f"{number(one['min'])} to {number(one['max'])}",
    "samples": lambda group, one: str(one["samples"]),
    "cold": lambda group, one: known(one, "cold_us", " us"),
    "launches": lambda group, one: known(one, "launches"),
    "a pass": lambda group, one: known(one, "us_of_pass", " us"),
    "of the pass": lambda group, one: known(one, "percent_of_pass", " %"),
    "ours is": lambda group, one: times(group, one),
    "GB/s": lambda group, one: known(one, "gb_per_s"),
    "TFLOP/s": lambda group, one: known(one, "tflop_per_s"),
    "of matmul": lambda group, one: known(one, "percent_of_matmul", " %"),
    "of roofline": lambda group, one: known(one, "percent_of_roofline", " %"),
    "clock": lambda group, one: known(one.get("sensors") or {}, "sm_mhz", " MHz"),
    "slowed by": lambda group, one: ", ".join((one.get("sensors") or {}).get("throttled", ())),
    "others' CPU": lambda group, one: known(one, "foreign_percent", " %"),
    "error": lambda group, one: "" if one["max_error"] is None else f"{one['max_error']:.1e}",
    "settings": lambda group, one: one["settings"],
}
"""Of a page of all rows; a column that is empty is left out."""


def known(one: Row, figure: str, unit: str = "") -> str:
    return "" if one.get(figure) is None else number(one[figure]) + unit


def times(group: Sequence[Row], one: Row) -> str:
    found = factor(group, one)
    return f"{found:.2f}x" if found else ""


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
        parts.append(f"## {', '.join(machine(here[0]))}")
        for group in tables_of(one for one in here if not refused(one)):
            one = group[0]
            parts.append(f"### {one['suite']}, {one['workload']}: {': '.join(filter(None, named(one)))}")
            parts += [table(*lines_of(group)), f"{footer(group, '')} Command: `{one['command']}`"]
        reasons = {f"{one['workload']}: {one['implementation']}: {one['reason']}" for one in here if refused(one)}
        parts += ["### Without a row", "\n".join(f"- {line}" for line in sorted(reasons))] if reasons else []
    return "\n\n".join(parts) + "\n"


def named(one: Row) -> tuple[str, str | None]:
    """A table in words, with the corpus where they do not have it."""
    corpus = one.get("corpus")
    return one["what"], None if corpus and corpus in one["what"] else corpus


def summary(rows: Sequence[Row], name: str) -> str:
    """For each machine a line for each table: ours, and how many times better it is than the others."""
    parts = []
    for here in by_machine(rows):
        parts += [f"![{title}](../benchmarks/results/plots/{file})" for file, title, _ in plots(here)]
        parts += [table(("", "ours", "others, the fastest first", "command"), summary_lines(here))]
        parts.append(footer(here, NOTES[name]))
    return "\n\n".join(parts)


def summary_lines(here: Sequence[Row]) -> Iterator[list[str]]:
    for group in tables_of(here):
        mine, cells = ours(group), {}
        if not (mine["times_better_than"] or mine.get("figure")):
            continue  # figures that only a page of all rows explains
        for of_one in grouped(group, "implementation"):
            figures = []
            for one in of_one:
                found = times(group, one)
                figures.append(f"{one.get('figure') or ''} {value(one)}{f' ({found})' if found else ''}".strip())
            cells[of_one[0]["implementation"]] = ", ".join(figures), factor(group, of_one[0]) or 0.0
        first, _ = cells.pop(mine["implementation"])
        others = sorted(cells.items(), key=lambda item: item[1][1])
        words = "; ".join(f"{name} {figures}" for name, (figures, _) in others) or "-"
        label = "" if mine["implementation"] in (SESSION, OURS) else f"{mine['implementation']} "
        command = f"`python -m benchmarks {mine['suite']} --only {mine['workload']}`"
        yield [": ".join(filter(None, named(mine))), f"{label}**{first}**", words, command]


Plot = tuple[str, str, Callable[[Any], None]]


def file_of(here: Sequence[Row], name: str) -> str:
    """Such as amd-epyc-avx2-cpu-factors.svg."""
    words = (here[0].get("gpu") or here[0]["cpu"]).replace("NVIDIA", "")
    return re.sub(r"[^a-z0-9]+", "-", f"{words} {name}".lower()).strip("-") + ".svg"


def plots(rows: Sequence[Row]) -> Iterator[Plot]:
    """For each suite on each machine: of kernels the roofline; else how many times better ours is than every other."""
    for here in by_machine(rows):
        for of_suite in grouped(here, "suite"):
            suite, factors = of_suite[0]["suite"], {}
            if kernels := [
                one for one in of_suite if one.get("gb_per_s") and is_ours(one) and one.get("cache") != WARM
            ]:
                yield (
                    file_of(here, f"{suite} roofline"),
                    f"{suite}: ours under the roof",
                    partial(draw_roofline, kernels),
                )
                continue
            for group in tables_of(of_suite):
                for alike in grouped(group, "figure", "pass"):
                    found, suffix = ours(alike), f" {alike[0].get('figure') or ''}".rstrip()
                    factors |= {f"{found['what'][:70]}{suffix}: {a}": x for a, x in found["times_better_than"].items()}
            if factors:
                title = f"{suite}: how many times faster (or leaner) modernbert is"
                yield file_of(here, f"{suite} factors"), title, partial(draw_factors, factors)


def draw_roofline(kernels: Sequence[Row], axes: Any) -> None:
    """Operations per second by operations per byte. A kernel without products is at one operation a byte: there its
    distance from the roof is that of its bytes per second from a copy's.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for one in kernels:
        name = one["implementation"].split(",")[0] if one["suite"] == "breakdown" else one["what"].split()[0]
        x = 1e3 * (one["tflop_per_s"] or 0.0) / one["gb_per_s"] or 1.0
        series.setdefault(name, []).append((x, x * one["gb_per_s"] / 1e3))
    for name, points in series.items():
        axes.scatter(*zip(*points, strict=True), s=12, label=name)
    copy, matmul = kernels[-1]["rates"]["copy_gb_per_s"] / 1e3, kernels[-1]["rates"]["matmul_tflop_per_s"]
    at = [0.5, matmul / copy, 10 * matmul / copy]
    axes.plot(at, [min(x * copy, matmul) for x in at], color="black", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s")
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_factors(factors: dict[str, float], axes: Any) -> None:
    axes.figure.set_size_inches(10, 1 + 0.2 * len(factors))
    axes.barh(list(factors), [found - 1 for found in factors.values()], left=1)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("right of 1: modernbert is ahead")


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


def committed() -> list[Row]:
    return latest(one for folder in sorted(RESULTS.iterdir()) for one in read(folder))


def generated(folder: Path | None) -> dict[Path, str]:
    """The text of every generated page, and of the pages of docs/ with their generated tables; or of that of a folder
    of `all`.
    """
    if folder:
        rows = latest(read(folder))
        pictures = [f"plots/{name}" for name, _, _ in plots([one for one in rows if not refused(one)])]
        text = page(rows, "Benchmarks", pictures)
        outcomes = folder / "suites.txt"
        text += f"\n## Suites\n\n{outcomes.read_text('utf-8')}" if outcomes.exists() else ""
        return {folder / "README.md": text}
    rows = committed()
    found = {
        RESULTS / suite / "README.md": page([one for one in rows if one["suite"] == suite], f"Results of `{suite}`")
        for suite in dict.fromkeys(one["suite"] for one in rows)
    }
    for name, file in DOCS.items():
        of_gpu = [one for one in rows if one.get("gpu") and one.get("model") in SHOWN]
        wanted = of_gpu if name == "gpu" else [one for one in rows if one["suite"] == name]
        text = summary([one for one in wanted if not refused(one)], name) if wanted else NO_GPU
        found[file] = replace_between(found.get(file) or file.read_text("utf-8"), text, name)
    return found


def replace_between(text: str, made: str, name: str) -> str:
    """`text` with this table between its markers."""
    start, end = f"<!-- {name}-table -->", f"<!-- /{name}-table -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"{DOCS[name].name} must contain {start} and {end} once each")
    return re.sub(f"{start}.*{end}", lambda _: f"{start}\n{made}\n{end}", text, flags=re.DOTALL)


def stale(folder: Path | None = None) -> list[Path]:
    """The pages whose text is not that of the rows."""
    return [file for file, text in generated(folder).items() if not file.exists() or file.read_text("utf-8") != text]


def write(folder: Path | None = None) -> list[Path]:
    """The pages and the plots."""
    files = generated(folder)
    for file, text in files.items():
        file.write_text(text, encoding="utf-8")
    rows = latest(read(folder)) if folder else committed()
    return [*files, *drawn(plots([one for one in rows if not refused(one)]), (folder or RESULTS) / "plots")]
