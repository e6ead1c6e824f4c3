"""Reranker: how well documents answer a query, as a `CrossEncoder` of sentence-transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..checkpoint import Content, unwrapped
from ..config import EncoderConfig
from ..inference.devices import encode_here_or_on
from ..inference.encode import list_of_texts
from ..packing import Packed, Texts
from ..pretrained import Backbone, Pretrained
from ..tokenizer import Tokenizer
from . import reranker_files
from .classifier import SequenceClassifier
from .folders import check_class
from .pairs import Ranked, longest, ranked, tokenize_pairs
from .reranker_files import RerankerConfig

if TYPE_CHECKING:
    from typing_extensions import Self


class Reranker(Pretrained):
    """A `SequenceClassifier` with one label, which reads query and document together, and its `Tokenizer`.

    `from_pretrained` loads a folder of a `CrossEncoder` of sentence-transformers, such as gte-reranker-modernbert-base,
    and `save_pretrained` writes one. Its scores equal those of `CrossEncoder.predict`.

    Args:
        classifier, tokenizer: taken over, not copied.
        config: how a logit becomes a score; None: `RerankerConfig()`.

    Raises:
        ValueError: a classifier of several labels.
    """

    formats = ("sentence-transformers",)

    def __init__(
        self, classifier: SequenceClassifier, tokenizer: Tokenizer, config: RerankerConfig | None = None
    ) -> None:
        super().__init__()
        if len(classifier.labels) != 1:
            what = f"the classifier has the labels {', '.join(classifier.labels)}"
            raise ValueError(f"a Reranker needs a classifier with one label, but {what:.200}: use a SequenceClassifier")
        self.classifier, self.tokenizer, self.config = classifier, tokenizer, config or RerankerConfig()
        self.training = classifier.training

    @classmethod
    def _read(cls, folder: Path, config: EncoderConfig, *, device: torch.device, dtype: torch.dtype) -> Self:
        check_class(folder, "Reranker")
        classifier = SequenceClassifier._read(folder, config, device=device, dtype=dtype)
        tokenizer = Tokenizer.from_pretrained(folder)
        return cls(classifier, tokenizer, reranker_files.read(folder, config, tokenizer))

    def _content(self, state: Mapping[str, Tensor] | None) -> Content:
        if state is not None:
            state = {name.removeprefix("classifier."): tensor for name, tensor in state.items()}
        return reranker_files.content(_plain(self.classifier)._content(state), self.tokenizer, self.config)

    @property
    def base_model(self) -> Backbone:
        """The encoder."""
        return _plain(self.classifier).base_model

    def forward(self, batch: Packed | Texts, *, rows: None = None) -> Tensor:
        """B packed pairs to their logits `[B, 1]`, without the activation. `classifier` has the loss.

        Args:
            rows: None: a pair has one logit. `Session` passes it.

        Raises:
            TypeError: neither a `Packed` nor `Texts`. ValueError: `rows`; what `Encoder` refuses.
        """
        packed = batch.batch if isinstance(batch, Texts) else batch
        if not isinstance(packed, Packed):
            how = "make one with tokenize(documents, query=...), or call score with texts"
            raise TypeError(f"Reranker is called with a Packed, got {type(batch).__name__}: {how}")
        return self.classifier(packed, rows=rows)

    def score(
        self,
        query: str,
        documents: Iterable[str],
        *,
        batch_tokens: int | None = None,
        progress: bool | None = None,
        devices: Sequence[str] | None = None,
    ) -> Tensor:
        """`[N]` float32 on the CPU, how well each of N documents answers the query, in the order given.

        Args:
            documents: `str` in an order: a list, a generator, a column of pandas, an array of strings.
            batch_tokens, progress, devices: as in `Embedder.encode`.

        Raises:
            TypeError: a query that is not a str; documents as in `Embedder.encode`.
            ValueError, RuntimeError: as `Embedder.encode`.
        """
        if not isinstance(query, str):
            raise TypeError(f"query must be a str, got {type(query).__name__} {query!r:.60}")
        tokenize = partial(Reranker.tokenize, query=query)
        options = {"devices": devices, "batch_tokens": batch_tokens, "progress": progress}
        logits_N1 = encode_here_or_on(self, tokenize, documents, dim=1, **options).values
        return getattr(nn, self.config.activation)()(logits_N1[:, 0])

    def rank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_k: int | None = None,
        batch_tokens: int | None = None,
        progress: bool | None = None,
        devices: Sequence[str] | None = None,
    ) -> list[Ranked]:
        """The `top_k` documents with the best scores (None: all), best first; of equal ones the first.

        The arguments, errors and scores are those of `score`. ValueError: a `top_k` below 1.
        """
        return ranked(
            self.score(query, documents, batch_tokens=batch_tokens, progress=progress, devices=devices), top_k
        )

    def tokenize(self, documents: Sequence[str], *, query: str, spans: bool = False) -> Texts:
        """What `score` feeds the classifier: pairs of the query, behind its prompt, and each document.

        `spans` is for `encode_texts`: a score has none, so that they are never made.
        """
        pairs = [(self.config.prompt + query, document) for document in list_of_texts(documents)]
        vocab_size = self.base_model.config.vocab_size
        return tokenize_pairs(self.tokenizer, pairs, max_length=self.max_length, vocab_size=vocab_size)

    @property
    def max_length(self) -> int:
        """Tokens of a pair that are read, with special tokens."""
        return self.config.max_length or longest(self.tokenizer, self.base_model.config)


def _plain(classifier: nn.Module) -> SequenceClassifier:
    """The classifier without wrappers, such as that of `torch.compile`."""
    classifier = unwrapped(classifier)
    assert isinstance(classifier, SequenceClassifier)
    return classifier
