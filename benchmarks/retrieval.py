"""Suite `retrieval`: stores on disk: rate and memory of indexing, latency and memory of search, cold start.

Passages have exactly 100 tokens, queries 32. In large stores a table of seeded vectors takes the encoder's place; they
are as much alike as those of the default model. Everything else is the code that everybody runs.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import clock, harness, texts
from benchmarks.cpu import THREADS
from benchmarks.encoder import peaks
from benchmarks.harness import MS, Difference, Measured, Result, Run, Sample, Suite, Table, Workers
from benchmarks.rows import ROOT, Row
from benchmarks.worker import Build, Job, Peer, Setup, State, Variant, memory
from modernbert import ColBERT, EncoderConfig, Packed
from modernbert.heads.dense import Dense
from modernbert.retrieval import Store, index

TOKENS, QUERIES, TOP = 100, 100, 10
WIDTH = 48
"""Of synthetic vectors; the default model's have 64."""

LIMIT_MB = 4096
"""What indexing a million passages may take."""

EXACT, PREFILTER, RECALL = "exact", "pre-filter", "recall@10 of exact search"

BARS = {
    ("search-10k", EXACT, "p50"): ("<=", 90.0),
    ("search-10k", PREFILTER, "p50"): ("<=", 30.0),
    ("search-10k", PREFILTER, RECALL): (">=", 0.99),
    ("search-scale", "index", "peak memory"): ("<=", float(LIMIT_MB)),
    ("cold-start", "modernbert --help", "time"): ("<=", 0.5),
}
"""What figures of a full run must reach, set beforehand: by workload, implementation and figure, in the row's unit."""


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


def model(width: int | None) -> ColBERT:
    """The default model, or a synthetic one of this width."""
    if width is None:
        return texts.default()
    head = Dense(width, width)
    nn.init.eye_(head.linear.weight)
    encoder: Any = TableEncoder(texts.default().encoder.config.vocab_size, width)
    return ColBERT(encoder, texts.default().tokenizer, [head], texts.default().config).eval()


# Builders. The folder of a setup has `N/corpus.jsonl`, and `N/store` or `N/synthetic` once they are made.


def corpus(setup: Setup, passages: int) -> Path:
    path = Path(setup.folder) / f"{passages}" / "corpus.jsonl"
    if not path.exists():
        texts.write_corpus(path, passages, TOKENS)
    return path


def store_of(setup: Setup, passages: int, width: int | None) -> Path:
    """A store with a pre-filter, made once; what an interrupted run has left goes on."""
    folder = corpus(setup, passages).with_name("synthetic" if width else "store")
    if not (marker := folder.with_name(f"{folder.name}.done")).exists():
        index([folder.with_name("corpus.jsonl")], folder, model(width), prefilter=True, progress=False)
        marker.touch()
    return folder


def searching(setup: Setup, *, passages: int, width: int | None, prefilter: bool) -> Build:
    """One query of 32 tokens after another. The answer is the best scores of two queries."""

    def variants(job: Job) -> Iterator[Variant]:
        asked = texts.queries(QUERIES, 32)
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
            with Store(store_of(setup, passages, width), model(width)) as store:
                asked, best = (
                    model(width).encode_queries(texts.queries(QUERIES, 32)[:2], progress=False),
                    [torch.empty(0)] * 2,
                )
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
        file, colbert = corpus(setup, len(job.lengths)), model(width)
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
            texts_ = contents(0 if len(job.lengths) > 100_000 else None)
            encode = partial(colbert.encode_documents, texts_, progress=False)
            yield Variant("texts in memory to vectors in memory", encode, encoded)
        else:
            yield Variant("JSON lines to a store on disk", build, stored)

    return variants


# Tables.


def table(workload: str, what: str, passages: int, peers: Mapping[str, Peer], reference: Peer, **more: Any) -> Table:
    known = {"model": "stores", "dtype": "float32", "model_pass": False, "rounds": 5} | more
    return Table(workload, what, job=Job((TOKENS,) * passages, (0,)), peers=peers, reference=reference, **known)


def described(passages: int, width: int | None) -> str:
    return f"{passages:,} passages, {f'synthetic vectors of width {width}' if width else 'default model'}"


def search_table(workload: str, passages: int, width: int | None) -> Table:
    known = {"passages": passages, "width": width}
    peers = {
        EXACT: Peer(searching, known | {"prefilter": False}),
        PREFILTER: Peer(searching, known | {"prefilter": True}, exact=False),
    }
    what = f"Search of {described(passages, width)}: the best {TOP}, a query of 32 tokens at a time"
    measured = partial(search, passages=passages, width=width)
    return table(workload, what, passages, peers, Peer(brute_force, known), **MS | {"measure": measured})


def search(workers: Workers, made: Table, *, passages: int, width: int | None) -> Result:
    """p50 and p99; anonymous memory of each process; the recall of the pre-filter against exact search."""
    count = 30 if workers.here.quick else QUERIES
    result = harness.latency(workers, made, count=count, figures=("p50", "p99"))
    extra: dict[str, dict[str, float]] = {RECALL: {}, "anonymous memory": {}}
    for name in workers.peers:
        if workers.worker(name).is_alive:
            extra["anonymous memory"][name] = memory("RssAnon", workers.worker(name).process.pid) / 1e6
    if not width and PREFILTER in workers.peers:
        extra[RECALL][PREFILTER] = workers.worker(PREFILTER).ask(recall, timeout=900, passages=passages, width=width)
    for figure, values in extra.items():
        done = [Measured(name, "", Difference(0.0, None), costs=[value]) for name, value in values.items()]
        unit = "" if figure == RECALL else "MB"
        result.rows.extend(workers.result(replace(made, figure=figure, unit=unit, value=float), done, {}).rows)
    corpus = {"corpus": described(passages, width), "kind": "synthetic vectors" if width else "measured"}
    return Result(result.workload, [one | corpus for one in result.rows], result.refused)


def recall(state: State, passages: int, width: int | None) -> float:
    """The mean share of what exact search finds for a query that the pre-filter finds."""
    with Store(store_of(state.setup, passages, width), model(width)) as store:
        asked, shares = texts.queries(QUERIES, 32), []
        for wanted, got in zip(
            store.search(asked, top_k=TOP), store.search(asked, top_k=TOP, prefilter=True), strict=True
        ):
            keys = {hit.passage_id for hit in wanted}
            shares.append(len(keys & {hit.passage_id for hit in got}) / len(keys))
    return sum(shares) / len(shares)


def index_table(workload: str, passages: int, width: int | None = None, **more: Any) -> Table:
    known, bare = {"width": width}, {"bare": True}
    peers = {"index": Peer(indexing, known), "bare encoder": Peer(indexing, known | bare)}
    what = f"Indexing {described(passages, width)}, {TOKENS} tokens each, into a new store"
    value = partial(rate, passages)
    usual = {"figure": "rate", "unit": "passages/s", "value": value, "rounds": 3}
    return table(workload, what, passages, peers, Peer(indexing, known | bare), **usual | more)


def rate(passages: int, seconds: float) -> float:
    return passages / seconds


def memory_table(workload: str, passages: int, width: int | None = None, **options: Any) -> Table:
    """Peak memory of one `index`."""
    known = {"figure": "peak memory", "unit": "MB", "value": lambda nbytes: nbytes / 1e6, "measure": peaks}
    peers = {"index": Peer(indexing, {"width": width} | options)}
    return replace(index_table(workload, passages, width), peers=peers, x=("passages", passages), **known)


def tables(here: Run, names: Sequence[str]) -> Iterator[Table]:
    sizes, million = ((200, 500), 5_000) if here.quick else ((10_000, 100_000), 1_000_000)
    for name in names:
        if name == "index-5000":
            yield index_table(name, 200 if here.quick else 5_000)
        elif name == "search-10k":
            yield from (search_table(name, sizes[0], width) for width in (WIDTH, None))
        elif name == "index-memory":  # the larger corpus may not take more
            yield from (memory_table(name, passages) for passages in sizes)
        elif name == "search-scale":  # the million is written under RLIMIT_DATA, and takes 12 GB of disk
            yield from (search_table(name, passages, None) for passages in sizes)
            yield memory_table(name, million, WIDTH, limit=True)
            yield search_table(name, million, WIDTH)


# The command line.


def cold_start(here: Run, folder: Path) -> Result:
    """In fresh processes, in turns with one that only imports torch."""
    ours = "from modernbert.cli import main; main()"
    starts = {  # name: arguments of python, and what has to be printed
        "import torch": (["-c", "import torch"], ""),
        "modernbert search": (["-c", ours, "search", "how does hail form?", "--index", str(folder)], "corpus.jsonl"),
        "modernbert --help": (["-c", ours, "--help"], "search"),
    }

    def start(name: str) -> None:
        arguments, printed = starts[name]
        known = {
            "capture_output": True,
            "text": True,
            "env": os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/kernels"},
        }
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, **known)
        if printed not in done.stdout:
            raise clock.Refused(f"does not print {printed!r}: {done.stdout[:200]!r}")

    asks = {name: partial(sample_of, partial(start, name)) for name in starts}
    taken, refused = harness.in_turns(asks, 3 if here.quick else 9)
    done = [
        Measured(
            name, "a process from start to end", Difference(0.0, None), costs=[one.seconds for one in samples]
        ).quiet(samples)
        for name, samples in taken.items()
    ]
    known: Row = {"suite": here.suite, "workload": "cold-start", "what": "Cold start of the command line"}
    known |= {"corpus": "", "figure": "time", "unit": "s"}
    return Result("cold-start", [one.row(done, float, **known) for one in done], refused)


def sample_of(work: Callable[[], Any]) -> Sample:
    """The processes that `work` starts and waits for count as its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    reading = clock.read_clocks(work)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Sample(reading.seconds, max(0.0, reading.foreign - 100 * own / reading.seconds))


def measure(here: Run, names: Sequence[str], *, work: Path | None = None) -> Iterator[Result]:
    """`work` keeps corpora and stores for another run; None: nothing is kept."""
    torch.set_num_threads(THREADS)
    here = replace(here, device="cpu", scratch=(work or here.scratch).resolve())
    (here.scratch / "stores").mkdir(parents=True, exist_ok=True)
    for result in harness.measure(here, tables(here, names)):
        yield result._replace(rows=[with_bar(one, here) for one in result.rows])
    if "cold-start" in names and here.left() > 0:
        result = cold_start(here, store_of(here.setup("stores", "float32"), 200, None))
        yield result._replace(rows=[with_bar(one, here) for one in result.rows])


def with_bar(one: Row, here: Run) -> Row:
    sign, bound = BARS.get((one["workload"], one["implementation"], one["figure"]), ("", 0.0))
    one = {"corpus": one["what"], "bar": None, "met": None} | one
    if not sign or here.quick:
        return one
    met = one["median"] <= bound if sign == "<=" else one["median"] >= bound
    return one | {"bar": f"{sign} {bound:g}", "met": met}


SUITES = {
    "retrieval": Suite(
        "stores on disk: rate and memory of indexing, latency and memory of search, cold start",
        {
            "index-5000": "rate of `index` from a file of 5,000 passages to a new store, over the bare encoder's",
            "search-10k": "p50, p99 and memory of search of 10,000 passages, exact and pre-filtered, and the recall",
            "index-memory": "peak memory of indexing 10,000 and 100,000 passages: the larger corpus may not take more",
            "search-scale": "the same searches of 10,000, 100,000 and a million passages, the million written in 4 GB",
            "cold-start": "`modernbert search` and `--help` as fresh processes, next to one that imports torch",
        },
        "the bare encoder, exact search",
        measure,
        minutes="about an hour, and 14 GB of disk",
    )
}
