"""What int8 products cost a search: nDCG@10 of the default model, and how much of float32's top 10 it finds."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from benchmarks.cpu import exported, int8
from benchmarks.cpu.contenders import OURS
from benchmarks.cpu.workloads import FLOAT32, THREADS
from benchmarks.harness import Contender, Result
from benchmarks.inputs import ASSETS, Batch, batched
from benchmarks.retrieval import synthetic
from benchmarks.rows import Row, row
from modernbert import ColBERT, EncoderConfig, maxsim
from modernbert.packing import Packed
from modernbert.retrieval import evaluate

WORKLOAD = "int8-retrieval"
QUERIES = 500
"""Of a set, the first ones; nearly every set has fewer."""


class Set(NamedTuple):
    """Documents and queries by id, and judgements where somebody made them."""

    name: str
    documents: dict[str, str]
    queries: dict[str, str]
    qrels: evaluate.Qrels | None


class Exported(nn.Module):
    """An exported model in the place of an `Encoder`: packed tokens to `[T, D]` or these rows, each text by itself."""

    def __init__(self, contender: Callable[[list[Batch]], Contender], config: EncoderConfig) -> None:
        super().__init__()
        self.contender, self.config = contender, config

    def forward(self, batch: Packed, rows: Tensor | None = None) -> Tensor:
        sequences = [ids.tolist() for ids in batch.input_ids.split(batch.lengths)]
        one = self.contender(batched(sequences, 1))
        x_TD = one.result(one.run())
        return x_TD if rows is None else x_TD[rows]


def run(scratch: Path, data: Path | None, *, quick: bool) -> Result:
    """All implementations on all sets in `data`, or on the demo corpus.

    Args:
        scratch: exported models are kept in it for this run.
    """
    rows, ways = [], dict(implementations(scratch / "default"))
    sets = [demo(passages=200 if quick else 2_000)] if data is None else [read(one) for one in folders(data)]
    for one in sets:
        rows += measured(one, ways)
    return Result(WORKLOAD, rows, {})


def implementations(folder: Path) -> Iterator[tuple[str, ColBERT]]:
    """The default model, and the same with int8 products in everybody's way."""
    if not folder.exists():
        shutil.copytree(ASSETS / "default", folder)  # exported models go beside it
    model = ColBERT.default()
    yield FLOAT32, model
    yield f"{OURS}, int8", with_encoder(model, int8.with_int8(model.encoder))
    for make, known in ((exported.onnx_runtime, {}), (exported.openvino, {"sources": ("torch",)})):
        contender = partial(first, partial(make, folder, threads=THREADS, settings="one by one", int8=True, **known))
        found = contender(batched([[1, 2]], 1))
        if found is not None:
            yield found.implementation, with_encoder(model, Exported(contender, model.encoder.config))


def first(make: Callable[..., Iterator[Contender]], batches: list[Batch]) -> Any:
    """The first of its contenders on these batches, None if it has none: they give the same numbers."""
    return next(make(batches=batches), None)


def with_encoder(model: ColBERT, encoder: Any) -> ColBERT:
    return ColBERT(encoder, model.tokenizer, [*model.dense], model.config).eval()  # pyright: ignore[reportArgumentType]


def measured(one: Set, ways: dict[str, ColBERT]) -> list[Row]:
    """Rows for nDCG@10, where there are judgements, and for recall@10 of float32's top 10."""
    tops = {name: top_ten(model, one) for name, model in ways.items()}
    found = []
    for name, top in tops.items():
        figures = {"recall@10 of float32's": agreement(top, tops[FLOAT32])}
        if one.qrels is not None:
            figures = {"nDCG@10": ndcg(top, one)} | figures
        for figure, values in figures.items():
            made = row(
                workload=WORKLOAD,
                what="What int8 products cost the default model: nDCG@10, and how much of float32's top 10 is found",
                implementation=name,
                settings=f"{one.name}: {len(one.documents):,} documents, {len(one.queries):,} queries",
                unit=figure,
                values=[sum(values) / len(values)],
                max_error=None,
                tolerance=None,
            )
            found.append(made | {"dtype": "float32" if name == FLOAT32 else "int8"})
    return found


def top_ten(model: ColBERT, one: Set) -> list[dict[str, float]]:
    """For every query the ids and scores of the best ten of all documents, exactly."""
    queries = model.encode_queries([*one.queries.values()], progress=False)
    documents = model.encode_documents([*one.documents.values()], progress=False)
    ids = [*one.documents]
    tops = []
    for start in range(0, len(queries), 32):  # so that the scores of all tokens fit
        scores, places = maxsim(queries[start : start + 32], documents, top_k=min(10, len(ids)))
        pairs = zip(scores.tolist(), places.tolist(), strict=True)
        tops += [{ids[at]: score for score, at in zip(*pair, strict=True)} for pair in pairs]
    return tops


def agreement(tops: Sequence[dict[str, float]], of: Sequence[dict[str, float]]) -> list[float]:
    """For every query, the share of `of` that stands in `tops`."""
    return [len(found.keys() & wanted.keys()) / len(wanted) for found, wanted in zip(tops, of, strict=True)]


def ndcg(tops: Sequence[dict[str, float]], one: Set) -> list[float]:
    run = dict(zip(one.queries, tops, strict=True))
    qrels = {query: grades for query, grades in (one.qrels or {}).items() if query in run}
    values = evaluate.measure(run, qrels, note=lambda text: None)
    return [*next(found for found in values if found.name == "nDCG@10").per_query.values()]


def folders(data: Path) -> list[Path]:
    """The sets in a folder; it may be one itself."""
    found = [data] if (data / "qrels").is_dir() else sorted(one.parent for one in data.glob("*/qrels"))
    if not found:
        raise FileNotFoundError(f"{data} holds no set in BEIR's layout: corpus.jsonl, queries.jsonl, qrels/test.tsv")
    return found


def read(folder: Path) -> Set:
    """A set in BEIR's layout, of whose judged queries the first `QUERIES` are taken."""
    files = evaluate.find_dataset(folder)
    with gzip.open(files.corpus, "rt") if files.corpus.suffix == ".gz" else files.corpus.open() as lines:
        records = [json.loads(line) for line in lines]
    documents = {str(one["_id"]): f"{one.get('title') or ''} {one['text']}".strip() for one in records}
    qrels = evaluate.read_qrels(files.qrels)
    judged = [(query, text) for query, text in evaluate.read_queries(files.queries).items() if query in qrels]
    return Set(folder.name, documents, dict(judged[:QUERIES]), qrels)


def demo(*, passages: int) -> Set:
    """Paragraphs of the demo corpus, and beginnings of those that were kept out: nobody has judged these."""
    with gzip.open(synthetic.DEMO, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    kept = [record for i, record in enumerate(records) if i % synthetic.HELD_OUT][:passages]
    documents = {str(i): f"{record['title']} {record['text']}" for i, record in enumerate(kept)}
    queries = {str(i): text for i, text in enumerate(synthetic.queries(100, 32))}
    return Set("demo corpus", documents, queries, None)
