"""Folders of modules: what sentence-transformers, PyLate and MultiVectorEncoder have in common.

Every function that reads a file raises a ValueError with the file, the key and the value for one that is not supported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from .. import checkpoint
from ..checkpoint import state_of, unwrapped
from ..config import FLAG, OBJECT, SIZE, TEXT, EncoderConfig, Kind
from ..tokenizer import Tokenizer
from .dense import Dense
from .folders import SETTINGS as SETTINGS

T = TypeVar("T")
File = bytes | dict[str, Any] | list[Any]

TRANSFORMER = "sentence_bert_config.json"
MOST_MODULES = 32

# The classes of torch.nn that have no parameters and act on each number alone.
ACTIVATIONS = (
    "CELU ELU GELU Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish ReLU ReLU6 SELU SiLU Sigmoid "
    "Softplus Softsign Tanh Tanhshrink"
)


class Module(NamedTuple):
    """An entry of modules.json: the last part of its type, and its folder."""

    kind: str
    path: Path


def get(where: Path, content: Mapping[str, Any], kind: Kind[T], name: str, default: object = None) -> T:
    return kind.check(f"{where}: {name}", content.get(name, default))


def read_if_there(folder: Path, name: str) -> dict[str, Any]:
    return checkpoint.read_json(folder, name) if checkpoint.has_file(folder / name) else {}


def read_modules(folder: Path, known: Sequence[str]) -> list[Module]:
    """The modules of modules.json, of which the first is the Transformer, in the folder itself."""
    where = folder / "modules.json"
    modules: list[Module] = []
    entries = checkpoint.read_json(folder, where.name, list)
    if len(entries) > MOST_MODULES:
        raise ValueError(f"{where} lists {len(entries):,} modules; at most {MOST_MODULES} are read")
    for place, entry in enumerate(entries):
        module = OBJECT.check(f"{where}: a module", entry)
        name, path = get(where, module, TEXT, "type"), get(where, module, TEXT, "path")
        kind = name.rsplit(".", 1)[-1]
        if kind not in known:
            raise ValueError(f"{where}: module {name!r} is not supported; known: {tuple(known)}")
        if ".." in Path(path).parts or Path(path).is_absolute():
            raise ValueError(f"{where} points to {path!r}, outside the folder")
        if (kind == "Transformer", folder / path == folder) != (place == 0, place == 0):
            raise ValueError(f"{where}: module {place} is {kind} in {path!r}; only the first is a Transformer, in ''")
        if any(folder / path == other.path for other in modules):
            raise ValueError(f"{where} lists {path!r} twice")
        modules.append(Module(kind, folder / path))
    return modules


def read_dense(folder: Path, device: torch.device | str, dtype: torch.dtype, activation: str = "Identity") -> Dense:
    """The layer of a folder; `activation` is that of a file that names none."""
    where, config = folder / "config.json", checkpoint.read_json(folder, "config.json")
    named = get(where, config, TEXT, "activation_function", f"torch.nn.{activation}")
    package, _, name = named.rpartition(".")
    if not package.startswith("torch.nn") or name not in ACTIVATIONS.split():
        raise ValueError(f"{where}: activation_function {named!r:.80} is not one of {ACTIVATIONS}")
    with torch.device("meta"):
        layer = Dense(
            get(where, config, SIZE, "in_features"),
            get(where, config, SIZE, "out_features"),
            bias=get(where, config, FLAG, "bias", True),
            activation=name,
            residual=get(where, config, FLAG, "use_residual", False),
        )
    checkpoint.load_weights(layer, folder, device=device, dtype=dtype, prefix="", ignore=())
    return layer


def check_widths(dense: Sequence[Dense], width: int, folder: Path | None = None) -> int:
    """The width that the last layer gives. The first one takes `width` numbers.

    Raises:
        ValueError: a layer that does not take what the one before it gives, with the `folder` of the layers.
    """
    for layer in dense:
        if layer.linear.in_features != width:
            where = "" if folder is None else f"{folder}: "
            raise ValueError(f"{where}a Dense takes {layer.linear.in_features} features, but is given {width}")
        width = layer.linear.out_features
    return width


def check_vocabulary(folder: Path, tokenizer: Tokenizer, encoder: EncoderConfig) -> None:
    """Raise a ValueError for ids of the tokenizer without a row in the table of the encoder."""
    # The special tokens around a text have ids of their own in tokenizer.json, which may be outside its vocabulary.
    largest = max([tokenizer.vocab_size - 1, *tokenizer.encode_batch([""])[0].ids])
    if largest >= encoder.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has id {largest}, but the encoder only {encoder.vocab_size} tokens")


class Parts(NamedTuple):
    """The tensors to write of an encoder and of each layer behind it."""

    encoder: dict[str, Tensor]
    layers: list[dict[str, Tensor]]


def parts_of(
    model: str, encoder: nn.Module, layers: Mapping[str, nn.Module], state: Mapping[str, Tensor] | None
) -> Parts:
    """The tensors of a model, or those of `state`, under the names of its state dict.

    Args:
        model: the name of its class. layers: by the beginning of their names in the state dict, such as "dense.0.".

    Raises:
        ValueError: a tensor of no part, or one that cannot be saved.
    """
    parts = {"encoder.": encoder, **layers}
    if unknown := [name for name in state or () if not name.startswith(tuple(parts))]:
        what = ", ".join(unknown[:10])
        raise ValueError(f"state_dict has {what}: the names of {model} begin with {', '.join(parts)}")
    of_encoder, *of_layers = (state_of(part, _below(prefix, state)) for prefix, part in parts.items())
    return Parts(of_encoder, of_layers)


def _below(prefix: str, state: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    found = {name.removeprefix(prefix): tensor for name, tensor in (state or {}).items() if name.startswith(prefix)}
    return None if state is None else found


def dense_files(path: str, place: int, layer: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, File]:
    """The files of a Dense in the folder `path`. TypeError: a layer that is not one; `place` counts them."""
    layer = unwrapped(layer)
    if not isinstance(layer, Dense):
        raise TypeError(f"layer {place} of the head is a {type(layer).__name__}; PyLate folders hold Dense layers")
    activation = type(layer.activation)
    whole = {key: value.cpu().contiguous() for key, value in tensors.items()}
    config = {
        "in_features": layer.linear.in_features,
        "out_features": layer.linear.out_features,
        "bias": layer.linear.bias is not None,
        "activation_function": f"{activation.__module__}.{activation.__qualname__}",
        "use_residual": layer.residual is not None,
    }
    return {f"{path}/config.json": config, f"{path}/model.safetensors": to_safetensors(whole)}


def entry(place: int, path: str, kind: str) -> dict[str, Any]:
    """An entry of modules.json."""
    return {"idx": place, "name": str(place), "path": path, "type": kind}


def transformer_entry() -> dict[str, Any]:
    return entry(0, "", "sentence_transformers.models.Transformer")
