"""Numbers that show during a run how good the model is, such as the loss of held-out batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from .batch_loss import BatchLoss
from .distributed import ALONE, Ranks

B = TypeVar("B")


@dataclass(frozen=True)
class Validation:
    """When to measure what, and which number makes a checkpoint the best one.

    Attributes:
        measure: gives numbers by name. It is called in evaluation mode and without gradients, on all ranks; the
            numbers of the first one count. The random state of the run is as before afterwards.
        steps: measured after every so many steps, and after the last one.
        best: the name of the number to compare.
        highest: whether the best is the highest, as of nDCG, and not the lowest, as of a loss.
    """

    measure: Callable[[], Mapping[str, float]]
    steps: int
    best: str = "loss"
    highest: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, but a validation needs 1 step or more between two measurements")

    def run(self, model: nn.Module, ranks: Ranks) -> dict[str, float]:
        """Raises ValueError if `best` is not among the numbers."""
        device = next(model.parameters()).device
        modes = {module: module.training for module in model.modules()}
        model.eval()
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
                mine = {name: float(value) for name, value in self.measure().items()}
        finally:
            for module, mode in modes.items():
                module.training = mode
        numbers = ranks.gather(mine)[0]
        if self.best not in numbers:
            raise ValueError(f"the validation gives {', '.join(numbers)}, but the best is to be found by {self.best!r}")
        return numbers

    def is_better(self, numbers: Mapping[str, float], best: float | None) -> bool:
        """NaN is never better."""
        new = numbers[self.best]
        return new == new and (best is None or (new > best if self.highest else new < best))


def mean_loss(
    batches: Callable[[], Iterable[B]], batch_loss: Callable[[B], BatchLoss], ranks: Ranks = ALONE
) -> Callable[[], dict[str, float]]:
    """Measures the loss and the metrics of `batch_loss` over held-out batches, as means over all their units.

    Args:
        batches: the same ones on each call. With several ranks, each gives its share; for a model of `fully_shard`,
            all shares have the same number of batches.
    """

    def measure() -> dict[str, float]:
        sums: dict[str, float] = {}
        total = 0.0
        for batch in batches():
            part = batch_loss(batch)
            count = float(part.count)
            total += count
            for name, value in {"loss": part.loss, **part.metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(value) * count
        every = ranks.gather((sums, total))
        units = sum(count for _, count in every)
        if not units:
            raise ValueError("the batches for validation are empty, so they have no mean loss")
        names = dict.fromkeys(name for found, _ in every for name in found)
        return {name: sum(found.get(name, 0.0) for found, _ in every) / units for name in names}

    return measure
