"""Dense retrieval: exact search with an `Embedder`, for its evaluation. Vectors are scored and not kept."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..heads.embedder import Embedder
from ..inference.session import Session
from ..packing import Span, Texts, Tokens, pack
from ..truncation import warn_if_cut
from .documents.text import OnNote
from .evaluate import Run
from .passages import Document
from .queries import EXCERPT, check_top_k
from .store.ranking import TopK
from .windows import Window, cut_documents

TOKENS = 1 << 18
"""Tokens of windows that are encoded and scored together."""

Similarity = Callable[[Tensor, Tensor], Tensor]
"""Vectors `[B, E]` and `[N, E]` to scores `[B, N]`, larger if more alike."""

SIMILARITIES: dict[str, Similarity] = {
    "cosine": lambda x_BE, x_NE: F.normalize(x_BE, dim=-1) @ F.normalize(x_NE, dim=-1).T,
    "dot": lambda x_BE, x_NE: x_BE @ x_NE.T,
    "euclidean": lambda x_BE, x_NE: -torch.cdist(x_BE, x_NE),
    "manhattan": lambda x_BE, x_NE: -torch.cdist(x_BE, x_NE, p=1),
}
"""What `EmbedderConfig.similarity` can name."""


def dense_run(
    session: Session[Embedder],
    queries: Mapping[str, str],
    documents: Iterable[Document],
    *,
    top_k: int = 100,
    on_note: OnNote = warnings.warn,
) -> Run:
    """For each query id its `top_k` documents, best first, as document id to score: a run for `evaluate`.

    A document is read as by `Embedder.encode_documents`, but a longer one than the model reads is cut into windows, at
    paragraphs and sentences, and scores as its best window. Each window has the prompt and the title of the document.
    `on_note` is called with the number of such documents. An empty document is not found. Memory grows with the number
    of documents by their ids alone.

    Raises:
        ValueError: two documents have the same id, the prompt fills all that the model reads, or no function compares
            the vectors of the model.
    """
    check_top_k(top_k)
    model, names, texts = session.model, list(queries), list(queries.values())
    similarity = similarity_of(model)
    asked = model.tokenize(texts, prompt_name="query")
    warn_if_cut(asked, lambda index: f"query {names[index]!r} ({texts[index][:EXCERPT]!r} ...)")
    x_BE = session.encode_tokens(asked).values
    best = [TopK(top_k) for _ in names]
    numbers: dict[str, int] = {}
    long: set[int] = set()
    last = -1
    for group in _groups(_windows(model, _distinct(documents))):
        owners = [numbers.setdefault(window.passage.id, len(numbers)) for window in group]
        long.update(owner for owner, before in zip(owners, [last, *owners], strict=False) if owner == before)
        last = owners[-1]
        ids_N3 = np.zeros((len(group), 3), dtype=np.int64)
        ids_N3[:, 0] = owners
        x_NE = session.encode_tokens(Texts(pack([window.ids.tolist() for window in group]))).values
        for found, scores_N in zip(best, similarity(x_BE, x_NE).numpy(), strict=True):
            found.add(scores_N, ids_N3)
    if long:
        on_note(
            f"documents longer than the {model.max_length:,} tokens that the model reads, each scored by its best "
            f"window: {len(long):,}"
        )
    ids = list(numbers)
    return {
        name: {ids[row]: score for row, score in zip(found.ids_N3[:, 0].tolist(), found.scores_N.tolist(), strict=True)}
        for name, found in zip(names, best, strict=True)
    }


def similarity_of(model: Embedder) -> Similarity:
    """What compares the vectors of a model. Raises ValueError if it names nothing that is known here."""
    name = model.config.similarity
    if name not in SIMILARITIES:
        raise ValueError(f"the similarity of the model is {name!r}: set {', '.join(SIMILARITIES)}")
    return SIMILARITIES[name]


def _distinct(documents: Iterable[Document]) -> Iterator[Document]:
    seen: set[str] = set()
    for document in documents:
        if document.id in seen:
            raise ValueError(f"several documents have the id {document.id!r}: a run could not tell them apart")
        seen.add(document.id)
        yield document


def _windows(model: Embedder, documents: Iterable[Document]) -> Iterator[Window]:
    around = model.tokenize([""], prompt_name="document").batch.num_tokens
    if around >= model.max_length:
        raise ValueError(f"the prompt for documents fills the {model.max_length:,} tokens that the model reads")
    return cut_documents(documents, partial(_tokenize, model), model.max_length)


def _tokenize(model: Embedder, texts: Sequence[str]) -> Tokens:
    """All of each text, with its spans, as `Embedder.encode_documents` would read it."""
    prompt = model.config.prompts["document"]
    prompted = [prompt + text.rstrip() for text in texts]
    found = model.tokenizer.encode_beginnings(prompted, max_length=sys.maxsize)
    batch = pack([encoding.ids for encoding in found], vocab_size=model.base_model.config.vocab_size)
    spans = [[_behind(len(prompt), *span) for span in encoding.offsets] for encoding in found]
    return Tokens(batch, torch.ones_like(batch.input_ids, dtype=torch.bool), spans)


def _behind(prompt: int, start: int, stop: int) -> Span:
    """The characters of the text, given those of the prompt and the text."""
    return (max(0, start - prompt), stop - prompt) if stop > max(start, prompt) else None


def _groups(windows: Iterable[Window]) -> Iterator[list[Window]]:
    group: list[Window] = []
    size = 0
    for window in windows:
        group.append(window)
        size += len(window.ids)
        if size >= TOKENS:
            yield group
            group, size = [], 0
    if group:
        yield group
