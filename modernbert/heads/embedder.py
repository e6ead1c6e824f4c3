"""Embedder: one vector for each text, as a `SentenceTransformer` of sentence-transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint import Content
from ..config import EncoderConfig
from ..encoder import Encoder
from ..inference.devices import encode_here_or_on
from ..inference.encode import list_of_texts
from ..packing import Packed, Texts, pack
from ..pretrained import Pretrained
from ..tokenizer import Encoding, Tokenizer
from . import embedder_files
from .dense import Dense
from .embedder_files import EmbedderConfig
from .folders import check_class
from .module_files import check_widths
from .pooling import encode_and_pool
from .quantize import Precision, quantize

if TYPE_CHECKING:
    from typing_extensions import Self


class Embedder(Pretrained):
    """An `Encoder`, its `Tokenizer`, a pooling, and layers that project the vector of a text.

    `from_pretrained` loads a folder of sentence-transformers, and `save_pretrained` writes one. Its vectors equal those
    of `SentenceTransformer.encode`, but for a `width`: here cut vectors get length one again.

    Args:
        encoder, tokenizer: taken over, not copied.
        dense: layers behind the pooling, each on the vector that the one before it gives. Theirs is the first width.
        config: how a text becomes a vector; None: `EmbedderConfig()`.

    Attributes:
        projection: the layers. dim: width E of the vectors.

    Raises:
        ValueError: a layer that does not take the vector in front of it, or a `width` beyond that of the vectors.
    """

    base_model_prefix = "encoder"
    formats = ("sentence-transformers",)

    def __init__(
        self, encoder: Encoder, tokenizer: Tokenizer, dense: Sequence[Dense] = (), config: EmbedderConfig | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.tokenizer, self.config = encoder, tokenizer, config or EmbedderConfig()
        self.projection = nn.ModuleList(dense)
        self.training = encoder.training
        width = check_widths(dense, encoder.config.hidden_size * len(self.config.poolings))
        if self.config.width is not None and self.config.width > width:
            raise ValueError(f"config: width is {self.config.width}, but vectors have {width} numbers")
        self.dim = self.config.width or width

    @classmethod
    def _read(cls, folder: Path, config: EncoderConfig, *, device: torch.device, dtype: torch.dtype) -> Self:
        check_class(folder, "Embedder")
        tokenizer = Tokenizer.from_pretrained(folder)
        settings, dense = embedder_files.read(folder, config, tokenizer, device=device, dtype=dtype)
        return cls(Encoder._read(folder, config, device=device, dtype=dtype), tokenizer, dense, settings)

    def _content(self, state: Mapping[str, Tensor] | None) -> Content:
        layers, encoder = [*self.projection], self.base_model.config
        return embedder_files.content(encoder, self.encoder, self.tokenizer, layers, self.config, state)

    def forward(self, batch: Packed | Texts, *, rows: None = None) -> Tensor:
        """B packed texts to their vectors `[B, E]`, of length one if `config.normalize`.

        For the poolings "cls" and "lasttoken" the last layer computes only one row of each text.

        Args:
            rows: None: a text has one vector. `encode_texts` and `Session` pass it.

        Raises:
            TypeError: neither a `Packed` nor `Texts`. ValueError: `rows`; what `Encoder` refuses.
        """
        packed = batch.batch if isinstance(batch, Texts) else batch
        if not isinstance(packed, Packed):
            how = "make one with pack(...), or call encode with texts"
            raise TypeError(f"Embedder is called with a Packed, got {type(batch).__name__}: {how}")
        if rows is not None:
            raise ValueError("an Embedder gives one vector for each text: leave out rows")
        x_BE = encode_and_pool(self.encoder, packed, self.config.poolings)
        for layer in self.projection:
            x_BE = layer(x_BE)
        x_BE = x_BE[:, : self.config.width]
        return F.normalize(x_BE, dim=-1) if self.config.normalize else x_BE

    def encode(
        self,
        texts: Iterable[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        precision: Precision | None = None,
        ranges: Tensor | None = None,
        batch_tokens: int | None = None,
        progress: bool | None = None,
        devices: Sequence[str] | None = None,
    ) -> Tensor:
        """Texts to their vectors, `[N, E]` float32 on the CPU, in the order given; with a `precision` in less memory.

        Args:
            texts: `str` in an order: a list, a generator, a column of pandas, an array of strings.
            prompt_name: of the prompt in `config.prompts`; None: `config.default_prompt`, if there is one.
            prompt: is put in front of every text, in the place of one with a name.
            precision, ranges: as in `quantize.quantize`, such as "binary"; None: float32.
            batch_tokens: tokens of one forward pass; None: a good value for the device.
            progress: show a bar on stderr; None: for long work on a terminal.
            devices: encode in one process for each, such as `["cuda:0", "cuda:1"]`; None: here. As the processes are
                spawned, a script starts them below `if __name__ == "__main__":`.

        Raises:
            TypeError: one str, a mapping, a set, or something in the place of a text, with its index.
            ValueError: a prompt that has no such name, or two prompts; half a surrogate pair in a text, a device that
                is not there, or a vector that is not finite, with the index of its text; `precision` as `quantize`.
            RuntimeError: the process was forked after this thread had encoded, or a process for a device has died.
        """
        tokenize = partial(Embedder.tokenize, prompt=self._prompt(prompt_name, prompt))
        options = {"devices": devices, "batch_tokens": batch_tokens, "progress": progress}
        if precision is None:
            return encode_here_or_on(self, tokenize, texts, dim=self.dim, **options).values
        quantize(torch.zeros(0, self.dim, device="cpu"), precision, ranges)  # refuses them before the work
        return quantize(encode_here_or_on(self, tokenize, texts, dim=self.dim, **options).values, precision, ranges)

    def encode_queries(
        self,
        texts: Iterable[str],
        *,
        batch_tokens: int | None = None,
        progress: bool | None = None,
        devices: Sequence[str] | None = None,
    ) -> Tensor:
        """`encode` with the prompt "query"."""
        return self.encode(texts, prompt_name="query", batch_tokens=batch_tokens, progress=progress, devices=devices)

    def encode_documents(
        self,
        texts: Iterable[str],
        *,
        batch_tokens: int | None = None,
        progress: bool | None = None,
        devices: Sequence[str] | None = None,
    ) -> Tensor:
        """`encode` with the prompt "document"."""
        return self.encode(texts, prompt_name="document", batch_tokens=batch_tokens, progress=progress, devices=devices)

    def tokenize(
        self, texts: Sequence[str], *, prompt_name: str | None = None, prompt: str | None = None, spans: bool = False
    ) -> Texts:
        """What `encode` feeds the encoder, and training the model: cut to `max_length`, with a prompt as in `encode`.

        `spans` is for `encode_texts`: a vector has none, so that they are never made.
        """
        found = self._tokenize(texts, self._prompt(prompt_name, prompt))
        batch = pack([encoding.ids for encoding in found], vocab_size=self.base_model.config.vocab_size)
        return Texts(batch, tuple(encoding.truncated for encoding in found))

    def query_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of queries, with prompt and special tokens: `pack(ids)` is what the model takes."""
        return [encoding.ids for encoding in self._tokenize(texts, self.config.prompts["query"])]

    def document_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of documents, as `query_ids` gives those of queries."""
        return [encoding.ids for encoding in self._tokenize(texts, self.config.prompts["document"])]

    def _tokenize(self, texts: Sequence[str], prompt: str) -> list[Encoding]:
        prepared = [prompt + text for text in list_of_texts(texts)]
        return self.tokenizer.encode_beginnings(prepared, max_length=self.max_length, offsets=False)

    @property
    def max_length(self) -> int:
        """Tokens of a text that are read, with special tokens."""
        if self.config.max_length is not None:
            return self.config.max_length
        limit = self.base_model.config.max_position_embeddings
        return limit if self.tokenizer.max_length is None else min(limit, self.tokenizer.max_length)

    def _prompt(self, name: str | None, prompt: str | None) -> str:
        if name is not None and prompt is not None:
            raise ValueError("prompt_name and prompt are two prompts: pass one of them")
        if prompt is not None:
            return prompt
        name = self.config.default_prompt if name is None else name
        if name is not None and name not in self.config.prompts:
            raise ValueError(f"prompt_name is {name!r:.80}, but the model has {', '.join(self.config.prompts)}")
        return "" if name is None else self.config.prompts[name]
