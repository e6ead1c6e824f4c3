"""Requests to tokens: what is wrong with a text is an error that names it. Runs in a thread, off the event loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ..heads.colbert import ColBERT
from ..heads.embedder import Embedder
from ..heads.reranker import Reranker
from ..packing import Texts, Tokenized, Tokens, pack
from ..texts import check_unicode
from ..tokenizer import Tokenizer
from .joined import join
from .refused import Refused
from .schemas import EmbeddingsRequest, MultiVectorRequest, RerankRequest

T = TypeVar("T")

TEXTS = 2048
"""Texts of one request at most, as OpenAI has it."""


def embedding_tokens(model: Embedder, request: EmbeddingsRequest) -> Texts:
    """The texts behind the prompt of their `input_type`, or ids as they are, with their special tokens."""
    _check_dimensions(request.dimensions, model.dim)
    found = request.input
    if isinstance(found, list) and found and (_is_id(found[0]) or isinstance(found[0], list)):
        return _id_tokens(model, [found] if _is_id(found[0]) else found)
    texts = _texts(found, "input")
    tokens = _checked("input", model.tokenize, texts, prompt_name=request.input_type)
    _check_lengths(tokens, "input", truncate=request.truncate)
    return tokens


def vector_tokens(model: ColBERT, request: MultiVectorRequest) -> Tokens:
    """The texts as queries or documents of late interaction."""
    _check_dimensions(request.dimensions, model.dim)
    texts = _texts(request.input, "input")
    tokenize = model.tokenize_queries if request.input_type == "query" else model.tokenize_documents
    tokens = _checked("input", tokenize, texts, spans=False)
    _check_lengths(tokens, "input", truncate=request.truncate)
    return tokens


def rerank_tokens(model: Reranker | ColBERT, request: RerankRequest, documents: Sequence[str]) -> Tokenized:
    """Pairs for a Reranker; the query and then the documents for a ColBERT. What is too long is cut, as by Cohere."""
    if request.max_tokens_per_doc is not None:
        documents = _cut(model.tokenizer, documents, request.max_tokens_per_doc)
    if isinstance(model, ColBERT):
        query = _checked("query", model.tokenize_queries, [request.query], spans=False)
        return join([query, _checked("documents", model.tokenize_documents, documents, spans=False)])
    _checked("query", check_unicode, 0, request.query)
    return _checked("documents", model.tokenize, documents, query=request.query)


def rerank_documents(request: RerankRequest) -> list[str]:
    """The documents, which may be objects with a text."""
    if not request.query.strip():
        raise Refused(400, "query is empty: ask for something", "query")
    found = request.documents
    if isinstance(found, list):
        found = [item["text"] if isinstance(item, dict) and item.keys() == {"text"} else item for item in found]
    return _texts(found, "documents")


def _texts(found: object, name: str) -> list[str]:
    """One text or a list of texts, as a list. Raises Refused with the index of what is not a text, or empty."""
    texts = [found] if isinstance(found, str) else found
    if not isinstance(texts, list):
        raise Refused(400, f"{name} must be a list of texts, got {_kind(found)}", name)
    _check_count(texts, name)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise Refused(400, f"{name}[{index}] must be a text, got {_kind(text)}", name)
        if not text.strip():
            raise Refused(400, f"{name}[{index}] is empty: leave it out", name)
    return texts


def _id_tokens(model: Embedder, rows: list[object]) -> Texts:
    _check_count(rows, "input")
    most, size = model.max_length, model.base_model.config.vocab_size
    ids: list[list[int]] = []
    for index, row in enumerate(rows):
        if not isinstance(row, list) or not row or not all(map(_is_id, row)):
            got = "an empty list" if row == [] else _kind(row)
            raise Refused(400, f"input[{index}] must be a list of token ids as input[0] is, got {got}", "input")
        if len(row) > most:
            raise Refused(400, f"input[{index}] has {len(row):,} tokens, but the model reads {most:,}: cut it", "input")
        if wrong := next((token for token in row if not 0 <= token < size), None):
            what = f"input[{index}] has the token id {wrong}, but the model's are 0 to {size - 1}"
            raise Refused(400, f"{what}: send texts, or ids of its own tokenizer", "input")
        ids.append(row)
    return Texts(pack(ids))


def _check_count(items: Sequence[object], name: str) -> None:
    if not items:
        raise Refused(400, f"{name} is empty: send at least one text", name)
    if len(items) > TEXTS:
        raise Refused(413, f"{name} has {len(items):,} texts, but a request has at most {TEXTS:,}: send several", name)


def _check_dimensions(dimensions: int | None, width: int) -> None:
    if dimensions is not None and dimensions > width:
        raise Refused(400, f"dimensions is {dimensions}, but the vectors of the model have {width}", "dimensions")


def _check_lengths(tokens: Tokenized, name: str, *, truncate: bool) -> None:
    cut = next((index for index, count in enumerate(tokens.truncated) if count), None)
    if cut is None or truncate:
        return
    read = tokens.batch.lengths[cut]
    what = f"{name}[{cut}] has at least {read + tokens.truncated[cut]:,} tokens, but the model reads {read:,}"
    raise Refused(400, f'{what}: split it, or send "truncate": true', name, "context_length_exceeded")


def _cut(tokenizer: Tokenizer, texts: Sequence[str], most: int) -> list[str]:
    """The first `most` tokens of each text, as text."""
    specials = len(tokenizer.encode_batch([""], offsets=False)[0].ids)
    found = _checked("documents", tokenizer.encode_beginnings, texts, max_length=most + specials)
    ends = [max(stop for _, stop in encoding.offsets) for encoding in found]
    return [text[:end] if encoding.truncated else text for text, encoding, end in zip(texts, found, ends, strict=True)]


def _checked(name: str, tokenize: Callable[..., T], *arguments: object, **options: object) -> T:
    """What `tokenize` gives. What it refuses is the fault of the request, in the field `name`."""
    try:
        return tokenize(*arguments, **options)
    except (TypeError, ValueError) as error:
        raise Refused(400, f"{name}: {error}", name) from error


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_KINDS: dict[type, str] = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}


def _kind(value: object) -> str:
    return _KINDS[type(value)]
