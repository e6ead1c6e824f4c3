"""Which model a store belongs to: vectors of two models may not be compared."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import torch

from ...heads.colbert import ColBERT

Model = str | os.PathLike[str] | ColBERT

PROBE = "The Naïve café's 3rd re-test, in 2024: x_1 = 0.5; für Größe, смысл, 検索 🔎\n"


def fingerprint(colbert: ColBERT) -> str:
    """What tells models apart whose vectors may not be compared; the same in float32 and in bfloat16.

    Weights are hashed in bfloat16, with what the encoder is set to and how a text becomes tokens.
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


def load(model: Model | None, manifest: Mapping[str, Any] | None) -> tuple[ColBERT, str | None]:
    """A model and the name that a store remembers it by: None for the built-in one, "" for one without a name.

    Args:
        model: a folder, a hub id, or a loaded model; None: that of the manifest, or the built-in one.
        manifest: of the store that it is for, if there is one.

    Raises:
        ValueError: it is another model than the store was made with.
    """
    if isinstance(model, ColBERT):
        colbert, name = model, ""
    else:
        name = str(model) if model is not None else manifest["model"] if manifest else None
        if name == "":
            raise ValueError("the store was made with a model that had no name: give the same one as `model`")
        colbert = ColBERT.default() if name is None else ColBERT.from_pretrained(name)
    if manifest and fingerprint(colbert) != manifest["fingerprint"]:
        made_with = manifest["model"] or ("the built-in model" if manifest["model"] is None else "another model")
        raise ValueError(f"the store was made with {made_with}, and this one is not the same: vectors do not compare")
    return colbert, name and absolute(name)


def absolute(name: str) -> str:
    """A model's name that means the same from everywhere: a folder by its whole path, a hub id as it is."""
    return os.path.abspath(name) if os.path.isdir(name) else name
