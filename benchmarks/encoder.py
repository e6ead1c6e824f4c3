"""Suites of whole encoders: throughput, latency, memory, padding, and the table of the ModernBERT paper.

A model is one more name in a tuple of models, a peer one more row of `peers.PEERS` and its name below.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks import harness, inputs, worker
from benchmarks.harness import BETTER, Failed, Measured, Result, Run, Suite, Table, Workers, WrongOutput, in_turns
from benchmarks.inputs import LENGTHS, MEAN, WORDS
from benchmarks.peers import (
    EAGER,
    FLASH,
    FLASH_COMPILED,
    OURS,
    PACKED_ENCODERS,
    REFERENCE,
    SDPA,
    SDPA_COMPILED,
    SENTENCE_TRANSFORMERS,
    SESSION,
    those,
)
from benchmarks.worker import ROOT, Job, Peer

TRANSFORMERS = "transformers (eager, sdpa, FlashAttention)"
COMPILED = f"{TRANSFORMERS}, the latter two under torch.compile too"


def models(here: Run, *names: str) -> Sequence[str]:
    """These on a GPU; on a CPU, and in a try-out, a small one."""
    return (names if not here.quick else names[:1]) if here.is_gpu else ("ettin-17m",)


# Throughput.

SETS = {name.replace(" ", "-"): name for name in LENGTHS}
TOKENS = 65_536
"""Of a call on a GPU: enough to fill it."""

ON_CPU = {"fixed 512": 8, "variable short": 16, "fixed 8192": 1, "variable long": 2}
QUICK = {"fixed 512": 2, "variable short": 4, "fixed 8192": 1, "variable long": 1}

FACTORS = {"fixed": {SDPA: 2.0, EAGER: 2.0, SDPA_COMPILED: 1.1, FLASH_COMPILED: 1.1, FLASH: 1.1, PACKED_ENCODERS: 1.05}}
FACTORS["variable"] = FACTORS["fixed"] | {SDPA: 3.0, EAGER: 3.0, SDPA_COMPILED: 1.3, FLASH_COMPILED: 1.3, FLASH: 1.3}
GOALS = {
    ("modernbert-base", "fixed 512"): 2.0e6,
    ("modernbert-base", "variable short"): 2.0e6,
    ("modernbert-base", "fixed 8192"): 1.0e6,
    ("modernbert-base", "variable long"): 1.3e6,
    ("ettin-17m", "fixed 512"): 20e6,
}
"""Tokens per second that we want to reach on an H200 in bfloat16."""


def throughput(here: Run, names: Sequence[str]) -> Iterator[Table]:
    """What compiles takes part for one model only: it takes minutes for each."""
    every = ("modernbert-base", "ettin-17m", "ettin-32m", "ettin-68m", "modernbert-large", "ettin-1b")
    for model in models(here, *every):
        peers = those(OURS, SESSION, SDPA, FLASH)
        if not here.quick:
            peers |= those(EAGER, SENTENCE_TRANSFORMERS, PACKED_ENCODERS)
            peers |= those(SDPA_COMPILED, FLASH_COMPILED) if here.is_gpu and model == every[0] else {}
        for workload in names:
            name = SETS[workload]
            count = QUICK[name] if here.quick else TOKENS // MEAN[name] if here.is_gpu else ON_CPU[name]
            lengths, goal = inputs.in_set(name, count, short=here.tries), GOALS.get((model, name))
            yield Table(
                workload,
                f"{model}, {count} texts of {inputs.words(name, short=here.tries)}",
                model,
                here.dtype,
                Job(lengths, here.checked(lengths)),
                peers,
                REFERENCE,
                name,
                goals={OURS: FACTORS[name.split()[0]]} if here.is_gpu and model == "modernbert-base" else {},
                goal={OURS: goal, SESSION: goal},
            )


# Latency.

ON_DEVICE = {"ettin-17m": 150.0, "modernbert-base": 450.0}
"""Microseconds on an H200 in bfloat16 that a query of 32 tokens may take with graphs."""


def latency(here: Run, names: Sequence[str]) -> Iterator[Table]:
    """From ids on the host to vectors on the device."""
    peers = those(OURS, SESSION, SDPA, SDPA_COMPILED, PACKED_ENCODERS)
    counts = {"query-32": (1,), "batches": (1, 8) if here.tries else (1, 8, 32, 2, 4)}
    for model in models(here, "ettin-17m", "modernbert-base"):
        for workload in names:
            for count in counts.get(workload, ()):
                query = workload == "query-32"
                lengths = (32,) if query else lengths_between(8, 32, count)
                words = "one query of 32 tokens" if query else f"{count} queries of 8 to 32 tokens"
                yield Table(
                    workload,
                    f"{model}, {words}, ids on the host to vectors on the device",
                    model,
                    here.dtype,
                    Job(lengths, tuple(range(count)), from_host=True),
                    peers,
                    REFERENCE,
                    words,
                    unit="us",
                    value=lambda seconds: 1e6 * seconds,
                    x=None if query else ("batch", count),
                    goals={SESSION: {SDPA: 5.0}} if query and here.is_gpu else {},
                    goal={SESSION: ON_DEVICE.get(model)} if query else {},
                    measure=partial(harness.latency, count=20 if here.quick else 200),
                )
            if workload == "cold-start":
                yield Table(
                    workload,
                    f"{model}, from the start of a process to the first vector of a text of 32 tokens",
                    model,
                    here.dtype,
                    Job((32,), (0,)),
                    {},
                    REFERENCE,
                    "one query of 32 tokens",
                    "cold start",
                    "ms",
                    lambda seconds: 1e3 * seconds,
                    model_pass=False,
                    measure=cold_start,
                )


def lengths_between(low: int, high: int, count: int) -> tuple[int, ...]:
    """Evenly, the longest first; a single text has the mean."""
    return (
        ((low + high) // 2,)
        if count == 1
        else tuple(round(high - (high - low) * n / (count - 1)) for n in range(count))
    )


COLD = {
    OURS: "from modernbert import Encoder, pack\n"
    "model = Encoder.from_pretrained(folder, dtype=dtype, device=device).eval()\n"
    "run = lambda: model(pack([ids]).to(device))[0]",
    SDPA: "from transformers import AutoModel\n"
    "model = AutoModel.from_pretrained(folder, dtype=dtype).to(device).eval()\n"
    "run = lambda: model(torch.tensor([ids], device=device)).last_hidden_state[0, 0]",
}
"""A process as a user starts it. The clock counts from the start of the system, so that both processes read the same."""


def cold_start(workers: Workers, table: Table) -> Result:
    """Import, load, encode one text: a new process each time, in turns, its vector compared with the reference."""
    here, setup = workers.here, workers.setup
    refused = workers.start()
    try:
        exact, plain = (None if one is None else one[0] for one in workers.expected(table.job))
    except Failed as reason:
        return Result(table.workload, [], {"every implementation": f"cannot be judged: the reference {reason}"})
    vectors: dict[str, torch.Tensor] = {}

    def start(name: str) -> float:
        ids = inputs.ids(0, table.job.lengths[0]).tolist()
        code = (
            f"import json, time, torch\nfolder, dtype, device = {setup.folder!r}, torch.{setup.dtype}, {setup.device!r}"
        )
        code += f"\nids = {ids}\n{COLD[name]}\nwith torch.inference_mode(): vector = run().float().tolist()"
        code += "\nprint(json.dumps([time.perf_counter(), vector]))"
        began = time.perf_counter()
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        known = {"capture_output": True, "text": True, "timeout": 600, "env": os.environ | {"PYTHONPATH": path}}
        done = subprocess.run([sys.executable, "-c", code], **known)
        if done.returncode:
            raise Failed(f"fails: {done.stderr.strip().splitlines()[-1:]}")
        until, vector = json.loads(done.stdout.splitlines()[-1])
        vectors[name] = torch.tensor(vector)
        return until - began

    rounds = 2 if here.quick else 5
    taken, failed = in_turns({name: partial(start, name) for name in COLD}, rounds, until=here.until)
    done = []
    for name, seconds in taken.items():
        try:
            assert exact is not None
            error = workers.judged(name, vectors[name], exact, plain, table.job)
            done.append(Measured(name, "import, load, encode; in a new process", error, costs=seconds))
        except WrongOutput as reason:
            failed[name] = str(reason)
    return Result(table.workload, workers.rows(table, done), workers.reasons(table, refused | failed))


# Memory.


def memory(here: Run, names: Sequence[str]) -> Iterator[Table]:
    """Beyond the loaded model and its inputs."""
    on_gpu, on_cpu = ((32, 512), (8, 512), (128, 512), (1, 8192), (4, 8192)), ((8, 512), (2, 512), (1, 4096))
    peers = those(OURS, SDPA, FLASH) if here.quick else those(OURS, SDPA, FLASH, EAGER)
    for count, length in ((1, 64), (2, 64)) if here.tries else on_gpu if here.is_gpu else on_cpu:
        for workload in names:
            yield memory_table(here, workload, models(here, "modernbert-base")[0], peers, count, length)


def memory_table(here: Run, workload: str, model: str, peers: dict[str, Peer], count: int, length: int) -> Table:
    backward = workload == "backward"
    passes = "forward + backward" if backward else "forward"
    lengths = (length,) * count
    return Table(
        workload,
        f"{model}, {count} texts of {length} tokens in one batch: peak memory of {passes}",
        model,
        here.dtype,
        Job(lengths, here.checked(lengths), batch=count, backward=backward),
        peers,
        REFERENCE,
        f"fixed {length}",
        "peak memory",
        "MB",
        lambda nbytes: nbytes / 1e6,
        model_pass=False,
        passes=passes,
        x=("tokens", count * length),
        goals={OURS: {SDPA: 2.0}} if backward else {},
        measure=peaks,
    )


def peaks(workers: Workers, table: Table) -> Result:
    """Bytes at the peak of a call. On a CPU an allocator keeps what it once had, so a process gives one sample."""
    here = workers.here
    if not here.is_gpu and not worker.CLEAR.exists():
        reason = "cannot be measured: only Linux resets the high-water mark of a process"
        return Result(table.workload, [], {"every implementation": reason})
    warm = Job((16, 8), (0,), batch=2, backward=table.job.backward)
    taken: dict[str, Measured] = {}
    refused: dict[str, str] = {}
    for _ in range(1 if here.is_gpu or here.quick else 3):
        fresh = Workers(here, table)
        try:
            refused |= fresh.start()
            exact, plain = fresh.expected(table.job)
            fresh.dismiss_judges()
            told, failed = fresh.turns(fresh.peers, worker.peak, 3 if here.is_gpu else 1, job=table.job, warm=warm)
            refused |= failed
            for name, found in told.items():
                try:
                    error = fresh.judged(name, found[0]["answer"], exact, plain, table.job)
                    one = taken.setdefault(name, Measured(name, found[0]["settings"], error))
                    one.costs += [each["bytes"] for each in found]
                except WrongOutput as reason:
                    refused[name] = str(reason)
        except Failed as reason:
            refused["every implementation"] = f"cannot be judged: the reference {reason}"
            break
        finally:
            workers.identity = fresh.identity
            fresh.close()
    done = [one for name, one in taken.items() if name not in refused]
    return Result(table.workload, workers.rows(table, done), workers.reasons(table, refused))


# Padding.


def padding(here: Run, names: Sequence[str]) -> Iterator[Table]:
    """transformers pads here, as its users do; sentence-transformers flattens where it can."""
    peers = those(OURS, SDPA, FLASH) if here.quick else those(OURS, SDPA, FLASH, SENTENCE_TRANSFORMERS)
    count, longest = (64, 512) if here.is_gpu else (8, 64) if here.quick else (16, 512)
    for model in models(here, "modernbert-base", "ettin-17m"):
        for fill in (0.25, 1.0, 0.5, 0.75, 0.1):
            lengths = lengths_of_fill(fill, count, longest)
            yield Table(
                "fill",
                f"{model}, one batch of {count} texts, the longest of {longest} tokens, {fill:.0%} of it real",
                model,
                here.dtype,
                Job(lengths, here.checked(lengths), batch=count, options={"padded": True}),
                peers,
                REFERENCE,
                f"fill {fill:g}",
                x=("fill", round(sum(lengths) / (count * longest), 3)),
                goals={OURS: {SDPA: 3.0}} if here.is_gpu and fill == 0.5 else {},
            )


def lengths_of_fill(fill: float, count: int, longest: int) -> tuple[int, ...]:
    """Lengths from short to `longest` whose sum is `fill` of a full batch, in random order."""
    # The mean of u ** k over u from 0 to 1 is 1 / (k + 1).
    drawn = [max(1, round(longest * ((at + 0.5) / count) ** (1 / fill - 1))) for at in range(count)]
    drawn[-1] = longest
    random.Random(0).shuffle(drawn)
    return tuple(drawn)


# The table of the paper.

BATCH = {512: 512, 8192: 32}
PUBLISHED = {
    "modernbert-base": {"fixed 512": 148.1, "variable short": 147.3, "fixed 8192": 123.7, "variable long": 133.8},
    "modernbert-large": {"fixed 512": 52.3, "variable short": 52.9, "fixed 8192": 46.8, "variable long": 49.8},
}
"""Table 2 of the paper, thousand tokens per second of its own implementation on one RTX 4090, in float32 except for
attention. It is part of `what`, never a row."""

LIMIT = {512: 8192, 8192: 512}
"""Texts of a batch above which the largest is not searched for."""


def paper_table(here: Run, names: Sequence[str]) -> Iterator[Table]:
    for model in models(here, "modernbert-base", "modernbert-large"):
        for workload in names:
            dtype = workload.rpartition("-")[2]
            if workload.startswith("largest"):
                if here.is_gpu or here.quick:
                    for length in (512,) if here.tries else (512, 8192):
                        yield largest_table(here, model, workload, dtype, length)
                continue
            # What compiles takes minutes for each set.
            slow = dtype == "bfloat16" and model == "modernbert-base"
            peers = those(OURS, SDPA, FLASH, *((SDPA_COMPILED, FLASH_COMPILED) if slow else ()))
            # bfloat16 is slow where a CPU has none, and one set shows that it works.
            for name in ("variable short",) if here.tries and dtype == "bfloat16" else LENGTHS:
                yield paper_row(here, model, dtype, name, peers)


def paper_row(here: Run, model: str, dtype: str, name: str, peers: dict[str, Peer]) -> Table:
    count, batch = paper_documents(here, name, dtype), BATCH[8192 if inputs.is_long(name) else 512]
    lengths = inputs.in_set(name, count, short=here.tries)
    parts = [f"{model}, {dtype}: {inputs.words(name, short=here.tries)}"]
    parts.append(f"{count:,} of the paper's {inputs.DOCUMENTS:,} documents, batches of {batch}")
    if model in PUBLISHED:
        parts.append(f"published: {PUBLISHED[model][name]:g} thousand tokens/s on an RTX 4090")
    job = Job(lengths, here.checked(lengths), batch=batch)
    return Table(dtype, "; ".join(parts), model, dtype, job, peers, REFERENCE, name, rounds=3)


def paper_documents(here: Run, name: str, dtype: str) -> int:
    """As many of a set as the time allows: all short ones and 512 long ones in a long run, in bfloat16."""
    if not here.is_gpu:
        return (1 if here.quick else 2) if inputs.is_long(name) else (2 if here.quick else 32)
    whole = inputs.DOCUMENTS // 16 if inputs.is_long(name) else inputs.DOCUMENTS
    if here.quick:
        return whole // 64
    short = here.minutes is not None and here.minutes < 15
    return whole // (8 if short else 1) // (4 if dtype == "float32" else 1)


def largest_table(here: Run, model: str, workload: str, dtype: str, length: int) -> Table:
    """Costs are shares of a batch, because less of them is better."""
    limit, tokens = (LIMIT[length], length) if here.is_gpu else (3, 32)
    return Table(
        workload,
        f"{model}, {dtype}: the largest batch of texts of {tokens} tokens, up to {limit:,}",
        model,
        dtype,
        Job((tokens,) * 2, (0,), batch=2),
        those(OURS, SDPA, FLASH),
        REFERENCE,
        f"fixed {tokens}",
        "largest batch",
        "sequences",
        lambda cost: 1 / cost,
        model_pass=False,
        measure=partial(largest, limit=limit),
    )


def largest(workers: Workers, table: Table, *, limit: int) -> Result:
    """Each implementation has the GPU for itself."""
    done, refused = [], {}
    for name, peer in table.peers.items():
        if workers.here.late():
            refused[name] = f"was not reached within {workers.here.minutes:g} minutes"
            continue
        only = Workers(workers.here, replace(table, peers={name: peer}))
        try:
            ready, reasons = only.prepared(table.job)
            only.dismiss_judges()
            refused |= reasons
            for one in ready.values():
                most = largest_batch(partial(fits, only, name, table.job.lengths[0]), limit)
                one.costs = [1 / most] if most else []
                if most:
                    done.append(one)
                else:
                    refused[name] = "has no memory for a single text"
        except Failed as reason:
            refused[name] = str(reason)
        finally:
            workers.identity = only.identity
            only.close()
    return Result(table.workload, workers.rows(table, done), workers.reasons(table, refused))


def fits(workers: Workers, name: str, tokens: int, count: int) -> bool:
    return workers.worker(name).ask(worker.fits, timeout=120, job=Job((tokens,) * count, (0,), batch=count))


def largest_batch(fits: Callable[[int], bool], limit: int) -> int:
    """The largest batch that fits, up to `limit`, within 1.5 %: doubled, then halved steps; 0 if not even one fits."""
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
    return low


SUITES = {
    "throughput": Suite(
        "tokens per second of whole encoders, forward, by model and by the four sets of lengths of the ModernBERT paper",
        {workload: f"texts of {WORDS[name]}" for workload, name in SETS.items()},
        f"{COMPILED}, sentence-transformers, packed-encoders",
        harness.of_tables(throughput),
        BETTER,
        weight=20,
    ),
    "latency": Suite(
        "latency of queries, from ids on the host to vectors on the device: p50, p99 and the device; and the cold start",
        {
            "query-32": "one query of 32 tokens",
            "batches": "1, 2, 4, 8 and 32 queries of 8 to 32 tokens in a call",
            "cold-start": "from the start of a process to its first vector, the checkpoint in the cache of the disk",
        },
        "transformers (sdpa, and under torch.compile), packed-encoders",
        harness.of_tables(latency),
        BETTER,
        weight=10,
    ),
    "memory": Suite(
        "peak memory beyond the loaded model and its inputs, by tokens of a call",
        {
            "forward": "inference: 4,096 to 65,536 tokens in texts of 512, and 1 and 4 texts of 8192",
            "backward": "a forward and a backward pass over the same",
        },
        TRANSFORMERS,
        harness.of_tables(memory),
        BETTER,
        weight=6,
    ),
    "padding": Suite(
        "real tokens per second of 64 texts, the longest of 512, by the share of the batch that is not padding",
        {"fill": "one batch by the share of it that is real tokens, 1.0 to 0.1"},
        "transformers (sdpa, FlashAttention), sentence-transformers",
        harness.of_tables(padding),
        BETTER,
        weight=8,
    ),
    "paper-table": Suite(
        "the efficiency protocol of the ModernBERT paper: tokens per second of its four sets, and the largest batch",
        {
            "bfloat16": "the four sets in bfloat16, 512 short or 32 long documents a batch",
            "float32": "the same in float32 without TF32, as published",
            "largest-batch-bfloat16": "the most texts of 512 and of 8192 tokens that fit into the GPU at once, in bfloat16",
            "largest-batch-float32": "the same in float32",
        },
        COMPILED,
        harness.of_tables(paper_table),
        BETTER,
        weight=14,
    ),
}
