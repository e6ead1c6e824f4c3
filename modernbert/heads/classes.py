"""The classes of this package by name, as `folders.class_of` gives it for a folder."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..encoder import Encoder
from ..pretrained import Pretrained
from .classifier import SequenceClassifier
from .colbert import ColBERT
from .embedder import Embedder
from .masked_lm import MaskedLM
from .multiple_choice import MultipleChoice
from .question_answering import QuestionAnswering
from .token_classifier import TokenClassifier

HEADS = (MaskedLM, SequenceClassifier, TokenClassifier, QuestionAnswering, MultipleChoice, Embedder, ColBERT)
CLASSES: Mapping[str, type[Pretrained]] = MappingProxyType({each.__name__: each for each in (Encoder, *HEADS)})
