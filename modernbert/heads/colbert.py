"""ColBERT: one normalised vector per token of a query or a document (late interaction, arXiv 2004.12832)."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modernbert_kernels as ops

from ..checkpoint import Content
from ..config import EncoderConfig
from ..encoder import Encoder
from ..inference.devices import encode_here_or_on
from ..inference.encode import Modules, list_of_texts, stream_texts
from ..late_interaction import Ragged, check_pool_factor, pool_documents, pool_tokens
from ..packing import Packed, Span, Tokens, list_of_sequences, pack
from ..pretrained import Pretrained
from ..tokenizer import Tokenizer
from . import colbert_files, colbert_formats
from .colbert_files import ColBERTConfig
from .dense import Dense
from .folders import check_class

if TYPE_CHECKING:
    from typing_extensions import Self

ASSETS = Path(__file__).parents[1] / "assets"


class ColBERT(Pretrained):
    """An `Encoder`, its `Tokenizer`, and a head that projects and normalises every token.

    `from_pretrained` loads a folder of PyLate, of sentence-transformers' `MultiVectorEncoder` or of Stanford's ColBERT.
    Blanks, prompts and the skiplist are handled as in the library that wrote the folder (see `ColBERTConfig`), so that
    vectors equal those of that library. `save_pretrained` writes a folder that the first two read, and with a `format`
    that of the second or the third.

    Attributes:
        encoder, tokenizer, config: the parts. dense: the layers of the head. dim: width E of the vectors.
    """

    base_model_prefix = "encoder"
    formats = tuple(colbert_formats.WRITERS)

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer, dense: Sequence[Dense], config: ColBERTConfig) -> None:
        super().__init__()
        self.encoder, self.tokenizer, self.config = encoder, tokenizer, config
        self.dense = nn.ModuleList(dense)
        self.dim = dense[-1].linear.out_features
        self.skip_ids = torch.tensor(sorted(_skip_ids(tokenizer, config)), dtype=torch.int64, device="cpu")
        for prefix in (config.query_prefix, config.document_prefix):
            if prefix and tokenizer.token_to_id(prefix) is None:
                raise ValueError(f"the prefix {prefix!r} is not a token of the tokenizer: add it, or set it to ''")
        if config.do_query_expansion and tokenizer.mask_token_id is None:
            raise ValueError("do_query_expansion needs a [MASK] token, and the tokenizer has none")
        for name in ("query_length", "document_length"):
            prefix, length = getattr(config, name.replace("length", "prefix")), getattr(config, name)
            if length < (needed := bool(prefix) + sum(map(len, self._template))):
                raise ValueError(f"{name}: a length of {length} has no room for the {needed} tokens around a text")

    @classmethod
    def from_encoder(
        cls, encoder: Encoder, tokenizer: Tokenizer, *, dim: int = 128, config: ColBERTConfig | None = None
    ) -> ColBERT:
        """A new, untrained head on an encoder: prefix tokens added, embeddings grown, one projection to `dim`.

        The encoder is taken over and changed in place, and the head gets its mode; the tokenizer is copied.
        """
        config = config or ColBERTConfig()
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_tokens([prefix for prefix in (config.query_prefix, config.document_prefix) if prefix])
        if tokenizer.vocab_size > encoder.config.vocab_size:
            encoder.resize_token_embeddings(tokenizer.vocab_size)
        with torch.device("cpu"):  # whatever the default device: the same numbers on each
            head = Dense(encoder.config.hidden_size, dim)
        nn.init.trunc_normal_(head.linear.weight, std=encoder.config.hidden_size**-0.5)
        weight = encoder.embeddings.tok_embeddings.weight
        colbert = cls(encoder, tokenizer, [head.to(weight.device, weight.dtype)], config)
        colbert.training = encoder.training
        colbert.dense.train(encoder.training)
        return colbert

    @classmethod
    def _read(cls, folder: Path, config: EncoderConfig, *, device: torch.device, dtype: torch.dtype) -> Self:
        check_class(folder, "ColBERT")  # a dense model has a Dense too
        # Stanford's head is in the file of the encoder.
        encoder = Encoder._read(folder, config, device=device, dtype=dtype, elsewhere=("linear.",))
        tokenizer = Tokenizer.from_pretrained(folder)
        head, dense = colbert_files.read(folder, config, tokenizer, device=device, dtype=dtype)
        return cls(encoder, tokenizer, dense, head)

    @classmethod
    def default(cls) -> ColBERT:
        """The small English model that ships with the package; see its model card in `modernbert/assets/default`."""
        return cls.from_pretrained(ASSETS / "default")

    def _content_in(self, format: str, state: Mapping[str, Tensor] | None) -> Content:
        write = colbert_formats.WRITERS[format]
        return write(self.base_model.config, self.encoder, self.tokenizer, [*self.dense], self.config, state)

    @overload
    def forward(self, batch: Tokens) -> Ragged: ...
    @overload
    def forward(self, batch: Packed, *, rows: Tensor | None = None) -> Tensor: ...

    def forward(self, batch: Packed | Tokens, *, rows: Tensor | None = None) -> Tensor | Ragged:
        """`Tokens` to the unit vectors of their scored rows, as a `Ragged` on the model's device, for `maxsim`.

        Or `[T]` tokens to `[T, E]` unit vectors, of which `Tokens.ragged` picks those that are scored. With `rows`
        (`Tokens.rows`) to the `[Q, E]` vectors of these alone, for less work: see `Encoder.forward`.

        Raises:
            TypeError: neither `Tokens` nor a `Packed`. ValueError: `rows` of `Tokens`, which have their own.
        """
        if isinstance(batch, Tokens):
            if rows is not None:
                raise ValueError("Tokens have rows of their own: leave out rows")
            return Ragged(self._vectors(batch.batch, batch.rows), batch.offsets)
        if not isinstance(batch, Packed):
            how = "pack(...), or Tokens with tokenize_queries(texts)"
            raise TypeError(f"ColBERT is called with a Packed, got {type(batch).__name__}: make one with {how}")
        return self._vectors(batch, rows)

    def _vectors(self, batch: Packed, rows: Tensor | None) -> Tensor:
        x_TD = self.encoder(batch, rows=rows)
        *hidden, last = self.dense
        for layer in hidden:
            x_TD = layer(x_TD)
        if isinstance(last, Dense) and last.is_projection:
            return ops.project_normalize(x_TD, last.linear.weight, last.linear.bias)
        return F.normalize(last(x_TD), dim=-1)

    def encode_queries(
        self,
        texts: Iterable[str],
        *,
        batch_tokens: int | None = None,
        progress: bool | None = None,
        devices: Sequence[str] | None = None,
    ) -> Ragged:
        """Queries to float32 unit vectors on the CPU, one `[n_i, E]` matrix per text, in the order given.

        Args:
            texts: `str` in an order: a list, a generator, a column of pandas, an array of strings.
            batch_tokens: tokens of one forward pass; None: a good value for the device.
            progress: show a bar on stderr; None: for long work on a terminal.
            devices: encode in one process for each, such as `["cuda:0", "cuda:1"]` or `["cpu", "cpu"]`; None: here.
                As the processes are spawned, a script starts them below `if __name__ == "__main__":`.

        Raises:
            TypeError: one str, a mapping, a set, or something in the place of a text, with its index.
            ValueError: half a surrogate pair in a text, a device that is not there, a `batch_tokens` that is not a
                whole number from 1, or a vector that is not finite, with the index of its text.
            RuntimeError: the process was forked after this thread had encoded, or a process for a device has died.
        """
        return self._encode(ColBERT.tokenize_queries, texts, batch_tokens, progress, devices)

    def encode_documents(
        self,
        texts: Iterable[str],
        *,
        batch_tokens: int | None = None,
        progress: bool | None = None,
        devices: Sequence[str] | None = None,
        pool_factor: int = 1,
    ) -> Ragged:
        """Documents to vectors as `encode_queries` does; punctuation on the skiplist has no row.

        Args:
            pool_factor: keep about one row in `pool_factor`, by hierarchical clustering (arXiv 2409.14683); needs
                the `retrieval` extra.
        """
        check_pool_factor(pool_factor)
        ragged = self._encode(ColBERT.tokenize_documents, texts, batch_tokens, progress, devices)
        return pool_documents(ragged, pool_factor)

    def stream_documents(
        self, texts: Iterable[str], *, batch_tokens: int | None = None, pool_factor: int = 1
    ) -> Iterator[Tensor]:
        """Documents as `encode_documents`, in memory that does not grow with their number.

        Texts are taken as they are needed, from a generator too, and each gives one `[n_i, E]` tensor, in order.
        """
        check_pool_factor(pool_factor)
        rows = stream_texts(Modules(self), self.tokenize_documents, texts, batch_tokens=batch_tokens)
        return (pool_tokens(x_NE, pool_factor) for x_NE in rows)

    def _encode(
        self,
        tokenize: Callable[..., Tokens],
        texts: Iterable[str],
        batch_tokens: int | None,
        progress: bool | None,
        devices: Sequence[str] | None,
    ) -> Ragged:
        options = {"devices": devices, "batch_tokens": batch_tokens, "progress": progress}
        return encode_here_or_on(self, tokenize, texts, dim=self.dim, **options)

    def tokenize_queries(self, texts: Sequence[str], *, spans: bool = True) -> Tokens:
        """What `encode_queries` feeds the encoder: `[CLS] prefix text [SEP]`, and [MASK] rows with expansion.

        Without `spans`, which encoding does not need, it is a good deal faster.
        """
        c = self.config
        ids, found, truncated = self._tokenize(texts, c.query_prompt, c.query_prefix, c.query_length, spans)
        return replace(self.query_tokens(ids, found), truncated=truncated)

    def tokenize_documents(self, texts: Sequence[str], *, truncate: bool = True, spans: bool = True) -> Tokens:
        """What `encode_documents` feeds the encoder, and which rows it keeps; all of the text without `truncate`."""
        c = self.config
        length = c.document_length if truncate else sys.maxsize
        ids, found, truncated = self._tokenize(texts, c.document_prompt, c.document_prefix, length, spans)
        return replace(self.document_tokens(ids, found, truncate=truncate), truncated=truncated)

    def query_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of queries as `tokenize_queries` cuts them, without prefix and special tokens: for `query_tokens`."""
        c = self.config
        return self._tokenize(texts, c.query_prompt, c.query_prefix, c.query_length, False)[0]

    def document_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of documents, for `document_tokens`, as `query_ids` gives those of queries."""
        c = self.config
        return self._tokenize(texts, c.document_prompt, c.document_prefix, c.document_length, False)[0]

    def query_tokens(self, ids: Sequence[Sequence[int]], spans: Sequence[Sequence[Span]] = ()) -> Tokens:
        """The `Tokens` of queries that are ids already: prefix, special tokens and expansion are added.

        A query that would be longer than `query_length` loses its end. spans: as in `Tokens`, of these ids; or none.
        """
        c = self.config
        rows, found, truncated = self._frame(ids, spans, c.query_prefix, c.query_length)
        key_lengths = [len(row) for row in rows]
        if c.do_query_expansion:
            mask = self.tokenizer.mask_token_id
            assert mask is not None  # __init__ has seen to it
            rows = [row + [mask] * (c.query_length - len(row)) for row in rows]
            found = [row + [None] * (c.query_length - len(row)) for row in found]
        batch = pack(rows, vocab_size=self.encoder.config.vocab_size)
        if c.do_query_expansion and not c.attend_to_expansion_tokens:
            batch = replace(batch, key_lengths=torch.tensor(key_lengths, dtype=torch.int32, device="cpu"))
        return Tokens(batch, torch.ones_like(batch.input_ids, dtype=torch.bool), found, truncated)

    def document_tokens(
        self, ids: Sequence[Sequence[int]], spans: Sequence[Sequence[Span]] = (), *, truncate: bool = True
    ) -> Tokens:
        """The `Tokens` of documents that are ids already, as `query_tokens`; rows on the skiplist are not kept."""
        c = self.config
        length = c.document_length if truncate else sys.maxsize
        rows, found, truncated = self._frame(ids, spans, c.document_prefix, length)
        batch = pack(rows, vocab_size=self.encoder.config.vocab_size)
        return Tokens(batch, ~torch.isin(batch.input_ids, self.skip_ids), found, truncated)

    def _tokenize(
        self, texts: Sequence[str], prompt: str, prefix: str, length: int, with_spans: bool
    ) -> tuple[list[list[int]], list[list[Span]], tuple[int, ...]]:
        """Text to ids, their spans and how many were cut off, without what `_frame` adds, but with room for it."""
        texts = list_of_texts(texts)
        prepared = [(prompt + text).strip() if self.config.strip else prompt + text for text in texts]
        # Cutting to query_length or document_length is the model's definition, as in every ColBERT. What encodes texts
        # for a result warns of it; training, which tokenises in each step, does not.
        room = length - bool(prefix)
        encodings = self.tokenizer.encode_beginnings(prepared, max_length=room, offsets=with_spans)
        before, after = map(len, self._template)
        ids, spans = [], []
        for text, clean, encoding in zip(texts, prepared, encodings, strict=True):
            own = slice(before, len(encoding.ids) - after)
            ids.append(encoding.ids[own])
            if not with_spans:
                continue
            shift = (prompt + text).find(clean) - len(prompt)
            rows: list[Span] = [
                (max(0, start + shift), end + shift) if end > start and end + shift > 0 else None
                for start, end in encoding.offsets[own]
            ]
            spans.append(rows)
        return ids, spans, tuple(encoding.truncated for encoding in encodings)

    def _frame(
        self, ids: Sequence[Sequence[int]], spans: Sequence[Sequence[Span]], prefix: str, length: int
    ) -> tuple[list[list[int]], list[list[Span]], tuple[int, ...]]:
        """`[CLS] prefix ids [SEP]`, at most `length` of them, their spans, and how many ids were cut off."""
        head, tail = self._template
        head = [*head, self.tokenizer.token_to_id(prefix)] if prefix else head
        room = length - len(head) - len(tail)
        if room < 0:
            raise ValueError(f"a length of {length} has no room for the {len(head) + len(tail)} tokens around a text")
        ids = list_of_sequences("ids", ids)
        rows = [[*head, *row[:room], *tail] for row in ids]
        framed = [[*[None] * len(head), *row[:room], *[None] * len(tail)] for row in spans]
        return rows, framed, tuple(max(0, len(row) - room) for row in ids)

    @cached_property
    def _template(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts in front of a text and after it."""
        specials = self.tokenizer.encode_batch([""], offsets=False)[0].ids
        front = int(specials[:1] == [self.tokenizer.cls_token_id])
        return specials[:front], specials[front:]


def _skip_ids(tokenizer: Tokenizer, config: ColBERTConfig) -> set[int]:
    ids = {tokenizer.token_to_id(word) for word in config.skiplist_words}
    if None in ids and config.skip_unknown:
        ids.add(tokenizer.unk_token_id)
    return {token for token in ids if token is not None}
