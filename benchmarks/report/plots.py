"""Which plots rows make: only where rows exist, and nobody's row is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from benchmarks.report.bars import Factor, factors
from benchmarks.report.curves import Curve, curves
from benchmarks.report.frame import ACCENT, GREY, Frame
from benchmarks.report.heat_map import heat_map
from benchmarks.report.lines import MODEL_SUITES, PROJECTED, ours
from benchmarks.report.model_plots import model_plots
from benchmarks.report.plot import Plot, plot
from benchmarks.report.reading import machine, tables_of
from benchmarks.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plots(rows: Sequence[Row]) -> list[Plot]:
    """All plots of these rows: by suite in the order of `PLOTS`, machine by machine, projections by themselves."""
    found = []
    for suite, make in PLOTS.items():
        groups: dict[tuple[object, ...], list[Row]] = {}
        for one in rows:
            if one["suite"] == suite:
                groups.setdefault((machine(one), one["kind"] == "projected"), []).append(one)
        for group in groups.values():
            found += make(group)
    names = [one.name for one in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"plots of one name: {', '.join(twice)}")
    return found


def kernel_plots(rows: Sequence[Row]) -> Iterator[Plot]:
    """For each workload a heat map of the shares of what the machine reaches."""
    by_workload: dict[str, list[Row]] = {}
    for table in tables_of(rows):
        if any(one["percent_of_copy"] or one["percent_of_matmul"] for one in table):
            by_workload.setdefault(table[0]["workload"], []).extend(table)
    for workload, group in by_workload.items():
        columns = list(dict.fromkeys(one["implementation"] for one in group))
        titles, cells = [], []
        for of_one in tables_of(group):
            # Whatever somebody uses more of, is what limits the op.
            bound = max(("copy", "matmul"), key=lambda rate: max(one[f"percent_of_{rate}"] or 0 for one in of_one))
            shares = {one["implementation"]: one[f"percent_of_{bound}"] for one in of_one}
            titles.append(f"{of_one[0]['what']} ({bound})")
            cells.append([shares.get(column) for column in columns])
        shared = _shared(titles)
        titles = [one.removeprefix(shared) for one in titles]
        title = f"Kernels, {workload}: share of the machine's rate (percent, more is better)"
        subtitle = f"{shared}share of the rate of a copy or a product measured in the same run, whichever is nearer."
        subtitle = f"{subtitle[0].upper()}{subtitle[1:]}"
        draw = _heat(titles, columns, cells)
        yield plot(group, f"kernels {workload}", title, subtitle, workload == next(iter(by_workload)), draw)


def _shared(titles: Sequence[str]) -> str:
    """What all of them begin with, up to a comma; of a single one nothing."""
    places = zip(*(one.split(", ") for one in titles), strict=False)
    alike = takewhile(lambda parts: len(set(parts)) == 1, places)
    return "".join(f"{parts[0]}, " for parts in alike) if len(titles) > 1 else ""


def _heat(titles: list[str], columns: list[str], cells: list[list[float | None]]) -> Callable[[Frame], Figure]:
    return lambda frame: heat_map(frame, titles, columns, cells)


def cpu_plots(rows: Sequence[Row]) -> Iterator[Plot]:
    """Our factors over everybody, of all workloads."""
    groups = []
    for group in tables_of(rows):
        mine = ours(group)
        if mine and mine["times_better_than"]:
            peers = {one["implementation"]: one for one in group if one is not mine}
            unclean = {name for name, one in peers.items() if not (one["clean"] and mine["clean"])}
            found = [
                Factor(name, factor, f"{factor:.2f}x{' †' if name in unclean else ''}", ACCENT if factor >= 1 else GREY)
                for name, factor in mine["times_better_than"].items()
            ]
            groups.append((mine["what"], found))
    if groups:
        title = "On a CPU: how many times faster (or leaner) modernbert is"
        subtitle = "Right of 1x modernbert is ahead of the implementation named there, left of it that one is."
        yield plot(rows, "cpu factors", title, subtitle, True, lambda frame: factors(frame, groups))


def retrieval_plots(rows: Sequence[Row]) -> Iterator[Plot]:
    """Latency of a search by the number of passages, of both kinds of vectors."""
    timed: dict[tuple[str, str], dict[int, dict[str, Row]]] = {}
    # What `search-10k` measures is measured by `search-scale` too: the former has the bar, and is shown.
    for one in sorted(rows, key=lambda one: one["workload"] != "search-scale"):
        if one["workload"].startswith("search-") and one["figure"] in ("p50", "p99"):
            passages, _, vectors = one["corpus"].partition(" passages, ")
            by_size = timed.setdefault((one["implementation"], vectors), {})
            by_size.setdefault(int(passages.replace(",", "")), {})[one["figure"]] = one
    lines, shown = [], []
    for (way, vectors), by_size in timed.items():
        points: dict[str, list[tuple[float, float]]] = {"p50": [], "p99": [], "unclean": []}
        for size, figures in sorted(by_size.items()):
            for figure, one in figures.items():
                points[figure].append((size, one["median"]))
                points["unclean"] += [] if one["clean"] else [(size, one["median"])]
                shown.append(one)
        synthetic = vectors.startswith("synthetic")
        label = f"{way}, {'synthetic' if synthetic else vectors}"
        lines.append(Curve(label, ACCENT if way == "exact" else "#0072B2", synthetic, *points.values()))
    if lines:
        title = "Search latency on a CPU, by passages in the store (ms, less is better)"
        subtitle = "Line: p50; dotted: p99. Of passages of 100 tokens; synthetic vectors cost no encoding of the query."
        draw = lambda frame: curves(frame, lines, "passages", "ms", log=True)  # noqa: E731
        yield plot(shown, "retrieval search", title, subtitle, True, draw)


PLOTS: dict[str, Callable[[Sequence[Row]], Iterator[Plot]]] = {
    **dict.fromkeys((*MODEL_SUITES, PROJECTED), model_plots),
    "kernels": kernel_plots,
    "cpu": cpu_plots,
    "retrieval": retrieval_plots,
}
