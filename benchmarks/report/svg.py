"""Plots as SVG files: the same rows and the same matplotlib give the same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.report.plot import Plot

HAS_MATPLOTLIB = find_spec("matplotlib") is not None
WITHOUT = "plots need matplotlib, which comes with the extra `bench`: pip install -e '.[bench]'"
FONTS = "'DejaVu Sans', Verdana, Arial, sans-serif"
"""Text stays text, which keeps a file small. Laid out with the first of these; the second is as wide."""

STYLE = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.6,
    "axes.labelcolor": "#333333",
    "text.color": "#222222",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.axisbelow": True,
}


def written(plots: Sequence[Plot], folder: Path) -> list[Path]:
    """Write the plots into a folder that holds nothing else, so that none of other rows stays there."""
    drawn = {folder / plot.file: svg(plot) for plot in plots}
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.svg"):
        file.unlink()
    for file, text in drawn.items():
        file.write_text(text, encoding="utf-8")
    return list(drawn)


def svg(plot: Plot) -> str:
    """A plot as one <svg> element: no date in it, nothing from elsewhere, ids only where something refers to them."""
    if not HAS_MATPLOTLIB:
        raise SystemExit(WITHOUT)
    import matplotlib

    drawn = io.StringIO()
    style: dict[Any, Any] = STYLE | {"svg.hashsalt": plot.name}
    with matplotlib.rc_context(style):
        plot.draw().savefig(drawn, format="svg")
    text = drawn.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"'DejaVu Sans'(, sans-serif)?", FONTS, text)
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r"<g>\s*</g>", "", text)
    # Whoever compares a file with what its rows give must know which version drew it.
    first, rest = text.split(">", 1)
    label = f"<title>{plot.title.replace('&', '&amp;').replace('<', '&lt;')}</title>"
    text = f'{first} role="img">\n <!-- drawn by matplotlib {matplotlib.__version__} -->\n {label}{rest}'
    return "\n".join(line.rstrip() for line in text.splitlines() if line.strip()) + "\n"


def drawn_by(text: str) -> str | None:
    """The version of matplotlib that drew a file."""
    found = re.search(r"<!-- drawn by matplotlib (\S+) -->", text)
    return found and found[1]
