"""Which parameters of a model share a learning rate and a weight decay."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..checkpoint import plain_names

# Where a parameter is in an encoder, whatever has the encoder: a head, a model of transformers, an adapter of peft.
PLACE = re.compile(r"((base_model|encoder|model|bert)\.)*(embeddings|layers\.(?P<layer>\d+))\.")


def parameter_groups(
    model: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    layer_decay: float = 1.0,
    decay_embeddings: bool = True,
) -> list[dict[str, Any]]:
    """The trainable parameters of an encoder, or of a head with its encoder, as groups for any PyTorch optimizer.

    Norms and biases have no weight decay, as in ModernBERT and Ettin. Tied parameters are in one group, once.

    Args:
        layer_decay: a layer has the learning rate of the layer above it times this, the embeddings that of the first
            layer times this. Heads and the final norm have `learning_rate`. About 0.8 to 0.95 for fine-tuning on few
            labels, so that lower layers keep what they have learnt (ELECTRA, arXiv 2003.10555).
        decay_embeddings: whether embedding tables have weight decay, as in ModernBERT. Without gradient, the row of a
            rare token shrinks in each step.

    Raises:
        ValueError: a model without trainable parameters, or `layer_decay` for one without layers.
    """
    places = list(_places(model))
    depth = 1 + max((layer for _, layer in places if layer is not None), default=-1)
    if layer_decay != 1 and depth == 0:
        raise ValueError(f"layer_decay is {layer_decay}, but {type(model).__name__} has no parameter named layers.0.…")
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for parameter, layer in places:
        if parameter.requires_grad:
            above = 0 if layer is None else depth - layer
            spared = parameter.ndim < 2 or (layer == EMBEDDINGS and not decay_embeddings)
            key = learning_rate * layer_decay**above, 0.0 if spared else weight_decay
            group = groups.setdefault(key, {"params": [], "lr": key[0], "weight_decay": key[1]})
            group["params"].append(parameter)
    if not groups:
        raise ValueError(f"{type(model).__name__} has no parameter with requires_grad: there is nothing to train")
    return list(groups.values())


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The trainable weight matrices of an encoder's layers, for Muon. Embeddings and heads are not among them."""
    places = _places(model)
    return [x for x, layer in places if layer not in (None, EMBEDDINGS) and x.ndim == 2 and x.requires_grad]


EMBEDDINGS = -1


def _places(model: nn.Module) -> Iterator[tuple[nn.Parameter, int | None]]:
    """Each parameter once, with the number of its layer: `EMBEDDINGS` below the first one, None above the last one.

    The names are those of a plain module, without what `torch.compile`, DDP and FSDP add to them.
    """
    for name, parameter in plain_names(dict(model.named_parameters())).items():
        place = PLACE.match(name)
        layer = None if place is None else int(place["layer"] or EMBEDDINGS)
        yield parameter, layer  # pyright: ignore[reportReturnType]  # `plain_names` hands on what it is given
