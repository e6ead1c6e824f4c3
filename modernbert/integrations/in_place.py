"""A live model of transformers takes the classes of `packed_classes.py`, which compute packed, or leaves them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn
from transformers.models.modernbert import modeling_modernbert as theirs

from ..config import EncoderConfig
from .packed_classes import PACKED, InPlace, check_weights

M = TypeVar("M", bound=nn.Module)


def pack(model: M) -> M:
    """See `transformers.pack_in_place`."""
    found = _models_in(model)
    for name, inner in found:
        _check_parts(name, inner)
        check_weights(inner)
    known = [_in_place(inner, model) for _, inner in found]
    for (_, inner), facts in zip(found, known, strict=True):
        vars(inner)["in_place"] = facts
        for part in _parts(inner):
            part.__class__ = PACKED.get(type(part), type(part))
    return model


def unpack_all(model: M) -> M:
    """See `transformers.unpack_in_place`."""
    found = _models_in(model)
    for name, inner in found:
        _check_parts(name, inner)
    replaced = {cls: own for own, cls in PACKED.items()}
    for _, inner in found:
        vars(inner).pop("in_place", None)
        for part in _parts(inner):
            part.__class__ = replaced.get(type(part), type(part))
    return model


def _models_in(model: nn.Module) -> list[tuple[str, theirs.ModernBertModel]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module with a ModernBertModel inside, got a {type(model).__name__}")
    found = [(name, each) for name, each in model.named_modules() if isinstance(each, theirs.ModernBertModel)]
    if not found:
        raise TypeError(
            f"this {type(model).__name__} has no ModernBertModel of transformers inside, so it stays as it is"
        )
    return found


def _parts(inner: theirs.ModernBertModel) -> Iterator[nn.Module]:
    yield inner
    layer: Any
    for layer in inner.layers:
        yield from (layer, layer.attn, layer.mlp)


def _check_parts(name: str, inner: theirs.ModernBertModel) -> None:
    """Raise TypeError for a part that does not run transformers' forward, or ours."""
    known = {*PACKED, *PACKED.values()}
    for part in _parts(inner):
        if type(part) not in known or "forward" in vars(part):
            what = "has another forward" if type(part) in known else "is a class of its own"
            raise TypeError(
                f"{name or 'the model'}: {type(part).__name__} {what}, such as of a wrapper, of sharding or of "
                "offloading: pack or unpack the model before that"
            )


def _in_place(inner: theirs.ModernBertModel, model: nn.Module) -> InPlace:
    """What the model needs to know of its config and of the modules around it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of keys that others keep in a config
        # A host that cuts the table, such as PyLate, leaves the ids of special tokens, which do not matter here.
        known = {key: value for key, value in inner.config.to_dict().items() if not key.endswith("_token_id")}
        config = EncoderConfig.from_hf(known)
    around = [each for each in model.modules() if any(part is inner for part in each.modules())]
    return InPlace(
        tuple((config.rope_theta(i), None if config.is_global(i) else config.window) for i in range(len(inner.layers))),
        config.head_dim,
        reads_padding=any(isinstance(each, theirs.ModernBertForQuestionAnswering) for each in around),
        document_prefix=next((prefix for each in around if (prefix := _document_prefix(each)) is not None), None),
    )


def _document_prefix(host: Any) -> int | None:
    """The token that PyLate, or a `MultiVectorEncoder`, puts behind [CLS] in documents; None if queries may have it."""
    if hasattr(host, "document_prefix_id"):
        query, document = host.query_prefix_id, host.document_prefix_id
        return document if None not in (query, document) and query != document else None
    prompts: Any = getattr(host, "prompts", None)
    tokenizer: Any = getattr(host, "tokenizer", None)
    if not isinstance(prompts, dict) or not prompts.get("query") or not hasattr(tokenizer, "get_added_vocab"):
        return None
    document = tokenizer.get_added_vocab().get(prompts.get("document"))
    query = tokenizer(prompts["query"], add_special_tokens=False)["input_ids"]
    return None if document in query else document
