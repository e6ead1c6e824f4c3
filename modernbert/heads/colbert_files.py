"""ColBERT folders of PyLate 1.x, sentence-transformers 6 and Stanford: settings and head in, a PyLate folder out."""

from __future__ import annotations

import os
import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from .. import checkpoint as files
from ..config import KINDS, EncoderConfig
from ..tokenizer import Tokenizer

if TYPE_CHECKING:
    from .colbert import ColBERT, ColBERTConfig
    from .dense import Dense

SETTINGS = "config_sentence_transformers.json"
TRANSFORMER = "sentence_bert_config.json"
METADATA = "artifact.metadata"

# Modules by the last part of their type; the others have no meaning for late interaction.
READ = ("Transformer", "Dense", "MultiVectorMask")
SKIPPED = ("Normalize", "Pooling")  # normalising is part of our forward pass; PyLate drops both as well

# What values there may be, as rows of `config.KINDS`: of the fields of `ColBERTConfig`, of the arguments of `Dense`.
SETTING_KINDS: dict[str, str] = {
    "query_prefix": "Text",
    "document_prefix": "Text",
    "query_prompt": "Text",
    "document_prompt": "Text",
    "query_length": "Size",
    "document_length": "Size",
    "do_query_expansion": "bool",
    "attend_to_expansion_tokens": "bool",
    "skiplist_words": "Words",
    "skip_unknown": "bool",
    "strip": "bool",
}
DENSE_KINDS = {"in_features": "Size", "out_features": "Size", "bias": "bool", "activation": "Text", "residual": "bool"}
# Of torch.nn, those that have no parameters and take each number by itself.
ACTIVATIONS = (
    "CELU ELU GELU Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish ReLU ReLU6 SELU SiLU Sigmoid "
    "Softplus Softsign Tanh Tanhshrink"
)


class Layer(NamedTuple):
    """One layer of the head: the arguments of `Dense`, and its weights."""

    arguments: dict[str, Any]
    state: dict[str, Tensor]


def read(
    folder: Path, tokenizer: Tokenizer, device: torch.device | str, dtype: torch.dtype
) -> tuple[dict[str, Any], list[Layer]]:
    """Fields of `ColBERTConfig`, and the layers of the head."""
    if files.read_json(folder, "config.json").get("architectures") == ["HF_ColBERT"]:
        weight = files.read_state_dict(folder, device=device, dtype=dtype).get("linear.weight")
        if weight is None or weight.dim() != 2:
            raise ValueError(f"{folder} has no matrix linear.weight, which is the head of a HF_ColBERT")
        head = {"in_features": weight.shape[1], "out_features": weight.shape[0]}
        return _stanford(folder), [Layer(head, {"linear.weight": weight})]
    if not files.has_file(folder / "modules.json"):
        raise ValueError(
            f"{folder} has no modules.json, so no late-interaction head: make one with "
            "ColBERT.from_encoder(Encoder.from_pretrained(...), Tokenizer.from_pretrained(...))"
        )
    modules: dict[str, list[Path]] = {}
    for module in files.read_json(folder, "modules.json", list):
        module = _checked(folder / "modules.json", module, {"type": "Text", "path": "Text"})
        kind = module["type"].rsplit(".", 1)[-1]
        if kind not in (*READ, *SKIPPED):
            raise ValueError(
                f"{folder}/modules.json: module {module['type']!r} is not supported; known: {READ + SKIPPED}"
            )
        modules.setdefault(kind, []).append(_inside(folder, module["path"]))
    if not modules.get("Dense"):
        raise ValueError(f"{folder}/modules.json lists no Dense module: this is no late-interaction checkpoint")
    written = files.read_json(folder, SETTINGS) if files.has_file(folder / SETTINGS) else {}
    native = written.get("model_type") == "MultiVectorEncoder"
    written |= _checked(folder / SETTINGS, written, {"prompts": "Object", "default_prompt_name": "Name"})
    settings = _native(folder, written, modules, tokenizer) if native else _pylate(written)
    layers = [
        Layer(_dense_arguments(path), files.read_state_dict(path, device=device, dtype=dtype))
        for path in modules["Dense"]
    ]
    return _checked(folder / SETTINGS, settings, {name: SETTING_KINDS[name] for name in settings}), layers


def _checked(where: Path, values: Any, kinds: dict[str, str]) -> dict[str, Any]:
    """The values named in `kinds`, as `config.KINDS` has them stored; ValueError for one that is not of its kind."""
    found = {name: values.get(name) if isinstance(values, dict) else None for name in kinds}
    for name, kind in kinds.items():
        accepts, _, wanted = KINDS[kind]
        if not accepts(found[name]):
            raise ValueError(f"{where}: {name} is {found[name]!r:.80}, but must be {wanted}")
    return {name: KINDS[kind][1](found[name]) for name, kind in kinds.items()}


def _stanford(folder: Path) -> dict[str, Any]:
    """artifact.metadata as PyLate reads it: always expansion, the whole skiplist, and its own defaults for the rest."""
    written = files.read_json(folder, METADATA) if files.has_file(folder / METADATA) else {}
    names = {
        "query_prefix": ("query_token_id", "[unused0]"),
        "document_prefix": ("doc_token_id", "[unused1]"),
        "query_length": ("query_maxlen", 32),
        "document_length": ("doc_maxlen", 180),
        "attend_to_expansion_tokens": ("attend_to_mask_tokens", False),
    }
    settings = {ours: written.get(theirs, default) for ours, (theirs, default) in names.items()}
    return _checked(folder / METADATA, settings, {name: SETTING_KINDS[name] for name in names}) | {
        "do_query_expansion": True
    }


def _pylate(written: dict[str, Any]) -> dict[str, Any]:
    """PyLate: prefixes are tokens, and a default prompt (rare) goes before queries and documents alike."""
    prompt = written["prompts"].get(written["default_prompt_name"] or "", "")
    expansion = written.get("do_query_expansion", True)
    words = written.get("skiplist_words")
    return {
        "query_prefix": written.get("query_prefix", "[Q] "),
        "document_prefix": written.get("document_prefix", "[D] "),
        "query_prompt": prompt,
        "document_prompt": prompt,
        "query_length": written.get("query_length", 32),
        "document_length": written.get("document_length", 180),
        "do_query_expansion": expansion,
        "attend_to_expansion_tokens": expansion and written.get("attend_to_expansion_tokens", False),
        "skiplist_words": tuple(string.punctuation) if words is None else words,
    }


def _native(
    folder: Path, written: dict[str, Any], modules: dict[str, list[Path]], tokenizer: Tokenizer
) -> dict[str, Any]:
    """sentence-transformers: prefixes are text (one token, where it was added to the vocabulary), blanks stay."""
    transformer = files.read_json(folder, TRANSFORMER)
    expansion = _checked(folder / TRANSFORMER, transformer, {"query_expansion": "Object"})["query_expansion"]
    if expansion and (expansion.get("strategy") != "fixed" or expansion.get("token") not in (None, "[MASK]")):
        raise ValueError(
            f"{folder}/{TRANSFORMER}: query_expansion {expansion} is not supported; only 'fixed' with [MASK]"
        )
    mask = files.read_json(modules["MultiVectorMask"][0], "config.json") if "MultiVectorMask" in modules else {}
    if mask.get("keep_only_token_ids") is not None or mask.get("skiplist_tasks", ["document"]) != ["document"]:
        raise ValueError(f"{folder}: MultiVectorMask {mask} is not supported; only a skiplist on documents")
    limit = tokenizer.max_length or 8192
    settings = {
        "query_length": expansion.get("length") if expansion else transformer.get("query_length") or limit,
        "document_length": transformer.get("document_length") or limit,
        "do_query_expansion": bool(expansion),
        "attend_to_expansion_tokens": expansion.get("attend", False),
        "skiplist_words": mask.get("skiplist_words") or (),
        "skip_unknown": False,
        "strip": False,
    }
    prompts = _checked(folder / SETTINGS, written["prompts"], {"query": "Name", "document": "Name"})
    for role in ("query", "document"):
        prompt = prompts[role] or ""
        is_token = prompt in tokenizer.added_tokens  # an ordinary word could merge with what follows it
        settings |= {f"{role}_prefix": prompt if is_token else "", f"{role}_prompt": "" if is_token else prompt}
    return settings


def _dense_arguments(folder: Path) -> dict[str, Any]:
    config = files.read_json(folder, "config.json")
    arguments = {
        "in_features": config.get("in_features"),
        "out_features": config.get("out_features"),
        "bias": config.get("bias", True),
        "activation": config.get("activation_function", "torch.nn.modules.linear.Identity"),
        "residual": config.get("use_residual", False),
    }
    arguments = _checked(folder / "config.json", arguments, DENSE_KINDS)
    path, name = arguments["activation"].rpartition(".")[::2]
    if not path.startswith("torch.nn") or name not in ACTIVATIONS.split():
        raise ValueError(f"{folder}/config.json: activation {arguments['activation']!r:.80} is none of {ACTIVATIONS}")
    return arguments | {"activation": name}


def check(
    folder: Path, encoder: EncoderConfig, tokenizer: Tokenizer, dense: Sequence[Dense], config: ColBERTConfig
) -> None:
    """Raise a ValueError where parts that are each sound are not of one model."""
    width = encoder.hidden_size
    for layer in dense:
        if layer.linear.in_features != width:
            raise ValueError(f"{folder}: a Dense takes {layer.linear.in_features} features, but is given {width}")
        width = layer.linear.out_features
    # Tokens around a text have ids of their own in tokenizer.json, which its vocabulary need not have.
    largest = max([tokenizer.vocab_size - 1, *tokenizer.encode_batch([""])[0].ids])
    if largest >= encoder.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has id {largest}, but the encoder only {encoder.vocab_size} tokens")
    if config.do_query_expansion and config.query_length > encoder.max_position_embeddings:
        limit = f"max_position_embeddings {encoder.max_position_embeddings}"
        raise ValueError(f"{folder}: queries are expanded to {config.query_length} tokens, beyond {limit}")


def _inside(folder: Path, name: str) -> Path:
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise ValueError(f"{folder}/modules.json points to {name!r}, outside of the folder")
    return folder / name


def write(folder: str | os.PathLike[str], colbert: ColBERT) -> None:
    """Write a PyLate 1.6 folder: the backbone at its root, each Dense in a folder of its own. Atomic.

    PyLate strips blanks around every text; a model that does not (`strip=False`, read from a sentence-transformers
    folder) does so once it is read back.
    """
    config, tokenizer = colbert.config, colbert.tokenizer
    skiplist = [
        word for word in config.skiplist_words if config.skip_unknown or tokenizer.token_to_id(word) is not None
    ]
    if config.query_prompt != config.document_prompt:
        raise ValueError("PyLate folders hold no separate prompts for queries and documents: put them into the texts")
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    extra: dict[str, Any] = dict(tokenizer.files())
    for index, layer in enumerate(colbert.dense, 1):
        name = f"{index}_Dense"
        modules.append({"idx": index, "name": str(index), "path": name, "type": "pylate.models.Dense.Dense"})
        extra[f"{name}/config.json"] = _dense_config(layer)  # pyright: ignore
        state = {key: value.detach().cpu().contiguous() for key, value in layer.state_dict().items()}
        extra[f"{name}/model.safetensors"] = to_safetensors(state)
    extra["modules.json"] = modules
    extra[TRANSFORMER] = {
        "max_seq_length": config.document_length - 1,
        "do_lower_case": tokenizer.do_lower_case,
    }
    extra[SETTINGS] = {
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
    encoder = colbert.encoder
    files.save(folder, config=encoder.config.to_hf(), state=encoder.state_dict(), files=extra)


def _dense_config(layer: Dense) -> dict[str, Any]:
    activation = type(layer.activation)
    return {
        "in_features": layer.linear.in_features,
        "out_features": layer.linear.out_features,
        "bias": layer.linear.bias is not None,
        "activation_function": f"{activation.__module__}.{activation.__qualname__}",
        "use_residual": layer.use_residual,
    }
