"""Checkpoints of Composer, the trainer of FlexBERT: one file with weights, config and tokenizer.

Its layout is that of `HuggingFaceModel` in github.com/mosaicml/composer.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import pickles
from ..checkpoint import plain_names
from ..config import OBJECT, EncoderConfig
from ..files import replacing
from ..tokenizer import Tokenizer
from .flexbert_config import CLASSES, from_flexbert, to_flexbert

PREFIX = "model."  # of the attribute of HuggingFaceModel that is the FlexBERT model
# FlexBERT's names and Hugging Face's, the longer ones first. All others are the same.
NAMES = {"bert.encoder.layers.": "model.layers.", "bert.": "model."}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TABLE, DECODER = "model.embeddings.tok_embeddings.weight", "decoder.weight"


class Composer(NamedTuple):
    """The model of a checkpoint: the name of our class, its config, its tensors, and the files of its tokenizer."""

    kind: str
    config: EncoderConfig
    state: dict[str, Tensor]
    tokenizer: dict[str, bytes]


def read(path: Path) -> Composer:
    """The model of a checkpoint that Composer wrote while it trained a FlexBERT. What else it holds is not read.

    Raises:
        ValueError: a damaged file, one without a FlexBERT model and its config, or a model that is not a ModernBERT.
    """
    content = pickles.read_nested(path)
    state = _at(path, content, "state")
    saved = _at(path, state, "integrations", "huggingface")
    model = _at(path, saved, "model", "config")
    named = str(model.get("class")).rsplit(".", 1)[-1]
    kind = next((ours for ours, theirs in CLASSES.items() if theirs == named), None)
    if kind is None:
        raise ValueError(f"{path} holds a {named:.80}; {', '.join(CLASSES.values())} are read")
    tokenizer = _tokenizer(path, saved)
    try:
        config = from_flexbert(_at(path, model, "content"), kind)
        if config.cls_token_id is None and "tokenizer.json" in tokenizer:
            config = config.changed(_ids(tokenizer))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    tensors = plain_names(pickles.state_dict(path, state.get("model")))
    return Composer(kind, config, {_from_flexbert(name): tensors[name] for name in tensors}, tokenizer)


def write(
    path: str | os.PathLike[str],
    kind: str,
    config: EncoderConfig,
    state: Mapping[str, Tensor],
    tokenizer: Mapping[str, bytes],
) -> None:
    """Write a checkpoint from which Composer's Trainer loads a FlexBERT (`load_path`, `load_weights_only=True`).

    Args:
        kind: the name of our class. state: tensors under the names of Hugging Face.
        tokenizer: the files of its tokenizer by name, or none.

    Raises:
        ValueError: what FlexBERT has no setting for.
    """
    content, named = to_flexbert(config, kind), f"src.bert_layers.model.{CLASSES[kind]}"
    tensors = {_to_flexbert(name): tensor for name, tensor in state.items()}
    if kind == "MaskedLM" and DECODER not in state:
        tensors[f"{PREFIX}{DECODER}"] = state[TABLE]
    files = {name: {"file_extension": ".json", "content": json.loads(file)} for name, file in tokenizer.items()}
    model = {"config": {"file_extension": ".json", "content": content, "class": named}}
    saved = {"model": tensors, "integrations": {"huggingface": {"model": model, "tokenizer": files}}}
    with replacing(Path(path)) as beside:
        torch.save({"state": saved}, beside)


def _from_flexbert(name: str) -> str:
    name = name.removeprefix(PREFIX)
    return next((ours + name[len(theirs) :] for theirs, ours in NAMES.items() if name.startswith(theirs)), name)


def _to_flexbert(name: str) -> str:
    found = (theirs + name[len(ours) :] for theirs, ours in NAMES.items() if name.startswith(ours))
    return PREFIX + next(found, name)


def _at(path: Path, content: object, *names: str) -> Mapping[str, Any]:
    """The object under these keys, each in the one before."""
    for name in names:
        content = content.get(name) if isinstance(content, dict) else None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a checkpoint that Composer wrote of a FlexBERT: it has no {' > '.join(names)}")
    return OBJECT.check(f"{path}: {names[-1]}", content)


def _tokenizer(path: Path, saved: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of the tokenizer that are JSON. Older versions of Composer leave ".json" out of their names."""
    files: dict[str, bytes] = {}
    for name, file in OBJECT.check(f"{path}: tokenizer", saved.get("tokenizer")).items():
        full = f"{str(name).removesuffix('.json')}.json"
        if full in TOKENIZER and isinstance(file, dict):
            files[full] = json.dumps(file.get("content"), indent=2, ensure_ascii=False).encode()
    return files


def _ids(files: Mapping[str, bytes]) -> dict[str, int | None]:
    """The special tokens of a tokenizer, as the config of a ModernBERT names them."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        tokenizer = Tokenizer.from_pretrained(folder)
    cls, sep, pad = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id
    return {"cls_token_id": cls, "sep_token_id": sep, "bos_token_id": cls, "eos_token_id": sep, "pad_token_id": pad}
