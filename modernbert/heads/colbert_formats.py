"""A ColBERT folder in the formats of two more libraries: sentence-transformers 6 and Stanford's ColBERT.

The numbers of the weights are the same in each. What a format cannot say raises a ValueError.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tokenizers
import torch
from tokenizers.normalizers import Lowercase
from tokenizers.normalizers import Sequence as Normalizers
from torch import Tensor, nn

from ..checkpoint import Content, unwrapped
from ..config import EncoderConfig
from ..tokenizer import CONFIG, USUAL_NAMES, Tokenizer
from . import colbert_files, module_files
from .colbert_files import METADATA, ColBERTConfig
from .dense import Dense
from .module_files import SETTINGS, TRANSFORMER, File

TOKENS = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}
STANFORD = "Stanford's ColBERT"


def native(
    backbone: EncoderConfig,
    encoder: nn.Module,
    tokenizer: Tokenizer,
    dense: Sequence[nn.Module],
    config: ColBERTConfig,
    state: Mapping[str, Tensor] | None = None,
) -> Content:
    """What a folder of a `MultiVectorEncoder` holds. Arguments as in `colbert_files.content`.

    There prefixes are the beginnings of texts, blanks around a text are kept, and tokenizer.json lower-cases.
    """
    home = "sentence_transformers.base.modules"
    files: dict[str, File] = _with_prefixes(tokenizer, config)
    modules = [module_files.entry(0, "", f"{home}.transformer.Transformer")]
    parts = colbert_files.parts_of(encoder, dense, state)
    for place, (layer, tensors) in enumerate(zip(dense, parts.layers, strict=True), 1):
        modules.append(module_files.entry(place, f"{place}_Dense", f"{home}.dense.Dense"))
        own = module_files.dense_files(f"{place}_Dense", place, layer, tensors)
        settings = own[f"{place}_Dense/config.json"]
        assert isinstance(settings, dict)
        files |= {**own, f"{place}_Dense/config.json": settings | TOKENS}
    mask, norm = len(modules), len(modules) + 1
    kind = "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask"
    modules.append(module_files.entry(mask, f"{mask}_MultiVectorMask", kind))
    modules.append(module_files.entry(norm, f"{norm}_Normalize", f"{home}.normalize.Normalize"))
    files[f"{mask}_MultiVectorMask/config.json"] = {
        "skiplist_words": _skiplist(tokenizer, config),
        "skiplist_tasks": ["document"],
        "keep_only_token_ids": None,
    }
    files[f"{norm}_Normalize/config.json"] = TOKENS
    files["modules.json"] = modules
    expansion = {"strategy": "fixed", "attend": config.attend_to_expansion_tokens, "token": None}
    files[TRANSFORMER] = {
        "transformer_task": "feature-extraction",
        "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        "module_output_name": "token_embeddings",
        "query_length": config.query_length,
        "document_length": config.document_length,
        **({"query_expansion": expansion | {"length": config.query_length}} if config.do_query_expansion else {}),
    }
    files[SETTINGS] = {
        "__version__": {"pytorch": torch.__version__},
        "model_type": "MultiVectorEncoder",
        "prompts": {
            "query": config.query_prefix + config.query_prompt,
            "document": config.document_prefix + config.document_prompt,
        },
        "default_prompt_name": None,
        "similarity_fn_name": "maxsim",
    }
    return Content(backbone.to_hf(), parts.encoder, files)


def stanford(
    backbone: EncoderConfig,
    encoder: nn.Module,
    tokenizer: Tokenizer,
    dense: Sequence[nn.Module],
    config: ColBERTConfig,
    state: Mapping[str, Tensor] | None = None,
) -> Content:
    """What a folder of Stanford's ColBERT holds: encoder and head in one file, settings in artifact.metadata.

    Arguments as in `colbert_files.content`.

    Raises:
        ValueError: a head of several layers, a query without expansion, or another setting that it cannot say.
    """
    layer = unwrapped(dense[0])
    if len(dense) > 1 or not isinstance(layer, Dense) or not layer.is_projection or layer.linear.bias is not None:
        raise ValueError(f"the head of {STANFORD} is one matrix, without bias, activation or residual")
    if not config.do_query_expansion:
        raise ValueError(f"{STANFORD} fills every query up with [MASK], but this model has do_query_expansion=False")
    if set(_skiplist(tokenizer, config)) != set(string.punctuation):
        raise ValueError(f"{STANFORD} skips string.punctuation in documents, but this model has another skiplist")
    if config.query_prompt or config.document_prompt:
        raise ValueError(f"{STANFORD} has no prompts: put them into the texts")
    if not (config.query_prefix and config.document_prefix):
        raise ValueError(f"{STANFORD} puts a token in front of queries and one in front of documents: name both")
    if tokenizer.do_lower_case:
        raise ValueError(f"{STANFORD} lower-cases nothing outside of tokenizer.json, as this model does")
    pad = _pad_token(tokenizer)
    files: dict[str, File] = dict(tokenizer.files())
    for name in (CONFIG, "special_tokens_map.json"):
        content = files[name]
        assert isinstance(content, bytes)
        files[name] = json.loads(content) | {"pad_token": pad}
    parts = colbert_files.parts_of(encoder, dense, state)
    tensors = {f"model.{name}": tensor for name, tensor in parts.encoder.items()}
    tensors |= {name: tensor.cpu().contiguous() for name, tensor in parts.layers[0].items()}
    files[METADATA] = {
        "query_token_id": config.query_prefix,
        "doc_token_id": config.document_prefix,
        "query_maxlen": config.query_length,
        "doc_maxlen": config.document_length,
        "attend_to_mask_tokens": config.attend_to_expansion_tokens,
        "mask_punctuation": True,
        "dim": layer.linear.out_features,
        "similarity": "cosine",
    }
    hf: dict[str, Any] = backbone.to_hf() | {
        "architectures": ["HF_ColBERT"],
        "pad_token_id": tokenizer.token_to_id(pad),
    }
    return Content(hf, tensors, files)


WRITERS: dict[str, Callable[..., Content]] = {
    "pylate": colbert_files.content,
    "sentence-transformers": native,
    "stanford": stanford,
}
"""By the name of the format, the usual one first."""


def _skiplist(tokenizer: Tokenizer, config: ColBERTConfig) -> list[str]:
    """The words that are tokens; if others mean the unknown token, that one too."""
    known = [word for word in config.skiplist_words if tokenizer.token_to_id(word) is not None]
    if len(known) == len(config.skiplist_words) or not config.skip_unknown or tokenizer.unk_token_id is None:
        return known
    unknown = tokenizer.id_to_token(tokenizer.unk_token_id)
    return known if unknown is None or unknown in known else [*known, unknown]


def _pad_token(tokenizer: Tokenizer) -> str:
    """A token for padding that is not [MASK]: Stanford's ColBERT gives rows of the pad token no vector."""
    own = [] if tokenizer.pad_token_id is None else [tokenizer.id_to_token(tokenizer.pad_token_id)]
    for name in [*own, *USUAL_NAMES["pad_token"]]:
        if name is not None and tokenizer.token_to_id(name) not in (None, tokenizer.mask_token_id):
            return name
    raise ValueError(f"{STANFORD} needs a pad token that is not the mask token, and the tokenizer has none")


def _with_prefixes(tokenizer: Tokenizer, config: ColBERTConfig) -> dict[str, File]:
    """The files of a tokenizer that lower-cases in tokenizer.json, and finds a prefix at the beginning of a text."""
    files: dict[str, File] = dict(tokenizer.files())
    content = files["tokenizer.json"]
    assert isinstance(content, bytes)
    backend = tokenizers.Tokenizer.from_str(content.decode())
    if tokenizer.do_lower_case:
        rest = backend.normalizer
        backend.normalizer = Normalizers([Lowercase()] if rest is None else [Lowercase(), rest])
    for prefix in filter(None, (config.query_prefix, config.document_prefix)):
        found = backend.encode(f"{prefix}a", add_special_tokens=False).ids[:1]
        if tokenizer.do_lower_case or found != [backend.token_to_id(prefix)]:
            backend.add_special_tokens([tokenizers.AddedToken(prefix, normalized=False, special=True)])
    return {**files, "tokenizer.json": backend.to_str().encode()}
