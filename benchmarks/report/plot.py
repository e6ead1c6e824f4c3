"""A plot that is not drawn yet: its name, its title, the rows that it shows, and the colour of everybody in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.report.frame import ACCENT, GREY, Frame
from benchmarks.report.reading import commit, machine
from benchmarks.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind people can tell apart, and two darker ones. Ours is one colour everywhere.
COLOURS = {
    "modernbert": ACCENT,
    "transformers, sdpa": "#0072B2",
    "transformers, eager": "#56B4E9",
    "transformers, flash": "#332288",
    "transformers": "#0072B2",
    "sentence-transformers": "#009E73",
    "packed-encoders": "#CC79A7",
    "ONNX Runtime": "#E69F00",
    "OpenVINO": "#882255",
    "maxsim-cpu": "#117733",
    "late-interaction-kernels": "#117733",
    "flash-maxsim": "#882255",
}


class Plot(NamedTuple):
    """A plot that is not drawn yet.

    Attributes:
        opens: a report opens with it.
        rows: what it shows.
    """

    name: str
    title: str
    opens: bool
    rows: Sequence[Row]
    draw: Callable[[], Figure]

    @property
    def file(self) -> str:
        return f"{self.name}.svg"


def plot(rows: Sequence[Row], name: str, title: str, subtitle: str, opens: bool, draw: Callable[..., Figure]) -> Plot:
    """`draw` is called with the frame."""
    projected = rows[0]["kind"] == "projected"
    place = machine(rows[0])[0].replace("NVIDIA ", "").partition("(")[0]
    if projected:
        title, subtitle = f"Projected, not measured. {title}", "No run produced these figures."
    frame = Frame(title, subtitle, source(rows), projected)
    words = re.findall(r"[a-z0-9.]+", f"{place} {'projected' if projected else ''} {name}".lower())
    return Plot("-".join(dict.fromkeys(words)), title, opens, rows, lambda: draw(frame))


def source(rows: Sequence[Row]) -> str:
    """Where and when, from what: it stands in every plot."""
    parts = [", ".join(machine(rows[0]))]
    for said in (lambda one: one["dtype"], lambda one: one["date"][:10], commit):
        parts.append(", ".join(dict.fromkeys(map(said, rows))).replace(", commit ", ", "))
    quick = ["a try-out, no result"] if any("--quick" in one["command"] for one in rows) else []
    unclean = (
        []
        if all(one["clean"] for one in rows)
        else ["† or a hollow mark: taken while other programs used the processor"]
    )
    return " · ".join([*parts, *quick, *unclean])


def colour(implementation: str) -> str:
    """By the longest name that an implementation's begins with: what is compiled has the colour of what is not."""
    names = [name for name in COLOURS if implementation.startswith(name)]
    return COLOURS[max(names, key=len)] if names else GREY
