"""Suite `accuracy`: how far everything is from float64 in each dtype, and what a search notices of it; int8 as well."""

from __future__ import annotations

import copy
import gzip
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import harness, peers, texts, worker
from benchmarks.clock import identity
from benchmarks.harness import (
    BETTER,
    LOADING,
    RELATIVE,
    Difference,
    Failed,
    Measured,
    Result,
    Run,
    Suite,
    Table,
    Workers,
    rms,
)
from benchmarks.peers import ONNX_RUNTIME, OPENVINO, OURS, REFERENCE, those
from benchmarks.rows import Row, row
from benchmarks.worker import Build, Job, Setup
from modernbert import ColBERT, EncoderConfig, Packed, maxsim
from modernbert.retrieval import evaluate

DTYPES = ("bfloat16", "float32", "float16")
SETS = {512: "fixed 512", 8192: "fixed 8192"}
TOP = "top-10"
LEAST = 1e-12
"""Errors below it say nothing beyond those of float64."""


def measure(here: Run, names: Sequence[str]) -> Iterator[Result]:
    if here.tries:  # one length: the other takes the same path
        names = [name for name in names if not name.endswith("-8192")]
    yield from harness.measure(here, (one for name in names if name != TOP for one in tables(here, name)))
    if TOP in names and not here.late():
        yield top_of_dtypes(here)


def tables(here: Run, workload: str) -> Iterator[Table]:
    dtype, _, length = workload.rpartition("-")
    names = (peers.OURS, peers.SESSION, peers.SDPA, peers.FLASH)
    if not here.quick:
        names += (peers.EAGER, peers.SENTENCE_TRANSFORMERS, peers.PACKED_ENCODERS)
    for model in ("modernbert-base", "ettin-17m")[: 1 if here.quick else 2] if here.is_gpu else ("ettin-17m",):
        cut = int(length) // (16 if here.tries else 1)
        count = 8 if here.is_gpu and length == "512" else 2 if length == "512" else 1
        what = f"{model}, {dtype}, {count} texts of {cut} tokens, compared with transformers in float64"
        job = Job((cut,) * count, tuple(range(count)))
        yield Table(
            workload,
            what,
            model,
            dtype,
            job,
            those(*names),
            REFERENCE,
            SETS[int(length)],
            "rms error",
            "",
            lambda cost: cost,
            model_pass=False,
            measure=drift,
        )


def drift(workers: Workers, table: Table) -> Result:
    """Two rows for everything that runs at all: no implementation is refused for an error, which is the figure."""
    refused, dtype = workers.start(), workers.setup.dtype
    try:
        exact, plain = (
            workers.judge(one).ask(worker.answer, timeout=LOADING, job=table.job) for one in ("float64", dtype)
        )
    except Failed as reason:
        return Result(table.workload, [], {"every implementation": f"has no reference: {reason}"})
    done, far = [], []
    for name in workers.peers:
        try:
            told = workers.worker(name).ask(worker.prepare, timeout=LOADING, job=table.job, window=0.0, seconds=0.0)
        except Failed as reason:
            refused[name] = str(reason)
            continue
        got = told["answer"]
        if got.shape != exact.shape or not bool(got.isfinite().all()):
            refused[name] = f"returns {tuple(got.shape)}, or numbers that are not finite"
            continue
        allowed = RELATIVE if dtype == "float32" else 2 * rms(plain, exact) + torch.finfo(torch.bfloat16).eps
        error = max(LEAST, rms(got, exact))
        cosine = F.cosine_similarity(got.double(), exact.double(), dim=-1).min().item()
        done.append(Measured(name, told["settings"], Difference(error, allowed), costs=[error]))
        far.append(replace(done[-1], costs=[max(LEAST, 1 - cosine)]))
    worst = replace(table, figure="cosine", value=lambda cost: 1 - cost)
    rows = workers.rows(table, done) + workers.rows(worst, far)
    return Result(table.workload, rows, workers.reasons(table, refused))


# What a search notices.


class Collection(NamedTuple):
    """Documents and queries by id, and judgements where there are any."""

    name: str
    documents: dict[str, str]
    queries: dict[str, str]
    qrels: evaluate.Qrels | None


def demo(*, passages: int) -> Collection:
    """Paragraphs of the demo corpus, and the beginnings of those that are kept out, without judgements."""
    records = texts.records()
    kept = [record for at, record in enumerate(records) if at % texts.HELD_OUT][:passages]
    documents = {str(at): f"{record['title']} {record['text']}" for at, record in enumerate(kept)}
    return Collection("demo corpus", documents, {str(at): text for at, text in enumerate(texts.queries(100, 32))}, None)


def collections(data: Path) -> list[Collection]:
    """The sets in BEIR's layout in a folder, which may be one; the first 500 judged queries of each."""
    folders = [data] if (data / "qrels").is_dir() else sorted(one.parent for one in data.glob("*/qrels"))
    if not folders:
        raise FileNotFoundError(f"{data} has no set in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/test.tsv")
    return [read_collection(folder) for folder in folders]


def read_collection(folder: Path) -> Collection:
    files = evaluate.find_dataset(folder)
    with gzip.open(files.corpus, "rt") if files.corpus.suffix == ".gz" else files.corpus.open() as lines:
        records = [json.loads(line) for line in lines]
    documents = {str(one["_id"]): f"{one.get('title') or ''} {one['text']}".strip() for one in records}
    qrels = evaluate.read_qrels(files.qrels)
    judged = [(query, text) for query, text in evaluate.read_queries(files.queries).items() if query in qrels]
    return Collection(folder.name, documents, dict(judged[:500]), qrels)


def top_ten(model: ColBERT, one: Collection) -> list[dict[str, float]]:
    """For every query the ids and scores of the best ten of all documents, exactly."""
    queries = model.encode_queries([*one.queries.values()], progress=False)
    documents = model.encode_documents([*one.documents.values()], progress=False)
    ids, tops = [*one.documents], []
    for start in range(0, len(queries), 32):  # so that the scores of all tokens fit
        scores, indices = maxsim(queries[start : start + 32], documents, top_k=min(10, len(ids)))
        pairs = zip(scores.tolist(), indices.tolist(), strict=True)
        tops += [{ids[at]: score for score, at in zip(*pair, strict=True)} for pair in pairs]
    return tops


def agreement(tops: Sequence[dict[str, float]], of: Sequence[dict[str, float]]) -> float:
    """The mean share of `of` that is found."""
    shares = [len(found.keys() & wanted.keys()) / len(wanted) for found, wanted in zip(tops, of, strict=True)]
    return sum(shares) / len(shares)


def ndcg(tops: Sequence[dict[str, float]], one: Collection) -> float:
    run = dict(zip(one.queries, tops, strict=True))
    qrels = {query: grades for query, grades in (one.qrels or {}).items() if query in run}
    metrics = evaluate.evaluate(run, qrels, on_note=lambda text: None)
    return next(metric.mean for metric in metrics if metric.name == "nDCG@10")


def top_of_dtypes(here: Run) -> Result:
    """How much of what the default model's float32 finds first is found by the same model in another dtype."""
    one = demo(passages=100 if here.quick else 2_000)
    exact = ColBERT.default().to(here.device)
    models: dict[str, ColBERT] = {"float32": exact}
    models |= {dtype: copy.deepcopy(exact).to(getattr(torch, dtype)) for dtype in ("bfloat16", "float16")}
    if not here.is_gpu:
        models["int8"] = with_encoder(exact, peers.with_int8(copy.deepcopy(exact.encoder)))
    wanted = top_ten(exact, one)
    vectors = exact.encode_documents([*one.documents.values()], progress=False).values
    what = f"the default model, {len(one.documents):,} passages and {len(one.queries)} queries of the demo corpus"
    rows = []
    for dtype, model in models.items():
        got = model.encode_documents([*one.documents.values()], progress=False).values
        rows.append(
            row(
                suite=here.suite,
                workload=TOP,
                what=f"{what}, {dtype}: the part of float32's top 10 that is found",
                implementation=OURS,
                settings=f"{dtype}, exact search",
                unit="",
                values=[agreement(top_ten(model, one), wanted)],
                dtype=dtype,
                max_error=rms(got, vectors),
            )
            | {"figure": "recall@10", "model": "default", "pass": "forward", "x": None}
            | {name: identity(torch.device(here.device))[name] for name in ("gpu", "driver", "capability")}
        )
    return Result(TOP, rows, {})


def with_encoder(model: ColBERT, encoder: Any) -> ColBERT:
    return ColBERT(encoder, model.tokenizer, [*model.dense], model.config).eval()  # pyright: ignore[reportArgumentType]


class Exported(nn.Module):
    """An exported model in place of an `Encoder`: packed tokens to `[T, D]` or these rows, each text alone."""

    def __init__(self, build: Build, config: EncoderConfig) -> None:
        super().__init__()
        self.build, self.config = build, config

    def forward(self, batch: Packed, rows: Tensor | None = None) -> Tensor:
        texts = batch.input_ids.split(batch.lengths)
        job = Job(tuple(batch.lengths), tuple(range(len(texts))), options={"ids": texts})
        x_TD = next(iter(self.build(job))).answer()
        return x_TD if rows is None else x_TD[rows]


def int8_retrieval(here: Run, data: Path | None) -> Result:
    """What int8 products cost the default model: nDCG@10 on the sets of `data`, and recall of float32's top 10."""
    folder, model = here.scratch / "default", ColBERT.default()
    if not folder.exists():
        shutil.copytree(texts.ASSETS / "default", folder)  # exported models are written to it
    setup = Setup(str(folder), "float32", "cpu", torch.get_num_threads(), True)
    makes: dict[str, Callable[[], Any]] = {
        f"{OURS}, int8": lambda: peers.with_int8(copy.deepcopy(model.encoder)),
        f"{ONNX_RUNTIME}, int8": lambda: Exported(peers.onnx_runtime(setup, int8=True), model.encoder.config),
        f"{OPENVINO}, int8": lambda: Exported(peers.openvino(setup, int8=True), model.encoder.config),
    }
    rows: list[Row] = []
    for one in collections(data) if data else [demo(passages=200 if here.quick else 2_000)]:
        wanted = top_ten(model, one)
        tops = {OURS: wanted} | {
            name: top_ten(with_encoder(model, make()), one)
            for name, make in makes.items()
            if (package := peers.PEERS[name].package) is None or harness.find_spec(package)
        }
        made = partial(
            row,
            suite=here.suite,
            workload="int8-retrieval",
            what="What int8 products cost the default model: nDCG@10, and how much of float32's top 10 is found",
            settings=f"{one.name}: {len(one.documents):,} documents, {len(one.queries):,} queries",
        )
        for name, top in tops.items():
            dtype = "int8" if name.endswith("int8") else "float32"
            if one.qrels is not None:
                rows.append(made(implementation=name, unit="nDCG@10", values=[ndcg(top, one)], dtype=dtype))
            recall = [agreement(top, wanted)]
            rows.append(made(implementation=name, unit="recall@10 of float32's", values=recall, dtype=dtype))
    return Result("int8-retrieval", rows, {})


SUITES = {
    "accuracy": Suite(
        "how far everything is from float64 in float32, bfloat16 and float16, and what a search notices of it",
        {
            **{
                f"{dtype}-{length}": f"hidden states of texts of {length} tokens in {dtype}: relative error, worst cosine"
                for length in SETS
                for dtype in DTYPES
            },
            TOP: "the default model on the demo corpus: how much of float32's top 10 each dtype finds",
        },
        "transformers (eager, sdpa, FlashAttention), sentence-transformers, packed-encoders",
        measure,
        BETTER,
        weight=6,
    )
}
