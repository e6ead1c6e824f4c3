"""Where the weights of a stage come from: a smaller model, and the same model with longer positions.

A new `Encoder` has the Megatron initialisation of ModernBERT (`Encoder.reset_parameters`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..checkpoint import is_sharded
from ..config import EncoderConfig
from ..pretrained import Pretrained
from .groups import PLACE

if TYPE_CHECKING:
    from ..encoder import Encoder


def tile_from(model: Pretrained, smaller: Pretrained) -> None:
    """Fill the weights of `model` with those of a trained smaller one, which converges faster than a random start.

    ModernBERT-large began so, from ModernBERT-base ("center tiling", arXiv 2412.13663, 2.2.2). The smaller tensor is in
    the middle, and its rows and columns are repeated around it. Q, K and V are tiled one by one and by whole heads,
    the halves of `Wi` one by one. A layer gets the one at the same relative depth (Gopher, arXiv 2112.11446). The norm
    before attention, which the first layer of the smaller model lacks, stays as it is.

    Args:
        model: changed in place. Not yet sharded.
        smaller: of the same class, an `Encoder` or a head with one.

    Raises:
        ValueError: a `model` that is smaller in something, or one with another vocabulary, head width or biases.
    """
    big, small = model.base_model.config, smaller.base_model.config
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if getattr(small, name) > getattr(big, name):
            raise ValueError(f"{name} is {getattr(big, name)}, but {getattr(small, name)} in the smaller model")
    for name in ("vocab_size", "head_dim"):
        if getattr(small, name) != getattr(big, name):
            raise ValueError(
                f"{name} is {getattr(big, name)}, but must be {getattr(small, name)} as in the smaller model"
            )
    new, old = model.state_dict(), smaller.state_dict()
    if is_sharded(new) or is_sharded(old):
        raise ValueError("a model is sharded over ranks: tile before sharding")
    sources = {name: _source(name, big, small) for name in new}
    # The first layer of an encoder has no norm before its attention.
    unlike = [name for name in {*sources.values()} ^ old.keys() if "layers.0.attn_norm." not in name]
    if unlike:
        raise ValueError(
            f"the models differ in {', '.join(sorted(unlike))}: both must have one head and the same biases"
        )
    with torch.no_grad():
        for name, source in sources.items():
            if source in old:
                new[name].copy_(_tiled(name, old[source], new[name].shape, big.head_dim))


def _source(name: str, big: EncoderConfig, small: EncoderConfig) -> str:
    """The name of the tensor of the smaller model: a layer at the same relative depth.

    FlexBERT rounds so too, and fails where that gives one layer too many.
    """
    place = PLACE.match(name)
    if place is None or place["layer"] is None:
        return name
    depth = round(int(place["layer"]) * small.num_hidden_layers / big.num_hidden_layers)
    start, end = place.span("layer")
    return f"{name[:start]}{min(depth, small.num_hidden_layers - 1)}{name[end:]}"


def _tiled(name: str, old: Tensor, shape: torch.Size, head_dim: int) -> Tensor:
    """`old` grown to `shape`. An axis is of `parts` parts that are tiled one by one, in steps of `unit`."""
    axes = [(1, 1)] * old.ndim
    if ".attn.Wqkv." in name:
        axes[0] = (3, head_dim)
    elif ".mlp.Wi." in name:
        axes[0] = (2, 1)
    elif name.endswith(".attn.Wo.weight"):
        axes[1] = (1, head_dim)
    for axis, (parts, unit) in enumerate(axes):
        rows = _centered(old.shape[axis] // unit // parts, shape[axis] // unit // parts)
        rows = torch.cat([rows + part * (old.shape[axis] // unit // parts) for part in range(parts)])
        rows = (rows[:, None] * unit + torch.arange(unit, device="cpu")).flatten()
        old = old.index_select(axis, rows.to(old.device))
    return old


def _centered(old: int, new: int) -> Tensor:
    """For each of `new` places, which of the `old` ones it repeats, so that these are in the middle in their order."""
    return (torch.arange(new, device="cpu") - (new - old) // 2) % old


def set_context(model: Pretrained, *, length: int, global_rope_theta: float, local_rope_theta: float) -> None:
    """Set the positions of an encoder, or of a head with one, to those of another stage, in place.

    The config and the angles of all layers change, weights do not. For the extension of the context: global layers get
    another theta, and the training that follows fits the weights to it.

    Raises:
        ValueError: a length or a theta that no encoder can have; nothing is changed.
    """
    encoder = cast("Encoder", model.base_model)
    config = encoder.config.changed(
        {
            "max_position_embeddings": length,
            "global_rope_theta": global_rope_theta,
            "local_rope_theta": local_rope_theta,
        }
    )
    encoder.config, encoder.thetas = config, tuple(map(config.rope_theta, range(config.num_hidden_layers)))
