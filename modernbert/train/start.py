"""A model to train, from any checkpoint: an encoder alone, one with another head, or one of the same kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

import tokenizers
from torch import nn

from ..checkpoint import locate
from ..encoder import Encoder
from ..heads.classifier import SequenceClassifier
from ..heads.colbert import ColBERT
from ..heads.colbert_files import ColBERTConfig
from ..heads.dense import Dense
from ..heads.embedder import Embedder
from ..heads.embedder_files import EmbedderConfig
from ..heads.folders import class_of
from ..heads.masked_lm import MaskedLM
from ..heads.token_classifier import TokenClassifier
from ..pretrained import Pretrained
from ..tokenizer import CONFIG, Tokenizer

KINDS: Mapping[str, type[Pretrained]] = MappingProxyType(
    {kind.__name__: kind for kind in (MaskedLM, SequenceClassifier, TokenClassifier, Embedder, ColBERT)}
)


class Middle(NamedTuple):
    """A layer in front of the projection: its width, in widths of the encoder, and whether its input is added."""

    width: int
    residual: bool


HEADS: Mapping[str, tuple[Middle, ...]] = MappingProxyType(
    {"linear": (), "wide": (Middle(2, False),), "residual": (Middle(2, True),)}
)
"""Heads of a ColBERT, without biases and activations: one projection; a wide layer in front of it; and with a residual
matrix beside this layer, as mxbai-edge has it (arXiv 2510.12327 compares more)."""


def start_encoder(name: str) -> Encoder:
    """The encoder of a folder or hub id, without the head that may be there."""
    kind = KINDS.get(class_of(locate(name)) or "", Encoder)  # by its class, so that no tensor is left over
    encoder = kind.from_pretrained(name).base_model
    assert isinstance(encoder, Encoder)
    return encoder


def start_embedder(name: str, *, max_length: int) -> Embedder:
    """The `Embedder` of a folder or hub id; or a new one, the mean over tokens, on the encoder that is there.

    Args:
        max_length: tokens of a text.
    """
    if class_of(locate(name)) == "Embedder":
        model = Embedder.from_pretrained(name)
        model.config = replace(model.config, max_length=max_length)
        return model
    return Embedder(start_encoder(name), Tokenizer.from_pretrained(name), config=EmbedderConfig(max_length=max_length))


def start_colbert(name: str, *, head: str, dim: int, config: ColBERTConfig, lower_case: bool) -> ColBERT:
    """A `ColBERT` with a new head on the encoder of a folder or hub id. Its weights are drawn from PyTorch's generator.

    Args:
        head: a name in `HEADS`. dim: width of the vectors.
        lower_case: whether the tokenizer lower-cases texts, whatever that of the checkpoint does.

    Raises:
        ValueError: a head that has no such name; what `ColBERT` refuses.
    """
    if head not in HEADS:
        raise ValueError(f"the head is {head!r:.80}, but must be one of {', '.join(HEADS)}")
    tokenizer = with_case(Tokenizer.from_pretrained(name), lower=lower_case)
    model = ColBERT.from_encoder(start_encoder(name), tokenizer, dim=dim, config=config)
    if not HEADS[head]:
        return model
    width, layers = model.encoder.config.hidden_size, []
    for middle in HEADS[head]:
        layers.append(Dense(width, middle.width * model.encoder.config.hidden_size, residual=middle.residual))
        width = layers[-1].linear.out_features
    layers.append(Dense(width, dim))
    for parameter in nn.ModuleList(layers).parameters():
        nn.init.trunc_normal_(parameter, std=parameter.shape[1] ** -0.5)  # as `from_encoder` does
    return ColBERT(model.encoder, model.tokenizer, layers, config)


def with_case(tokenizer: Tokenizer, *, lower: bool) -> Tokenizer:
    """A copy of a tokenizer that lower-cases texts, or does not. A tokenizer.json that lower-cases goes on to."""
    files = tokenizer.files()
    backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    return Tokenizer(backend, {**json.loads(files[CONFIG]), "do_lower_case": lower})
