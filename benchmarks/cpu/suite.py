"""The `cpu` suite: encoding and MaxSim on two threads, in float32 and in int8, beside what people use for it today."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from benchmarks.cpu import contenders, int8_retrieval, peak_memory
from benchmarks.cpu.workloads import BUILDERS, THREADS, TOLERANCE, Workload, alone
from benchmarks.harness import Measured, Result, measure
from benchmarks.inputs import random_ids
from benchmarks.process_memory import CLEAR
from benchmarks.rows import Row, row
from benchmarks.seeded import save_seeded

MEMORY, RETRIEVAL = "long-8192-memory", "int8-retrieval"
WORKLOADS = {
    "short-16": "latency of one text of 16 tokens",
    "short-24": "latency of one text of 24 tokens",
    "short-32": "latency of one text of 32 tokens, the length of a query",
    "fixed-512": "16 texts of 512 tokens",
    "variable": "32 texts of the lengths of the ModernBERT paper, N(256, 64) clipped to [32, 512]",
    "first-token": "[CLS] of the same texts: what it saves to compute only the rows that are read",
    "from-text": "64 Wikipedia passages from string to mean-pooled vector, tokenising timed",
    "maxsim-48": "one query of 32 tokens against 1000 documents of 16 to 300 tokens, width 48",
    "maxsim-128": "the same in width 128",
    "long-8192": "one text of 8192 tokens",
    MEMORY: "its peak memory beyond the loaded model, a fresh process for each sample",
    "base-variable": "ModernBERT-base, 8 texts of the paper's lengths",
    "int8-short-32": "int8 products, one text of 32 tokens, beside our float32; the error stands in the row",
    "int8-variable": "int8 products, 32 texts of the paper's lengths, beside our float32",
    RETRIEVAL: "what int8 costs the default model: nDCG@10 on the sets of --data, recall of the top 10 of float32",
}


def run(
    *, quick: bool, only: Sequence[str], minutes: float | None = None, data: Path | None = None
) -> Iterator[Result]:
    """Measure the workloads named in `only` (all if empty), one `Result` each as it is done.

    Args:
        minutes: after these nothing new is begun; None: no limit.
        data: holds folders in BEIR's layout for `int8-retrieval`; None: the demo corpus, which has no judgements.
    """
    from transformers.utils.logging import (
        disable_progress_bar,
    )  # slow to import, and `--list` needs none of it

    disable_progress_bar()
    torch.set_num_threads(THREADS)
    # maxsim-cpu and the tokenizers have thread pools of their own, which read this when they start.
    os.environ["RAYON_NUM_THREADS"] = str(THREADS)
    until = math.inf if minutes is None else time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as scratch:
        for name in only or WORKLOADS:
            if time.monotonic() > until:
                late = f"was not reached within {minutes:g} minutes: ask for it with --only {name}"
                yield Result(name, [], {"the rest": late})
                return
            if name == RETRIEVAL:
                yield int8_retrieval.run(Path(scratch), data, quick=quick)
                continue
            shape, build = BUILDERS.get(name, ("ettin-17m", None))
            folder = Path(scratch) / (shape or "")
            if shape and not folder.exists():
                save_seeded(shape, folder)
            yield (
                memory(folder, quick=quick) if build is None else timed(name, build(folder, quick=quick), quick=quick)
            )


def timed(name: str, workload: Workload, *, quick: bool) -> Result:
    measured, refused = measure(
        workload.contenders,
        workload.expected,
        math.inf if workload.tolerance is None else workload.tolerance,
        rounds=(2 if quick else 4) if workload.slow else (3 if quick else 9),
        window=0.2 if quick else 0.5,
    )
    return Result(name, [_row(name, workload, one, measured) for one in measured], refused)


def _row(name: str, workload: Workload, one: Measured, all_measured: Sequence[Measured]) -> Row:
    mine = one.contender.implementation
    per_second = workload.tokens is not None
    is_int8 = mine.endswith("int8")
    # Who computes exactly is no worse for being slower than who does not.
    rivals = [
        other
        for other in all_measured
        if other is not one and (is_int8 or not other.contender.implementation.endswith("int8"))
    ]
    return row(
        workload=name,
        what=workload.what,
        implementation=mine,
        settings=one.contender.settings,
        unit="tokens/s" if per_second else "ms",
        values=[workload.tokens / s if workload.tokens is not None else 1000 * s for s in one.seconds],
        max_error=one.max_error,
        tolerance=None if is_int8 else TOLERANCE,
        foreign_percent=one.foreign,
        clean=one.clean,
        calls=one.calls,
        times_better_than={other.contender.implementation: one.times_faster_than(other) for other in rivals},
        goals=workload.goals if mine == contenders.OURS else {},
    ) | (_int8_fields(workload, one) if is_int8 else {})


def _int8_fields(workload: Workload, one: Measured) -> Row:
    """How far the rows of an int8 model are from float32: the mean and the worst cosine."""
    output = one.contender.result(one.contender.run())
    cosine = F.cosine_similarity(output, workload.expected, dim=-1)
    mean, worst = (float(f"{value:.4g}") for value in (cosine.mean().item(), cosine.min().item()))
    settings = f"{one.contender.settings}; cosine {mean:g}, at worst {worst:g}"
    return {"dtype": "int8", "settings": settings, "cosine": mean, "worst_cosine": worst}


def memory(folder: Path, *, quick: bool) -> Result:
    """Extra peak memory of one text of 8192 tokens. Other programs do not change it: every row is clean."""
    if not CLEAR.exists():
        reason = "cannot be measured: only Linux resets the high-water mark of a process"
        return Result(MEMORY, [], {"every implementation": reason})
    expected = alone(folder, random_ids([8192]))
    peaks: dict[str, list[float]] = {}
    errors, refused = {}, {}
    for name in (contenders.OURS, contenders.TRANSFORMERS):
        runs = [peak_memory.in_fresh_process(name, folder, 8192, THREADS) for _ in range(1 if quick else 3)]
        error = max((output - expected).abs().max().item() for _, output in runs)
        if error <= TOLERANCE:
            peaks[name], errors[name] = [peak for peak, _ in runs], error
        else:
            refused[name] = f"differs from the reference by {error:.2g}, allowed are {TOLERANCE:.2g}"
    rows = [
        row(
            workload=MEMORY,
            what="Ettin-17m, one text of 8192 tokens: peak memory beyond the loaded model",
            implementation=name,
            settings="a fresh process for each sample",
            unit="MB",
            values=values,
            max_error=errors[name],
            tolerance=TOLERANCE,
            times_better_than={
                other: median(theirs) / median(values) for other, theirs in peaks.items() if other != name
            },
            goals={contenders.TRANSFORMERS: 8.0} if name == contenders.OURS else {},
        )
        for name, values in peaks.items()
    ]
    return Result(MEMORY, rows, refused)
