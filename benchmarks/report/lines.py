"""One line of a table for each row, by suite: which columns, and what stands in them."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report.reading import number, value
from benchmarks.rows import Row
from benchmarks.suites import SUITES

# Here and not from the suites, which take long to import.
OURS, TRITON = ("modernbert", "modernbert, graphs", "modernbert, int8"), "triton"
"""Our names, the one that factors are told of first; and the kernels that the `kernels` suite tells them of."""

MODEL_SUITES = ("throughput", "latency", "training", "memory", "padding", "paper-table", "colbert", "accuracy")
PROJECTED = "roofline"
"""The suite of rows that no run produced; they look like those of a model."""


UNCLEAN = "† marks a figure taken while other programs used more than 6 % of a core."
PERCENTAGES = (
    ("percent_of_matmul", "of matmul"),
    ("percent_of_datasheet", "of datasheet"),
    ("percent_of_roofline", "of roofline"),
    ("percent_of_datasheet_roofline", "of datasheet roofline"),
)
CPU_COLUMNS = ("implementation", "median", "range", "samples", "modernbert is", "others' CPU", "error", "settings")
RETRIEVAL_COLUMNS = ("", "way", "figure", "median", "bar", "range", "samples", "others' CPU", "error", "settings")
KERNEL_COLUMNS = (
    *("implementation", "median", "range", "samples", "triton is", "GB/s", "of copy", "TFLOP/s", "of matmul"),
    *("clocks and power", "error", "settings"),
)
MODEL_COLUMNS = (
    *("implementation", "figure", "median", "range", "samples", "modernbert is", "goal", "TFLOP/s"),
    *(column for _, column in PERCENTAGES),
    *("clocks and power", "error", "settings"),
)
NOTES = {
    "cpu": "Factors above 1 say that modernbert is ahead: the median over rounds of both times within a round. "
    f"{UNCLEAN}",
    "retrieval": "Recall is that of the pre-filter against exact search. Synthetic vectors come from a seeded table in "
    f"place of the encoder, and their queries cost no encoding; all else is the code that everybody runs. {UNCLEAN}",
    "kernels": "GB/s and TFLOP/s are the least that a call must move and compute over its time, beside them the share "
    "of a copy and of a bfloat16 product measured in the same run. No call found its data in a cache. Errors are root "
    "mean squares, as shares of the truth.",
    PROJECTED: "No run produced these figures. The bound is that of the datasheet; a projection takes of it the shares "
    "that its settings say.",
}
MODEL_NOTE = (
    "Factors above 1 say that modernbert is ahead: the median over rounds. Tokens are real ones, padding never counts. "
    "TFLOP/s are the operations that the model must do over the time; beside them the share of the product measured in "
    "the same run, of the datasheet, and of the rooflines that both give. A figure that no run produced is marked as "
    "projected."
)


REPORTED = (*SUITES, PROJECTED)


def is_model(suite: str) -> bool:
    """Whether the rows of a suite look like those of a model."""
    return suite in (*MODEL_SUITES, PROJECTED)


def note(suite: str) -> str:
    return NOTES.get(suite, MODEL_NOTE)


def columns(group: Sequence[Row]) -> tuple[str, ...]:
    """The columns of a table; those of a model in which nothing would stand are left out."""
    suite = group[0]["suite"]
    if is_model(suite):
        return tuple(MODEL_COLUMNS[at] for at in _filled(group))
    return {"cpu": CPU_COLUMNS, "retrieval": RETRIEVAL_COLUMNS, "kernels": KERNEL_COLUMNS}[suite]


def lines(group: Sequence[Row]) -> list[list[str]]:
    """One line for each row, under `columns(group)`."""
    suite = group[0]["suite"]
    if is_model(suite):
        return [[line[at] for at in _filled(group)] for line in _model_lines(group)]
    if suite == "kernels":
        return [_kernel_line(group, one) for one in group]
    if suite == "retrieval":
        return [
            [one["corpus"], one["implementation"], one["figure"], value(one), bar(one, "{}: {}"), *_circumstances(one)]
            for one in group
        ]
    return [_cpu_line(group, one) for one in group]


def ours(group: Sequence[Row], figure: str | None = None) -> Row | None:
    """Our row of a table (of its rows with this figure), by the first of our names."""
    alike = [one for one in group if one.get("figure") == figure]
    return next((one for name in OURS for one in alike if one["implementation"] == name), None)


def less_is_better(one: Row) -> bool:
    """Of times, memory and errors; of all other figures more is."""
    return one["unit"] in ("us", "ms", "s", "MB") or "error" in one["figure"]


def bar(one: Row, form: str) -> str:
    """The bar of a figure and whether it is reached, or nothing if it has none."""
    return form.format(one["bar"], "met" if one["met"] else "missed") if one["bar"] else ""


def clocks(one: Row) -> str:
    """Clocks, power and temperature of the GPU while it ran, as far as they were read."""
    units = {"sm_mhz": "MHz", "memory_mhz": "MHz", "watts": "W", "celsius": "°C"}
    state = one.get("state") or {}
    return ", ".join(f"{state[sensor]:g} {unit}" for sensor, unit in units.items() if state.get(sensor) is not None)


def factor(mine: Row | None, one: Row) -> str:
    """How many times better ours is, and what we mean it to be."""
    name = one["implementation"]
    if mine is None or name not in mine["times_better_than"]:
        return ""
    goal = f" (goal {mine['goals'][name]:g}x)" if name in mine["goals"] else ""
    return f"{mine['times_better_than'][name]:.2f}x{goal}"


def _cpu_line(group: Sequence[Row], one: Row) -> list[str]:
    range_, samples, *rest = _circumstances(one)
    return [one["implementation"], value(one), range_, samples, factor(ours(group), one), *rest]


def _kernel_line(group: Sequence[Row], one: Row) -> list[str]:
    mine = next((other for other in group if other["implementation"] == TRITON), None)
    figures = [("gb_per_s", ""), ("percent_of_copy", " %"), ("tflop_per_s", ""), ("percent_of_matmul", " %")]
    range_, samples, _, error, settings = _circumstances(one)
    return [
        one["implementation"],
        value(one),
        range_,
        samples,
        factor(mine, one),
        *(_known(one, figure, unit) for figure, unit in figures),
        clocks(one),
        error,
        settings,
    ]


def _model_lines(group: Sequence[Row]) -> list[list[str]]:
    found = []
    for one in group:
        range_, samples, _, error, settings = _circumstances(one)
        figure, x = one["figure"], one["x"]
        found.append(
            [
                one["implementation"],
                figure if x is None else f"{figure}, {x['name']} {x['value']:g}",
                value(one),
                range_,
                samples,
                factor(ours([other for other in group if other["x"] == x], figure), one),
                _goal(one),
                _known(one, "tflop_per_s"),
                *(_known(one, percentage, " %") for percentage, _ in PERCENTAGES),
                clocks(one),
                error,
                settings,
            ]
        )
    return found


def _goal(one: Row) -> str:
    """The figure that we mean to reach on this GPU, and whether it is reached."""
    if not one.get("goal"):
        return ""
    reached = one["median"] <= one["goal"] if less_is_better(one) else one["median"] >= one["goal"]
    return f"{number(one['goal'])}: {'met' if reached else 'missed'}"


def _filled(group: Sequence[Row]) -> list[int]:
    """Which columns of a model's table are not empty."""
    cells = zip(*_model_lines(group), strict=True)
    return [at for at, column in enumerate(cells) if any(column)]


def _known(one: Row, figure: str, unit: str = "") -> str:
    return "" if one.get(figure) is None else number(one[figure]) + unit


def _circumstances(one: Row) -> list[str]:
    """Range, samples, the CPU of others, error and settings."""
    return [
        f"{number(one['min'])} to {number(one['max'])}" if one["samples"] else "",
        str(one["samples"] or ""),
        "" if one["foreign_percent"] is None else f"{one['foreign_percent']:.1f} %",
        "" if one["max_error"] is None else f"{one['max_error']:.1e}",
        one["settings"],
    ]
