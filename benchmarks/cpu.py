"""Suite `cpu`: encoding, MaxSim and search on two threads, next to what people use today."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks import inputs
from benchmarks.encoder import of_texts
from benchmarks.harness import MS, PEAK, Run, Suite, Table
from benchmarks.late_interaction import maxsim_table, text_table
from benchmarks.peers import ONNX_RUNTIME, OPENVINO, SDPA, SDPA_COMPILED, those
from benchmarks.retrieval import on_cpu, search_of_ours
from benchmarks.worker import ENGINES, OURS, SESSION


def paper_lengths(count: int) -> tuple[int, ...]:
    return inputs.SETS["variable-short"].first(count)


def short(here: Run, workload: str) -> Table:
    length, found = int(workload[6:]), those(OURS, SESSION, *ENGINES, SDPA, SDPA_COMPILED, ONNX_RUNTIME, OPENVINO)
    what = f"ettin-17m, one text of {length} tokens"
    return of_texts(here, workload, "ettin-17m", what, [length], found, rounds=9, **MS)


BULK = {
    "fixed-512": ("ettin-17m", (512,) * 16, "16 texts of 512 tokens"),
    "variable": ("ettin-17m", paper_lengths(32), "32 texts of the paper's variable lengths"),
    "base-variable": ("modernbert-base", paper_lengths(8), "8 texts of the paper's variable lengths"),
}


def bulk(here: Run, workload: str) -> Table:
    model, lengths, what = BULK[workload]
    known = {"checked": tuple(range(len(lengths))), "rounds": 9 if model == "ettin-17m" else 4}
    found = those(OURS, SESSION, *ENGINES, SDPA, ONNX_RUNTIME, OPENVINO)
    return of_texts(here, workload, model, f"{model}, {what}", lengths, found, **known)


def long(here: Run, workload: str) -> Table:
    """With 8192 tokens without ONNX Runtime, which needs more than 6 GB here."""
    length, known = int(workload.split("-")[1]), {"rounds": 4}
    graphs = (*ENGINES, ONNX_RUNTIME, OPENVINO) if length == 2048 else ()
    what, found = f"ettin-17m, one text of {length} tokens", those(OURS, SESSION, SDPA, *graphs)
    if workload.endswith("memory"):
        what, known = f"{what}: peak memory beyond the loaded model", {"batch": 1} | PEAK
    return of_texts(here, workload, "ettin-17m", what, [length], found, **known)


def text(here: Run, workload: str) -> Table:
    if workload == "from-text":
        count = 4 if here.quick else 64
        return text_table(here, workload, f"{count} Wikipedia passages", count=count, rounds=9)
    lengths, said = paper_lengths(8 if here.quick else 256), "the paper's lengths"
    if workload == "documents-short":
        count = 16 if here.quick else 1024
        # From 3 to 32 in an order that does not help.
        lengths, said = tuple(3 + 29 * (at * 389 % count) // (count - 1) for at in range(count)), "3 to 32 tokens"
    return text_table(here, workload, f"{len(lengths):,} texts of {said}", lengths, rounds=9)


TABLES: dict[str, tuple[Callable[[Run, str], Table], str]] = {
    **{f"short-{n}": (short, f"latency of one text of {n} tokens") for n in (8, 16, 24, 32, 64, 128)},
    "fixed-512": (bulk, "16 texts of 512 tokens"),
    "variable": (bulk, "32 texts of the lengths of the ModernBERT paper, N(256, 64) clipped to [32, 512]"),
    "from-text": (text, "64 Wikipedia passages from string to late-interaction vectors, tokenising timed"),
    "documents": (text, "the same of 256 texts of the paper's lengths"),
    "documents-short": (text, "the same of 1,024 texts of 3 to 32 tokens"),
    "maxsim-48": (maxsim_table, "one query of 32 tokens against 1000 documents of 16 to 300 tokens, width 48"),
    "maxsim-128": (maxsim_table, "the same in width 128"),
    "search-10k": (search_of_ours, "p50 of exact search of 10,000 passages, default model"),
    "long-2048": (long, "one text of 2048 tokens"),
    "long-8192": (long, "one text of 8192 tokens"),
    "long-8192-memory": (long, "its peak memory beyond the loaded model, a fresh process for each sample"),
    "base-variable": (bulk, "ModernBERT-base, 8 texts of the paper's lengths"),
}
"""A workload is a function that makes its table, and a line for --list."""


SUITES = {
    "cpu": Suite(
        "encoding, MaxSim and search on two threads of a CPU, next to what people use today",
        {name: line for name, (_, line) in TABLES.items()},
        "transformers (and under torch.compile), sentence-transformers, ONNX Runtime, OpenVINO, maxsim-cpu",
        partial(on_cpu, lambda here, names: (TABLES[name][0](here, name) for name in names)),
        on="needs no GPU; about half an hour",
        weight=10,
    )
}
