"""Suites of whole encoders: throughput, latency, memory, padding, accuracy, and the table of the ModernBERT paper.

A model is one more name in a tuple of models, a peer one more row of `peers.PEERS` and its name below.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import harness, inputs, worker
from benchmarks.clock import Refused
from benchmarks.harness import BETTER, LOADING, MS, Difference, Measured, Result, Run, Suite, Table, Workers, rms
from benchmarks.inputs import LENGTHS, MEAN, WORDS
from benchmarks.peers import (
    COMPILED,
    EAGER,
    FLASH,
    OURS,
    PACKED_ENCODERS,
    REFERENCE,
    SDPA,
    SENTENCE_TRANSFORMERS,
    SESSION,
    those,
)
from benchmarks.rows import ROOT
from benchmarks.worker import Job, Peer

TRANSFORMERS = "transformers (eager, sdpa, FlashAttention, under torch.compile)"


def of_texts(
    here: Run, workload: str, model: str, what: str, lengths: Sequence[int], peers: Mapping[str, Peer], **more: Any
) -> Table:
    """A table of texts, by default in tokens per second, in the dtype of the run, next to transformers one by one.

    Args:
        more: of the `Job` and of the `Table`.
    """
    of_job = {name: more.pop(name) for name in ("batch", "from_host", "backward", "options") if name in more}
    job = Job(tuple(lengths), more.pop("checked", None) or here.checked(lengths), **of_job)
    return Table(
        workload, what, model, **{"dtype": here.dtype, "job": job, "peers": peers, "reference": REFERENCE} | more
    )


def models(here: Run, *names: str) -> Sequence[str]:
    """These on a GPU; on a CPU a small one."""
    return (names if not here.quick else names[:1]) if here.is_gpu else ("ettin-17m",)


SETS = {name.replace(" ", "-"): name for name in LENGTHS}
COUNTS = {"fixed 512": (8, 2), "variable short": (16, 4), "fixed 8192": (1, 1), "variable long": (2, 1)}
"""Texts on a CPU, and in a try-out. On a GPU about 65,536 tokens fill it."""


def throughput(here: Run, names: Sequence[str]) -> Iterator[Table]:
    """What compiles takes part for one model only: it takes minutes for each."""
    every = ("modernbert-base", "ettin-17m", "ettin-32m", "ettin-68m", "modernbert-large", "ettin-1b")
    for model in models(here, *every):
        peers = those(OURS, SESSION, SDPA, FLASH)
        if not here.quick:
            peers |= those(EAGER, SENTENCE_TRANSFORMERS, PACKED_ENCODERS)
            peers |= those(*COMPILED) if here.is_gpu and model == every[0] else {}
        for workload in names:
            name = SETS[workload]
            count = COUNTS[name][here.quick] if here.quick or not here.is_gpu else 65_536 // MEAN[name]
            what = f"{model}, {count} texts of {inputs.words(name, short=here.tries)}"
            yield of_texts(here, workload, model, what, inputs.in_set(name, count, short=here.tries), peers)


def latency(here: Run, names: Sequence[str]) -> Iterator[Table]:
    """From ids on the host to vectors on the device."""
    peers = those(OURS, SESSION, SDPA, COMPILED[0], PACKED_ENCODERS)
    counts = {"query-32": (1,), "batches": (1, 8) if here.tries else (1, 8, 32, 2, 4)}
    known: dict[str, Any] = {"unit": "us", "value": lambda seconds: 1e6 * seconds, "from_host": True}
    known["measure"] = partial(harness.latency, count=20 if here.quick else 200)
    for model in models(here, "ettin-17m", "modernbert-base"):
        for workload in names:
            for count in counts.get(workload, ()):
                query = workload == "query-32"
                lengths = (32,) if query else lengths_between(8, 32, count)
                words = "one query of 32 tokens" if query else f"{count} queries of 8 to 32 tokens"
                what = f"{model}, {words}, ids on the host to vectors on the device"
                x = None if query else ("batch", count)
                yield of_texts(here, workload, model, what, lengths, peers, x=x, checked=tuple(range(count)), **known)
            if workload == "cold-start":
                what = f"{model}, from the start of a process to the first vector of a text of 32 tokens"
                yield of_texts(here, workload, model, what, (32,), {}, model_pass=False, measure=cold_start, **MS)


def lengths_between(low: int, high: int, count: int) -> tuple[int, ...]:
    """Evenly, the longest first; a single text has the mean."""
    if count == 1:
        return ((low + high) // 2,)
    return tuple(round(high - (high - low) * index / (count - 1)) for index in range(count))


COLD = {
    OURS: "from modernbert import Encoder, pack\n"
    "model = Encoder.from_pretrained(folder, dtype=dtype, device=device).eval()\n"
    "run = lambda: model(pack([ids]).to(device))[0]",
    SDPA: "from transformers import AutoModel\n"
    "model = AutoModel.from_pretrained(folder, dtype=dtype).to(device).eval()\n"
    "run = lambda: model(torch.tensor([ids], device=device)).last_hidden_state[0, 0]",
}
"""A process as a user starts it. The clock counts from the start of the system, so both processes read the same."""


def cold_start(workers: Workers, table: Table) -> Result:
    """Import, load, encode one text: a new process each time, in turns, its vector compared with the reference."""
    here, setup, vectors = workers.here, workers.setup, {}
    refused = workers.start()
    try:
        exact, plain = workers.expected(table.job)
    except Refused as reason:
        return workers.result(table, [], {"every implementation": str(reason)})

    def start(name: str) -> float:
        known = f"folder, dtype, device = {setup.folder!r}, torch.{setup.dtype}, {setup.device!r}"
        code = (
            f"import json, time, torch\n{known}\nids = {inputs.ids(0, table.job.lengths[0]).tolist()}\n{COLD[name]}\n"
        )
        code += "with torch.inference_mode(): vector = run().float().tolist()\n"
        code += "print(json.dumps([time.perf_counter(), vector]))"
        began, path = time.perf_counter(), os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        options = {"capture_output": True, "text": True, "timeout": 600, "env": os.environ | {"PYTHONPATH": path}}
        done = subprocess.run([sys.executable, "-c", code], **options)
        if done.returncode:
            raise Refused(f"fails: {done.stderr.strip().splitlines()[-1:]}")
        until, vector = json.loads(done.stdout.splitlines()[-1])
        vectors[name] = torch.tensor(vector)
        return until - began

    asks = {name: partial(start, name) for name in COLD}
    taken, failed = harness.in_turns(asks, 2 if here.quick else table.rounds, until=here.until)
    done = []
    for name, seconds in taken.items():
        try:
            error = workers.judged(name, vectors[name], exact[0], None if plain is None else plain[0], table.job)
            done.append(Measured(name, "import, load, encode; in a new process", error, costs=seconds))
        except Refused as reason:
            failed[name] = str(reason)
    return workers.result(table, done, refused | failed)


def memory(here: Run, names: Sequence[str]) -> Iterator[Table]:
    on_gpu, on_cpu = ((32, 512), (8, 512), (128, 512), (1, 8192), (4, 8192)), ((8, 512), (2, 512), (1, 4096))
    peers, model = those(OURS, SDPA, FLASH, *(() if here.quick else (EAGER,))), models(here, "modernbert-base")[0]
    for count, length in ((1, 64), (2, 64)) if here.tries else on_gpu if here.is_gpu else on_cpu:
        for workload in names:
            what = f"{model}, {count} texts of {length} tokens in one batch: peak memory, {workload}"
            yield memory_table(here, workload, model, what, count, length, peers, backward=workload == "backward")


def memory_table(
    here: Run, workload: str, model: str, what: str, count: int, length: int, peers: Mapping[str, Peer], **more: Any
) -> Table:
    known: dict[str, Any] = {"figure": "peak memory", "unit": "MB", "value": lambda nbytes: nbytes / 1e6}
    known |= {"model_pass": False, "x": ("tokens", count * length), "measure": peaks, "batch": count}
    return of_texts(here, workload, model, what, (length,) * count, peers, **known | more)


def peaks(workers: Workers, table: Table) -> Result:
    """Bytes at the peak of a call beyond the loaded model and its inputs. On a CPU a process gives one sample."""
    here, taken, refused = workers.here, {}, {}
    if not here.is_gpu and not worker.CLEAR.exists():
        return workers.result(table, [], {"every implementation": "only Linux resets the peak memory of a process"})
    warm = Job((16, 8), (0,), batch=2, backward=table.job.backward)
    for _ in range(1 if here.is_gpu or here.quick else 3):
        with harness.workers_of(here, table) as fresh:
            refused |= fresh.start()
            workers.identity = fresh.identity
            try:
                exact, plain = fresh.expected(table.job)
            except Refused as reason:
                refused["every implementation"] = str(reason)
                break
            fresh.dismiss_judges()
            told, failed = fresh.turns(fresh.peers, worker.peak, 3 if here.is_gpu else 1, job=table.job, warm=warm)
            refused |= failed
            for name, found in told.items():
                try:
                    error = fresh.judged(name, found[0]["answer"], exact, plain, table.job)
                    one = taken.setdefault(name, Measured(name, found[0]["settings"], error))
                    one.costs += [max(1, each["bytes"]) for each in found]
                except Refused as reason:
                    refused[name] = str(reason)
    return workers.result(table, [one for name, one in taken.items() if name not in refused], refused)


def padding(here: Run, names: Sequence[str]) -> Iterator[Table]:
    """transformers pads here, as its users do; sentence-transformers flattens where it can."""
    peers = those(OURS, SDPA, FLASH, *(() if here.quick else (SENTENCE_TRANSFORMERS,)))
    count, longest = (64, 512) if here.is_gpu else (8, 64) if here.quick else (16, 512)
    for model in models(here, "modernbert-base", "ettin-17m"):
        for fill in (0.25, 1.0, 0.5, 0.75, 0.1):
            lengths = lengths_of_fill(fill, count, longest)
            what = f"{model}, one batch of {count} texts, the longest of {longest} tokens, {fill:.0%} of it real"
            x, options = ("fill", round(sum(lengths) / (count * longest), 3)), {"padded": True}
            yield of_texts(here, "fill", model, what, lengths, peers, batch=count, options=options, x=x)


def lengths_of_fill(fill: float, count: int, longest: int) -> tuple[int, ...]:
    """Lengths from short to `longest` whose sum is `fill` of a full batch, in random order."""
    # The mean of u ** k over u from 0 to 1 is 1 / (k + 1).
    drawn = [max(1, round(longest * ((at + 0.5) / count) ** (1 / fill - 1))) for at in range(count)]
    drawn[-1] = longest
    random.Random(0).shuffle(drawn)
    return tuple(drawn)


# The table of the paper.

PUBLISHED = {
    "modernbert-base": {"fixed 512": 148.1, "variable short": 147.3, "fixed 8192": 123.7, "variable long": 133.8},
    "modernbert-large": {"fixed 512": 52.3, "variable short": 52.9, "fixed 8192": 46.8, "variable long": 49.8},
}
"""Table 2 of the paper, thousand tokens per second of its own implementation on one RTX 4090, in float32 except for
attention. It is part of `what`, never a row."""


def paper_table(here: Run, names: Sequence[str]) -> Iterator[Table]:
    for model in models(here, "modernbert-base", "modernbert-large"):
        for workload in names:
            dtype = workload.rpartition("-")[2]
            if workload.startswith("largest"):
                if here.is_gpu or here.quick:
                    lengths = {512: 8192, 8192: 512} if here.is_gpu else {32: 3}
                    yield from (largest_table(here, model, workload, dtype, *one) for one in lengths.items())
                continue
            # What compiles takes minutes for each set.
            slow = dtype == "bfloat16" and model == "modernbert-base"
            peers = those(OURS, SDPA, FLASH, *(COMPILED if slow else ()))
            # bfloat16 is slow where a CPU has none, and one set shows that it works.
            for name in ("variable short",) if here.tries and dtype == "bfloat16" else LENGTHS:
                count, batch = paper_documents(here, name, dtype), 32 if inputs.is_long(name) else 512
                parts = [f"{model}, {dtype}: {inputs.words(name, short=here.tries)}"]
                parts.append(f"{count:,} of the paper's {inputs.DOCUMENTS:,} documents, batches of {batch}")
                if model in PUBLISHED:
                    parts.append(f"published: {PUBLISHED[model][name]:g} thousand tokens/s on an RTX 4090")
                lengths, known = inputs.in_set(name, count, short=here.tries), {"dtype": dtype, "batch": batch}
                yield of_texts(here, workload, model, "; ".join(parts), lengths, peers, rounds=3, **known)


def paper_documents(here: Run, name: str, dtype: str) -> int:
    """As many of a set as the time allows: all short ones and 512 long ones in a long run, in bfloat16."""
    if not here.is_gpu:
        return (2, 1)[here.quick] if inputs.is_long(name) else (32, 2)[here.quick]
    whole = inputs.DOCUMENTS // (16 if inputs.is_long(name) else 1) // (4 if dtype == "float32" else 1)
    return whole // (64 if here.quick else 8 if here.minutes is not None and here.minutes < 15 else 1)


def largest_table(here: Run, model: str, workload: str, dtype: str, tokens: int, limit: int) -> Table:
    """Costs are shares of a batch, because less of them is better."""
    what = f"{model}, {dtype}: the largest batch of texts of {tokens} tokens, up to {limit:,}"
    known: dict[str, Any] = {"figure": "largest batch", "unit": "sequences", "value": lambda cost: 1 / cost}
    known |= {"model_pass": False, "measure": partial(largest, limit=limit), "dtype": dtype, "batch": 2}
    return of_texts(here, workload, model, what, (tokens,) * 2, those(OURS, SDPA, FLASH), checked=(0,), **known)


def largest(workers: Workers, table: Table, *, limit: int) -> Result:
    """Each implementation has the GPU for itself."""
    done, refused = [], {}
    for name, peer in table.peers.items():
        if workers.here.left() <= 0:
            refused[name] = f"was not reached within {workers.here.minutes:g} minutes"
            continue
        with harness.workers_of(workers.here, replace(table, peers={name: peer})) as only:
            ready, reasons = only.prepared(table.job)
            workers.identity = only.identity
            only.dismiss_judges()
            refused |= reasons
            for one in ready.values():
                try:
                    one.costs = [1 / largest_batch(partial(fits, only, name, table.job.lengths[0]), limit)]
                    done.append(one)
                except Refused as reason:
                    refused[name] = str(reason)
    return workers.result(table, done, refused)


def fits(workers: Workers, name: str, tokens: int, count: int) -> bool:
    return workers.worker(name).ask(worker.fits, timeout=120, job=Job((tokens,) * count, (0,), batch=count))


def largest_batch(fits: Callable[[int], bool], limit: int) -> int:
    """The largest batch that fits, up to `limit`, within 1.5 %: doubled, then halved steps."""
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
    if not low:
        raise Refused("has no memory for a single text")
    return low


# Accuracy.


def accuracy(here: Run, names: Sequence[str]) -> Iterator[Table]:
    more = () if here.quick else (EAGER, SENTENCE_TRANSFORMERS, PACKED_ENCODERS)
    for workload in names:
        dtype, _, length = workload.rpartition("-")
        cut, count = int(length) // (16 if here.tries else 1), 1 if length == "8192" else 8 if here.is_gpu else 2
        for model in models(here, "modernbert-base", "ettin-17m"):
            what = f"{model}, {dtype}, {count} texts of {cut} tokens, compared with transformers in float64"
            known: dict[str, Any] = {"figure": "rms error", "unit": "", "value": lambda cost: cost, "model_pass": False}
            known |= {"dtype": dtype, "checked": tuple(range(count)), "measure": drift}
            yield of_texts(
                here, workload, model, what, (cut,) * count, those(OURS, SESSION, SDPA, FLASH, *more), **known
            )


def drift(workers: Workers, table: Table) -> Result:
    """The error of everything that runs at all, and its worst cosine: no implementation is refused for an error."""
    refused, dtypes, done = workers.start(), ("float64", workers.setup.dtype), []
    try:
        exact, plain = (workers.judge(one).ask(worker.answer, timeout=LOADING, job=table.job) for one in dtypes)
    except Refused as reason:
        return workers.result(table, [], {"every implementation": f"has no reference: {reason}"})
    for name in workers.peers:
        try:
            got: Tensor = workers.worker(name).ask(worker.answer, timeout=LOADING, job=table.job)
        except Refused as reason:
            refused[name] = str(reason)
            continue
        if got.shape != exact.shape or not bool(got.isfinite().all()):
            refused[name] = f"returns {tuple(got.shape)}, or numbers that are not finite"
            continue
        cosine = F.cosine_similarity(got.double(), exact.double(), dim=-1).min().item()
        error = Difference(max(1e-12, rms(got, exact)), 2 * rms(plain, exact) + torch.finfo(torch.bfloat16).eps)
        done.append(Measured(name, "", error, costs=[error.found], more={"worst_cosine": cosine}))
    return workers.result(table, done, refused)


PAPER = {
    "bfloat16": "the four sets in bfloat16, 512 short or 32 long documents a batch",
    "float32": "the same in float32 without TF32, as published",
    "largest-batch-bfloat16": "the most texts of 512 and of 8192 tokens that fit into the GPU at once, in bfloat16",
    "largest-batch-float32": "the same in float32",
}
LATENCY = {
    "query-32": "one query of 32 tokens",
    "batches": "1, 2, 4, 8 and 32 queries of 8 to 32 tokens in a call",
    "cold-start": "from the start of a process to its first vector, the checkpoint in the cache of the disk",
}
MEMORY = {
    "forward": "inference: 4,096 to 65,536 tokens in texts of 512, and 1 and 4 texts of 8192",
    "backward": "a forward and a backward pass over the same",
}
ACCURACY = {f"{dtype}-{n}": f"texts of {n} tokens" for n in (512, 8192) for dtype in ("bfloat16", "float32", "float16")}


def suite(what: str, workloads: Mapping[str, str], against: str, make: Callable[..., Any], weight: int) -> Suite:
    return Suite(what, workloads, against, harness.of_tables(make), BETTER, weight=weight)


SUITES = {
    "throughput": suite(
        "tokens per second of whole encoders, forward, by model and by the four sets of lengths of the paper",
        {workload: f"texts of {WORDS[name]}" for workload, name in SETS.items()},
        f"{TRANSFORMERS}, sentence-transformers, packed-encoders",
        throughput,
        20,
    ),
    "latency": suite(
        "latency of queries, ids on the host to vectors on the device: p50, p99 and the device; and the cold start",
        LATENCY,
        "transformers (sdpa, and under torch.compile), packed-encoders",
        latency,
        10,
    ),
    "memory": suite("peak memory beyond the model and its inputs, by tokens", MEMORY, TRANSFORMERS, memory, 6),
    "padding": suite(
        "real tokens per second of 64 texts, the longest of 512, by the share of the batch that is not padding",
        {"fill": "one batch by the share of it that is real tokens, 1.0 to 0.1"},
        f"{TRANSFORMERS}, sentence-transformers",
        padding,
        8,
    ),
    "paper-table": suite("the efficiency protocol of the ModernBERT paper", PAPER, TRANSFORMERS, paper_table, 14),
    "accuracy": suite("how far hidden states are from float64, by dtype", ACCURACY, TRANSFORMERS, accuracy, 6),
}
