"""Which model a store belongs to: vectors of two different models must not be compared."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import torch

from ...heads.colbert import ColBERT
from ...inference.session import Session
from .format import ModelIdentity

ModelSource = str | os.PathLike[str] | ColBERT
"""A folder, a hub id, or a loaded model."""

PROBE = "The Naïve café's 3rd re-test, in 2024: x_1 = 0.5; für Größe, смысл, 検索 🔎\n"


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to encode, and its identity, which is costly to compute: pass this object on."""

    session: Session
    identity: ModelIdentity


def fingerprint(colbert: ColBERT) -> str:
    """A hash that differs between models whose vectors must not be compared. The same in float32 and in bfloat16.

    It covers the weights in bfloat16, the settings of the encoder, and how texts become tokens.
    """
    config, c = colbert.encoder.config, colbert.config
    layers = [(config.is_global(i), config.rope_theta(i)) for i in range(config.num_hidden_layers)]
    head = [(type(layer.activation).__name__, layer.residual is not None) for layer in colbert.dense]
    encoder = (layers, config.num_attention_heads, config.window, config.hidden_activation, config.norm_eps)
    lengths = (c.query_length, c.document_length, c.attend_to_expansion_tokens)
    texts = [colbert.tokenize_queries([PROBE]), colbert.tokenize_documents([PROBE])]
    tokens = [(text.batch.input_ids.tolist(), text.keep.tolist()) for text in texts]
    digest = hashlib.sha256(repr((encoder, head, lengths, tokens)).encode())
    for name, tensor in sorted(colbert.state_dict().items()):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().bfloat16().contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def load_colbert(name: str | os.PathLike[str] | None) -> ColBERT:
    """The model in a folder or on the hub; None for the built-in one."""
    return ColBERT.default() if name is None else ColBERT.from_pretrained(name)


def load_model(
    source: ModelSource | LoadedModel | None, made_with: ModelIdentity | None = None, engine: str | None = None
) -> LoadedModel:
    """Load a model and check that it belongs to a store.

    Args:
        source: None: the model that the store was made with, or the built-in one. A `LoadedModel` is returned as it is.
        made_with: the identity of the store's model; None: there is no store yet.

    Raises:
        ValueError: the store was made with another model.
    """
    model = source if isinstance(source, LoadedModel) else _load(source, made_with, engine)
    if made_with and model.identity.fingerprint != made_with.fingerprint:
        name = made_with.name or ("the built-in model" if made_with.name is None else "another model")
        raise ValueError(f"the store was made with {name}, and this model is different: their vectors do not compare")
    return model


def _load(source: ModelSource | None, made_with: ModelIdentity | None, engine: str | None) -> LoadedModel:
    if isinstance(source, ColBERT):
        colbert, name = source, ""
    else:
        name = str(source) if source is not None else made_with.name if made_with else None
        if name == "":
            raise ValueError("the store was made with a model that had no name: pass the same one as `model`")
        colbert = load_colbert(name)
    return LoadedModel(Session(colbert, engine=engine), ModelIdentity(name and absolute(name), fingerprint(colbert)))


def absolute(name: str) -> str:
    """A model's name, independent of the working directory: a folder by its full path, a hub id unchanged."""
    return os.path.abspath(name) if os.path.isdir(name) else name
