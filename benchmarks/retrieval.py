"""Suite `retrieval`: stores on disk: rate and memory of indexing, latency and memory of search, cold start.

Passages have exactly 100 tokens, queries 32. In place of the encoder, a synthetic model has a table of seeded vectors that
are as much alike as those of the default model; tokens, windows, shards and scores come from the code that everybody runs.
Memory is anonymous memory, read from outside: the kernel may drop the pages of mapped files.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import clock, harness, rows, texts
from benchmarks.cpu import THREADS
from benchmarks.harness import FOREIGN_LIMIT, Difference, Measured, Result, Run, Sample, Suite, WrongOutput, in_turns
from benchmarks.rows import ROOT, Row
from benchmarks.worker import Peer, Setup, State, Worker, memory
from modernbert import ColBERT, EncoderConfig, Packed
from modernbert.heads.dense import Dense
from modernbert.retrieval import Store, index

TOKENS, QUERY_TOKENS, TOP = 100, 32, 10
WIDTH = 48
"""Of synthetic vectors; the default model's have 64."""

SCORES, FP16 = 1e-4, 2.0**-11
"""The tolerances of a score, and of a stored vector: half a step of float16 below 1."""

LIMIT_MB = 4096
"""What indexing and searching a million passages may take."""

WHAT = f"Search for the best {TOP} passages of {TOKENS} tokens, a query of {QUERY_TOKENS} tokens at a time"


# The synthetic model.


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
        ids_T = batch.input_ids
        sums = torch.stack([ids.sum() for ids in ids_T.split(batch.lengths)])
        text_T = sums.repeat_interleave(torch.tensor(batch.lengths))
        # All texts begin and end alike, so what is beyond their ends is always the same.
        trigram_T = (ids_T.roll(1) * 8209 + ids_T) * 8209 + ids_T.roll(-1)
        keys = (torch.zeros_like(ids_T), text_T, ids_T, text_T * 8209 + ids_T, trigram_T)
        x_TD = torch.zeros(len(ids_T), self.config.hidden_size)
        for part, (share, key_T) in enumerate(zip(self.SHARES, keys, strict=True)):
            row_T = ((key_T * len(keys) + part) * 2_654_435_761 >> 16) % self.ROWS
            x_TD += share**0.5 * self.table[row_T]
        return x_TD if rows is None else x_TD[rows]


def model(width: int | None) -> ColBERT | None:
    """The model that a store is opened with: a synthetic one of this width, or its own."""
    if width is None:
        return None
    head = Dense(width, width)
    nn.init.eye_(head.linear.weight)
    encoder: Any = TableEncoder(texts.default().encoder.config.vocab_size, width)
    return ColBERT(encoder, texts.default().tokenizer, [head], texts.default().config).eval()


# What runs in a process of its own, whose memory is read from outside.


def build(
    state: State, corpus: str, folder: str, width: int | None, *, prefilter: bool, limit_mb: int | None
) -> dict[str, Any]:
    """Index a corpus; `limit_mb` is RLIMIT_DATA, to which mapped stores count as well."""
    if limit_mb:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_mb << 20, limit_mb << 20))
    colbert, started = model(width), time.perf_counter()
    summary = index([corpus], folder, colbert, prefilter=prefilter, progress=False)
    return {"seconds": time.perf_counter() - started, "passages": summary.passages}


def search(
    state: State, folder: str, width: int | None, queries: list[str], *, prefilter: bool, rounds: int
) -> dict[str, Any]:
    """One query after another, in `rounds` passes over all of them, after one exact search that reads everything.

    Returns:
        Seconds until the first answer; for each pass the seconds of each query, and the foreign CPU; what every query
        found, as (passage, score).
    """
    found: dict[str, list[tuple[int, float]]] = {}

    def ask(query: str) -> float:
        started = time.perf_counter()
        (hits,) = store.search([query], top_k=TOP, prefilter=prefilter)
        seconds = time.perf_counter() - started
        found[query] = [(hit.passage_id, hit.score) for hit in hits]
        return seconds

    colbert, started = model(width), time.perf_counter()
    with Store(folder, colbert) as store:
        store.search(queries[:1], top_k=TOP)
        load_seconds = time.perf_counter() - started
        ask(queries[0])
        passes = [quiet_pass(lambda: [ask(query) for query in queries], retries=rounds - 1) for _ in range(rounds)]
    return {"load_seconds": load_seconds, "passes": passes, "found": [found[query] for query in queries]}


def quiet_pass(
    ask_all: Callable[[], list[float]],
    *,
    retries: int,
    read: Callable[[Callable[[], Any]], clock.Reading] = clock.read_clocks,
) -> tuple[list[float], float]:
    """The seconds of each query in the quietest of some passes, and its foreign CPU; one quiet pass is enough."""
    attempts: list[tuple[list[float], float]] = []
    for _ in range(1 + retries):
        seconds: list[float] = []
        foreign = read(lambda seconds=seconds: seconds.extend(ask_all())).foreign
        attempts.append((seconds, foreign))
        if foreign <= FOREIGN_LIMIT:
            break
    return min(attempts, key=lambda attempt: attempt[1])


def watched(request: Callable[..., Any], **arguments: Any) -> tuple[Any, float]:
    """What a request gives in a fresh process, and the peak of its anonymous memory in MB."""
    with tempfile.TemporaryDirectory() as scratch:
        one, peak = Worker(Setup("", "float32", "cpu", THREADS, False), Peer(harness.nothing), Path(scratch)), 0.0
        try:
            one.send(request, **arguments)
            while not one.connection.poll(0.01):
                peak = max(peak, memory("RssAnon", one.process.pid) / 2**20)
            return one.receive(10), peak
        finally:
            one.close()


# The stores of a run, and how a figure of them becomes a row.


@dataclass(frozen=True)
class Sizes:
    """Passages of the stores: `scale` and `memory` really encoded, `synthetic` not; queries, and passes over them."""

    index: int = 5_000
    search: int = 10_000
    scale: tuple[int, ...] = (10_000, 100_000)
    synthetic: int = 1_000_000
    memory: tuple[int, int] = (10_000, 100_000)
    start: int = 200
    queries: int = 100
    rounds: int = 5


FULL = Sizes()
QUICK = Sizes(index=200, search=500, scale=(200, 500), synthetic=5_000, memory=(200, 500), queries=30, rounds=2)


class Figure(NamedTuple):
    """A figure with the bar that it must reach in the full sizes."""

    name: str
    unit: str
    values: Sequence[float]
    at_most: float | None = None
    at_least: float | None = None


@dataclass(frozen=True)
class Stores:
    """Made once and kept in `work`: what is there is used, what is unfinished goes on."""

    work: Path
    sizes: Sizes = FULL
    searched: dict[tuple[int, int | None, bool], tuple[Any, float]] = field(default_factory=dict)

    def corpus(self, passages: int) -> Path:
        path = self.work / f"{passages}" / "corpus.jsonl"
        if not path.exists():
            texts.write_corpus(path, passages, TOKENS)
        return path

    def folder(self, passages: int, width: int | None) -> Path:
        return self.work / f"{passages}" / (f"synthetic-{width}" if width else "store")

    def build(
        self, passages: int, width: int | None, folder: Path, *, prefilter: bool, limit_mb: int | None = None
    ) -> tuple[Any, float]:
        """Index into `folder`, or give the store that is there a pre-filter."""
        known = {"corpus": str(self.corpus(passages)), "folder": str(folder), "width": width}
        return watched(build, **known, prefilter=prefilter, limit_mb=limit_mb)

    def store(self, passages: int, width: int | None) -> Path:
        """A store with a pre-filter."""
        folder = self.folder(passages, width)
        marker = folder.with_name(f"{folder.name}.done")
        if not marker.exists():
            self.build(passages, width, folder, prefilter=True)
            marker.touch()
        return folder

    def search(self, passages: int, width: int | None, *, prefilter: bool) -> tuple[Any, float]:
        """A search is done once in a run."""
        key = (passages, width, prefilter)
        if key not in self.searched:
            known = {"folder": str(self.store(passages, width)), "width": width, "prefilter": prefilter}
            rounds = max(1, min(self.sizes.rounds, 300_000 // passages))
            asked = texts.queries(self.sizes.queries, QUERY_TOKENS)
            self.searched[key] = watched(search, **known, queries=asked, rounds=rounds)
        return self.searched[key]

    def row(self, figure: Figure, *, corpus: str, synthetic: bool = False, **measured: Any) -> Row:
        """A row of this suite; `measured` as of `rows.row`."""
        known = {"suite": "retrieval", "unit": figure.unit, "values": figure.values, "dtype": "fp16 vectors"}
        one = rows.row(**known | measured)
        bar, met = None, None
        if self.sizes == FULL and figure.at_most is not None:
            bar, met = f"<= {figure.at_most:g}", one["median"] <= figure.at_most
        if self.sizes == FULL and figure.at_least is not None:
            bar, met = f">= {figure.at_least:g}", one["median"] >= figure.at_least
        kind = "synthetic vectors" if synthetic else "measured"
        return one | {"kind": kind, "corpus": corpus, "figure": figure.name, "bar": bar, "met": met}


def described(passages: int, width: int | None) -> str:
    return f"{passages:,} passages, {f'synthetic vectors of width {width}' if width else 'default model'}"


# Searching.


class Case(NamedTuple):
    """A search of a store: how large, of which width if it is synthetic, in which way, and how fast it has to be."""

    passages: int
    width: int | None
    prefilter: bool
    at_most: float | None = None

    @property
    def way(self) -> str:
        return "pre-filter" if self.prefilter else "exact"


def searches(stores: Stores, workload: str, cases: Sequence[Case]) -> Result:
    found, refused = [], {}
    for case in cases:
        try:
            found += search_rows(stores, workload, case)
        except WrongOutput as reason:
            refused[f"{described(case.passages, case.width)}, {case.way}"] = str(reason)
    return Result(workload, found, refused)


def search_rows(stores: Stores, workload: str, case: Case) -> list[Row]:
    """p50, p99 and peak memory; of a pre-filter on real vectors the recall too. Raises WrongOutput."""
    passages, width, prefilter, at_most = case
    exact, _ = stores.search(passages, width, prefilter=False)
    done, peak = stores.search(passages, width, prefilter=prefilter)
    if prefilter:
        error = score_difference(exact["found"], done["found"])
    else:
        asked = texts.queries(2, QUERY_TOKENS)
        error = float64_difference(stores.store(passages, width), width, asked, done["found"][: len(asked)])
    if not error <= SCORES:
        raise WrongOutput(f"differs from the reference by {error:.2g}, allowed are {SCORES:g}")
    foreign, count = max(foreign for _, foreign in done["passes"]), stores.sizes.queries
    row = partial(stores.row, workload=workload, what=WHAT, corpus=described(passages, width), implementation=case.way)
    row = partial(row, synthetic=bool(width))
    known: dict[str, Any] = {"foreign_percent": foreign, "clean": foreign <= FOREIGN_LIMIT, "calls": count}
    known |= {"max_error": error, "tolerance": SCORES, "settings": f"Store.search, {count} queries, after load"}
    p50, p99 = ([1e3 * float(np.percentile(each, at)) for each, _ in done["passes"]] for at in (50, 99))
    made = [row(Figure("p50", "ms", p50, at_most), **known), row(Figure("p99", "ms", p99), **known)]
    if prefilter and not width:
        share = Figure(f"recall@{TOP} of exact search", "", [recall(exact["found"], done["found"])], None, 0.99)
        share = share if at_most else share._replace(at_least=None)
        made.append(row(share, settings=f"{count} beginnings of paragraphs that are in no passage"))
    settings = f"of the process, mapped files not counted; first answer after {done['load_seconds']:.1f} s"
    bound = LIMIT_MB if passages == FULL.synthetic else None
    return [*made, row(Figure("peak memory", "MB", [peak], bound), settings=settings)]


Found = Sequence[Sequence[tuple[int, float]]]
"""What each query found, best first: a passage and its score."""


def recall(exact: Found, found: Found) -> float:
    """The mean share of what exact search finds for a query that was found."""
    pairs = [({key for key, _ in wanted}, {key for key, _ in got}) for wanted, got in zip(exact, found, strict=True)]
    return sum(len(wanted & got) / len(wanted) for wanted, got in pairs) / len(pairs)


def score_difference(exact: Found, found: Found) -> float:
    """The largest difference between the scores of passages that both have found."""
    largest = 0.0
    for wanted, got in zip(exact, found, strict=True):
        scores = dict(wanted)
        largest = max([largest, *(abs(scores[key] - score) for key, score in got if key in scores)])
    return largest


def float64_difference(folder: Path, width: int | None, queries: Sequence[str], found: Found) -> float:
    """The largest difference between the scores found and the best of the whole store, computed in float64."""
    with Store(folder, model(width)) as store:
        asked = [query_QE.double() for query_QE in store.colbert.encode_queries(queries)]
        best = [torch.empty(0, dtype=torch.float64)] * len(asked)
        for _, _, vectors in store.batches():
            values_NE, lengths = vectors.values.double(), vectors.offsets.diff()
            for at, query_QE in enumerate(asked):
                most = torch.segment_reduce(values_NE @ query_QE.T, "max", lengths=lengths)
                scores = torch.cat([best[at], most.sum(1)])
                best[at] = scores.topk(min(len(found[at]), len(scores))).values
    scores = torch.tensor([[score for _, score in hits] for hits in found], dtype=torch.float64)
    return (scores - torch.stack(best)).abs().max().item()


def search_exact(stores: Stores, workload: str) -> Result:
    return searches(stores, workload, [Case(stores.sizes.search, width, False, 90) for width in (WIDTH, None)])


def search_prefilter(stores: Stores, workload: str) -> Result:
    return searches(stores, workload, [Case(stores.sizes.search, width, True, 30) for width in (WIDTH, None)])


def search_scale(stores: Stores, workload: str) -> Result:
    """The largest store is written, searched and deleted: it takes 12 GB."""
    found = searches(stores, workload, [Case(n, None, way) for n in stores.sizes.scale for way in (False, True)])
    count = stores.sizes.synthetic
    needed, free = 14_000 * count, shutil.disk_usage(stores.work).free
    if free < needed:
        found.refused[described(count, WIDTH)] = f"needs {needed / 1e9:.0f} GB of disk, and {free / 1e9:.0f} are free"
        return found
    folder = stores.folder(count, WIDTH)
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run has left would make it look faster
    row = partial(stores.row, workload=workload, what=WHAT, corpus=described(count, WIDTH), synthetic=True)
    written = []
    for prefilter, limit in ((False, LIMIT_MB), (True, None)):
        told, peak = stores.build(count, WIDTH, folder, prefilter=prefilter, limit_mb=limit)
        how = {"implementation": "index --prefilter" if prefilter else "index"}
        how["settings"] = "of a store that has none yet" if prefilter else f"under RLIMIT_DATA of {LIMIT_MB} MB"
        written.append(row(Figure("peak memory", "MB", [peak], LIMIT_MB), **how))
        written.append(row(Figure("rate", "passages/s", [told["passages"] / told["seconds"]]), **how))
    folder.with_name(f"{folder.name}.done").touch()
    largest = searches(stores, workload, [Case(count, WIDTH, way) for way in (False, True)])
    shutil.rmtree(folder.parent)
    return Result(workload, [*found.rows, *written, *largest.rows], {**found.refused, **largest.refused})


# Indexing, and the command line.


def index_rate(stores: Stores, workload: str) -> Result:
    """`index` of a BEIR file, reading and writing included, in turns with `encode_documents` of the same texts."""
    from modernbert.retrieval.documents.find import read_file

    count, colbert = stores.sizes.index, texts.default()
    corpus = stores.corpus(count)
    contents = [document.content for document in read_file(corpus)]
    with tempfile.TemporaryDirectory(dir=stores.work) as scratch:
        folder = Path(scratch) / "store"

        def build_anew() -> None:
            shutil.rmtree(folder, ignore_errors=True)
            index([corpus], folder, colbert, progress=False)

        def encode() -> Tensor:
            return colbert.encode_documents(contents, progress=False).values

        build_anew()
        with Store(folder, colbert) as store:
            stored = torch.cat([vectors.values for _, _, vectors in store.batches()])
        error = (stored - encode()).abs().max().item()
        if not error <= FP16:
            return Result(workload, [], {"index": f"differs from the encoder by {error:.2g}, allowed are {FP16:.2g}"})
        asks = {"index": build_anew, "bare encoder": encode}
        rounds = min(3, stores.sizes.rounds)
        samples, _ = in_turns({name: sampled(run) for name, run in asks.items()}, rounds, retries=rounds)
    row = partial(
        stores.row,
        workload=workload,
        what=f"Indexing {count:,} passages of {TOKENS} tokens into a new store",
        corpus=described(count, None),
        max_error=error,
        tolerance=FP16,
    )
    made = {
        name: Measured(name, "", Difference(error, FP16), costs=[one.seconds for one in samples[name]]) for name in asks
    }
    how = {"index": "a file of JSON lines to a store on disk", "bare encoder": "texts in memory to vectors in memory"}
    ratios = [theirs / mine for mine, theirs in zip(made["index"].costs, made["bare encoder"].costs, strict=True)]
    figures = [("index", Figure("rate over the bare encoder's", "x", ratios, None, 0.9))]
    figures += [
        (name, Figure("rate", "passages/s", [count / cost for cost in one.costs])) for name, one in made.items()
    ]
    for name, one in made.items():
        one.keep(samples[name])
    found = [
        row(figure, implementation=name, settings=how[name], foreign_percent=made[name].foreign, clean=made[name].clean)
        for name, figure in figures
    ]
    return Result(workload, found, {})


def sampled(run: Callable[[], Any], read: Callable[..., clock.Reading] = clock.read_clocks) -> Callable[[], Sample]:
    """A sample of one call, after no other."""
    return lambda: Sample(*read(run))


def index_memory(stores: Stores, workload: str) -> Result:
    """The stores that are made here are kept for other workloads."""
    ways = {"index": False, "index --prefilter": True}
    peaks: dict[tuple[str, int], float] = {}
    for count in stores.sizes.memory:
        anew, kept = stores.work / f"{count}" / "anew", stores.folder(count, None)
        shutil.rmtree(anew, ignore_errors=True)
        for way, prefilter in ways.items():
            _, peaks[way, count] = stores.build(count, None, anew, prefilter=prefilter)
        shutil.rmtree(kept, ignore_errors=True)
        anew.rename(kept)
        kept.with_name(f"{kept.name}.done").touch()
    row = partial(stores.row, workload=workload, what="Indexing, peak memory, mapped files not counted")
    few, many = stores.sizes.memory
    found = []
    for way, prefilter in ways.items():
        how = "of a store that has none yet" if prefilter else "from JSON lines to a new store"
        this = partial(row, implementation=way, settings=how)
        for count in (few, many):
            found.append(this(Figure("peak memory", "MB", [peaks[way, count]]), corpus=described(count, None)))
        # It may not grow; a tenth is left for noise. The centroids of the pre-filter grow with the root.
        growth = Figure("peak memory over peak memory", "x", [peaks[way, many] / peaks[way, few]])
        growth = growth if prefilter else growth._replace(at_most=1.1)
        found.append(this(growth, corpus=f"{many:,} passages against {few:,}"))
    return Result(workload, found, {})


def cold_start(stores: Stores, workload: str) -> Result:
    """The command line in fresh processes, in turns with one that only imports torch."""
    folder, ours = stores.store(stores.sizes.start, None), "from modernbert.cli import main; main()"
    starts = {  # name: arguments of python, and what has to be printed
        "import torch": (["-c", "import torch"], ""),
        "modernbert search": (["-c", ours, "search", "how does hail form?", "--index", str(folder)], "corpus.jsonl"),
        "modernbert --help": (["-c", ours, "--help"], "search"),
    }
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])

    def start(name: str) -> None:
        arguments, printed = starts[name]
        known = {"capture_output": True, "text": True, "env": os.environ | {"PYTHONPATH": path}}
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, **known)
        if printed not in done.stdout:
            raise WrongOutput(f"does not print {printed!r}: {done.stdout[:200]!r}")

    rounds = 3 if stores.sizes != FULL else 9
    taken, _ = in_turns({name: sampled(partial(start, name), read_children) for name in starts}, rounds)
    seconds = {name: [sample.seconds for sample in samples] for name, samples in taken.items()}
    search, alone, usage = "modernbert search", "import torch", "modernbert --help"
    above = [mine - theirs for mine, theirs in zip(seconds[search], seconds[alone], strict=True)]
    figures = [
        (search, Figure("above import torch", "s", above, 2.0)),
        (usage, Figure("time", "s", seconds[usage], 0.5)),
    ]
    figures += [(name, Figure("time", "s", seconds[name])) for name in (search, alone)]
    found = [
        stores.row(
            figure,
            workload=workload,
            what="Cold start of the command line",
            corpus=described(stores.sizes.start, None) if name == search else "",
            implementation=name,
            settings="a process from start to end, its files in the page cache",
            foreign_percent=max(sample.foreign for sample in taken[name]),
            clean=all(sample.clean for sample in taken[name]),
        )
        for name, figure in figures
    ]
    return Result(workload, found, {})


def read_children(work: Callable[[], Any]) -> clock.Reading:
    """`read_clocks`, to which the processes that `work` starts and waits for are its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    reading = clock.read_clocks(work)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return clock.Reading(reading.seconds, max(0.0, reading.foreign - 100 * own / reading.seconds))


MAKE: dict[str, Callable[[Stores, str], Result]] = {
    "index-5000": index_rate,
    "search-10k": search_exact,
    "search-10k-prefilter": search_prefilter,
    "index-memory": index_memory,
    "search-scale": search_scale,
    "cold-start": cold_start,
}


def measure(here: Run, names: Sequence[str], *, work: Path | None = None) -> Iterator[Result]:
    """`work` keeps corpora and stores for another run; None: nothing is kept."""
    torch.set_num_threads(THREADS)
    os.environ["RAYON_NUM_THREADS"] = str(THREADS)  # the tokenizers have threads of their own
    stores = Stores((work or here.scratch).resolve(), QUICK if here.quick else FULL)
    stores.work.mkdir(parents=True, exist_ok=True)
    for name in names:
        if here.late():
            yield here.rest(name)
            return
        yield MAKE[name](stores, name)


SUITES = {
    "retrieval": Suite(
        "stores on disk: rate and memory of indexing, latency and memory of search, cold start",
        {
            "index-5000": "rate of `index` from a file of 5,000 passages to a new store, over the bare encoder's",
            "search-10k": "p50, p99 and memory of exact search of 10,000 passages, synthetic and of the default model",
            "search-10k-prefilter": "the same with the pre-filter, and its recall@10 of exact search",
            "index-memory": "peak memory of indexing 10,000 and 100,000 passages: the larger corpus may not take more",
            "search-scale": "both searches of 10,000, 100,000 and a million passages, the million written in 4 GB",
            "cold-start": "`modernbert search` and `modernbert --help` as fresh processes, over one that imports torch",
        },
        "the bare encoder, exact search, bars that were set beforehand",
        measure,
        minutes="about an hour, and 14 GB of disk",
    )
}
