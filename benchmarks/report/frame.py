"""What surrounds every plot: title, subtitle, where its rows come from; and the sizes, colours and numbers of all.

Only matplotlib's objects are used, none of its global state. Lengths are inches.
"""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, MARGIN = 8.0, 0.25
CHARACTER = 0.068
"""The width of a character of the usual size, on the safe side."""

GREY, INK, ACCENT = "#8a8a8a", "#222222", "#D55E00"
BEHIND_TEXT = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8}


class Frame(NamedTuple):
    """What is written around every plot."""

    title: str
    subtitle: str
    footer: str
    projected: bool


def framed(frame: Frame, height: float) -> tuple[Figure, float, float]:
    """An empty figure around a body of this height; where its body begins and ends, from the bottom."""
    from matplotlib.figure import Figure

    title = textwrap.wrap(frame.title, 74)
    subtitle = textwrap.wrap(frame.subtitle, 120)
    footer = textwrap.wrap(frame.footer, 150)
    below = 0.16 + 0.125 * len(footer)
    above = 0.16 + 0.23 * len(title) + 0.16 * len(subtitle)
    total = below + height + above
    figure = Figure(figsize=(WIDTH, total))
    at = total - 0.12
    for line in title:
        write(figure, MARGIN, at, line, fontsize=12, fontweight="bold", va="top")
        at -= 0.23
    for line in subtitle:
        write(figure, MARGIN, at, line, fontsize=8, color="#555555", va="top")
        at -= 0.16
    for number, line in enumerate(reversed(footer)):
        write(figure, MARGIN, 0.08 + 0.125 * number, line, fontsize=6, color="#666666", va="bottom")
    if frame.projected:
        write(
            figure,
            WIDTH / 2,
            total / 2,
            "PROJECTED",
            fontsize=64,
            fontweight="bold",
            color=ACCENT,
            alpha=0.16,
            ha="center",
            va="center",
            rotation=18,
            zorder=10,
        )
    return figure, below, below + height


def write(figure: Figure, x: float, y: float, text: str, **how: Any) -> None:
    width, height = figure.get_size_inches()
    figure.text(x / width, y / height, text, **how)


def axes(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    total_width, total_height = figure.get_size_inches()
    return figure.add_axes((left / total_width, bottom / total_height, width / total_width, height / total_height))


def short(value: float) -> str:
    """A number in few characters: 512, 18.5 k, 2.05 M."""
    for least, size, sign in ((1e9, 1e9, " G"), (1e6, 1e6, " M"), (1e4, 1e3, " k")):
        if value >= least:
            return f"{_three(value / size)}{sign}"
    return f"{value:,.0f}" if value >= 1000 else _three(value)


def _three(value: float) -> str:
    """Three digits, and no zeros behind the point of a round number."""
    return f"{value:.3g}" if value == round(value) else f"{value:#.3g}".rstrip(".")
