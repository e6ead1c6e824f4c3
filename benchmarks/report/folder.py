"""The report of one folder of rows: a page, a README and plots, all made from the rows and nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report.circumstances import QUICK, circumstances, is_quick
from benchmarks.report.lines import REPORTED, note
from benchmarks.report.page import page
from benchmarks.report.plot import Plot
from benchmarks.report.plots import plots
from benchmarks.report.reading import latest, measured
from benchmarks.report.svg import written
from benchmarks.report.tables import sections
from benchmarks.rows import Row, read


def write(folder: Path) -> list[Path]:
    """Write FOLDER/report.html, README.md and plots/ from FOLDER/rows/*.jsonl, also of a run that was cut off.

    Returns:
        The files written.

    Raises:
        SystemExit: there is no row.
    """
    found = [one for one in latest(read(folder / "rows")) if one["suite"] in REPORTED]
    rows = [one for suite in REPORTED for one in found if one["suite"] == suite]
    if not rows:
        raise SystemExit(f"no rows in {folder / 'rows'}: `python -m benchmarks all --output {folder}` makes some")
    log = folder / "suites.jsonl"
    lines = log.read_text("utf-8").splitlines() if log.exists() else []
    # A folder that was run into again says of each suite what became of it last.
    suites = list({one["suite"]: one for one in map(json.loads, lines)}.values())
    shown = plots(measured(rows))
    files = written(shown, folder / "plots")
    readme, html = folder / "README.md", folder / "report.html"
    readme.write_text(markdown(rows, shown, suites), encoding="utf-8")
    drawn = [(plot, file.read_text("utf-8")) for plot, file in zip(shown, files, strict=True)]
    html.write_text(page(rows, drawn, suites), encoding="utf-8")
    return [html, readme, *files]


def markdown(rows: Sequence[Row], shown: Sequence[Plot], suites: Sequence[dict[str, str]]) -> str:
    parts = ["# modernbert, measured", "The same with its plots in one file: [report.html](report.html)."]
    parts += [f"**{QUICK}**"] if is_quick(rows) else []
    parts += [f"![{plot.title}](plots/{plot.file})" for plot in shown if plot.opens]
    for suite in dict.fromkeys(one["suite"] for one in rows):
        parts += [f"## {suite}", note(suite)]
        others = (plot for plot in shown if plot.rows[0]["suite"] == suite and not plot.opens)
        parts += [f"![{plot.title}](plots/{plot.file})" for plot in others]
        parts += sections([one for one in rows if one["suite"] == suite], "###")
    parts.append("## Circumstances")
    for heading, said in circumstances(rows, suites):
        parts += [f"### {heading}", "\n".join(f"* {line}" for line in said)]
    return "\n\n".join(parts) + "\n"
