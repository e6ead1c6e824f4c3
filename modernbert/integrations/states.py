"""What is inside of an encoder: the residual stream at chosen layers, and maps of attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

import modernbert_kernels as ops

from ..encoder import Encoder, Layer, ropes, take_rows
from ..modules import add_norm
from ..packed import check_packed, check_rows
from ..packing import Packed

MOST_TOKENS = 1024
"""Of maps of attention, which hold a number for each pair of tokens in each head: 50 MB a layer of ModernBERT-base."""


def hidden_states(
    encoder: Encoder,
    batch: Packed,
    inputs_embeds: Tensor | None = None,
    *,
    layers: Sequence[int] | None = None,
    rows: Tensor | None = None,
) -> list[Tensor]:
    """The residual stream at `layers`, `[T, D]` each, or `[Q, D]` of `rows`, on the way of `Encoder.forward`.

    Layers behind the last of these are not computed, and only `rows` leave the one before it.

    Args:
        layers: 0 for the embeddings, n for what has passed n layers. The last, N or -1, is after the final norm, as in
            transformers 5. None: all N + 1.
        rows: `[Q]` integers, increasing; None: all.

    Raises:
        ValueError: a layer that is not there; what `Encoder` refuses.
    """
    count = len(encoder.layers)
    wanted = _places(layers, count + 1)
    check_packed(batch)
    if rows is not None:
        check_rows(rows, batch.num_tokens)
    rope_of = ropes(batch, encoder.thetas, encoder.config.head_dim)
    x_TD, delta_TD = encoder.embeddings(batch.input_ids, inputs_embeds), None
    last, found = max(wanted, default=-1), {}
    for place in range(last + 1):
        if place in wanted:
            state_TD = add_norm(x_TD, delta_TD, encoder.final_norm)[1] if place == count else _sum(x_TD, delta_TD)
            found[place] = take_rows(state_TD, None if 0 < place == last else rows)
        if place < last:
            rows_of_layer = rows if place == last - 1 else None
            layer = encoder.layers[place]
            x_TD, delta_TD = layer(x_TD, delta_TD, batch, rope_of[encoder.thetas[place]], rows_of_layer)
    return [found[place] for place in wanted]


def attention_maps(encoder: Encoder, batch: Packed, *, layers: Sequence[int] | None = None) -> list[list[Tensor]]:
    """For each of `layers` the map of each text, `[H, n, n]`: in row i the weights with which token i reads each token.

    They are those of the reference, without dropout; a fast backend never makes them. A row that sees nothing is 0.

    Args:
        layers: from 0, or from the end with negative numbers; None: all N.

    Raises:
        ValueError: more than `MOST_TOKENS` tokens, or a layer that is not there; what `Encoder` refuses.
    """
    check_size(batch.num_tokens)
    places = _places(layers, len(encoder.layers))
    states = hidden_states(encoder, batch, layers=places)
    return [maps_of_layer(encoder, batch, place, state) for place, state in zip(places, states, strict=True)]


def maps_of_layer(encoder: Encoder, batch: Packed, place: int, state_TD: Tensor) -> list[Tensor]:
    """The maps of one layer, which reads the residual stream `state_TD`."""
    layer, config = cast("Layer", encoder.layers[place]), encoder.config
    h_TD = state_TD if layer.attn_norm is None else layer.attn_norm(state_TD)
    qkv_T3HK = layer.attn.Wqkv(h_TD).unflatten(1, (3, config.num_attention_heads, config.head_dim))
    table = ops.rotary_table(batch.positions, encoder.thetas[place], config.head_dim)
    q_THK, k_THK, _ = ops.rotary.reference(qkv_T3HK, *table).unbind(1)
    keys = batch.lengths if batch.key_lengths is None else batch.key_lengths.tolist()
    texts = zip(q_THK.split(batch.lengths), k_THK.split(batch.lengths), keys, strict=True)
    return [_map(*text, layer.attn.window) for text in texts]


def check_size(tokens: int) -> None:
    """Raise a ValueError for more tokens than maps of attention are made of."""
    if tokens > MOST_TOKENS:
        what = f"maps of attention are made of at most {MOST_TOKENS:,} tokens, padding included, got {tokens:,}"
        raise ValueError(f"{what}: pass fewer or shorter texts")


def _map(q_nHK: Tensor, k_nHK: Tensor, keys: int, window: int | None) -> Tensor:
    place_n = torch.arange(len(q_nHK), device=q_nHK.device)
    visible_nn = (place_n < keys).expand(len(q_nHK), -1)
    if window is not None:
        visible_nn = visible_nn & ((place_n[:, None] - place_n).abs() <= window)
    scores_Hnn = q_nHK.transpose(0, 1) @ k_nHK.permute(1, 2, 0) * q_nHK.shape[-1] ** -0.5
    dtype = torch.promote_types(scores_Hnn.dtype, torch.float32)
    weights_Hnn = scores_Hnn.masked_fill(~visible_nn, -torch.inf).softmax(-1, dtype=dtype)
    return weights_Hnn.masked_fill(~visible_nn.any(-1, keepdim=True), 0).to(q_nHK.dtype)


def _sum(x_TD: Tensor, delta_TD: Tensor | None) -> Tensor:
    # A copy, because a layer that is given no delta writes into its x.
    return x_TD.clone() if delta_TD is None else x_TD + delta_TD


def _places(given: Sequence[int] | None, count: int) -> list[int]:
    """Layers among `count`, as positive numbers; None: all."""
    for place in given or ():
        if not isinstance(place, int) or isinstance(place, bool) or not -count <= place < count:
            raise ValueError(f"layers has {place!r:.60}, but this encoder has 0 to {count - 1}")
    return list(range(count)) if given is None else [place % count for place in given]
