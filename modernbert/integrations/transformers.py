"""A model of transformers with our packed forward; and our encoder with the signature of a model of transformers."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from modernbert_kernels.dispatch import recorded

from ..encoder import Encoder, EncoderOutput, no_states
from ..outputs import AttentionOutput
from ..packing import Packed, unpack
from ..padded import pack_padded
from .states import check_size, hidden_states, maps_of_layer

M = TypeVar("M", bound=nn.Module)


def pack_in_place(model: M) -> M:
    """Let every `ModernBertModel` of transformers in `model` compute packed, and return `model`.

    Only classes of modules change. Parameters, hooks, adapters (those of now and later ones), gradient checkpointing,
    copies, pickles and saved files are those of the model as it was. `unpack_in_place` is the way back.

    The numbers are those of transformers with `attn_implementation="sdpa"` wherever the host reads them, up to the
    order of sums; other rows of padding are zero. Dropout draws other random numbers.

    Args:
        model: a `ModernBertModel`, or a module with one or more inside: an `AutoModelFor...`, a `CrossEncoder`, a
            `SentenceTransformer`, a `MultiVectorEncoder`, PyLate's `ColBERT`, a `PeftModel`, a module of yours. Give
            the outermost one, as what is around a `ModernBertModel` tells which rows are read: the first one of each
            text and tokens under the mask that are not padding; the head for questions reads padding too.

    Raises:
        TypeError: there is none inside, one that is wrapped or sharded already, or one that is quantised.
        ValueError: a setting of its config that is not implemented.
        ImportError: transformers is not installed.
    """
    from .in_place import pack

    return pack(model)


def unpack_in_place(model: M) -> M:
    """Undo `pack_in_place`: the model computes as transformers wrote it. A model that is not packed stays as it is.

    Raises:
        TypeError: as `pack_in_place`.
    """
    from .in_place import unpack_all

    return unpack_all(model)


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
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        query_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> EncoderOutput | AttentionOutput:
        """`[B, S]` ids to `[B, S, D]` rows, zero in padding.

        Args:
            input_ids: `[B, S]` token ids, checked if they are on the CPU.
            attention_mask: `[B, S]`, 1 at real tokens, which must be adjacent in each row, and 0 elsewhere.
            query_mask: `[B, S]`, 1 at query-only tokens: they see the real ones, unseen themselves (see `pack`).
            position_ids: `[B, S]` rotary positions; default 0, 1, 2, ... from each sequence's first real token.
            inputs_embeds: `[B, S, D]` in place of the embedding table's rows, before their norm.
            output_hidden_states: also return N + 1 tensors `[B, S, D]`: the embeddings, the residual stream after each
                layer but the last, and `last_hidden_state` (as transformers 5). `states.hidden_states` gives those of
                chosen layers.
            output_attentions: an `AttentionOutput`, of at most `states.MOST_TOKENS` tokens with padding.

        Where `torch.export`, `torch.onnx` or `torch.jit.trace` records a program, ids and the numbers in masks are not
        checked, and every op is its reference.

        Raises:
            ValueError: masks with holes, ids out of range, contradictory or unsupported arguments.
        """
        if isinstance(input_ids, torch.fx.Proxy):
            raise TypeError("torch.fx.symbolic_trace cannot follow lengths and masks: use torch.export")
        if token_type_ids is not None:
            raise ValueError("token_type_ids: ModernBERT has no token types; leave the argument out")
        if output_attentions and (recorded() or torch.compiler.is_compiling()):
            raise ValueError("output_attentions: maps are not made where a program is recorded or compiled")
        if return_dict is False:
            raise ValueError("return_dict=False: the output is a named tuple already; index it instead")
        masks = {"query_mask": query_mask, "position_ids": position_ids}
        batch = pack_padded(input_ids, attention_mask, inputs_embeds, self.config, **masks)
        embeds_TD = None if inputs_embeds is None else inputs_embeds.flatten(0, 1)[batch.padded_rows]
        if output_attentions:
            return self._with_attentions(batch, embeds_TD, output_hidden_states)
        if not output_hidden_states:
            return EncoderOutput(unpack(self.encoder(batch, inputs_embeds=embeds_TD), batch), no_states())
        states = tuple(unpack(state_TD, batch) for state_TD in hidden_states(self.encoder, batch, embeds_TD))
        return EncoderOutput(states[-1], states)

    def _with_attentions(
        self, batch: Packed, embeds_TD: Tensor | None, output_hidden_states: bool | None
    ) -> AttentionOutput:
        length = batch.padded_length
        assert length is not None
        check_size(len(batch) * length)
        states = hidden_states(self.encoder, batch, embeds_TD)
        zeros_BHSS = states[0].new_zeros(len(batch), self.config.num_attention_heads, length, length)
        attentions = tuple(
            _padded_maps(zeros_BHSS.clone(), maps_of_layer(self.encoder, batch, place, state), batch)
            for place, state in enumerate(states[:-1])
        )
        padded = tuple(unpack(state_TD, batch) for state_TD in states)
        return AttentionOutput(padded[-1], padded if output_hidden_states else None, attentions)


def _padded_maps(padded_BHSS: Tensor, maps: list[Tensor], batch: Packed) -> Tensor:
    """`[H, n, n]` of each text, put into `[B, H, S, S]`."""
    assert batch.padded_rows is not None
    columns = (batch.padded_rows % max(1, padded_BHSS.shape[-1])).split(batch.lengths)
    for text, (map_Hnn, column_n) in enumerate(zip(maps, columns, strict=True)):
        padded_BHSS[text][:, column_n[:, None], column_n] = map_Hnn
    return padded_BHSS
