"""What a recipe computes of a batch, and what the batches of a step are together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class BatchLoss(NamedTuple):
    """The loss of a batch: a mean over the units that the recipe counts.

    A step is the mean over the units of all its batches, on all ranks, however they were cut into batches.

    Attributes:
        loss: 0-d with its graph, the mean over `count` units; 0, not NaN, where there are none.
        tokens: the tokens read, for the log.
        metrics: 0-d tensors for the log, means over the same units.
        count: masked tokens, pairs or texts; an int or a 0-d tensor. 1: batches weigh the same.
    """

    loss: Tensor
    tokens: int
    metrics: dict[str, Tensor]
    count: int | Tensor = 1

    def detached(self) -> BatchLoss:
        """The numbers without their graphs."""
        metrics = {name: value.detach() for name, value in self.metrics.items()}
        return BatchLoss(self.loss.detach(), self.tokens, metrics, self.count)


def totals(parts: Sequence[BatchLoss]) -> Tensor:
    """`[3]` float32 on the device of the losses: their sum over all units, the units, and the tokens."""
    rows = []
    for part in parts:
        # Filled there: a number that is copied to a GPU would make the CPU wait for it.
        count = torch.full_like(part.loss, 1, dtype=torch.float32) * part.count
        rows.append(torch.stack([part.loss.float() * count, count, torch.full_like(count, part.tokens)]))
    return torch.stack(rows).sum(0)
