"""The `retrieval` suite: stores on disk: rate and memory of indexing, latency and memory of search, cold start."""

from __future__ import annotations

import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu.suite import THREADS
from benchmarks.harness import (
    Contender,
    Measured,
    Reading,
    Result,
    WrongOutput,
    check,
    interleave,
    read_clocks,
)
from benchmarks.retrieval import synthetic as texts
from benchmarks.retrieval.process import ROOT, environment
from benchmarks.retrieval.search import search_exact, search_prefilter, search_scale
from benchmarks.retrieval.stores import FULL, QUICK, TOKENS, Bench, described
from benchmarks.rows import Row
from modernbert.retrieval import Store, index
from modernbert.retrieval.documents.find import read_file

FP16 = 2.0**-11  # half a step of float16 below 1, the tolerance of a stored vector


def index_rate(bench: Bench, workload: str) -> Result:
    """`index` of a BEIR file, reading and writing included, in turns with `encode_documents` of the same texts."""
    count, colbert = bench.sizes.index, texts.default()
    corpus = bench.corpus(count)
    contents = [document.content for document in read_file(corpus)]
    with tempfile.TemporaryDirectory(dir=bench.work) as scratch:
        folder = Path(scratch) / "store"

        def build_anew() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            index([corpus], folder, colbert, progress=False)

        def stored(_: object) -> Tensor:
            with Store(folder, colbert) as store:
                return torch.cat([vectors.values for _, _, vectors in store.batches()])

        def encode() -> Tensor:
            return colbert.encode_documents(contents, progress=False).values

        ours = Contender("index", "a file of JSON lines to a store on disk", build_anew, stored)
        bare = Contender("bare encoder", "texts in memory to vectors in memory", encode, lambda values: values)
        error = check(ours, encode(), FP16)
        rounds = min(3, bench.sizes.rounds)
        samples = interleave([ours, bare], {"index": 1, "bare encoder": 1}, rounds, rounds, read_clocks)
    measured = [Measured(one, error, 1, tuple(samples[one.implementation])) for one in (ours, bare)]

    def row(one: Measured, **more: Any) -> Row:
        return bench.row(
            workload=workload,
            what=f"Indexing {count:,} passages of {TOKENS} tokens into a new store",
            corpus=described(count, None),
            implementation=one.contender.implementation,
            settings=one.contender.settings,
            max_error=error,
            tolerance=FP16,
            foreign_percent=one.foreign,
            clean=one.clean,
            **more,
        )

    ratios = [theirs / mine for mine, theirs in zip(measured[0].seconds, measured[1].seconds, strict=True)]
    rates = [
        row(one, figure="rate", unit="passages/s", values=[count / seconds for seconds in one.seconds])
        for one in measured
    ]
    ratio = row(measured[0], figure="rate over the bare encoder's", unit="x", values=ratios, at_least=0.9)
    return Result(workload, [ratio, *rates], {})


def index_memory(bench: Bench, workload: str) -> Result:
    """The stores that are made here are kept for other workloads."""
    ways = {"index": False, "index --prefilter": True}
    peaks: dict[tuple[str, int], float] = {}
    for count in bench.sizes.memory:
        anew, kept = bench.work / f"{count}" / "anew", bench.folder(count, None)
        shutil.rmtree(anew, ignore_errors=True)
        for way, prefilter in ways.items():
            _, peaks[way, count] = bench.build(count, None, anew, prefilter=prefilter)
        shutil.rmtree(kept, ignore_errors=True)
        anew.rename(kept)
    row = partial(bench.row, workload=workload, what="Indexing, peak memory, mapped files not counted")
    few, many = bench.sizes.memory
    found = []
    for way, prefilter in ways.items():
        settings = "of a store that has none yet" if prefilter else "from JSON lines to a new store"
        this = partial(row, implementation=way, settings=settings)
        found += [
            this(corpus=described(count, None), figure="peak memory", unit="MB", values=[peaks[way, count]])
            for count in (few, many)
        ]
        found.append(
            this(
                corpus=f"{many:,} passages against {few:,}",
                figure="peak memory over peak memory",
                unit="x",
                values=[peaks[way, many] / peaks[way, few]],
                # It may not grow; a tenth is left for noise. The centroids of the pre-filter grow with the root.
                at_most=None if prefilter else 1.1,
            )
        )
    return Result(workload, found, {})


def cold_start(bench: Bench, workload: str) -> Result:
    """The command line in fresh processes, in turns with one that does nothing but import torch."""
    folder = bench.store(bench.sizes.start, None)
    ours = "from modernbert.cli import main; main()"
    starts = {  # name: arguments of python, and what has to be printed
        "import torch": (["-c", "import torch"], ""),
        "modernbert search": (["-c", ours, "search", "how does hail form?", "--index", str(folder)], "corpus.jsonl"),
        "modernbert --help": (["-c", ours, "--help"], "search"),
    }

    def contender(name: str) -> Contender:
        command, printed = [sys.executable, *starts[name][0]], starts[name][1]

        def start() -> None:
            done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
            if printed not in done.stdout:
                raise WrongOutput(f"does not print {printed!r}: {done.stdout[:200]!r}")

        return Contender(name, "a process from start to end, its files in the page cache", start, torch.as_tensor)

    rounds = 3 if bench.sizes.rounds < FULL.rounds else 9
    taken = interleave([contender(name) for name in starts], dict.fromkeys(starts, 1), rounds, 3, read_children)
    seconds = {name: [sample.seconds for sample in samples] for name, samples in taken.items()}
    above = [mine - theirs for mine, theirs in zip(seconds["modernbert search"], seconds["import torch"], strict=True)]

    def row(name: str, figure: str, values: Sequence[float], at_most: float | None = None) -> Row:
        return bench.row(
            workload=workload,
            what="Cold start of the command line",
            corpus=described(bench.sizes.start, None) if name == "modernbert search" else "",
            implementation=name,
            figure=figure,
            unit="s",
            values=values,
            at_most=at_most,
            settings="a process from start to end, its files in the page cache",
            foreign_percent=max(sample.foreign for sample in taken[name]),
            clean=all(sample.clean for sample in taken[name]),
        )

    search, torch_alone, usage = "modernbert search", "import torch", "modernbert --help"
    found = [
        row(search, "above import torch", above, at_most=2.0),
        row(usage, "time", seconds[usage], at_most=0.5),
        row(search, "time", seconds[search]),
        row(torch_alone, "time", seconds[torch_alone]),
    ]
    return Result(workload, found, {})


def read_children(work: Callable[[], Any]) -> Reading:
    """`read_clocks`, to which the processes that `work` starts and waits for are its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    reading = read_clocks(work)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Reading(reading.seconds, max(0.0, reading.foreign - 100 * own / reading.seconds))


BUILDERS: dict[str, Callable[[Bench, str], Result]] = {
    "index-5000": index_rate,
    "search-10k": search_exact,
    "search-10k-prefilter": search_prefilter,
    "index-memory": index_memory,
    "search-scale": search_scale,
    "cold-start": cold_start,
}
WORKLOADS = {
    "index-5000": "rate of `index` from a file of 5,000 passages to a new store, over the bare encoder's",
    "search-10k": "p50, p99 and memory of exact search of 10,000 passages, synthetic vectors and the default model's",
    "search-10k-prefilter": "the same with the pre-filter, and its recall@10 of exact search",
    "index-memory": "peak memory of indexing 10,000 and 100,000 passages: the larger corpus may not take more",
    "search-scale": "both searches of 10,000, 100,000 and a million passages, the million written in less than 4 GB",
    "cold-start": "`modernbert search` and `modernbert --help` as fresh processes, over one that only imports torch",
}


def run(
    *, quick: bool, only: Sequence[str], minutes: float | None = None, work: Path | None = None
) -> Iterator[Result]:
    """Measure the workloads named in `only` (all if empty), one `Result` each as it is done.

    Args:
        minutes: after these no workload is begun; None: all are.
        work: keeps corpora and stores for another run; None: nothing is kept.
    """
    until = math.inf if minutes is None else time.monotonic() + 60 * minutes
    torch.set_num_threads(THREADS)
    os.environ["RAYON_NUM_THREADS"] = str(THREADS)  # the tokenizers have threads of their own
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench((work or Path(scratch)).resolve(), QUICK if quick else FULL)
        bench.work.mkdir(parents=True, exist_ok=True)
        for name in only or WORKLOADS:
            if time.monotonic() > until:
                yield Result(name, [], {"the rest": f"was not reached within {minutes:g} minutes"})
            else:
                yield BUILDERS[name](bench, name)
