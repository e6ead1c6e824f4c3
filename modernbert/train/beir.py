"""How well a model retrieves, measured during a run on a data set in the layout of BEIR or MTEB."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from torch import Tensor, nn

from ..late_interaction import Ragged, maxsim
from ..retrieval.dataset import find_dataset, parts, read_qrels, read_queries
from ..retrieval.documents.find import read_file
from ..retrieval.evaluate import Metric, check_measures, evaluate
from ..truncation import TruncationWarning
from .distributed import is_sharded

TOP = 100
"""Documents of a query that are ranked, as many as recall@100 looks at."""


class Retriever(Protocol):
    """What encodes queries and documents, such as a `ColBERT`."""

    def encode_queries(
        self, texts: Iterable[str], *, batch_tokens: int | None = None, progress: bool | None = None
    ) -> Ragged: ...
    def encode_documents(
        self, texts: Iterable[str], *, batch_tokens: int | None = None, progress: bool | None = None
    ) -> Ragged: ...


def beir(
    folder: str | os.PathLike[str], model: Retriever, *, split: str | None = None, batch_tokens: int | None = None
) -> Callable[[], dict[str, float]]:
    """The means of `beir_metrics`."""
    measure = beir_metrics(folder, model, split=split, batch_tokens=batch_tokens)
    return lambda: {metric.name: metric.mean for metric in measure()}


def beir_metrics(
    folder: str | os.PathLike[str], model: Retriever, *, split: str | None = None, batch_tokens: int | None = None
) -> Callable[[], list[Metric]]:
    """Measures nDCG@10, MRR@10 and recall@100 on a data set in the layout of BEIR or MTEB, which is read now.

    Scores are exact, and documents are cut at the length of the model. `modernbert evaluate` cuts them into passages
    instead. Every rank measures all of it.

    Raises:
        ValueError: when it measures a model in parts on several ranks, which cannot encode here.
        FileNotFoundError, ValueError: as `find_dataset`, `read_qrels` and `read_queries`; no query is judged.
        ModuleNotFoundError: ir-measures is not installed (extra `retrieval`).
    """
    check_measures()
    corpus, queries, qrels = find_dataset(folder, split)
    judged = read_qrels(qrels)
    asked = {name: text for name, text in read_queries(queries).items() if name in judged}
    documents = [document for file in parts(corpus) for document in read_file(file, on_note=_quiet)]
    if not asked or not documents:
        raise ValueError(f"{folder} has {len(documents):,} documents and {len(asked):,} queries with judgements")
    ids = [document.id for document in documents]
    texts = [document.content for document in documents]

    def measure() -> list[Metric]:
        if isinstance(model, nn.Module) and any(map(is_sharded, model.parameters())):
            # Encoding runs in inference mode, and on a CPU in threads: neither fits the messages of `fully_shard`.
            raise ValueError(
                "a model in parts on several ranks cannot be measured on a BEIR folder: use parallel='ddp'"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)
            found = model.encode_documents(texts, batch_tokens=batch_tokens, progress=False)
            wanted = model.encode_queries(list(asked.values()), batch_tokens=batch_tokens, progress=False)
        # One more than are ranked, because one may be the query.
        scores, index = maxsim(wanted, found, top_k=TOP + 1)
        run = {name: _named(*row, ids) for name, row in zip(asked, zip(scores, index, strict=True), strict=True)}
        return evaluate(run, judged, on_note=_quiet)

    return measure


def _named(scores: Tensor, index: Tensor, ids: Sequence[str]) -> dict[str, float]:
    places: list[int] = index.tolist()
    return {ids[place]: score for place, score in zip(places, scores.tolist(), strict=True)}


def _quiet(message: str) -> None:
    """Notes about the data set were of use once, to the one that made it."""
