"""A heat map: percentages by row and column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.report.frame import CHARACTER, INK, MARGIN, WIDTH, Frame, axes, framed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heat_map(
    frame: Frame, rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[float | None]]
) -> Figure:
    """Percentages by row and column; a cell without one stays empty."""
    import numpy as np

    names = 0.75 * CHARACTER * max(map(len, columns))  # their height, as they are turned
    figure, bottom, _ = framed(frame, 0.2 * len(rows) + names + 0.25)
    left = 0.88 * CHARACTER * max(map(len, rows)) + 0.1
    width = min(WIDTH - 2 * MARGIN - left - 0.5 * names, 0.6 * len(columns))
    ax = axes(figure, MARGIN + left, bottom + 0.05, width, 0.2 * len(rows))
    shares = np.array([[np.nan if cell is None else cell for cell in row] for row in cells])
    ax.pcolormesh(np.ma.masked_invalid(shares), cmap="Blues", vmin=0, vmax=110, edgecolors="white", linewidth=0.8)
    for row, column in zip(*np.nonzero(~np.isnan(shares)), strict=True):
        share = shares[row, column]
        colour = "white" if share > 62 else INK
        ax.text(column + 0.5, row + 0.5, f"{share:.0f}", ha="center", va="center", fontsize=7, color=colour)
    ax.set_yticks([at + 0.5 for at in range(len(rows))], rows, fontsize=7)
    ax.set_xticks(
        [at + 0.5 for at in range(len(columns))], columns, fontsize=7.5, rotation=55, ha="left", rotation_mode="anchor"
    )
    ax.xaxis.tick_top()
    ax.invert_yaxis()
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return figure
