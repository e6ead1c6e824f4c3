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
from ..heads.classes import CLASSES
from ..heads.colbert import ColBERT
from ..heads.colbert_files import ColBERTConfig
from ..heads.dense import Dense
from ..heads.embedder import Embedder
from ..heads.embedder_files import EmbedderConfig
from ..heads.folders import class_of
from ..pretrained import Pretrained
from ..tokenizer import CONFIG, Tokenizer
from .reading import digest_folder

KEEP = "keep"


class Middle(NamedTuple):
    """A layer in front of the projection: its width, in widths of the encoder, and whether its input is added."""

    width: int
    residual: bool


HEADS: Mapping[str, tuple[Middle, ...]] = MappingProxyType(
    {"linear": (), "wide": (Middle(2, False),), "residual": (Middle(2, True),)}
)
"""Heads of a ColBERT, without biases and activations: one projection; a wide layer in front of it; and with a residual
matrix beside this layer, as mxbai-edge has it (arXiv 2510.12327 compares more)."""


def hash_of(name: str) -> str:
    """A hash of all files of a folder or hub id, from which a resumed run must have started too."""
    return digest_folder(locate(name))


def start_model(name: str) -> Pretrained:
    """The model of a folder or hub id, of its own class, so that no tensor is left over."""
    return CLASSES.get(class_of(locate(name)) or "", Encoder).from_pretrained(name)


def start_encoder(name: str) -> Encoder:
    """The encoder of a folder or hub id, without the head that may be there."""
    return encoder_of(start_model(name))


def encoder_of(model: Pretrained) -> Encoder:
    encoder = model.base_model
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


def start_colbert(
    name: str, *, head: str, dim: int | None, config: ColBERTConfig, lower_case: bool | None = None
) -> ColBERT:
    """A `ColBERT` on the encoder of a folder or hub id. A new head is drawn from PyTorch's generator.

    Args:
        head: a name in `HEADS`; or `KEEP`, for the head, prefixes and skiplist of a checkpoint that is a ColBERT.
        dim: width of the vectors; None: that of the head that is kept.
        config: with `KEEP` only its lengths and its expansion are used.
        lower_case: whether the tokenizer lower-cases texts; None: as that of the checkpoint.

    Raises:
        ValueError: a head that has no such name, or of another width than `dim`; what `ColBERT` refuses.
    """
    tokenizer = Tokenizer.from_pretrained(name)
    if lower_case is not None:
        tokenizer = with_case(tokenizer, lower=lower_case)
    if head == KEEP:
        return _kept(ColBERT.from_pretrained(name), tokenizer, dim, config)
    if head not in HEADS or dim is None:
        raise ValueError(f"the head is {head!r:.80}, but must be {KEEP}, or one of {', '.join(HEADS)} with a width")
    model = ColBERT.from_encoder(start_encoder(name), tokenizer, dim=dim, config=config)
    if not HEADS[head]:
        return model
    hidden = width = model.encoder.config.hidden_size
    layers = []
    for middle in HEADS[head]:
        layers.append(Dense(width, middle.width * hidden, residual=middle.residual))
        width = middle.width * hidden
    layers.append(Dense(width, dim))
    for parameter in nn.ModuleList(layers).parameters():
        nn.init.trunc_normal_(parameter, std=parameter.shape[1] ** -0.5)  # as `from_encoder` does
    return ColBERT(model.encoder, model.tokenizer, layers, config)


def _kept(model: ColBERT, tokenizer: Tokenizer, dim: int | None, config: ColBERTConfig) -> ColBERT:
    if dim not in (None, model.dim):
        raise ValueError(f"the head that is kept gives {model.dim} numbers, not {dim}: leave out the width")
    kept = ("query_length", "document_length", "do_query_expansion", "attend_to_expansion_tokens")
    settings = replace(model.config, **{name: getattr(config, name) for name in kept})
    layers = [layer for layer in model.dense if isinstance(layer, Dense)]
    return ColBERT(model.encoder, tokenizer, layers, settings)


def with_case(tokenizer: Tokenizer, *, lower: bool) -> Tokenizer:
    """A copy of a tokenizer that lower-cases texts, or does not. A tokenizer.json that lower-cases goes on to."""
    files = tokenizer.files()
    backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    return Tokenizer(backend, {**json.loads(files[CONFIG]), "do_lower_case": lower})
