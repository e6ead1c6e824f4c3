"""Bars: from zero in panels, and factors to both sides of one."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.report.frame import BEHIND_TEXT, CHARACTER, GREY, INK, MARGIN, WIDTH, Frame, axes, framed, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Bar(NamedTuple):
    label: str
    value: float
    low: float
    high: float
    text: str
    beside: str
    colour: str


class Panel(NamedTuple):
    title: str
    bars: list[Bar]
    roofline: float | None


class Factor(NamedTuple):
    """How many times better ours is than a peer: more than 1, ours is ahead."""

    peer: str
    factor: float
    text: str
    colour: str


def bars(frame: Frame, panels: Sequence[Panel]) -> Figure:
    """Bars from zero, each panel with its own scale and everybody in the same line of all; numbers at the ends."""
    names = list(dict.fromkeys(bar.label for panel in panels for bar in panel.bars))
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    tall = 0.21 * len(names) + 0.1
    figure, _, top = framed(frame, (tall + 0.42) * down)
    label, gap = CHARACTER * max(map(len, names)) + 0.1, 0.3
    width = (WIDTH - 2 * MARGIN - label - gap * (across - 1)) / across
    for at, panel in enumerate(panels):
        row, column = divmod(at, across)
        left, bottom = MARGIN + label + column * (width + gap), top - (tall + 0.42) * (row + 1) + 0.02
        ax = axes(figure, left, bottom, width, tall)
        write(figure, left, bottom + tall + 0.05, panel.title, fontsize=9, fontweight="bold")
        _panel(ax, panel, names, width)
        ax.set_yticks(range(len(names)), names if column == 0 else [""] * len(names))
    return figure


def _panel(ax: Axes, panel: Panel, names: Sequence[str], width: float) -> None:
    beside = CHARACTER * (max(len(bar.beside) for bar in panel.bars) + 1)
    texts = CHARACTER * (max(len(bar.text) for bar in panel.bars) + 1) + beside
    # Numbers stand at the end of a bar, factors in a column at the right border.
    limit = max(bar.high for bar in panel.bars) / (1 - texts / width) or 1.0
    limit = max(limit, 1.03 * (panel.roofline or 0) / (1 - beside / width))
    for bar in panel.bars:
        at = names.index(bar.label)
        ax.barh(at, bar.value, height=0.74, color=bar.colour, linewidth=0)
        if bar.high > bar.low:
            ax.plot([bar.low, bar.high], [at, at], color=INK, linewidth=0.8, solid_capstyle="butt")
        ax.text(bar.high + 0.015 * limit, at, bar.text, va="center", fontsize=8, bbox=BEHIND_TEXT)
        ax.text(limit, at, bar.beside, ha="right", va="center", fontsize=7, color="#777777")
    for at in set(range(len(names))) - {names.index(bar.label) for bar in panel.bars}:
        ax.text(0.015 * limit, at, "no figure", va="center", fontsize=7, color=GREY)
    if panel.roofline:
        ax.plot([panel.roofline] * 2, [-0.5, len(names) - 0.5], color=INK, linewidth=0.9, dashes=(4, 2), zorder=0.5)
        ax.text(panel.roofline, -0.6, "roofline", ha="right", va="bottom", fontsize=7, color="#444444")
    ax.set_xlim(0, limit)
    ax.set_ylim(len(names) - 0.5, -0.6)
    ax.tick_params(axis="y", length=0, pad=3)
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)


def factors(frame: Frame, groups: Sequence[tuple[str, Sequence[Factor]]]) -> Figure:
    """Bars to the right of 1 where ours is ahead, to the left where a peer is; a factor of two is as long both ways."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    count = sum(len(group) + 0.7 for _, group in groups)
    figure, bottom, _ = framed(frame, 0.19 * count + 0.5)
    left = 3.1
    width = WIDTH - 2 * MARGIN - left
    ax = axes(figure, MARGIN + left, bottom + 0.25, width, 0.19 * count + 0.1)
    ax.set_xscale("log")
    every = [one for _, group in groups for one in group]
    low = min(0.7, 0.85 * min(one.factor for one in every))
    # Far enough that every text ends before the right border.
    octaves = [
        math.log2(max(1, one.factor) / low) / (1 - CHARACTER * len(f"{one.text}  {one.peer}") / width) for one in every
    ]
    high = low * 2 ** max(octaves)
    at = 0.0
    for what, group in groups:
        middle = at + (len(group) - 1) / 2
        wrapped = textwrap.fill(what, 46, max_lines=max(2, len(group)), placeholder=" ...")
        ax.text(-0.01, middle, wrapped, transform=ax.get_yaxis_transform(), ha="right", va="center", fontsize=7.5)
        for one in group:
            ax.barh(at, one.factor - 1, left=1, height=0.74, color=one.colour, linewidth=0)
            ax.text(1.04 * max(1, one.factor), at, f"{one.text} {one.peer}", va="center", fontsize=7)
            at += 1
        at += 0.7
    ax.axvline(1, color=INK, linewidth=0.8)
    ticks = [tick for tick in (0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32) if low <= tick <= high]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    ax.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    ax.set_xlim(low, high)
    ax.set_ylim(at - 0.7, -0.8)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    return figure
