"""Our retrievers as models of mteb (extra `mteb`): `mteb.evaluate(MtebColBERT(colbert), tasks)`.

Retrieval tasks are searched as by `modernbert evaluate`, exactly and with long documents to their end, so that their
numbers are the same. mteb keeps results by the name and the revision of a model. The revision is a hash of the weights
here, so that a model that was trained on is evaluated again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from ..heads.colbert import ColBERT
from ..heads.embedder import Embedder
from ..inference.session import Session
from ..retrieval.build import index
from ..retrieval.dense import dense_run, similarity_of
from ..retrieval.evaluate import Run, untied
from ..retrieval.passages import Document
from ..retrieval.store.identity import load_model
from ..retrieval.store.search import Store

if TYPE_CHECKING:
    from mteb.models import ModelMeta  # pyright: ignore[reportMissingImports]


Rows = Iterable[dict[str, str]]
"""A `datasets.Dataset` of texts."""


class PromptType(Protocol):
    """mteb's enumeration of "query" and "document"."""

    value: str


class MtebColBERT:
    """A `ColBERT` that `mteb.evaluate` takes, for retrieval and reranking (mteb's `SearchProtocol`).

    Args:
        colbert: its weights must not change afterwards.
        name: under which mteb keeps the results, as "organisation/model".

    Raises ModuleNotFoundError if mteb is not installed.
    """

    def __init__(self, colbert: ColBERT, *, name: str = "local/colbert") -> None:
        self._model = load_model(colbert)
        self.mteb_model_meta = _meta(colbert, name, self._model.identity.fingerprint, colbert.config.document_length)

    def index(self, corpus: Rows, **_: object) -> None:
        """Take the documents that the next `search` is among."""
        self._corpus = corpus

    def search(
        self, queries: Rows, *, top_k: int, top_ranked: Mapping[str, Sequence[str]] | None = None, **_: object
    ) -> Run:
        """Query id to document id to score, of the `top_k` documents, or of those in `top_ranked`."""
        with TemporaryDirectory() as folder:
            corpus, store = Path(folder, "corpus.jsonl"), Path(folder, "store")
            with corpus.open("w", encoding="utf-8") as file:
                for row in self._corpus:
                    record = {"_id": row["id"], "title": row.get("title"), "text": row["text"]}
                    print(json.dumps(record), file=file)
            index([corpus], store, self._model)
            with Store(store, self._model) as opened:
                texts = _query_texts(queries)
                if top_ranked is None:
                    run = opened.run(texts, top_k=top_k)
                else:
                    run = {name: _among(opened, name, text, top_ranked.get(name, ())) for name, text in texts.items()}
        return {name: untied(scores) for name, scores in run.items()}


class MtebEmbedder:
    """An `Embedder` that `mteb.evaluate` takes, for all tasks on texts (mteb's `EncoderProtocol` and `SearchProtocol`).

    Texts get the prompt "query" or "document" where a task has both, and else the default prompt of the model.

    Args:
        embedder, name: as in `MtebColBERT`.

    Raises ModuleNotFoundError if mteb is not installed.
    """

    def __init__(self, embedder: Embedder, *, name: str = "local/embedder") -> None:
        self._session = Session(embedder)
        self._similarity = similarity_of(embedder)
        self.mteb_model_meta = _meta(embedder, name, _fingerprint(embedder), embedder.max_length)

    def encode(
        self, inputs: Iterable[Mapping[str, list[str]]], *, prompt_type: PromptType | None = None, **_: object
    ) -> np.ndarray:
        """`[N, E]` float32: the vectors of the texts in all batches."""
        texts = [text for batch in inputs for text in batch["text"]]
        prompt_name = None if prompt_type is None else prompt_type.value
        return self._session.model.encode(texts, prompt_name=prompt_name).numpy()

    def similarity(self, embeddings1: np.ndarray | Tensor, embeddings2: np.ndarray | Tensor) -> Tensor:
        """`[B, N]`: each vector of the first with each of the second."""
        return self._similarity(*map(torch.atleast_2d, map(_tensor, (embeddings1, embeddings2))))

    def similarity_pairwise(self, embeddings1: np.ndarray | Tensor, embeddings2: np.ndarray | Tensor) -> Tensor:
        """`[N]`: each vector of the first with the one of the second that has its place."""
        pairs = zip(_tensor(embeddings1), _tensor(embeddings2), strict=True)
        return torch.cat([self._similarity(x_E[None], y_E[None])[0] for x_E, y_E in pairs])

    def index(self, corpus: Rows, **options: object) -> None:
        """Take the documents that the next `search` is among."""
        self._corpus, self._options = corpus, options

    def search(
        self, queries: Rows, *, top_k: int, top_ranked: Mapping[str, Sequence[str]] | None = None, **options: object
    ) -> Run:
        """Query id to document id to score, of the `top_k` documents.

        With `top_ranked`, of those in it: by mteb's own search, which leaves out what is beyond the model's length.
        """
        if top_ranked is not None:
            from mteb.models import SearchEncoderWrapper  # pyright: ignore[reportMissingImports]

            wrapper = SearchEncoderWrapper(self)
            wrapper.index(self._corpus, **self._options)
            return wrapper.search(queries, top_k=top_k, top_ranked=top_ranked, **options)
        documents = (
            Document("corpus", row["id"], row.get("title") or "", row["text"], line)
            for line, row in enumerate(self._corpus, start=1)
        )
        run = dense_run(self._session, _query_texts(queries), documents, top_k=top_k)
        return {name: untied(scores) for name, scores in run.items()}


def _query_texts(queries: Rows) -> dict[str, str]:
    """Texts by id, with their instructions where mteb's own models put them."""
    return {row["id"]: " ".join(filter(None, (row["text"], row.get("instruction")))) for row in queries}


def _among(store: Store, name: str, text: str, documents: Sequence[str]) -> dict[str, float]:
    """The scores of some documents for a query."""
    wanted, found = set(documents), store.run({name: text}, top_k=store.documents)[name]
    return {document: score for document, score in found.items() if document in wanted}


def _meta(model: ColBERT | Embedder, name: str, revision: str, max_tokens: int) -> ModelMeta:
    try:
        from mteb.models import ModelMeta  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("to run tasks of mteb: pip install 'modernbert[mteb]'") from error
    known = {
        "name": name,
        "revision": revision,
        "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "max_tokens": max_tokens,
        "embed_dim": model.dim,
        "framework": ["PyTorch"],
    }
    return ModelMeta.create_empty(known)


def _tensor(vectors: np.ndarray | Tensor) -> Tensor:
    return torch.as_tensor(vectors, device="cpu")


def _fingerprint(model: Embedder) -> str:
    """A hash of the weights of an `Embedder`, and of how it makes a vector of a text."""
    digest = hashlib.sha256(repr((model.base_model.config, model.config)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
