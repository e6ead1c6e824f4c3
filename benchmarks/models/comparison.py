"""Who is right enough to be measured, and what samples say of each other."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import WrongOutput

ABSOLUTE = 1e-4
"""Of float32 on a CPU: the largest difference anywhere, as in the `cpu` suite."""

RELATIVE = 1e-4
"""Of float32 where sums are done in another order, on a GPU and backward, as a share of the reference. One product in
TF32 errs by more."""


class Error(NamedTuple):
    """The difference from the reference, and what is allowed."""

    found: float
    allowed: float


def error(got: Tensor, exact: Tensor, plain: Tensor | None, *, absolute: bool) -> Error:
    """Judge an answer.

    Args:
        exact: the reference in float32.
        plain: the reference in the dtype that is measured; None for float32. Then its root mean square error, twice,
            and a rounding step of bfloat16 are allowed.
        absolute: the largest absolute difference counts, up to `ABSOLUTE`; float32 only.

    Raises:
        WrongOutput: it is not within what is allowed.
    """
    if got.shape != exact.shape:
        raise WrongOutput(f"returned shape {tuple(got.shape)}, the reference has {tuple(exact.shape)}")
    if plain is not None:
        one = Error(rms(got, exact), 2 * rms(plain, exact) + torch.finfo(torch.bfloat16).eps)
    elif absolute:
        one = Error((got.double() - exact.double()).abs().max().item(), ABSOLUTE)
    else:
        one = Error(rms(got, exact), RELATIVE)
    if not one.found <= one.allowed:  # NaN is refused too
        raise WrongOutput(f"differs from the reference by {one.found:.2g}, allowed are {one.allowed:.2g}")
    return one


def rms(got: Tensor, exact: Tensor) -> float:
    """Root mean square error as a share of the reference."""
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


@dataclass
class Taken:
    """An implementation that is right, and what was measured of it, one sample a round.

    Attributes:
        calls: in a sample.
        costs: seconds, or bytes: whatever is better when it is less.
        foreign: percent of a core that others used, the worst of the samples; None if they do not matter.
        state: clocks, power and temperature.
    """

    name: str
    settings: str
    error: Error
    calls: int = 1
    costs: list[float] = field(default_factory=list)
    foreign: float | None = None
    clean: bool = True
    state: dict[str, float | None] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.costs)

    def times_better_than(self, other: Taken) -> float:
        """Median over rounds: only samples of one round are compared."""
        return statistics.median(theirs / mine for mine, theirs in zip(self.costs, other.costs, strict=True))


def largest_batch(fits: Callable[[int], bool], limit: int) -> int:
    """The largest batch that fits, up to `limit`, within 1.5 %: doubled, then by halves; 0 if not even one fits."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    if high > limit:
        if low == limit or fits(limit):
            return limit
        high = limit
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
