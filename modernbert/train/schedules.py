"""Factors of the learning rate: a warm-up, a plateau and a decay.

A schedule is a `Callable[[int], float]`: from a step, counted from 0, to the factor by which `fit` multiplies the
optimizer's learning rates. In steps: `partial(warmup_stable_decay, total=10_000, warmup=600, decay=2_000)`. In tokens:
`stages.Stage.factor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import MappingProxyType


def linear(left: float) -> float:
    """Straight down. For fine-tuning: GLUE, and Hugging Face's default."""
    return left


def one_minus_sqrt(left: float) -> float:
    """Fast at first, then slower: `1 - sqrt(1 - left)`.

    For the decay at the end of a plateau, where it beats a straight line (arXiv 2405.18392). ModernBERT, Ettin.
    """
    return 1 - math.sqrt(1 - left)


def cosine(left: float) -> float:
    """Slow, fast, slow: half a period. For a run whose length is known at its start, without a plateau."""
    return (1 - math.cos(math.pi * left)) / 2


DECAYS = MappingProxyType({"linear": linear, "1-sqrt": one_minus_sqrt, "cosine": cosine})
"""The shapes of a decay by name: from the share of it that is left, from 1 down to 0, to the share of the factor."""


def warmup_stable_decay(
    now: int,
    *,
    total: float,
    warmup: float = 0,
    decay: float = 0,
    shape: Callable[[float], float] = linear,
    final: float = 0.0,
) -> float:
    """The factor of the learning rates at `now`: a straight rise from nothing, 1, then a decay to `final`.

    A plateau lets a run be continued, or decayed from any of its checkpoints. Without one, `decay=total - warmup`, this
    is the usual cosine or linear schedule. Before the decay has begun, `total` may be changed.

    Args:
        now, total, warmup, decay: all in one unit, steps or tokens. `now` is what was done before this step.
        shape: of the decay, such as those in `DECAYS`.
        final: the factor at the end of the decay, which no step reaches: the last one is the one before.
    """
    rise = (now + 1) / max(1, warmup)
    left = (total - now) / max(1, decay)
    fall = final + (1 - final) * shape(min(1.0, max(0.0, left)))
    return min(1.0, rise, fall)
