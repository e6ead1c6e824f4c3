"""The `cpu` suite: encoding and MaxSim in float32 on two threads, beside what people use for it today."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cpu import contenders, peak_memory
from benchmarks.harness import Contender, Measured, Result, measure
from benchmarks.inputs import Ids, batched, normal_lengths, paper_lengths, random_ids
from benchmarks.rows import Row, row

THREADS = 2
TOLERANCE = 1e-4
ASSETS = Path(__file__).parents[2] / "modernbert" / "assets"


@dataclass(frozen=True)
class Workload:
    """What is run, what must come out, and who runs it.

    Attributes:
        what: the workload in words.
        expected: what every contender must return, within `TOLERANCE`.
        tokens: real tokens of one call, for rows in tokens/s; None for rows in ms.
        goals: how many times faster than each peer we mean to be.
        slow: fewer samples are taken of it.
    """

    what: str
    contenders: list[Contender]
    expected: Tensor
    tokens: int | None = None
    goals: dict[str, float] = field(default_factory=dict)
    slow: bool = False


def alone(folder: Path, sequences: Ids) -> Tensor:
    """The reference: `[T, D]` of transformers in float32, every text by itself, so that nothing is padded."""
    one = contenders.transformers_sdpa(folder, batched(sequences, 1), "sdpa")
    return one.result(one.run())


def short(folder: Path, length: int) -> Workload:
    sequences = random_ids([length])
    batches = batched(sequences, 1)
    return Workload(
        f"Ettin-17m, one text of {length} tokens",
        [
            contenders.ours(folder, sequences),
            contenders.transformers_sdpa(folder, batches, "sdpa"),
            *contenders.onnx_runtime(folder, batches, "one text", THREADS),
        ],
        alone(folder, sequences),
        goals={contenders.TRANSFORMERS: 1.8 if length == 32 else 2.0, contenders.ONNX_RUNTIME: 1.0},
    )


def fixed(folder: Path, *, quick: bool) -> Workload:
    sequences = random_ids([512] * 16)
    sizes = (1, 8) if quick else (1, 2, 4, 8, 16)
    return Workload(
        "Ettin-17m, 16 texts of 512 tokens",
        [
            contenders.ours(folder, sequences),
            *(contenders.transformers_sdpa(folder, batched(sequences, n), f"sdpa, batches of {n}") for n in sizes),
            *contenders.onnx_runtime(folder, batched(sequences, 1), "one by one", THREADS),
        ],
        alone(folder, sequences),
        tokens=16 * 512,
        goals={contenders.TRANSFORMERS: 1.2},
    )


def variable(folder: Path, *, quick: bool) -> Workload:
    lengths = paper_lengths(32)
    sequences = random_ids(lengths)
    peers = [
        *contenders.transformers_batchings(folder, sequences, sizes=(8,) if quick else (2, 4, 8, 16, 32)),
        *contenders.onnx_runtime(folder, batched(sequences, 1), "one by one", THREADS),
    ]
    if not quick:
        by_length = batched(sequences, 4, by_length=True)
        peers += contenders.onnx_runtime(folder, by_length, "length-sorted batches of 4", THREADS)
    return Workload(
        f"Ettin-17m, 32 texts of the paper's variable lengths (mean {sum(lengths) / 32:.0f})",
        [contenders.ours(folder, sequences), *peers],
        alone(folder, sequences),
        tokens=sum(lengths),
        goals={
            contenders.AS_THEY_COME: 1.6,
            contenders.LENGTH_SORTED: 1.3,
            contenders.ONE_BY_ONE: 1.3,
            contenders.ONNX_RUNTIME: 1.2,
        },
    )


def long(folder: Path) -> Workload:
    """Without ONNX Runtime: it takes more than 6 GB here."""
    sequences = random_ids([8192])
    return Workload(
        "Ettin-17m, one text of 8192 tokens",
        [
            contenders.ours(folder, sequences),
            contenders.transformers_sdpa(folder, batched(sequences, 1), "sdpa"),
        ],
        alone(folder, sequences),
        tokens=8192,
        goals={contenders.TRANSFORMERS: 2.3},
        slow=True,
    )


def from_text(folder: Path, *, quick: bool) -> Workload:
    """From strings on both sides, with the tokenizer of the default model: its ids fit the seeded weights.

    The texts are lower-cased beforehand: that model's tokenizer.json leaves it to the caller, and a plain
    transformers tokenizer does not do it.
    """
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / "default" / file, folder)
    with gzip.open(ASSETS / "demo" / "corpus.jsonl.gz", "rt", encoding="utf-8") as corpus:
        texts = [json.loads(next(corpus))["text"].lower() for _ in range(64)]
    sizes = (8, 32) if quick else (1, 4, 8, 16, 32)
    mine, tokens = contenders.ours_from_text(folder, texts)
    return Workload(
        f"Ettin-17m, 64 Wikipedia passages ({tokens:,} tokens), text to pooled vectors, tokenising timed",
        [mine, *contenders.sentence_transformers(folder, texts, sizes=sizes)],
        contenders.mean_alone(folder, texts),
        tokens=tokens,
    )


def maxsim(width: int, *, quick: bool) -> Workload:
    """Every contender gets the documents in the form that it likes best before the clock starts."""
    lengths = normal_lengths(1000, mean=181, low=16, high=300)
    generator = torch.Generator().manual_seed(0)
    query_QE = F.normalize(torch.randn(32, width, generator=generator), dim=-1)
    documents = F.normalize(torch.randn(sum(lengths), width, generator=generator), dim=-1).split(lengths)
    in_float64 = [(query_QE.double() @ document.double().T).amax(1).sum() for document in documents]
    return Workload(
        f"MaxSim, 1 query of 32 x 1000 documents ({sum(lengths):,} tokens), width {width}",
        [
            contenders.ours_maxsim(query_QE, documents),
            *contenders.padded_maxsim(query_QE, documents, chunks=(50,) if quick else (200, 50, 10)),
            *contenders.maxsim_cpu(query_QE, documents),
        ],
        torch.stack(in_float64),
        goals={contenders.PADDED_EINSUM: 4.0, contenders.MAXSIM_CPU: 1.2} if width == 48 else {},
    )


def base(folder: Path, *, quick: bool) -> Workload:
    lengths = paper_lengths(4 if quick else 8)
    sequences = random_ids(lengths)
    return Workload(
        f"ModernBERT-base, {len(lengths)} texts of the paper's variable lengths",
        [
            contenders.ours(folder, sequences),
            *contenders.transformers_batchings(folder, sequences, sizes=() if quick else (2, 4, 8)),
        ],
        alone(folder, sequences),
        tokens=sum(lengths),
        goals={contenders.LENGTH_SORTED: 1.15, contenders.ONE_BY_ONE: 1.15},
        slow=True,
    )


# name: (shape of the model or None, builder); each builder is called when its turn comes.
BUILDERS: dict[str, tuple[str | None, Callable[..., Workload]]] = {
    "short-16": ("ettin-17m", lambda folder, quick: short(folder, 16)),
    "short-24": ("ettin-17m", lambda folder, quick: short(folder, 24)),
    "short-32": ("ettin-17m", lambda folder, quick: short(folder, 32)),
    "fixed-512": ("ettin-17m", fixed),
    "variable": ("ettin-17m", variable),
    "from-text": ("ettin-17m", from_text),
    "maxsim-48": (None, lambda folder, quick: maxsim(48, quick=quick)),
    "maxsim-128": (None, lambda folder, quick: maxsim(128, quick=quick)),
    "long-8192": ("ettin-17m", lambda folder, quick: long(folder)),
    "base-variable": ("modernbert-base", base),
}
MEMORY = "long-8192-memory"  # not a matter of time, so no `Workload`
WORKLOADS = (*BUILDERS, MEMORY)


def run(*, quick: bool, only: Sequence[str]) -> Iterator[Result]:
    """Measure the workloads named in `only` (all if empty), one `Result` each as it is done."""
    from transformers.utils.logging import (
        disable_progress_bar,
    )  # slow to import, and `--list` needs none of it

    disable_progress_bar()
    torch.set_num_threads(THREADS)
    # maxsim-cpu and the tokenizers have thread pools of their own, which read this when they start.
    os.environ["RAYON_NUM_THREADS"] = str(THREADS)
    with tempfile.TemporaryDirectory() as scratch:
        for name in only or WORKLOADS:
            shape, build = BUILDERS.get(name, ("ettin-17m", None))
            folder = Path(scratch) / (shape or "")
            if shape and not folder.exists():
                contenders.save_seeded(shape, folder)
            yield (
                memory(folder, quick=quick) if build is None else timed(name, build(folder, quick=quick), quick=quick)
            )


def timed(name: str, workload: Workload, *, quick: bool) -> Result:
    measured, refused = measure(
        workload.contenders,
        workload.expected,
        TOLERANCE,
        rounds=(2 if quick else 4) if workload.slow else (3 if quick else 9),
        window=0.2 if quick else 0.5,
    )
    return Result(name, [_row(name, workload, one, measured) for one in measured], refused)


def _row(name: str, workload: Workload, one: Measured, all_measured: Sequence[Measured]) -> Row:
    mine = one.contender.implementation
    per_second = workload.tokens is not None
    return row(
        workload=name,
        what=workload.what,
        implementation=mine,
        settings=one.contender.settings,
        unit="tokens/s" if per_second else "ms",
        values=[workload.tokens / s if workload.tokens is not None else 1000 * s for s in one.seconds],
        max_error=one.max_error,
        tolerance=TOLERANCE,
        foreign_percent=one.foreign,
        clean=one.clean,
        calls=one.calls,
        times_better_than={
            other.contender.implementation: one.times_faster_than(other) for other in all_measured if other is not one
        },
        goals=workload.goals if mine == contenders.OURS else {},
    )


def memory(folder: Path, *, quick: bool) -> Result:
    """Extra peak memory of one text of 8192 tokens. Other programs do not change it: every row is clean."""
    if not peak_memory.CLEAR.exists():
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
