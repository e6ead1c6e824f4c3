"""Session: a model made ready to answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..heads.colbert import ColBERT
from ..late_interaction import Ragged, pool_tokens
from ..packing import Packed, Tokens
from .encode import encode_texts, encode_tokens


class Session:
    def __init__(self, model: ColBERT) -> None:
        self.model = model

    def __call__(self, batch: Packed, *, rows: Tensor | None = None) -> Tensor:
        return self.model(batch, rows=rows)

    def encode_queries(
        self, texts: Sequence[str], *, batch_tokens: int | None = None, progress: bool | None = None
    ) -> Ragged:
        return encode_texts(self.model, "tokenize_queries", texts, batch_tokens, progress, None)

    def encode_documents(
        self,
        texts: Sequence[str],
        *,
        batch_tokens: int | None = None,
        progress: bool | None = None,
        pool_factor: int = 1,
    ) -> Ragged:
        ragged = encode_texts(self.model, "tokenize_documents", texts, batch_tokens, progress, None)
        return ragged if pool_factor == 1 else Ragged.from_list([pool_tokens(x, pool_factor) for x in ragged])

    def encode_tokens(
        self,
        tokens: Tokens,
        *,
        batch_tokens: int | None = None,
        advance: Callable[[int], None] = lambda texts: None,
    ) -> Ragged:
        return Ragged.from_list(encode_tokens(self.model, tokens, batch_tokens, advance))
