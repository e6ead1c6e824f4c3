"""ModernBERT and Ettin encoders, padding-free from text to late-interaction score.

A name is imported when it is first used, so `import modernbert` and `modernbert --help` are instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modernbert.config import EncoderConfig
    from modernbert.encoder import Encoder
    from modernbert.heads.colbert import ColBERT
    from modernbert.inference.session import Session
    from modernbert.late_interaction import Ragged, maxsim
    from modernbert.packing import Packed, Tokens, pack, unpack
    from modernbert.tokenizer import Tokenizer

__all__ = [
    "ColBERT",
    "Encoder",
    "EncoderConfig",
    "Packed",
    "Ragged",
    "Session",
    "Tokenizer",
    "Tokens",
    "maxsim",
    "pack",
    "unpack",
]

_HOME = {
    "ColBERT": "modernbert.heads.colbert",
    "Encoder": "modernbert.encoder",
    "EncoderConfig": "modernbert.config",
    "Packed": "modernbert.packing",
    "Ragged": "modernbert.late_interaction",
    "Session": "modernbert.inference.session",
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
