"""Suites of whole encoders: throughput, latency, memory, and the table of the ModernBERT paper.

A model is one more name in a tuple of models, a peer one more row of `peers.PEERS` and its name below.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

from benchmarks import harness
from benchmarks.harness import PEAK, Run, Suite, Table
from benchmarks.inputs import DOCUMENTS, SETS
from benchmarks.peers import COMPILED, FLASH, PACKED_ENCODERS, REFERENCE, SDPA, those
from benchmarks.worker import OURS, SESSION, Job, Peer


def of_texts(
    here: Run, workload: str, model: str, what: str, lengths: Sequence[int], peers: Mapping[str, Peer], **more: Any
) -> Table:
    """A table of texts, by default in tokens per second, in the dtype of the run, next to transformers one by one.

    Args:
        more: of the `Job` and of the `Table`. By default the longest and the shortest text are compared.
    """
    ends = {lengths.index(max(lengths)), lengths.index(min(lengths))}
    of_job: dict[str, Any] = {"checked": tuple(sorted(ends))}
    of_job |= {one.name: more.pop(one.name) for one in fields(Job) if one.name in more}
    known = {"dtype": here.dtype, "job": Job(tuple(lengths), **of_job), "peers": peers, "reference": REFERENCE}
    return Table(workload, what, model, **known | more)


def models(here: Run, *names: str) -> Sequence[str]:
    """These on a GPU, the first in a try-out; on a CPU a small one."""
    return names[: 1 if here.quick else None] if here.is_gpu else ("ettin-17m",)


PUBLISHED = {
    "modernbert-base": {"fixed-512": 148.1, "variable-short": 147.3, "fixed-8192": 123.7, "variable-long": 133.8},
    "modernbert-large": {"fixed-512": 52.3, "variable-short": 52.9, "fixed-8192": 46.8, "variable-long": 49.8},
}
"""Table 2 of the paper, thousand tokens per second of its own implementation on one RTX 4090, in float32 except for
attention. It is part of `what`, never a row."""


def throughput(here: Run, names: Sequence[str]) -> Iterator[Table]:
    """By the protocol of the paper, in bfloat16; the models of the paper in float32 too, without TF32, as published."""
    every = ("modernbert-base", "modernbert-large", "ettin-17m", "ettin-32m", "ettin-68m", "ettin-1b")
    for model in models(here, *every):
        for dtype in ("bfloat16", "float32") if here.is_gpu and model in PUBLISHED else (here.dtype,):
            peers = those(OURS, SESSION, SDPA, FLASH)
            if not here.quick:
                # What compiles takes minutes for each set.
                slow = COMPILED if here.is_gpu and dtype == "bfloat16" and model == every[0] else ()
                peers |= those(PACKED_ENCODERS, *slow)
            for name in names:
                documents, count, batch = SETS[name], count_of(here, name, dtype), 32 if SETS[name].is_long else 512
                what = f"{model}, {dtype}: {count:,} of the paper's {DOCUMENTS:,} documents, "
                what += f"{documents.words()}, batches of {batch}"
                if model in PUBLISHED:
                    what += f"; published: {PUBLISHED[model][name]:g} thousand tokens/s on an RTX 4090"
                lengths, known = documents.first(count), {"dtype": dtype, "batch": batch, "rounds": 3}
                yield of_texts(here, name, model, what, lengths, peers, **known)


def count_of(here: Run, name: str, dtype: str) -> int:
    """As many of a set as the time allows: all short ones and 512 long ones in a long run, in bfloat16."""
    if not here.is_gpu:
        return (2, 1)[here.quick] if SETS[name].is_long else (32, 2)[here.quick]
    whole = DOCUMENTS // (16 if SETS[name].is_long else 1) // (4 if dtype == "float32" else 1)
    return whole // (64 if here.quick else 8 if here.minutes < 20 else 1)


def latency(here: Run, names: Sequence[str]) -> Iterator[Table]:
    """From ids on the host to vectors on the device."""
    known: dict[str, Any] = {"unit": "us", "value": lambda seconds: 1e6 * seconds, "from_host": True}
    known["measure"] = partial(harness.speed, count=20 if here.quick else 200)
    peers = those(OURS, SESSION, SDPA, COMPILED[0], PACKED_ENCODERS)
    queries = {"query-32": {1: (32,)}, "batches": {count: (32, 24, 16, 8) * (count // 4) for count in (4, 8, 32)}}
    for model in models(here, "ettin-17m", "modernbert-base"):
        for workload in names:
            for count, lengths in queries[workload].items():
                words = "one query of 32 tokens" if count == 1 else f"{count} queries of 8 to 32 tokens"
                what = f"{model}, {words}, ids on the host to vectors on the device"
                yield of_texts(here, workload, model, what, lengths, peers, checked=tuple(range(count)), **known)


def memory(here: Run, names: Sequence[str]) -> Iterator[Table]:
    on_gpu, on_cpu = ((32, 512), (8, 512), (128, 512), (1, 8192), (4, 8192)), ((8, 512), (2, 512), (1, 4096))
    peers, model = those(OURS, SDPA, FLASH), models(here, "modernbert-base")[0]
    for count, length in ((1, 64), (2, 64)) if here.quick and not here.is_gpu else on_gpu if here.is_gpu else on_cpu:
        what = f"{model}, {count} texts of {length} tokens in one batch: peak memory"
        yield of_texts(here, names[0], model, what, (length,) * count, peers, batch=count, **PEAK)


AGAINST = "transformers (sdpa, FlashAttention, under torch.compile), packed-encoders"

SUITES = {
    "paper-table": Suite(
        "tokens per second of whole encoders, forward, by the efficiency protocol of the ModernBERT paper",
        {name: f"documents of {lengths.words()}" for name, lengths in SETS.items()},
        AGAINST,
        harness.of_tables(throughput),
        weight=42,
    ),
    "latency": Suite(
        "latency of queries, ids on the host to vectors on the device: p50 and p99",
        {"query-32": "one query of 32 tokens", "batches": "4, 8 and 32 queries of 8 to 32 tokens in a call"},
        AGAINST,
        harness.of_tables(latency),
        weight=10,
    ),
    "memory": Suite(
        "peak memory beyond the model and its inputs, by tokens",
        {"forward": "inference: 4,096 to 65,536 tokens in texts of 512, and 1 and 4 texts of 8192"},
        AGAINST,
        harness.of_tables(memory),
        weight=6,
    ),
}
