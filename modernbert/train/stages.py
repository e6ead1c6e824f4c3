"""A table of the stages of ModernBERT's and Ettin's pretraining, and what changes from step to step within one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType

from .schedules import DECAYS, warmup_stable_decay


@dataclass(frozen=True)
class Stage:
    """One stage of pretraining. Its first step is step 0; it goes on from the weights of the stage before it.

    Attributes:
        tokens: of the whole stage. Its last step may pass them.
        sequence_length: the longest sequence, in tokens.
        batch_size: sequences of `sequence_length` tokens in a step, over all ranks and accumulated batches.
        learning_rate, weight_decay: at the plateau. The weight decay is fully decoupled (`StableAdamW`).
        global_rope_theta, local_rope_theta: of the rotary positions, for `initialize.set_context`.
        mask_rate: share of the tokens that the model predicts.
        warmup_tokens: in which the learning rate rises from nothing.
        decay_tokens: at the end of the stage, in which it falls to `final` times its plateau.
        decay: the shape of this fall, a name in `DECAYS`.
        first_batch_size: of the first step; None: `batch_size`. Also what the batch size grows by.
        batch_warmup_tokens: in which the batch size grows, with as many steps at each size.

    Raises:
        ValueError: values that contradict one another.
    """

    tokens: int
    sequence_length: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    global_rope_theta: float
    local_rope_theta: float
    mask_rate: float = 0.3
    warmup_tokens: int = 0
    decay_tokens: int = 0
    decay: str = "1-sqrt"
    final: float = 0.0
    first_batch_size: int | None = None
    batch_warmup_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "sequence_length", "batch_size", "first_batch_size", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}, but must be above 0")
        for name in ("weight_decay", "warmup_tokens", "decay_tokens", "batch_warmup_tokens"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be 0 or more")
        if not 0 <= self.final <= 1:
            raise ValueError(f"final is {self.final}, but must be from 0 to 1")
        if not 0 < self.mask_rate < 1:
            raise ValueError(f"mask_rate is {self.mask_rate}, but must be above 0 and below 1")
        if self.decay not in DECAYS:
            raise ValueError(f"decay is {self.decay!r}, but must be one of {', '.join(DECAYS)}")
        if self.warmup_tokens + self.decay_tokens > self.tokens:
            raise ValueError(
                f"warmup_tokens {self.warmup_tokens:,} and decay_tokens {self.decay_tokens:,} are more than the "
                f"{self.tokens:,} tokens of the stage"
            )
        if self.batch_size % self._unit:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of first_batch_size {self._unit}")

    @property
    def _unit(self) -> int:
        return self.batch_size if self.first_batch_size is None else self.first_batch_size

    @property
    def steps(self) -> int:
        """Steps until `tokens` are reached."""
        step, before, size = [run for run in self._runs if run[1] < self.tokens][-1]
        return step - (before - self.tokens) // (size * self.sequence_length)

    def batch_size_at(self, step: int) -> int:
        """Sequences of `sequence_length` tokens in this step, over all ranks and accumulated batches."""
        return self._run(step)[2]

    def tokens_before(self, step: int) -> int:
        """Tokens of all steps before this one, if their batches are full."""
        first, before, size = self._run(step)
        return before + (step - first) * size * self.sequence_length

    def factor(self, step: int) -> float:
        """The factor of the learning rate at this step: the `schedule` of `fit`."""
        return warmup_stable_decay(
            self.tokens_before(step),
            total=self.tokens,
            warmup=self.warmup_tokens,
            decay=self.decay_tokens,
            shape=DECAYS[self.decay],
            final=self.final,
        )

    def scaled(self, tokens: int, *, sequence_length: int, batch_size: int) -> Stage:
        """The same stage for a small machine: warm-ups and decay are the same shares of fewer tokens.

        The batch size grows in as many sizes as before, or in fewer if `batch_size` cannot be cut into so many.
        """
        sizes = self.batch_size // self._unit
        sizes = max(n for n in range(1, sizes + 1) if batch_size % n == 0)
        return replace(
            self,
            tokens=tokens,
            sequence_length=sequence_length,
            batch_size=batch_size,
            warmup_tokens=self.warmup_tokens * tokens // self.tokens,
            decay_tokens=self.decay_tokens * tokens // self.tokens,
            first_batch_size=batch_size // sizes,
            batch_warmup_tokens=self.batch_warmup_tokens * tokens // self.tokens,
        )

    def _run(self, step: int) -> tuple[int, int, int]:
        return [run for run in self._runs if run[0] <= step][-1]

    @cached_property
    def _runs(self) -> tuple[tuple[int, int, int], ...]:
        """For each batch size: its first step, the tokens before it, and the size."""
        return tuple(self._batch_sizes())

    def _batch_sizes(self) -> Iterator[tuple[int, int, int]]:
        """FlexBERT's rule (`BatchSizeWarmupScheduler`): a step takes the first size whose threshold is not reached.

        The threshold of a size is the share of the warm-up that it and all smaller sizes have in the sum of sizes.
        """
        growing = range(self._unit, self.batch_size, self._unit)
        step = tokens = cumulated = 0
        for size in growing:
            yield step, tokens, size
            cumulated += size
            threshold = -(-self.batch_warmup_tokens * cumulated // sum(growing))
            steps = max(0, -((tokens - threshold) // (size * self.sequence_length)))
            step, tokens = step + steps, tokens + steps * size * self.sequence_length
        yield step, tokens, self.batch_size


BILLION = 10**9


def _short(
    billions: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    *,
    warmup: int = 0,
    first_batch_size: int | None = None,
    batch_warmup: int = 0,
) -> Stage:
    """A row at 1,024 tokens: all layers with theta 10,000."""
    return Stage(
        tokens=billions * BILLION,
        sequence_length=1024,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        global_rope_theta=1e4,
        local_rope_theta=1e4,
        warmup_tokens=warmup * BILLION,
        first_batch_size=first_batch_size,
        batch_warmup_tokens=batch_warmup * BILLION,
    )


def _long(
    tokens: int,
    sequence_length: int,
    batch_size: int,
    learning_rate: float,
    weight_decay: float,
    *,
    local: float,
    final: float | None = None,
    mask_rate: float = 0.3,
) -> Stage:
    """A row after the extension: global layers with theta 160,000. `final`: 1-sqrt to it over the whole stage."""
    return Stage(
        tokens=tokens,
        sequence_length=sequence_length,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        global_rope_theta=160e3,
        local_rope_theta=local,
        mask_rate=mask_rate,
        decay_tokens=0 if final is None else tokens,
        final=0.0 if final is None else final,
    )


def _ettin(
    learning_rate: float,
    weight_decay: float,
    warmup: int,
    first_batch_size: int,
    batch_warmup: int,
    *,
    tails: tuple[int, int] = (250 * BILLION, 50 * BILLION),
    local: float = 160e3,
) -> tuple[Stage, ...]:
    return (
        _short(
            1700,
            4608,
            learning_rate,
            weight_decay,
            warmup=warmup,
            first_batch_size=first_batch_size,
            batch_warmup=batch_warmup,
        ),
        _long(tails[0], 7999, 4608, learning_rate, weight_decay, local=local, final=0.5),
        _long(tails[1], 7999, 4608, learning_rate / 2, weight_decay, local=160e3, final=0.04, mask_rate=0.15),
    )


STAGES = MappingProxyType(
    {
        "modernbert-base": (
            _short(1719, 4608, 8e-4, 1e-5, warmup=3, first_batch_size=768, batch_warmup=50),
            _long(250 * BILLION, 8192, 576, 3e-4, 1e-5, local=1e4),
            _long(50 * BILLION, 8192, 576, 3e-4, 1e-5, local=1e4, final=0.001),
        ),
        "modernbert-large": (
            # Its loss had stopped falling after 900 billion tokens. It went on from there at a tenth of the rate.
            _short(900, 4928, 5e-4, 1e-5, warmup=2, first_batch_size=448, batch_warmup=10),
            _short(800, 4928, 5e-5, 1e-6),
            _long(250 * BILLION, 8192, 616, 5e-5, 1e-6, local=1e4),
            _long(50 * BILLION, 8192, 624, 5e-5, 1e-6, local=1e4, final=0.001),
        ),
        "ettin-17m": _ettin(3e-3, 3e-4, 4, 576, 125, local=1e4),
        "ettin-32m": _ettin(3e-3, 3e-4, 4, 512, 100),
        "ettin-68m": _ettin(3e-3, 3e-4, 3, 384, 75),
        "ettin-150m": _ettin(8e-4, 1e-5, 3, 288, 50),
        "ettin-400m": _ettin(5e-4, 1e-5, 2, 192, 10),
        "ettin-1b": _ettin(5e-4, 5e-5, 2, 96, 3, tails=(83_333_000_000, 16_666_666_667)),
    }
)
"""The published stages by the name of a preset.

All of them have `StableAdamW` with betas 0.9 and 0.98, eps 1e-6 and fully decoupled weight decay, except for norms and
biases; dropout 0.1 of the output of attention; and a held-out loss at 15 % masking.

ModernBERT: arXiv 2412.13663, table 3, and the YAML files of the branch `pretraining_documentation` of
AnswerDotAI/ModernBERT. The paper prints the long batch sizes of one GPU of 8: 72, 77 and 78.
Ettin: arXiv 2507.11412 and `pretraining/configs/standard` of JHU-CLSP/ettin-encoder-vs-decoder. The first batch size is
that of one micro-batch on each of 4 GPUs.
"""
