"""Tables from rows, for a terminal and in Markdown: nothing in them is typed by hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.table import Table

from benchmarks.report.lines import columns, lines, note
from benchmarks.report.reading import machine, measured, origin, refusals, tables_of, value
from benchmarks.rows import Row

# The settings of the way that an op takes by itself begin so.
CHOSEN = "what the op chooses"

FASTEST = ("", "fastest", "chosen by the op", "the fastest is")


def rich_table(rows: Sequence[Row]) -> Table:
    """The rows of one table, for a terminal."""
    table = Table(*columns(rows), title=rows[0]["what"], title_justify="left", title_style="bold")
    for line in lines(rows):
        table.add_row(*line)
    return table


def rich_fastest(rows: Sequence[Row]) -> Table:
    table = Table(*FASTEST)
    for line in fastest(rows):
        table.add_row(*line)
    return table


def fastest(rows: Sequence[Row]) -> Iterator[list[str]]:
    """One line per table of the `kernels` suite: which way is the fastest, what the op chooses, what that costs."""
    for group in tables_of(rows):
        best = min(group, key=lambda one: one["median"])
        chosen = next((one for one in group if one["settings"].startswith(CHOSEN)), None)
        if chosen is None:
            continue
        factor = 1 if chosen is best else best["times_better_than"][chosen["implementation"]]
        cells = (f"{one['implementation']}, {value(one)}" for one in (best, chosen))
        yield [group[0]["what"], *cells, f"{factor:.2f}x"]


def markdown(rows: Sequence[Row]) -> str:
    """Every row of a suite, as a page of its own."""
    parts = ["# Results", "Made by `python -m benchmarks report` from the rows in this folder.", note(rows[0]["suite"])]
    return "\n\n".join([*parts, *sections(rows, "##")]) + "\n"


def sections(rows: Sequence[Row], level: str) -> Iterator[str]:
    """A section for each machine, in it a table for each workload, and what was refused.

    Args:
        rows: of one suite, what was refused among them.
        level: the signs of a heading.
    """
    for here in dict.fromkeys(machine(one) for one in rows):
        of_machine = [one for one in rows if machine(one) == here]
        yield f"{level} {', '.join(here)}"
        with_figures = measured(of_machine)
        if of_machine[0]["suite"] == "kernels" and (best := list(fastest(with_figures))):
            yield from (f"{level}# The fastest", table(FASTEST, best))
        for group in tables_of(with_figures):
            yield from (f"{level}# {group[0]['what']}", table(columns(group), lines(group)), origin(group[0]))
        refused = refusals(one for one in of_machine if one not in with_figures)
        if refused:
            yield from (f"{level}# Refused, and left out", "\n".join(f"* {line}" for line in refused))


def table(titles: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [titles, ["---"] * len(titles), *cells])
