"""Embedder: one vector for each text, as a `SentenceTransformer` of sentence-transformers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from ..encoder import Encoder
from ..packing import Packed, Texts
from ..pretrained import Pretrained
from ..tokenizer import Tokenizer
from .dense import Dense
from .embedder_files import EmbedderConfig


class Embedder(Pretrained):
    """`Embedder(encoder, tokenizer, dense=[], config=EmbedderConfig(pooling="cls", prompts={"query": "..."}))`."""

    def __init__(
        self, encoder: Encoder, tokenizer: Tokenizer, dense: Sequence[Dense] = (), config: EmbedderConfig | None = None
    ) -> None:
        raise NotImplementedError

    def forward(self, batch: Packed | Texts, *, rows: None = None) -> Tensor:
        """B packed texts to `[B, E]` vectors of `config.width` numbers, of length one if `config.normalize`."""
        raise NotImplementedError

    def encode(self, texts: Iterable[str], *, prompt: str | None = None, **options: object) -> Tensor:
        """`[N, E]` float32 on the CPU; `prompt`: a name of `config.prompts`, or a text."""
        raise NotImplementedError

    def encode_queries(self, texts: Iterable[str], **options: object) -> Tensor:
        raise NotImplementedError

    def encode_documents(self, texts: Iterable[str], **options: object) -> Tensor:
        raise NotImplementedError

    def query_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids with prompt, cut and with special tokens: `pack(ids)` is what the model takes."""
        raise NotImplementedError

    def document_ids(self, texts: Sequence[str]) -> list[list[int]]:
        raise NotImplementedError


