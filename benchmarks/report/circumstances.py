"""What surrounds the figures of a report: machines, clocks, rates, versions, commands, and who is not there and why."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks.report.lines import clocks
from benchmarks.report.reading import commit, machine, measured, number, refusals
from benchmarks.rows import Row

QUICK = "Taken with --quick: a try-out of the path on small inputs, no result."


def circumstances(rows: Sequence[Row], suites: Sequence[dict[str, str]]) -> list[tuple[str, list[str]]]:
    """Headings with lines of plain text; those with nothing to say are left out.

    Args:
        rows: all of a report, what was refused among them.
        suites: what became of each, as `everything.py` notes it.
    """
    figures = measured(rows)
    found = [
        ("Machine", unique(rows, lambda one: ", ".join(machine(one)))),
        ("What it reached", unique(figures, _rates)),
        ("Clocks, power and temperature while it measured", _extremes(figures)),
        ("Versions", unique(figures, _versions)),
        ("Commit", unique(rows, commit)),
        ("When", unique(rows, lambda one: one["date"])),
        ("Commands", unique(rows, lambda one: one["command"])),
        ("What was run", [" ".join(filter(None, map(_said, (one,)))) for one in suites]),
        ("Refused, and left out for lack of time", refusals(one for one in rows if one not in figures)),
    ]
    return [(heading, lines) for heading, lines in found if lines]


def is_quick(rows: Iterable[Row]) -> bool:
    return any("--quick" in one["command"] for one in rows)


def unique(rows: Iterable[Row], said: Callable[[Row], str]) -> list[str]:
    return [text for text in dict.fromkeys(map(said, rows)) if text]


def _said(one: dict[str, str]) -> str:
    command = f": {one['command']}" if one["command"] else ""
    return (
        f"{one['suite']}: {one['outcome']}, {one['seconds']} s{command}"
        if one["command"]
        else (f"{one['suite']}: {one['outcome']}")
    )


def _rates(one: Row) -> str:
    """The yardsticks of a row: a copy and a product, measured in its run."""
    if one["workload"] == "rates":
        return f"{one['suite']}: {one['implementation']} {number(one['median'])} {one['unit']}"
    rates = one.get("rates")
    if not rates:
        return ""
    copy, product = (number(rates[name]) for name in ("copy_gb_per_s", "matmul_tflop_per_s"))
    return f"{one['suite']}, {one['dtype']}: copy {copy} GB/s, product {product} TFLOP/s"


def _versions(one: Row) -> str:
    return ", ".join(f"{name} {version}" for name, version in one["versions"].items() if version)


def _extremes(rows: Sequence[Row]) -> list[str]:
    """For every GPU the least and the most of what was read."""
    by_gpu: dict[str, list[Row]] = {}
    for one in rows:
        if clocks(one):
            by_gpu.setdefault(one["gpu"], []).append(one)
    found = []
    for gpu, group in by_gpu.items():
        parts = []
        for sensor, unit in (("sm_mhz", "MHz"), ("memory_mhz", "MHz (memory)"), ("watts", "W"), ("celsius", "°C")):
            values = [one["state"][sensor] for one in group if one["state"].get(sensor) is not None]
            if values:
                parts.append(f"{min(values):g} to {max(values):g} {unit}")
        found.append(f"{gpu}: {', '.join(parts)}")
    return found
