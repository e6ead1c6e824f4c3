"""ModernBERT and Ettin encoders, padding-free from text to late-interaction score.

A name is imported when it is first used, so `import modernbert` and `modernbert --help` are instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modernbert.config import EncoderConfig
    from modernbert.encoder import Encoder
    from modernbert.heads.classifier import SequenceClassifier
    from modernbert.heads.colbert import ColBERT
    from modernbert.heads.embedder import Embedder
    from modernbert.heads.masked_lm import MaskedLM
    from modernbert.heads.multiple_choice import MultipleChoice
    from modernbert.heads.question_answering import QuestionAnswering
    from modernbert.heads.reranker import Reranker
    from modernbert.heads.token_classifier import TokenClassifier
    from modernbert.inference.session import Session
    from modernbert.late_interaction import Ragged, maxsim
    from modernbert.packing import Packed, Tokens, pack, unpack
    from modernbert.tokenizer import Tokenizer

__all__ = [
    "ColBERT",
    "Embedder",
    "Encoder",
    "EncoderConfig",
    "MaskedLM",
    "MultipleChoice",
    "Packed",
    "QuestionAnswering",
    "Ragged",
    "Reranker",
    "SequenceClassifier",
    "Session",
    "TokenClassifier",
    "Tokenizer",
    "Tokens",
    "maxsim",
    "pack",
    "unpack",
]

_HOME = {
    "ColBERT": "modernbert.heads.colbert",
    "Embedder": "modernbert.heads.embedder",
    "Encoder": "modernbert.encoder",
    "EncoderConfig": "modernbert.config",
    "MaskedLM": "modernbert.heads.masked_lm",
    "MultipleChoice": "modernbert.heads.multiple_choice",
    "Packed": "modernbert.packing",
    "QuestionAnswering": "modernbert.heads.question_answering",
    "Ragged": "modernbert.late_interaction",
    "Reranker": "modernbert.heads.reranker",
    "SequenceClassifier": "modernbert.heads.classifier",
    "Session": "modernbert.inference.session",
    "TokenClassifier": "modernbert.heads.token_classifier",
    "Tokenizer": "modernbert.tokenizer",
    "Tokens": "modernbert.packing",
    "maxsim": "modernbert.late_interaction",
    "pack": "modernbert.packing",
    "unpack": "modernbert.packing",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'modernbert' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
