"""Suite `retrieval`: stores on disk: rate and memory of indexing, latency and memory of search.

Passages have 100 tokens in the mean, queries 30. In large stores a table of seeded vectors takes the encoder's place;
they are as much alike as those of the default model. Everything else is the code that everybody runs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import resource
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modernbert
from benchmarks import harness, inputs, worker
from benchmarks.harness import MS, PEAK, Difference, Measured, Result, Run, Suite, Table, Workers
from benchmarks.worker import OURS, Build, Job, Peer, Setup, State, Variant
from modernbert import ColBERT, EncoderConfig, Packed
from modernbert.retrieval import Store, index

THREADS = 2
TOKENS, QUERIES, TOP = 100, 100, 10
WIDTH = 48
"""Of synthetic vectors; the default model's have 64."""

LIMIT_MB = 4096
"""What indexing a million passages may take."""

EXACT, PREFILTER, RECALL = "exact", "pre-filter", "recall@10 of exact search"


class TableEncoder(nn.Module):
    """In place of an `Encoder`: `[T]` tokens to `[T, width]` sums of seeded unit vectors.

    What two tokens have in common decides which vectors they share, and `SHARES` how much these weigh, so that cosines
    have the means of the default model's. The same passage gets the same vectors in every batch.
    """

    # Of the squared length. Mean cosines of the default model in 60 passages: 0.15 of two tokens in two passages, 0.21
    # of two in one, 0.28 of the same in two, 0.54 of the same in one.
    SHARES = (0.15, 0.06, 0.13, 0.20, 0.46)
    ROWS = 1 << 16

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.config = EncoderConfig(
            vocab_size=vocab_size, hidden_size=width, num_hidden_layers=1, num_attention_heads=1
        )
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("table", F.normalize(torch.randn(self.ROWS, width, generator=generator), dim=-1))
        self.register_buffer("shares", torch.tensor(self.SHARES))  # so that the fingerprint of a store has them
        self.table: Tensor

    def forward(self, batch: Packed, *, rows: Tensor | None = None) -> Tensor:
        ids_T, lengths = batch.input_ids, torch.tensor(batch.lengths)
        text_T = torch.stack([ids.sum() for ids in ids_T.split(batch.lengths)]).repeat_interleave(lengths)
        # All texts begin and end alike, so what is beyond their ends is always the same.
        trigram_T = (ids_T.roll(1) * 8209 + ids_T) * 8209 + ids_T.roll(-1)
        keys = (torch.zeros_like(ids_T), text_T, ids_T, text_T * 8209 + ids_T, trigram_T)
        x_TD = torch.zeros(len(ids_T), self.config.hidden_size)
        for part, (share, key_T) in enumerate(zip(self.SHARES, keys, strict=True)):
            x_TD += share**0.5 * self.table[((key_T * len(keys) + part) * 2_654_435_761 >> 16) % self.ROWS]
        return x_TD if rows is None else x_TD[rows]


@cache
def model(width: int | None) -> ColBERT:
    """The default model, or a synthetic one of this width."""
    from modernbert.heads.dense import Dense  # not in every checkout that a worker may import

    if width is None:
        return inputs.default()
    head = Dense(width, width)
    nn.init.eye_(head.linear.weight)
    encoder: Any = TableEncoder(inputs.default().encoder.config.vocab_size, width)
    return ColBERT(encoder, inputs.default().tokenizer, [head], inputs.default().config).eval()


# Builders. The folder of a setup has `N/corpus.jsonl`, and the stores of these passages once they are made.


def corpus(folder: str, passages: int) -> Path:
    path = Path(folder) / f"{passages}" / "corpus.jsonl"
    if not path.exists():
        inputs.write_corpus(path, passages)
    return path


def store_of(setup: Setup, passages: int, width: int | None) -> Path:
    """A store with a pre-filter, made once by each checkout; what an interrupted run has left goes on."""
    checkout = hashlib.sha256(str(Path(modernbert.__file__).parents[1]).encode()).hexdigest()[:8]
    folder = corpus(setup.folder, passages).with_name(f"store-{width or 'default'}-{checkout}")
    if not (marker := folder.with_name(f"{folder.name}.done")).exists():
        index([folder.with_name("corpus.jsonl")], folder, model(width), prefilter=True, progress=False)
        marker.touch()
    return folder


def searching(setup: Setup, *, passages: int, width: int | None, prefilter: bool) -> Build:
    """One query after another. The answer is the best scores of two queries."""

    def variants(job: Job) -> Iterator[Variant]:
        asked = inputs.queries(QUERIES)
        store, following = Store(store_of(setup, passages, width), model(width)), itertools.cycle(asked)
        find = partial(store.search, top_k=TOP, prefilter=prefilter)

        def answer() -> Tensor:
            return torch.tensor([[hit.score for hit in hits] for hits in find(asked[:2])])

        yield Variant("Store.search, after load", lambda: find([next(following)]), answer)

    return variants


def brute_force(setup: Setup, *, passages: int, width: int | None) -> Build:
    """The reference: the best scores over the whole store, computed in float64."""

    def variants(job: Job) -> Iterator[Variant]:
        def answer() -> Tensor:
            asked = model(width).encode_queries(inputs.queries(QUERIES)[:2], progress=False)
            best = [torch.empty(0)] * 2
            with Store(store_of(setup, passages, width), model(width)) as store:
                for _, _, vectors in store.batches():
                    values_NE, lengths = vectors.values.double(), vectors.offsets.diff()
                    for at, query_QE in enumerate(asked):
                        most = torch.segment_reduce(values_NE @ query_QE.double().T, "max", lengths=lengths)
                        scores = torch.cat([best[at], most.sum(1)])
                        best[at] = scores.topk(min(TOP, len(scores))).values
            return torch.stack(best)

        yield Variant("brute force", answer, answer)

    return variants


def indexing(setup: Setup, *, width: int | None = None, bare: bool = False, limit: bool = False) -> Build:
    """`index` of a file of JSON lines into a new store; or the bare encoder on the same texts in memory."""
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_MB << 20, LIMIT_MB << 20))

    def variants(job: Job) -> Iterator[Variant]:
        file, colbert = corpus(setup.folder, len(job.lengths)), model(width)
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
            return colbert.encode_documents(contents(2), progress=False).values[:100].half().float()

        if bare:
            texts = contents(0 if len(job.lengths) > 100_000 else None)
            encode = partial(colbert.encode_documents, texts, progress=False)
            yield Variant("texts in memory to vectors in memory", encode, encoded)
        else:
            yield Variant("JSON lines to a store on disk", build, stored)

    return variants


# Tables.


def table(
    here: Run, workload: str, what: str, passages: int, peers: Mapping[str, Peer], reference: Peer, **more: Any
) -> Table:
    folder = here.scratch / "stores"
    folder.mkdir(parents=True, exist_ok=True)
    corpus(str(folder), passages)
    known = {"model": "stores", "dtype": "float32", "model_pass": False} | more
    return Table(workload, what, job=Job((TOKENS,) * passages, (0,)), peers=peers, reference=reference, **known)


def described(passages: int, width: int | None) -> str:
    return f"{passages:,} passages, {f'synthetic vectors of width {width}' if width else 'default model'}"


def search_table(here: Run, workload: str, passages: int, width: int | None) -> Table:
    known = {"passages": passages, "width": width}
    peers = {
        EXACT: Peer(searching, known | {"prefilter": False}),
        PREFILTER: Peer(searching, known | {"prefilter": True}, exact=False),
    }
    what = f"Search of {described(passages, width)}: the best {TOP}, a query of 30 tokens at a time"
    more = {"corpus": described(passages, width), "kind": "synthetic vectors" if width else "measured"}
    measured = partial(search, passages=passages, width=width)
    return table(
        here, workload, what, passages, peers, Peer(brute_force, known), **MS | {"measure": measured, "more": more}
    )


def search(workers: Workers, made: Table, *, passages: int, width: int | None) -> Result:
    """p50 and p99; anonymous memory of each process; the recall of the pre-filter against exact search."""
    count = 30 if workers.here.quick else QUERIES
    result = harness.speed(workers, made, count=count)
    extra: dict[str, dict[str, float]] = {RECALL: {}, "anonymous memory": {}}
    for name in workers.peers:
        if workers.worker(name).is_alive:
            extra["anonymous memory"][name] = worker.memory("RssAnon", workers.worker(name).process.pid) / 1e6
    if not width and PREFILTER in workers.peers:
        extra[RECALL][PREFILTER] = workers.worker(PREFILTER).ask(recall, timeout=900, passages=passages, width=width)
    for figure, values in extra.items():
        done = [Measured(name, "", Difference(0.0, None), costs=[value]) for name, value in values.items()]
        unit = "" if figure == RECALL else "MB"
        result.rows.extend(workers.result(replace(made, figure=figure, unit=unit, value=float), done, {}).rows)
    return result


def recall(state: State, passages: int, width: int | None) -> float:
    """The mean share of what exact search finds for a query that the pre-filter finds."""
    with Store(store_of(state.setup, passages, width), model(width)) as store:
        asked, shares = inputs.queries(QUERIES), []
        exact, quick = (store.search(asked, top_k=TOP, prefilter=prefilter) for prefilter in (False, True))
        for wanted, got in zip(exact, quick, strict=True):
            keys = {hit.passage_id for hit in wanted}
            shares.append(len(keys & {hit.passage_id for hit in got}) / len(keys))
    return sum(shares) / len(shares)


def search_of_ours(here: Run, workload: str) -> Table:
    """Exact search with the default model, for comparing checkouts: each makes its own store."""
    passages = 64 if here.quick else 10_000
    known = {"passages": passages, "width": None}
    what = f"exact search of {described(passages, None)}: p50 of {QUERIES} queries of 30 tokens"
    timed = partial(harness.speed, count=20 if here.quick else QUERIES)
    peers = {OURS: Peer(searching, known | {"prefilter": False})}
    return table(here, workload, what, passages, peers, Peer(brute_force, known), rounds=9, **MS | {"measure": timed})


def index_table(here: Run, workload: str, passages: int, width: int | None = None, **more: Any) -> Table:
    known, bare = {"width": width}, {"bare": True}
    peers = {"index": Peer(indexing, known), "bare encoder": Peer(indexing, known | bare)}
    what = f"Indexing {described(passages, width)}, {TOKENS} tokens in the mean, into a new store"
    usual: dict[str, Any] = {"figure": "rate", "unit": "passages/s", "value": lambda seconds: passages / seconds}
    return table(here, workload, what, passages, peers, Peer(indexing, known | bare), **usual | {"rounds": 3} | more)


def memory_table(here: Run, workload: str, passages: int, width: int | None = None, **options: Any) -> Table:
    """Peak memory of one `index`."""
    peers = {"index": Peer(indexing, {"width": width} | options)}
    return replace(index_table(here, workload, passages, width, **PEAK, x=("passages", passages)), peers=peers)


def tables(here: Run, names: Sequence[str]) -> Iterator[Table]:
    sizes, million = ((64, 128), 512) if here.quick else ((10_000, 100_000), 1_000_000)
    for name in names:
        if name == "index-5000":
            yield index_table(here, name, 64 if here.quick else 5_000)
        elif name == "search-10k":
            yield from (search_table(here, name, sizes[0], width) for width in (WIDTH, None))
        elif name == "index-memory":  # the larger corpus may not take more
            yield from (memory_table(here, name, passages) for passages in sizes)
        elif name == "search-scale":  # the million is written under RLIMIT_DATA, and takes 12 GB of disk
            yield from (search_table(here, name, passages, None) for passages in sizes)
            yield memory_table(here, name, million, WIDTH, limit=True)
            yield search_table(here, name, million, WIDTH)


def measure(here: Run, names: Sequence[str]) -> Iterator[Result]:
    torch.set_num_threads(THREADS)
    here = replace(here, device="cpu")
    for result in harness.measure(here, tables(here, names)):
        yield result._replace(rows=[{"corpus": one["what"], **one} for one in result.rows])


SUITES = {
    "retrieval": Suite(
        "stores on disk: rate and memory of indexing, latency and memory of search",
        {
            "index-5000": "rate of `index` from a file of 5,000 passages to a new store, over the bare encoder's",
            "search-10k": "p50, p99 and memory of search of 10,000 passages, exact and pre-filtered, and the recall",
            "index-memory": "peak memory of indexing 10,000 and 100,000 passages: the larger corpus may not take more",
            "search-scale": "the same searches of 10,000, 100,000 and a million passages, the million written in 4 GB",
        },
        "the bare encoder, exact search",
        measure,
        on="needs no GPU; about an hour, and 14 GB of disk",
    )
}
