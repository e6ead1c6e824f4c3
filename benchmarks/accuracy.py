"""What half precision and int8 cost a search: nDCG@10, and how much of float32's top 10 it finds."""

from __future__ import annotations

import copy
import gzip
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import harness, peers, texts
from benchmarks.harness import Result, Run
from benchmarks.peers import INT8, ONNX_RUNTIME, OPENVINO, OURS, PEERS
from benchmarks.rows import row
from benchmarks.worker import Build, Job, Setup
from modernbert import ColBERT, EncoderConfig, Packed, maxsim
from modernbert.retrieval import evaluate

WORKLOAD = "int8-retrieval"


class Collection(NamedTuple):
    """Documents and queries by id, and judgements where there are any."""

    name: str
    documents: dict[str, str]
    queries: dict[str, str]
    qrels: evaluate.Qrels | None


def demo(*, passages: int) -> Collection:
    """Paragraphs of the demo corpus, and the beginnings of those that are held out, without judgements."""
    kept = [record for index, record in enumerate(texts.records()) if index % texts.HELD_OUT][:passages]
    documents = {str(index): f"{record['title']} {record['text']}" for index, record in enumerate(kept)}
    return Collection("demo corpus", documents, dict(enumerate_text(texts.queries(100, 32))), None)


def enumerate_text(found: Sequence[str]) -> Iterator[tuple[str, str]]:
    return ((str(index), text) for index, text in enumerate(found))


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


class Exported(nn.Module):
    """An exported model in place of an `Encoder`: packed tokens to `[T, D]` or these rows, each text alone."""

    def __init__(self, build: Build, config: EncoderConfig) -> None:
        super().__init__()
        self.build, self.config = build, config

    def forward(self, batch: Packed, rows: Tensor | None = None) -> Tensor:
        job = Job(tuple(batch.lengths), tuple(range(len(batch))), options={"ids": batch.input_ids.split(batch.lengths)})
        x_TD = next(iter(self.build(job))).answer()
        return x_TD if rows is None else x_TD[rows]


def models(here: Run) -> Iterator[tuple[str, ColBERT]]:
    """The default model in every dtype, and with the int8 products of ours and of others."""
    model, folder = texts.default(), here.scratch / "default"
    yield OURS, model
    for dtype in (torch.bfloat16, torch.float16):
        yield f"{OURS}, {dtype}".replace("torch.", ""), copy.deepcopy(model).to(dtype)
    shutil.copytree(texts.ASSETS / "default", folder, dirs_exist_ok=True)  # exported models are written to it
    setup = Setup(str(folder), "float32", "cpu", torch.get_num_threads(), True)
    encoders: dict[str, Any] = {INT8: peers.with_int8(copy.deepcopy(model.encoder))}
    for name in (f"{ONNX_RUNTIME}, int8", f"{OPENVINO}, int8"):
        if harness.find_spec(PEERS[name].package or ""):
            encoders[name] = Exported(PEERS[name].builder(setup, int8=True), model.encoder.config)
    for name, encoder in encoders.items():
        dense: Any = model.dense
        yield name, ColBERT(encoder, model.tokenizer, [*dense], model.config).eval()


def retrieval(here: Run, data: Path | None) -> Result:
    """Exact search of the sets of `data`, or of the demo corpus, by all of `models`."""
    rows, known = [], dict(models(here))
    for one in collections(data) if data else [demo(passages=200 if here.quick else 2_000)]:
        tops = {name: top_ten(model, one) for name, model in known.items()}
        for name, top in tops.items():
            figures = {} if one.qrels is None else {"nDCG@10": ndcg(top, one)}
            figures["recall@10 of float32's"] = agreement(top, tops[OURS])
            said: dict[str, Any] = {"suite": here.suite, "workload": WORKLOAD, "implementation": name}
            said["what"] = (
                "What int8 products cost the default model: nDCG@10, and how much of float32's top 10 is found"
            )
            said["settings"] = f"{one.name}: {len(one.documents):,} documents, {len(one.queries):,} queries"
            said["dtype"] = "float32" if name == OURS else name.rpartition(", ")[2]
            rows += [row([value], unit=unit, **said) for unit, value in figures.items()]
    return Result(WORKLOAD, rows, {})
