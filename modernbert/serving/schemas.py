"""What the routes are asked for. A field that a route does not know is refused by name, and never ignored.

Texts are checked in `asked.py`, which names the one that is wrong.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

STRICT = ConfigDict(extra="forbid", strict=True)  # "3" is not a number
Positive = Annotated[int, Field(ge=1)]
InputType = Literal["query", "document"]


class EmbeddingsRequest(BaseModel):
    """OpenAI's. `input_type` and `truncate` are Jina's and Cohere's; `user` has no effect."""

    model_config = STRICT
    input: object
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Positive | None = None
    input_type: InputType | None = None
    truncate: bool = False
    user: str | None = None


class RerankRequest(BaseModel):
    """Jina's, and Cohere's of both versions; `priority` has no effect."""

    model_config = STRICT
    query: str
    documents: object
    model: str | None = None
    top_n: Positive | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: Positive | None = None
    priority: int | None = None


class MultiVectorRequest(BaseModel):
    """Jina's, and "safetensors" for a response without text."""

    model_config = STRICT
    input: object
    model: str | None = None
    input_type: InputType = "document"
    embedding_type: Literal["float", "base64", "safetensors"] = "float"
    dimensions: Positive | None = None
    truncate: bool = False


class SearchRequest(BaseModel):
    """The arguments of `Store.search`; `reasons` as in `modernbert search --json`."""

    model_config = STRICT
    query: str
    top_k: Annotated[int, Field(ge=1, le=1000)] = 10
    by: Literal["passage", "document"] = "passage"
    path: str | None = None
    where: dict[str, Any] | None = None
    prefilter: bool = False
    reasons: bool = True
