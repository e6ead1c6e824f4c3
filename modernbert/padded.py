"""The padded entrance: a `[B, S]` batch of another library as a `Packed`, with every row that the library may score."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from modernbert_kernels.dispatch import recorded

from .masks import check_padded
from .packed import Packed
from .packing import in_front_of_graph, pack, padded_ids


class Vocabulary(Protocol):
    """What this file needs of an `EncoderConfig`, or of a config of transformers."""

    vocab_size: int
    pad_token_id: int | None


def pack_padded(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    config: Vocabulary,
    *,
    query_mask: Tensor | None = None,
    hidden_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Packed:
    """`pack` that keeps tokens under the mask, such as the unattended [MASK] tokens of query expansion.

    Hugging Face's model computes every row. Those under the mask see the real tokens, unseen themselves, and a library
    may score them. Here they are query-only rows, and only padding is dropped: `config.pad_token_id`, or 0 if it is
    None. Without ids, rows in front of the real tokens are padding, and those after them are not.

    A batch that is expanded by its pad token looks like padding: pass its `query_mask`. Where `torch.export` and the
    like record a program, all tokens in front of the real ones are padding.

    Args:
        input_ids, attention_mask, position_ids: as in `pack`.
        query_mask: as in `pack`; None: found as above.
        hidden_mask: `[B, S]` bool, in place of what is found as above: the tokens under the mask that are not padding,
            on either side of the real ones.
        inputs_embeds: `[B, S, D]` in place of ids.

    Raises:
        ValueError, TypeError: as `pack`; tokens under the mask on both sides of the real tokens.
    """
    if torch.compiler.is_compiling() and not recorded():
        options = {"query_mask": query_mask, "hidden_mask": hidden_mask, "position_ids": position_ids}
        return in_front_of_graph(pack_padded, input_ids, attention_mask, inputs_embeds, config, **options)
    ids_BS = padded_ids(input_ids, inputs_embeds)
    if recorded():
        if query_mask is None and attention_mask is not None:
            behind_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device) >= _first(attention_mask)
            query_mask = (attention_mask == 0) & behind_BS
            if input_ids is not None:
                query_mask = query_mask & (input_ids != (config.pad_token_id or 0))
        return pack(ids_BS, attention_mask, query_mask=query_mask, position_ids=position_ids)
    check_padded(ids_BS, attention_mask, None, position_ids)
    hidden_BS = hidden_mask
    if hidden_BS is None and query_mask is None:
        hidden_BS = _hidden_tokens(input_ids, attention_mask, config)
    if attention_mask is None or hidden_BS is None or not hidden_BS.any():
        options = {"query_mask": query_mask, "position_ids": position_ids, "vocab_size": config.vocab_size}
        return pack(ids_BS, attention_mask, **options)

    place_BS = torch.arange(ids_BS.shape[1], device=ids_BS.device).expand_as(ids_BS)
    in_front_B1 = (hidden_BS & (place_BS < _first(attention_mask))).any(1, keepdim=True)
    # Query-only rows follow the real tokens of a Packed. Attention has no direction: where they come first, the
    # sequence is packed from its end, each token with its own position.
    order_BS = torch.where(in_front_B1, place_BS.flip(1), place_BS)
    mask_BS, hidden_BS = attention_mask.gather(1, order_BS), hidden_BS.gather(1, order_BS)
    if (both_B := (hidden_BS & (place_BS < _first(mask_BS))).any(1)).any():
        raise ValueError(
            f"sequence {int(both_B.nonzero()[0])} has tokens under attention_mask 0 on both sides of its real tokens: "
            f"keep them on one side, and pad with pad_token_id, which is {config.pad_token_id or 0}"
        )
    # Padding between the real tokens and the last of the others stays too, because a sequence has no holes.
    until_last_BS = hidden_BS.flip(1).cumsum(1).flip(1) > 0
    batch = pack(
        ids_BS.gather(1, order_BS),
        mask_BS,
        query_mask=until_last_BS & (mask_BS == 0) & (place_BS >= _first(mask_BS)),
        position_ids=order_BS if position_ids is None else position_ids.expand_as(ids_BS).gather(1, order_BS),
        vocab_size=config.vocab_size,
    )
    rows_T, length = batch.padded_rows, ids_BS.shape[1]
    assert rows_T is not None
    return replace(batch, padded_rows=rows_T // length * length + order_BS.flatten()[rows_T])


def _hidden_tokens(input_ids: Tensor | None, mask_BS: Tensor | None, config: Vocabulary) -> Tensor | None:
    """`[B, S]` bool, the tokens under the mask that are not padding; None if there are none."""
    if mask_BS is None:
        return None
    hidden_BS = mask_BS == 0
    if input_ids is not None:
        hidden_BS &= input_ids != (config.pad_token_id or 0)
    if not hidden_BS.any():
        return None
    place_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    behind_BS = place_S >= _first(mask_BS)
    if input_ids is None:
        hidden_BS &= behind_BS
    else:  # what no table has a row for cannot be scored: it is padding, or `pack` refuses it
        hidden_BS &= behind_BS | ((input_ids >= 0) & (input_ids < config.vocab_size))
    return hidden_BS


def _first(mask_BS: Tensor) -> Tensor:
    """`[B, 1]`, where the real tokens begin; 0 where there are none."""
    return (mask_BS != 0).int().argmax(1, keepdim=True)
