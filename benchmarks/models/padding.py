"""Speed against the fill ratio: real tokens per second of 64 texts, the longest of 512, by what is not padding."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from benchmarks.harness import Result
from benchmarks.models.case import Case, some_places
from benchmarks.models.implementations import FLASH, IMPLEMENTATIONS, OURS, SDPA, SENTENCE_TRANSFORMERS
from benchmarks.models.measure import Bench, Table, bench

FILLS = (0.25, 1.0, 0.5, 0.75, 0.1)
WORKLOADS = {"fill": "tokens per second of one batch by the share of it that is real tokens, 1.0 to 0.1"}

NAMES = (OURS, SDPA, FLASH, SENTENCE_TRANSFORMERS)
"""transformers pads here, as its users do; sentence-transformers flattens where it can."""


def run(*, quick: bool, only: Sequence[str], minutes: float | None = None) -> Iterator[Result]:
    """ModernBERT-base and Ettin-17m in bfloat16 on a GPU; Ettin-17m in float32 on a CPU."""
    with bench("padding", quick=quick, minutes=minutes) as here:
        names = {name: IMPLEMENTATIONS[name] for name in (NAMES[:3] if quick else NAMES)}
        for model in ("modernbert-base", "ettin-17m") if here.is_gpu else ("ettin-17m",):
            with here.team(model, "bfloat16" if here.is_gpu else "float32", names) as team:
                for fill in FILLS:
                    if here.late():
                        yield here.rest("fill")
                        return
                    yield team.measure(table(here, model, fill))


def table(here: Bench, model: str, fill: float) -> Table:
    count, longest = (64, 512) if here.is_gpu else (8, 64) if here.quick else (16, 512)
    lengths = lengths_of(fill, count, longest)
    return Table(
        "fill",
        f"{model}, one batch of {count} texts, the longest of {longest} tokens, {fill:.0%} of it real",
        f"fill {fill:g}",
        Case(lengths, some_places(lengths, here.checked), batch=count, options={"padded": True}),
        x=("fill", round(sum(lengths) / (count * longest), 3)),
        goals={OURS: {SDPA: 3.0}} if here.is_gpu and fill == 0.5 else {},
    )


def lengths_of(fill: float, count: int, longest: int) -> tuple[int, ...]:
    """Lengths from short to `longest` whose sum is `fill` of a full batch, in random order."""
    # The mean of u ** k over u from 0 to 1 is 1 / (k + 1).
    drawn = [max(1, round(longest * ((at + 0.5) / count) ** (1 / fill - 1))) for at in range(count)]
    drawn[-1] = longest
    random.Random(0).shuffle(drawn)
    return tuple(drawn)
