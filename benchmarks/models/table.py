"""What a table of rows says: the case that everybody runs, and the figure that is made of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from benchmarks.models.case import Case


@dataclass(frozen=True)
class Table:
    """Rows that are compared with each other.

    Attributes:
        workload, what: its key in `WORKLOADS`; the table in words.
        lengths: the name of the set of lengths.
        figure, unit: what the number is (throughput, p50, ...), and its unit.
        value: from the cost of a call (seconds, bytes) to a number in that unit; None is real tokens per second.
        model_pass: a cost is the seconds of a pass through the model, of which shares of a roofline can be said.
        passes: "forward", "forward + backward" or "forward + backward + AdamW".
        x: (name, value) of this point on a curve.
        goals, goal: for our rows, by name: factors over peers that we mean to reach; a value in the unit.
    """

    workload: str
    what: str
    lengths: str
    case: Case
    figure: str = "throughput"
    unit: str = "tokens/s"
    value: Callable[[float], float] | None = None
    model_pass: bool = True
    passes: str = "forward"
    x: tuple[str, float] | None = None
    goals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    goal: Mapping[str, float | None] = field(default_factory=dict)

    def in_unit(self, cost: float) -> float:
        return sum(self.case.lengths) / cost if self.value is None else self.value(cost)
