"""Parameter groups and learning rates."""

from __future__ import annotations

import torch
from torch import nn


def adamw(model: nn.Module, table: torch.Tensor, *, learning_rate: float, table_rate: float) -> torch.optim.AdamW:
    """AdamW for a model whose embedding table has a learning rate of its own."""
    others = [parameter for parameter in model.parameters() if parameter is not table]
    groups = [{"params": [table], "lr": table_rate}, {"params": others, "lr": learning_rate}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)


def warmup_and_decay(step: int, *, steps: int, warmup: float, decay: float) -> float:
    """The factor of the learning rates: a rise from nothing, a plateau, a linear decay to nothing.

    `warmup` and `decay` are shares of the steps. Before the decay has begun, more steps may be asked for.
    """
    rise = (step + 1) / max(1, warmup * steps)
    fall = (steps - step) / max(1, decay * steps)
    return min(1.0, rise, fall)
