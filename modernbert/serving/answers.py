"""Rows to responses, in the form of each API. Runs in a thread, off the event loop: much of the time is in the text."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from fastapi import Response
from pydantic_core import to_json
from safetensors.torch import save
from torch import Tensor, nn

from ..heads.colbert import ColBERT
from ..heads.embedder import Embedder
from ..heads.pairs import ranked
from ..heads.reranker import Reranker
from ..late_interaction import Ragged, maxsim
from ..packing import Tokenized
from .schemas import EmbeddingsRequest, MultiVectorRequest, RerankRequest

SAFETENSORS = "application/vnd.safetensors"


def json_response(content: object, status: int = 200) -> Response:
    return Response(to_json(content), status, media_type="application/json")


def embeddings(name: str, model: Embedder, request: EmbeddingsRequest, tokens: Tokenized, rows: Ragged) -> Response:
    """OpenAI's `CreateEmbeddingResponse`."""
    x_NE = _cut(rows.values, request.dimensions, normalize=model.config.normalize)
    vectors = map(_base64, x_NE) if request.encoding_format == "base64" else x_NE.tolist()
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
    return json_response({"object": "list", "data": data, "model": name, "usage": _usage(tokens)})


def multi_vectors(name: str, request: MultiVectorRequest, tokens: Tokenized, rows: Ragged) -> Response:
    """Jina's response, or a safetensors file with `values` and `offsets`, as of `modernbert encode`."""
    rows = Ragged(_cut(rows.values, request.dimensions, normalize=True), rows.offsets)
    known = {"model": name, "usage": _usage(tokens)}
    if request.embedding_type == "safetensors":
        tensors = {"values": rows.values.contiguous(), "offsets": rows.offsets}
        metadata = {"model": name, "usage": json.dumps(known["usage"])}
        return Response(save(tensors, metadata=metadata), media_type=SAFETENSORS)
    data = []
    for index, x_NE in enumerate(rows):
        found: dict[str, object] = {"object": "embeddings", "index": index}
        if request.embedding_type == "base64":
            found |= {"embeddings": _base64(x_NE), "shape": list(x_NE.shape)}
        else:
            found["embeddings"] = x_NE.tolist()
        data.append(found)
    return json_response({"object": "list", "data": data, **known})


def rerank(
    name: str,
    model: Reranker | ColBERT,
    request: RerankRequest,
    documents: Sequence[str],
    tokens: Tokenized,
    rows: Ragged,
    *,
    version: int,
) -> Response:
    """The response of Jina and of Cohere in one: each reads its own fields."""
    if isinstance(model, ColBERT):
        scores_N = maxsim(rows[:1], rows[1:])[0]
    else:
        scores_N = getattr(nn, model.config.activation)()(rows.values[:, 0])
    shown = request.return_documents if request.return_documents is not None else version == 1
    results = [
        {"index": index, "relevance_score": score} | ({"document": {"text": documents[index]}} if shown else {})
        for index, score in ranked(scores_N)[: request.top_n]
    ]
    usage = _usage(tokens)
    meta = {"api_version": {"version": str(version)}, "tokens": {"input_tokens": usage["total_tokens"]}}
    return json_response(
        {"id": str(uuid.uuid4()), "model": name, "object": "list", "results": results, "usage": usage, "meta": meta}
    )


def _usage(tokens: Tokenized) -> dict[str, int]:
    """Tokens that the model read, with special tokens."""
    count = tokens.batch.num_tokens
    return {"prompt_tokens": count, "total_tokens": count}


def _cut(x_NE: Tensor, dimensions: int | None, *, normalize: bool) -> Tensor:
    """The first numbers of each vector, of a model that was trained for it (Matryoshka)."""
    if dimensions is None:
        return x_NE
    return F.normalize(x_NE[:, :dimensions], dim=-1) if normalize else x_NE[:, :dimensions]


def _base64(x: Tensor) -> str:
    """Numbers in float32, little-endian, row by row."""
    return base64.b64encode(x.to(torch.float32).contiguous().numpy().astype("<f4").tobytes()).decode()
