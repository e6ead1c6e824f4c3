"""Suite `retrieval`: stores on disk: rate and memory of indexing, latency and memory of search.

Passages have 100 tokens in the mean, queries 30. The model is the default one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import modernbert
from benchmarks import harness, inputs, worker
from benchmarks.harness import MS, PEAK, Difference, Measured, Result, Run, Suite, Table, Workers
from benchmarks.worker import OURS, Build, Job, Peer, Setup, State, Variant
from modernbert.retrieval import Store, index

THREADS = 2
TOKENS, QUERIES, TOP = 100, 100, 10
EXACT, PREFILTER, RECALL = "exact", "pre-filter", "recall@10 of exact search"


def corpus(folder: str, passages: int) -> Path:
    path = Path(folder) / f"{passages}" / "corpus.jsonl"
    if not path.exists():
        inputs.write_corpus(path, passages)
    return path


def store_of(setup: Setup, passages: int) -> Path:
    """A store with a pre-filter, made once by each checkout; what an interrupted run has left goes on."""
    checkout = hashlib.sha256(str(Path(modernbert.__file__).parents[1]).encode()).hexdigest()[:8]
    folder = corpus(setup.folder, passages).with_name(f"store-{checkout}")
    if not (marker := folder.with_name(f"{folder.name}.done")).exists():
        index([folder.with_name("corpus.jsonl")], folder, inputs.default(), prefilter=True, progress=False)
        marker.touch()
    return folder


def searching(setup: Setup, *, passages: int, prefilter: bool) -> Build:
    """One query after another. The answer is the best scores of two queries."""

    def variants(job: Job) -> Iterator[Variant]:
        asked = inputs.queries(QUERIES)
        store, following = Store(store_of(setup, passages), inputs.default()), itertools.cycle(asked)
        find = partial(store.search, top_k=TOP, prefilter=prefilter)

        def answer() -> Tensor:
            return torch.tensor([[hit.score for hit in hits] for hits in find(asked[:2])])

        yield Variant("Store.search, after load", lambda: find([next(following)]), answer)

    return variants


def brute_force(setup: Setup, *, passages: int) -> Build:
    """The reference: the best scores over the whole store, computed in float64."""

    def variants(job: Job) -> Iterator[Variant]:
        def answer() -> Tensor:
            asked = inputs.default().encode_queries(inputs.queries(QUERIES)[:2], progress=False)
            best = [torch.empty(0)] * 2
            with Store(store_of(setup, passages), inputs.default()) as store:
                for _, _, vectors in store.batches():
                    values_NE, lengths = vectors.values.double(), vectors.offsets.diff()
                    for at, query_QE in enumerate(asked):
                        most = torch.segment_reduce(values_NE @ query_QE.double().T, "max", lengths=lengths)
                        scores = torch.cat([best[at], most.sum(1)])
                        best[at] = scores.topk(min(TOP, len(scores))).values
            return torch.stack(best)

        yield Variant("brute force", answer, answer)

    return variants


def indexing(setup: Setup, *, bare: bool = False) -> Build:
    """`index` of a file of JSON lines into a new store; or the bare encoder on the same texts in memory."""

    def variants(job: Job) -> Iterator[Variant]:
        file, colbert = corpus(setup.folder, len(job.lengths)), inputs.default()
        folder = file.with_name("anew")

        def contents(most: int | None = None) -> list[str]:
            with file.open(encoding="utf-8") as lines:
                return [f"{one['title']} {one['text']}" for one in map(json.loads, itertools.islice(lines, most))]

        def build() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            index([file], folder, colbert, progress=False)

        def stored() -> Tensor:
            with Store(folder, colbert) as store:
                found = next(store.batches())[2].values[:100]
            shutil.rmtree(folder)
            return found

        def encoded() -> Tensor:
            return colbert.encode_documents(contents(8), progress=False).values[:100].half().float()

        if bare:
            texts = contents()
            encode = partial(colbert.encode_documents, texts, progress=False)
            yield Variant("texts in memory to vectors in memory", encode, encoded)
        else:
            yield Variant("JSON lines to a store on disk", build, stored)

    return variants


def table(
    here: Run, workload: str, what: str, passages: int, peers: Mapping[str, Peer], reference: Peer, **more: Any
) -> Table:
    folder = here.scratch / "stores"
    folder.mkdir(parents=True, exist_ok=True)
    corpus(str(folder), passages)
    known = {"model": "stores", "dtype": "float32", "model_pass": False} | more
    return Table(workload, what, job=Job((TOKENS,) * passages, (0,)), peers=peers, reference=reference, **known)


def search_table(here: Run, workload: str, passages: int) -> Table:
    known = {"passages": passages}
    peers = {
        EXACT: Peer(searching, known | {"prefilter": False}),
        PREFILTER: Peer(searching, known | {"prefilter": True}, exact=False),
    }
    what = f"Search of {passages:,} passages: the best {TOP}, a query of 30 tokens at a time"
    measured = partial(search, passages=passages)
    return table(here, workload, what, passages, peers, Peer(brute_force, known), **MS | {"measure": measured})


def search(workers: Workers, made: Table, *, passages: int) -> Result:
    """p50 and p99; anonymous memory of each process; the recall of the pre-filter against exact search."""
    count = 5 if workers.here.quick else QUERIES
    result = harness.speed(workers, made, count=count)
    extra: dict[str, dict[str, float]] = {RECALL: {}, "anonymous memory": {}}
    for name in workers.peers:
        if workers.worker(name).is_alive:
            extra["anonymous memory"][name] = worker.memory("RssAnon", workers.worker(name).process.pid) / 1e6
    if PREFILTER in workers.peers:
        extra[RECALL][PREFILTER] = workers.worker(PREFILTER).ask(recall, timeout=900, passages=passages)
    for figure, values in extra.items():
        done = [Measured(name, "", Difference(0.0, None), costs=[value]) for name, value in values.items()]
        unit = "" if figure == RECALL else "MB"
        result.rows.extend(workers.result(replace(made, figure=figure, unit=unit, value=float), done, {}).rows)
    return result


def recall(state: State, passages: int) -> float:
    """The mean share of what exact search finds for a query that the pre-filter finds."""
    with Store(store_of(state.setup, passages), inputs.default()) as store:
        asked, shares = inputs.queries(QUERIES), []
        exact, quick = (store.search(asked, top_k=TOP, prefilter=prefilter) for prefilter in (False, True))
        for wanted, got in zip(exact, quick, strict=True):
            keys = {hit.passage_id for hit in wanted}
            shares.append(len(keys & {hit.passage_id for hit in got}) / len(keys))
    return sum(shares) / len(shares)


def search_of_ours(here: Run, workload: str) -> Table:
    """Exact search with the default model, for comparing checkouts: each makes its own store."""
    made = search_table(here, workload, 64 if here.quick else 10_000)
    timed = partial(harness.speed, count=5 if here.quick else QUERIES)
    return replace(made, peers={OURS: made.peers[EXACT]}, measure=timed, rounds=9)


def index_table(here: Run, workload: str, passages: int, **more: Any) -> Table:
    bare = Peer(indexing, {"bare": True})
    peers = {"index": Peer(indexing), "bare encoder": bare}
    what = f"Indexing {passages:,} passages, {TOKENS} tokens in the mean, into a new store"
    usual: dict[str, Any] = {"figure": "rate", "unit": "passages/s", "value": lambda seconds: passages / seconds}
    return table(here, workload, what, passages, peers, bare, **usual | {"rounds": 3} | more)


def tables(here: Run, names: Sequence[str]) -> Iterator[Table]:
    sizes = (64, 128) if here.quick else (10_000, 100_000)
    for name in names:
        if name == "index-5000":
            yield index_table(here, name, 64 if here.quick else 5_000)
        elif name == "index-memory":
            of_index = (index_table(here, name, passages, **PEAK) for passages in sizes)
            yield from (replace(one, peers={"index": Peer(indexing)}) for one in of_index)
        else:
            yield search_table(here, name, sizes[name == "search-100k"])


def on_cpu(make: Callable[[Run, Sequence[str]], Iterable[Table]], here: Run, names: Sequence[str]) -> Iterator[Result]:
    """The `measure` of a suite for a CPU, on two threads."""
    torch.set_num_threads(THREADS)
    here = replace(here, device="cpu")
    yield from harness.measure(here, make(here, names))


SUITES = {
    "retrieval": Suite(
        "stores on disk: rate and memory of indexing, latency and memory of search",
        {
            "index-5000": "rate of `index` from a file of 5,000 passages to a new store, over the bare encoder's",
            "search-10k": "p50, p99 and memory of search of 10,000 passages, exact and pre-filtered, and the recall",
            "search-100k": "the same of 100,000 passages",
            "index-memory": "peak memory of indexing 10,000 and 100,000 passages: the larger corpus may not take more",
        },
        "the bare encoder, exact search",
        partial(on_cpu, tables),
        on="needs no GPU; about half an hour",
    )
}
