"""Plots of the suites of models: curves of rows that have an `x`, bars of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from benchmarks.report.bars import Bar, Panel, bars
from benchmarks.report.curves import Curve, curves
from benchmarks.report.frame import short
from benchmarks.report.lines import PROJECTED, less_is_better, ours
from benchmarks.report.plot import Plot, colour, plot
from benchmarks.report.reading import tables_of
from benchmarks.rows import Row

FIGURES = {
    "throughput": "Throughput",
    "p50": "Latency",
    "p99": "Latency, 99th percentile",
    "cold start": "Cold start",
    "device": "Time on the device",
    "peak memory": "Peak memory",
    "largest batch": "Largest batch",
    "rms error": "Root mean square error",
    "cosine": "Cosine with the reference",
}
ABSCISSAS = {  # what a plot is called by, and what stands at its axis
    "fill": ("fill ratio", "share of the padded batch that is real tokens"),
    "batch": ("batch size", "sequences in a call"),
    "tokens": ("tokens", "tokens in a call"),
}
MODEL_NAMES = {"modernbert-base": "ModernBERT-base", "modernbert-large": "ModernBERT-large"}


def model_plots(rows: Sequence[Row]) -> Iterator[Plot]:
    """One plot for each model, figure, dtype and pass; p50 and p99 share theirs."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for one in rows:
        x, figure = one["x"] and one["x"]["name"], one["figure"]
        key = ("p50" if x and figure == "p99" else figure, x, one["model"], one["dtype"], one["pass"])
        groups.setdefault(key, []).append(one)
    opened = set()
    for (figure, x, *_), group in groups.items():
        for which, shown in _apart(group).items() if x else [("", group)]:
            yield _curves(shown, which, figure not in opened) if x else _bars(shown, figure not in opened)
            opened.add(figure)


def _apart(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of one plot each, by what sets it apart: all together, if nobody has two figures at the same place then,
    or by workload, or by the longest text too. Tokens are always told apart by the texts that they are in.
    """
    parts: tuple[Callable[[Row], str], ...] = (
        lambda one: "",
        lambda one: one["workload"],
        lambda one: f"{one['workload']}, texts of up to {one['lengths']['longest']} tokens",
    )
    groups: dict[str, list[Row]] = {}
    for part in parts[2:] if rows[0]["x"]["name"] == "tokens" else parts:
        groups = {}
        for one in rows:
            groups.setdefault(part(one), []).append(one)
        places = [(at, one["implementation"], one["figure"], one["x"]["value"]) for at in groups for one in groups[at]]
        if len(set(places)) == len(places):
            break
    return groups


def _named(rows: Sequence[Row]) -> tuple[str, str, str]:
    """A name for the file, a title, and the unit with its direction."""
    one = rows[0]
    figure: str = one["figure"]
    shown = FIGURES[figure] if figure in FIGURES else figure.capitalize()
    better = "less" if less_is_better(one) else "more"
    if one["x"]:
        shown = f"{shown} by {ABSCISSAS.get(one['x']['name'], [one['x']['name']])[0]}"
    elif one["suite"] != PROJECTED and not shown.lower().startswith(one["suite"]):
        shown = f"{one['suite'].replace('-', ' ').capitalize()}, {shown[0].lower()}{shown[1:]}"
    model = MODEL_NAMES.get(one["model"], one["model"].replace("ettin-", "Ettin-"))
    unit = one["unit"].replace("us", "µs")
    name = f"{one['suite']} {one['figure']} {one['model']} {one['dtype']} {one['pass'].removeprefix('forward')}"
    return name, f"{shown}: {model}, {one['dtype']} ({unit}{', ' if unit else ''}{better} is better)", unit


def _bars(rows: Sequence[Row], opens: bool) -> Plot:
    name, title, _ = _named(rows)
    tables = tables_of(rows)
    firsts = [group[0] for group in tables]
    # Whatever is short and tells the panels from one another.
    ways = ([said(one) for one in firsts] for said in (_lengths, lambda one: one["workload"], lambda one: one["what"]))
    titles = next((titles for titles in ways if len(set(titles)) == len(titles)), [one["what"] for one in firsts])
    panels = [
        Panel(what, [_bar(group, one) for one in group], _roofline(group))
        for what, group in zip(titles, tables, strict=True)
    ]
    subtitle = f"{rows[0]['pass'].capitalize()}. Bar: the median, with the range of its samples. Grey: how many times "
    subtitle += "better modernbert is."
    if any(panel.roofline for panel in panels):
        subtitle += " Roofline: with the rates of a copy and a product measured in this run."
    return plot(rows, name, title, subtitle, opens, lambda frame: bars(frame, panels))


def _lengths(one: Row) -> str:
    return one["lengths"]["name"]


def _bar(group: Sequence[Row], one: Row) -> Bar:
    mine = ours(group, one["figure"])
    name = one["implementation"]
    factor = mine["times_better_than"].get(name) if mine else None
    mark = "" if one["clean"] else " †"
    beside = "" if factor is None else f"{factor:.2f}x"
    text = f"{short(one['median'])}{mark}"
    return Bar(name, one["median"], one["min"], one["max"], text, beside, colour(name))


def _roofline(group: Sequence[Row]) -> float | None:
    """Where the bar of somebody at the roofline would end; a roofline of times is a least time, and none is drawn."""
    known = [one for one in group if one["percent_of_roofline"] and not less_is_better(one)]
    return 100 * known[0]["median"] / known[0]["percent_of_roofline"] if known else None


def _point(one: Row) -> tuple[float, float]:
    return one["x"]["value"], one["median"]


def _curves(rows: Sequence[Row], which: str, opens: bool) -> Plot:
    name, title, unit = _named(rows)
    x = rows[0]["x"]["name"]
    by_name: dict[str, list[Row]] = {}
    for one in sorted(rows, key=lambda one: one["x"]["value"]):
        by_name.setdefault(one["implementation"], []).append(one)
    lines = []
    for who, group in by_name.items():
        upper = [_point(one) for one in group if one["figure"] == "p99"]
        points = [_point(one) for one in group if one["figure"] != "p99"]
        unclean = [_point(one) for one in group if not one["clean"]]
        if points:
            lines.append(Curve(who, colour(who), "compiled" in who or "graphs" in who, points, upper, unclean))
    which = which or ", ".join(dict.fromkeys(one["workload"] for one in rows))
    subtitle = f"{rows[0]['pass'].capitalize()}; {which}."
    subtitle += " Line: p50; dotted: p99." if any(line.upper for line in lines) else ""
    x_label = ABSCISSAS[x][1] if x in ABSCISSAS else x
    # The speed by fill is a share of a bound, all else grows with x.
    log = x != "fill" and min(one["median"] for one in rows) > 0
    name = f"{name} by {x} {which}"
    return plot(rows, name, title, subtitle, opens, lambda frame: curves(frame, lines, x_label, unit, log=log))
