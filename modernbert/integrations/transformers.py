"""The encoder with the signature of transformers' `ModernBertModel`, for `torch.export` too."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils import _pytree

import modernbert_kernels as ops

from ..encoder import Encoder, EncoderOutput, Rope, add_norm
from ..packing import Packed, check_padded, padded_ids, unpack
from ..padded import pack_padded

# torch.export.save writes only classes that are registered by name.
_pytree._register_namedtuple(EncoderOutput, serialized_type_name="modernbert.EncoderOutput")


class TransformersEncoder(nn.Module):
    """An `Encoder` that takes every argument of Hugging Face's `ModernBertModel`: each works, or is refused by name.

    Attributes:
        encoder: the `Encoder`, shared and not copied. config: its `EncoderConfig`.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.config = encoder, encoder.config

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        query_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> EncoderOutput:
        """`[B, S]` ids to `[B, S, D]` rows, zero in padding.

        Args:
            input_ids: `[B, S]` token ids, checked if they are on the CPU.
            attention_mask: `[B, S]`, 1 at real tokens, which must be adjacent in each row, and 0 elsewhere.
            query_mask: `[B, S]`, 1 at query-only tokens: they see the real ones, unseen themselves (see `pack`).
            position_ids: `[B, S]` rotary positions; default 0, 1, 2, ... from each sequence's first real token.
            inputs_embeds: `[B, S, D]` in place of the embedding table's rows, before their norm.
            output_hidden_states: also return N + 1 tensors `[B, S, D]`: the embeddings, the residual stream after each
                layer but the last, and `last_hidden_state` (as transformers 5).

        Under `torch.export` ids and the numbers in masks are not checked, and every op is its reference.

        Raises:
            ValueError: masks with holes, ids out of range, contradictory or unsupported arguments.
        """
        if token_type_ids is not None:
            raise ValueError("token_type_ids: ModernBERT has no token types; leave the argument out")
        if output_attentions:
            raise ValueError("output_attentions: attention probabilities are never materialised here")
        if return_dict is False:
            raise ValueError("return_dict=False: the output is a named tuple already; index it instead")
        # Not is_exporting(), which in torch 2.11 is true under torch.compile too.
        if torch.compiler._is_exporting_flag:
            ids_BS = padded_ids(input_ids, inputs_embeds)
            batch, restore = pack_static(ids_BS, attention_mask, query_mask, position_ids), unpack_static
        else:
            masks = {"query_mask": query_mask, "position_ids": position_ids}
            batch, restore = pack_padded(input_ids, attention_mask, inputs_embeds, self.config, **masks), unpack
        embeds_TD = None if inputs_embeds is None else inputs_embeds.flatten(0, 1)[batch.padded_rows]
        if not output_hidden_states:
            return EncoderOutput(restore(self.encoder(batch, inputs_embeds=embeds_TD), batch))
        states = tuple(restore(state_TD, batch) for state_TD in hidden_states(self.encoder, batch, embeds_TD))
        return EncoderOutput(states[-1], states)


def hidden_states(encoder: Encoder, batch: Packed, inputs_embeds: Tensor | None = None) -> Iterator[Tensor]:
    """The N + 1 tensors `[T, D]` on the way of `Encoder.forward`, whose loop this is."""
    width = encoder.config.head_dim
    rope_of = {theta: Rope(*ops.rotary_table(batch.positions, theta, width)) for theta in set(encoder.thetas)}
    x_TD, delta_TD = encoder.embeddings(batch.input_ids, inputs_embeds), None
    for layer, theta in zip(encoder.layers, encoder.thetas, strict=True):
        yield x_TD if delta_TD is None else x_TD + delta_TD
        x_TD, delta_TD = layer(x_TD, delta_TD, batch, rope_of[theta])
    yield add_norm(x_TD, delta_TD, encoder.final_norm)[1]


def pack_static(
    ids_BS: Tensor, attention_mask: Tensor | None, query_mask: Tensor | None, position_ids: Tensor | None
) -> Packed:
    """`pack` for `torch.export`: shapes depend on no value. Padding rows stay, behind the keys, as query-only rows.

    Ids and the numbers in masks are not checked. Undo it with `unpack_static`.
    """
    check_padded(ids_BS, attention_mask, query_mask, position_ids)
    if attention_mask is not None and attention_mask.is_floating_point():
        raise ValueError(f"attention_mask is {attention_mask.dtype}: export with a mask of integers or of bool")
    batch_size, length = ids_BS.shape
    keys_BS = torch.ones_like(ids_BS, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    if query_mask is not None:
        raise ValueError("query_mask cannot be exported: expansion tokens must be kept apart from padding")
    order_BS = (~keys_BS).int().argsort(dim=1, stable=True)
    first_B1 = torch.arange(batch_size, device=ids_BS.device)[:, None] * length
    positions_BS = torch.arange(length, device=ids_BS.device).expand(batch_size, -1)
    if position_ids is not None:
        positions_BS = position_ids.expand(batch_size, -1).gather(1, order_BS)
    return Packed(
        input_ids=ids_BS.gather(1, order_BS).flatten(),
        positions=positions_BS.flatten(),
        cu_seqlens=torch.arange(batch_size + 1, device=ids_BS.device, dtype=torch.int32) * length,
        lengths=(),
        max_seqlen=length,
        key_lengths=keys_BS.sum(1).int(),
        padded_rows=(order_BS + first_B1).flatten(),
        padded_length=length,
    )


def unpack_static(values: Tensor, batch: Packed) -> Tensor:
    """Undo `pack_static`: `[B * S, ...]` to `[B, S, ...]` with zeros in padding."""
    assert batch.padded_rows is not None
    assert batch.padded_length is not None
    assert batch.key_lengths is not None
    within_T = torch.arange(batch.padded_length, device=values.device).expand(batch.key_lengths.shape[0], -1)
    real_T = (within_T < batch.key_lengths[:, None]).flatten()
    values = torch.where(real_T.view(-1, *[1] * (values.dim() - 1)), values, 0)
    return torch.empty_like(values).index_copy(0, batch.padded_rows, values).unflatten(0, (-1, batch.padded_length))
