"""A row of a suite of models: what `benchmarks.rows` writes, and what shares of the machine the figure is."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks import model_work
from benchmarks.gpu_state import SENSORS
from benchmarks.models.comparison import Taken
from benchmarks.models.table import Table
from benchmarks.rows import Row, row
from modernbert.config import EncoderConfig

SHARES = (
    *("tflop_per_s", "percent_of_matmul", "percent_of_datasheet"),
    *("percent_of_roofline", "percent_of_datasheet_roofline"),
)

GOALS_OF = ("NVIDIA H200", "bfloat16")
"""The GPU and the dtype that values to reach are meant for."""


class Rates(NamedTuple):
    """What this machine reached in this run: bytes copied (read and written) and operations, per second."""

    copy: float
    matmul: float

    @classmethod
    def of(cls, samples: Mapping[str, Sequence[float]]) -> Rates:
        return cls(*(statistics.median(samples[name]) for name in cls._fields))


def model_row(
    table: Table,
    one: Taken,
    all_taken: Sequence[Taken],
    rates: Rates,
    suite: str,
    model: str,
    dtype: str,
    config: EncoderConfig,
    identity: Mapping[str, Any],
) -> Row:
    """The row of an implementation, compared with the others of its table."""
    lengths = table.case.lengths
    made = row(
        workload=table.workload,
        what=table.what,
        implementation=one.name,
        settings=one.settings,
        unit=table.unit,
        values=[table.in_unit(cost) for cost in one.costs],
        max_error=one.error.found,
        tolerance=float(f"{one.error.allowed:.2g}"),
        foreign_percent=one.foreign,
        clean=one.clean,
        calls=one.calls,
        times_better_than={other.name: one.times_better_than(other) for other in all_taken if other is not one},
        goals=dict(table.goals.get(one.name, {})),
    )
    meant = (identity.get("gpu"), dtype) == GOALS_OF
    known = {
        "suite": suite,
        "dtype": dtype,
        "gpu": identity.get("gpu"),
        "driver": identity.get("driver"),
        "capability": identity.get("capability"),
        "versions": made["versions"] | identity.get("versions", {}),
        "state": dict.fromkeys(SENSORS.values()) | one.state,
        "pass": table.passes,
        "model": model,
        "figure": table.figure,
        "lengths": {
            "name": table.lengths,
            "sequences": len(lengths),
            "tokens": sum(lengths),
            "longest": max(lengths),
        },
        "x": None if table.x is None else {"name": table.x[0], "value": table.x[1]},
        "goal": table.goal.get(one.name) if meant else None,
        "rates": {"copy_gb_per_s": figure(rates.copy, 1e-9), "matmul_tflop_per_s": figure(rates.matmul, 1e-12)},
    }
    return made | known | shares(table, one.median, rates, dtype, config, identity.get("gpu"))


def shares(
    table: Table, seconds: float, rates: Rates, dtype: str, config: EncoderConfig, gpu: str | None
) -> dict[str, float | None]:
    """Operations per second, and what part they are of the rates of this run and of the datasheet; None where the cost
    is not the time of a pass.
    """
    if not table.model_pass:
        return dict.fromkeys(SHARES)
    lengths, backward = table.case.lengths, "backward" in table.passes
    itemsize = getattr(torch, dtype).itemsize
    flops = model_work.flops(config, lengths, backward=backward)

    def of_roofline(flops_per_s: float, bytes_per_s: float) -> float | None:
        least = model_work.least_seconds(config, lengths, itemsize, flops_per_s, bytes_per_s, backward=backward)
        return figure(least / seconds, 100)

    sheet = model_work.datasheet(gpu)
    peak = None if sheet is None else getattr(sheet, dtype, None)
    return {
        "tflop_per_s": figure(flops / seconds, 1e-12),
        "percent_of_matmul": figure(flops / seconds, 100 / rates.matmul),
        "percent_of_datasheet": None if peak is None else figure(flops / seconds, 100 / peak),
        "percent_of_roofline": of_roofline(rates.matmul, rates.copy),
        "percent_of_datasheet_roofline": None if peak is None or sheet is None else of_roofline(peak, sheet.bytes),
    }


def figure(value: float, scale: float = 1.0) -> float:
    return float(f"{value * scale:.4g}")
