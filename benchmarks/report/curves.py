"""Curves: a line for everybody, with a mark for every row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.report.frame import ACCENT, BEHIND_TEXT, CHARACTER, MARGIN, WIDTH, Frame, axes, framed, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Curve(NamedTuple):
    """`points` are x and y; `upper` are drawn thinner, in the same colour; the marks of `unclean` ones are hollow."""

    label: str
    colour: str
    dashed: bool
    points: list[tuple[float, float]]
    upper: list[tuple[float, float]]
    unclean: list[tuple[float, float]]


def curves(frame: Frame, lines: Sequence[Curve], x_label: str, y_label: str, *, log: bool) -> Figure:
    """Lines with a mark for every row; who a line is stands at its end."""
    figure, bottom, _ = framed(frame, 3.9)
    right = CHARACTER * max(len(line.label) for line in lines) + 0.2
    ax = axes(figure, MARGIN + 0.5, bottom + 0.45, WIDTH - 2 * MARGIN - 0.5 - right, 3.3)
    for line in lines:
        style = (0, (4, 2)) if line.dashed else "-"
        width = 2.2 if line.colour == ACCENT else 1.4
        x, y = zip(*line.points, strict=True)
        ax.plot(x, y, color=line.colour, linewidth=width, linestyle=style, marker="o", markersize=4)
        if line.unclean:
            x, y = zip(*line.unclean, strict=True)
            ax.plot(x, y, "o", color=line.colour, markersize=4, markerfacecolor="white", zorder=3)
        if line.upper:
            x, y = zip(*line.upper, strict=True)
            ax.plot(x, y, color=line.colour, linewidth=0.8, linestyle=(0, (1, 1.5)), marker="_", markersize=5)
    values = [point for line in lines for point in (*line.points, *line.upper)]
    _scale(ax, sorted({x for x, _ in values}), [y for _, y in values], log=log)
    ax.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ends = [ax.transLimits.transform(ax.transScale.transform(line.points[-1])) for line in lines]
    for line, (x, _), y in zip(lines, ends, spread([y for _, y in ends], 0.052), strict=True):
        ax.annotate(
            line.label,
            (float(x) + 0.015, y),
            xycoords="axes fraction",
            va="center",
            color=line.colour,
            bbox=BEHIND_TEXT,
        )
    return figure


def _scale(ax: Axes, x: list[float], y: list[float], *, log: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    if log:
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_ylim(min(y) / 1.3, max(y) * 1.3)
        decades = max(y) / min(y)
        steps = (1.0,) if decades > 2000 else (1.0, 3.0) if decades > 100 else (1.0, 2.0, 5.0)
        ax.yaxis.set_major_locator(LogLocator(subs=steps))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.set_ylim(0, 1.08 * max(y))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    ax.set_xticks(x, [f"{value:,.0f}" if value == int(value) else f"{value:g}" for value in x])


def spread(places: Sequence[float], least: float) -> list[float]:
    """The places, moved apart until neighbours are at least so far from one another, about where they were."""
    order = sorted(range(len(places)), key=lambda at: places[at])
    moved = [places[at] for at in order]
    for _ in range(200):
        for at in range(1, len(moved)):
            lack = least - (moved[at] - moved[at - 1])
            if lack > 1e-9:
                moved[at - 1] -= lack / 2
                moved[at] += lack / 2
    return [place for _, place in sorted(zip(order, moved, strict=True))]
