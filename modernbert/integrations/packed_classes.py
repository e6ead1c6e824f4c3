"""The classes of transformers' ModernBERT with a packed forward, which `in_place.py` gives to a live model.

They keep the names of those that they replace and have no weights of their own, so that parameters, hooks, adapters,
copies and files are those of the model as it was, and everything is looked up when it is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.modernbert import modeling_modernbert as theirs

import modernbert_kernels as ops
from modernbert_kernels.dispatch import recorded

from ..encoder import Rope, ropes
from ..inference.batches import CPU_TOKENS, micro_batches
from ..modules import add_norm
from ..packed import Packed, check_packed
from ..packing import has_no_padding, in_front_of_graph, unpack
from ..padded import pack_padded

M = TypeVar("M", bound=nn.Module)

IGNORED = ("token_type_ids", "num_items_in_batch", "seq_idx", "batch_size", "seq_len")
"""Arguments that change nothing in transformers' encoder either; the last two are those of transformers 4."""


@dataclass(frozen=True)
class InPlace:
    """What a packed model knows beside its own modules.

    Attributes:
        kinds: the theta and the window of each layer when the model was packed, which do not change after that.
        head_dim: width of a head.
        reads_padding: whether its head reads the rows of padding too.
        document_prefix: the token behind [CLS] in documents of late interaction; None if there is none.
    """

    kinds: tuple[tuple[float, int | None], ...]
    head_dim: int
    reads_padding: bool = False
    document_prefix: int | None = None


def packed_class(cls: type[M]) -> type[M]:
    """Give a class the place of the one that it replaces, under which PEFT, FSDP and pickle look for it.

    Made anew, such as by `type(model)(config)`, it is a model of transformers.
    """
    replaced = cls.__mro__[1]

    def new(wanted: type[M], *arguments: Any, **options: Any) -> Any:
        return replaced(*arguments, **options) if arguments or options else object.__new__(wanted)

    def reduce(self: M, protocol: int) -> tuple[Any, ...]:
        _, _, *state = super(cls, self).__reduce_ex__(protocol)  # pyright: ignore[reportAssignmentType]
        return _empty, (replaced,), *state

    cls.__module__ = replaced.__module__
    cls.__new__, cls.__reduce_ex__ = staticmethod(new), reduce  # pyright: ignore[reportAttributeAccessIssue]
    return cls


def _empty(replaced: type[nn.Module]) -> nn.Module:
    """A module without content of the class that replaces this one."""
    return object.__new__(PACKED[replaced])


@packed_class
class ModernBertModel(theirs.ModernBertModel):
    in_place: InPlace

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutput | tuple[Tensor, ...]:
        """transformers' arguments and output. Rows of padding are zero, unless a head reads them."""
        options = _options(self, kwargs)
        flat = {name: kwargs[name] for name in FLAT if kwargs.get(name) is not None}
        arguments = (self, input_ids, attention_mask, position_ids, inputs_embeds, flat)
        batch = in_front_of_graph(_packed, *arguments) if torch.compiler.is_compiling() else _packed(*arguments)

        # As one text, because adapters and hooks on the embeddings expect [batch, length].
        if inputs_embeds is None:
            x_TD = self.embeddings(input_ids=batch.input_ids[None])[0]
        else:
            x_TD = self.embeddings(inputs_embeds=inputs_embeds.flatten(0, 1)[batch.padded_rows][None])[0]
        states: list[Tensor] | None = [] if options["output_hidden_states"] else None
        cut = states is None and batch.lengths and x_TD.is_cpu and not torch.is_grad_enabled()
        if cut and not torch.compiler.is_compiling():
            # What a layer writes then fits into the cache.
            parts = micro_batches(batch, CPU_TOKENS)
            xs_TD = x_TD.split([part.num_tokens for part in parts])
            outputs = [self._layers(x, part, None) for x, part in zip(xs_TD, parts, strict=True)]
            last_TD = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        else:
            last_TD = self._layers(x_TD, batch, states)
        last = _unpacked(last_TD, batch)
        output = BaseModelOutput(last_hidden_state=last, hidden_states=None if states is None else (*states, last))
        return output if options["return_dict"] else output.to_tuple()

    def _layers(self, x_TD: Tensor, batch: Packed, states: list[Tensor] | None) -> Tensor:
        """The output of the last layer and its norm; that of each layer before is added to `states`, padded."""
        kinds, delta_TD = self.in_place.kinds, None
        rope_of = ropes(batch, (theta for theta, _ in kinds), self.in_place.head_dim)
        for layer, (theta, window) in zip(self.layers, kinds, strict=True):
            if states is not None:
                states.append(_unpacked(x_TD if delta_TD is None else x_TD + delta_TD, batch))
            x_TD, delta_TD = layer(x_TD, delta_TD, batch, rope_of[theta], window)
        return add_norm(x_TD, delta_TD, self.final_norm)[1]


@packed_class
class ModernBertEncoderLayer(theirs.ModernBertEncoderLayer):
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x_TD: Tensor, delta_TD: Tensor | None, batch: Packed, rope: Rope, window: int | None
    ) -> tuple[Tensor, Tensor]:
        """As a layer of `encoder.py`. transformers checkpoints it where that is asked for."""
        if delta_TD is None:
            h_TD = self.attn_norm(x_TD)
        else:
            x_TD, h_TD = add_norm(x_TD, delta_TD, self.attn_norm)
        x_TD, h_TD = add_norm(x_TD, self.attn(h_TD, batch, rope, window), self.mlp_norm)
        return x_TD, self.mlp(h_TD)


@packed_class
class ModernBertAttention(theirs.ModernBertAttention):
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x_TD: Tensor, batch: Packed, rope: Rope, window: int | None
    ) -> Tensor:
        out_THK = ops.attention(
            checked(self.Wqkv)(x_TD).reshape(x_TD.shape[0], 3, -1, self.head_dim),
            batch.cu_seqlens,
            batch.max_seqlen,
            rope=(rope.cos, rope.sin),
            window=window,
            key_lengths=batch.key_lengths,
            dropout_p=self.config.attention_dropout if self.training else 0.0,
            ranges_3T=rope.ranges,
        )
        return self.out_drop(checked(self.Wo)(out_THK.flatten(1)))


@packed_class
class ModernBertMLP(theirs.ModernBertMLP):
    def forward(self, hidden_states: Tensor) -> Tensor:
        h_TF = ops.geglu(checked(self.Wi)(hidden_states), self.config.hidden_activation)
        return checked(self.Wo)(self.drop(h_TF))


PACKED: dict[type[nn.Module], type[nn.Module]] = {
    cls.__mro__[1]: cls for cls in (ModernBertModel, ModernBertEncoderLayer, ModernBertAttention, ModernBertMLP)
}
FLAT = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""What transformers' `DataCollatorWithFlattening` adds to texts that it joins into one row."""


def _options(model: ModernBertModel, given: dict[str, Any]) -> dict[str, Any]:
    """`output_hidden_states` and `return_dict`, by default as the config has them. Other arguments are refused."""
    options = {"output_hidden_states": False, "output_attentions": False, "is_causal": False, "return_dict": True}
    for name, default in options.items():
        value = given.get(name)
        options[name] = getattr(model.config, name, default) if value is None else value
    todo = "call modernbert.integrations.transformers.unpack_in_place(model) first"
    if options["output_attentions"]:
        raise ValueError(f"output_attentions: a packed model never materialises attention probabilities; {todo}")
    if options["is_causal"]:
        raise ValueError(f"is_causal: a packed model sees both directions; {todo}")
    if not isinstance(options["output_hidden_states"], bool):
        raise ValueError(
            f"output_hidden_states is {options['output_hidden_states']!r}: a packed model takes True; {todo}"
        )
    for name in given.keys() - options.keys() - {*IGNORED, *FLAT}:
        if given[name] is not None and given[name] is not False:
            raise TypeError(f"{name}: a packed model does not take this argument; {todo}")
    if recorded():
        raise ValueError(f"a program of a packed model cannot be recorded; {todo}")
    if hasattr(model.get_input_embeddings(), "neftune_noise_alpha"):
        raise ValueError(f"neftune_noise_alpha: this noise depends on the padded length; {todo}")
    return options


def _packed(
    model: ModernBertModel,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    flat: dict[str, Any],
) -> Packed:
    """The batch with every row that a host may read: see `_read_under_mask`."""
    if flat:
        return _joined(input_ids, attention_mask, position_ids, flat)
    hidden_BS, tokens = None, inputs_embeds if input_ids is None else input_ids
    if isinstance(attention_mask, Tensor) and tokens is not None and attention_mask.shape == tokens.shape[:2]:
        if has_no_padding(attention_mask):
            attention_mask = None
        else:
            hidden_BS = _read_under_mask(model, input_ids, attention_mask)
    masks = {"hidden_mask": hidden_BS, "position_ids": position_ids}
    return pack_padded(input_ids, attention_mask, inputs_embeds, model.config, **masks)


def _read_under_mask(model: ModernBertModel, input_ids: Tensor | None, mask_BS: Tensor) -> Tensor:
    """`[B, S]` bool, the tokens under the mask whose rows the host may read.

    These are the first token, which heads read as [CLS], and tokens of query expansion: all but the pad token, and not
    in documents. transformers' head for questions reads all.
    """
    known, under_BS = model.in_place, mask_BS == 0
    if known.reads_padding:
        return under_BS
    place_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
    if input_ids is None:
        read_BS = place_S >= (mask_BS != 0).int().argmax(1, keepdim=True)
    else:
        read_BS = input_ids != (model.config.pad_token_id or 0)
        if known.document_prefix is not None and input_ids.shape[1] > 1:
            read_BS = read_BS & (input_ids[:, 1:2] != known.document_prefix)
    return under_BS & (read_BS | (place_S == 0))


def _joined(
    input_ids: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None, flat: dict[str, Any]
) -> Packed:
    """The batch of a host that has joined its texts into one row `[1, T]`, with `cu_seq_lens_q` and `max_length_q`."""
    if missing := {"cu_seq_lens_q", "max_length_q"} - flat.keys():
        raise ValueError(f"{', '.join(sorted(missing))}: texts that are joined need cu_seq_lens_q and max_length_q")
    if input_ids is None or input_ids.shape[0] != 1 or attention_mask is not None:
        raise ValueError("cu_seq_lens_q: texts that are joined come as input_ids [1, tokens], without attention_mask")
    ids_T = input_ids[0]
    positions = torch.arange(ids_T.shape[0], device=ids_T.device) if position_ids is None else position_ids[0]
    batch = Packed(ids_T.long(), positions.long(), flat["cu_seq_lens_q"].int(), (), int(flat["max_length_q"]))
    check_packed(batch)
    return batch


def _unpacked(x_TD: Tensor, batch: Packed) -> Tensor:
    return x_TD[None] if batch.padded_length is None else unpack(x_TD, batch)


def check_weights(model: theirs.ModernBertModel) -> None:
    """Raise TypeError for quantised weights."""
    layer: Any
    for layer in model.layers:
        for linear in (layer.attn.Wqkv, layer.attn.Wo, layer.mlp.Wi, layer.mlp.Wo):
            checked(linear)


def checked(linear: nn.Module) -> nn.Module:
    """The layer. TypeError if it is quantised: what it gives for a row may depend on the rows beside it."""
    if type(linear) is not nn.Linear and not torch.compiler.is_compiling():
        dtypes = [parameter.dtype for parameter in linear.parameters()]
        if not dtypes or not all(dtype.is_floating_point for dtype in dtypes):
            raise TypeError(f"the model has a quantised {type(linear).__name__}: leave it unpacked")
    return linear
