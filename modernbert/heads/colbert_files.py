"""The settings and the head of a ColBERT folder. Reads PyLate 1.x, sentence-transformers 6 and Stanford; writes PyLate.

Every function that reads a file raises a ValueError with the file, the key and the value for one that is not supported.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..checkpoint import Content
from ..config import FLAG, NAME, OBJECT, SIZE, SIZE_OR_NULL, TEXT, WORDS, EncoderConfig
from ..settings import Settings
from ..tokenizer import Tokenizer
from . import module_files
from .dense import Dense
from .module_files import SETTINGS, TRANSFORMER, File, get, read_if_there

METADATA = "artifact.metadata"

# Modules by the last part of their type; all others have no meaning for late interaction.
READ = ("Transformer", "Dense", "MultiVectorMask")
SKIPPED = ("Normalize", "Pooling")  # normalising is part of our forward pass; PyLate drops both as well


@dataclass(unsafe_hash=True)
class ColBERTConfig(Settings):
    """How texts become rows; the names are PyLate's.

    Attributes:
        query_prefix, document_prefix: a token inserted after [CLS], or "".
        query_prompt, document_prompt: text put in front of every text, or "".
        query_length, document_length: maximum number of rows of a text, special tokens and prefix included.
        do_query_expansion: fill queries with [MASK] rows up to `query_length`; these rows take part in the score.
        attend_to_expansion_tokens: whether real tokens attend to those rows.
        skiplist_words: tokens whose rows are dropped from documents (one id each, as in PyLate: "." but not " .").
        skip_unknown: a skiplist word outside the vocabulary means [UNK] (PyLate) instead of nothing.
        strip: remove blanks around a text (PyLate).
    """

    query_prefix: str = "[Q] "
    document_prefix: str = "[D] "
    query_prompt: str = ""
    document_prompt: str = ""
    query_length: int = 32
    document_length: int = 180
    do_query_expansion: bool = False
    attend_to_expansion_tokens: bool = False
    skiplist_words: tuple[str, ...] = tuple(string.punctuation)
    skip_unknown: bool = True
    strip: bool = True


def read(
    folder: Path, encoder: EncoderConfig, tokenizer: Tokenizer, *, device: torch.device | str, dtype: torch.dtype
) -> tuple[ColBERTConfig, list[Dense]]:
    """The settings and the layers of the head. Raises a ValueError where they do not fit `encoder` and `tokenizer`."""
    if checkpoint.read_json(folder, "config.json").get("architectures") == ["HF_ColBERT"]:
        config, dense = _stanford(folder), [_stanford_head(folder, device, dtype)]
    else:
        modules = _folders_of_modules(folder)
        where, written = folder / SETTINGS, read_if_there(folder, SETTINGS)
        native = written.get("model_type") == "MultiVectorEncoder"
        config = _native(folder, written, modules, tokenizer) if native else _pylate(where, written)
        dense = [module_files.read_dense(path, device, dtype) for path in modules["Dense"]]

    module_files.check_widths(dense, encoder.hidden_size, folder)
    module_files.check_vocabulary(folder, tokenizer, encoder)
    if config.do_query_expansion and config.query_length > encoder.max_position_embeddings:
        limit = f"max_position_embeddings {encoder.max_position_embeddings}"
        raise ValueError(f"{folder}: queries are expanded to {config.query_length} tokens, beyond {limit}")
    return config, dense


def _stanford(folder: Path) -> ColBERTConfig:
    """artifact.metadata as PyLate reads it: always with expansion and the whole skiplist, else its own defaults."""
    where, written = folder / METADATA, read_if_there(folder, METADATA)
    return ColBERTConfig(
        query_prefix=get(where, written, TEXT, "query_token_id", "[unused0]"),
        document_prefix=get(where, written, TEXT, "doc_token_id", "[unused1]"),
        query_length=get(where, written, SIZE, "query_maxlen", 32),
        document_length=get(where, written, SIZE, "doc_maxlen", 180),
        do_query_expansion=True,
        attend_to_expansion_tokens=get(where, written, FLAG, "attend_to_mask_tokens", False),
    )


def _stanford_head(folder: Path, device: torch.device | str, dtype: torch.dtype) -> Dense:
    head = ("linear.weight",)
    weight = checkpoint.read_state_dict(folder, only=head, device=device, dtype=dtype).get(*head)
    if weight is None or weight.dim() != 2:
        raise ValueError(f"{folder} has no matrix linear.weight, which is the head of a HF_ColBERT")
    with torch.device("meta"):
        layer = Dense(weight.shape[1], weight.shape[0])
    checkpoint.load_state_dict(layer, {"linear.weight": weight}, prefix="", ignore=())
    return layer


def _folders_of_modules(folder: Path) -> dict[str, list[Path]]:
    """The folders of the modules in modules.json, by the kind of module; at least one is a Dense."""
    where = folder / "modules.json"
    if not checkpoint.has_file(where):
        raise ValueError(
            f"{folder} has no modules.json, and so no late-interaction head: make one with "
            "ColBERT.from_encoder(Encoder.from_pretrained(...), Tokenizer.from_pretrained(...))"
        )
    modules: dict[str, list[Path]] = {}
    for kind, path in module_files.read_modules(folder, READ + SKIPPED):
        if kind == "Dense" and "Normalize" in modules:
            raise ValueError(f"{where}: a Dense after a Normalize is not supported; vectors are normalised at the end")
        modules.setdefault(kind, []).append(path)
    if not modules.get("Dense"):
        raise ValueError(f"{where} lists no Dense module: this is not a late-interaction checkpoint")
    return modules


def _pylate(where: Path, written: Mapping[str, Any]) -> ColBERTConfig:
    """PyLate: prefixes are tokens, and a default prompt (rare) is put in front of queries and documents alike."""
    prompts, name = get(where, written, OBJECT, "prompts"), get(where, written, NAME, "default_prompt_name")
    if name and name not in prompts:
        raise ValueError(f"{where}: default_prompt_name is {name!r}, but prompts has only {list(prompts)}")
    prompt = get(where, prompts, TEXT, name or "", "")
    expansion = get(where, written, FLAG, "do_query_expansion", True)
    words = written.get("skiplist_words")
    return ColBERTConfig(
        query_prefix=get(where, written, TEXT, "query_prefix", "[Q] "),
        document_prefix=get(where, written, TEXT, "document_prefix", "[D] "),
        query_prompt=prompt,
        document_prompt=prompt,
        query_length=get(where, written, SIZE, "query_length", 32),
        document_length=get(where, written, SIZE, "document_length", 180),
        do_query_expansion=expansion,
        attend_to_expansion_tokens=expansion and get(where, written, FLAG, "attend_to_expansion_tokens", False),
        skiplist_words=tuple(string.punctuation) if words is None else get(where, written, WORDS, "skiplist_words"),
    )


def _native(
    folder: Path, written: Mapping[str, Any], modules: Mapping[str, Sequence[Path]], tokenizer: Tokenizer
) -> ColBERTConfig:
    """sentence-transformers: prefixes are text (one token if it was added to the vocabulary), blanks are kept."""
    where, transformer = folder / TRANSFORMER, checkpoint.read_json(folder, TRANSFORMER)
    expansion = get(where, transformer, OBJECT, "query_expansion")
    if expansion and (expansion.get("strategy") != "fixed" or expansion.get("token") not in (None, "[MASK]")):
        raise ValueError(f"{where}: query_expansion {expansion} is not supported; only 'fixed' with [MASK]")
    mask = checkpoint.read_json(modules["MultiVectorMask"][0], "config.json") if "MultiVectorMask" in modules else {}
    if mask.get("keep_only_token_ids") is not None or mask.get("skiplist_tasks", ["document"]) != ["document"]:
        raise ValueError(f"{folder}: MultiVectorMask {mask} is not supported; only a skiplist on documents")
    words, limit = mask.get("skiplist_words"), tokenizer.max_length or 8192
    query_length = get(where, transformer, SIZE_OR_NULL, "query_length") or limit
    query_length = expansion.get("length") if expansion else query_length
    prompts = get(folder / SETTINGS, written, OBJECT, "prompts")
    query, document = (get(folder / SETTINGS, prompts, NAME, role) or "" for role in ("query", "document"))
    tokens = tokenizer.added_tokens  # any other word could merge with the text after it, so it is a prompt
    return ColBERTConfig(
        query_prefix=query if query in tokens else "",
        document_prefix=document if document in tokens else "",
        query_prompt="" if query in tokens else query,
        document_prompt="" if document in tokens else document,
        query_length=SIZE.check(f"{where}: query_length", query_length),
        document_length=get(where, transformer, SIZE_OR_NULL, "document_length") or limit,
        do_query_expansion=bool(expansion),
        attend_to_expansion_tokens=get(where, expansion, FLAG, "attend", False),
        skiplist_words=() if words is None else WORDS.check(f"{folder}: skiplist_words", words),
        skip_unknown=False,
        strip=False,
    )


def content(
    backbone: EncoderConfig,
    encoder: nn.Module,
    tokenizer: Tokenizer,
    dense: Sequence[nn.Module],
    config: ColBERTConfig,
    state: Mapping[str, Tensor] | None = None,
) -> Content:
    """What a PyLate 1.6 folder holds: the backbone at its root, each Dense in a folder of its own.

    PyLate strips blanks around every text. A model that does not (`strip=False`, read from a sentence-transformers
    folder) will do so after it is read back.

    Args:
        state: the tensors, under the names of `ColBERT.state_dict`; None: those of `encoder` and `dense`.

    Raises:
        TypeError: a layer of the head is not a Dense.
        ValueError: queries and documents have different prompts, which PyLate folders cannot express, or a tensor
            that cannot be saved.
    """
    if config.query_prompt != config.document_prompt:
        raise ValueError("PyLate folders hold no separate prompts for queries and documents: put them into the texts")
    skiplist = [
        word for word in config.skiplist_words if config.skip_unknown or tokenizer.token_to_id(word) is not None
    ]
    modules = [module_files.transformer_entry()]
    files: dict[str, File] = dict(tokenizer.files())
    parts = parts_of(encoder, dense, state)
    for index, (layer, tensors) in enumerate(zip(dense, parts.layers, strict=True), 1):
        modules.append(module_files.entry(index, f"{index}_Dense", "pylate.models.Dense.Dense"))
        files |= module_files.dense_files(f"{index}_Dense", index, layer, tensors)
    files["modules.json"] = modules
    files[TRANSFORMER] = {"max_seq_length": config.document_length - 1, "do_lower_case": tokenizer.do_lower_case}
    files[SETTINGS] = {
        "__version__": {"pytorch": torch.__version__},
        "model_type": "ColBERT",
        "prompts": {"query": "", "document": "", **({"default": config.query_prompt} if config.query_prompt else {})},
        "default_prompt_name": "default" if config.query_prompt else None,
        "similarity_fn_name": "MaxSim",
        "query_prefix": config.query_prefix,
        "document_prefix": config.document_prefix,
        "query_length": config.query_length,
        "document_length": config.document_length,
        "attend_to_expansion_tokens": config.attend_to_expansion_tokens,
        "skiplist_words": skiplist,
        "do_query_expansion": config.do_query_expansion,
    }
    return Content(backbone.to_hf(), parts.encoder, files)


def parts_of(encoder: nn.Module, dense: Sequence[nn.Module], state: Mapping[str, Tensor] | None) -> module_files.Parts:
    """The tensors of a ColBERT by the module that holds them; see `content`."""
    layers = {f"dense.{index}.": layer for index, layer in enumerate(dense)}
    return module_files.parts_of("a ColBERT", encoder, layers, state)
