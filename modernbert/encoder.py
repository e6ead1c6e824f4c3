"""The ModernBERT encoder on packed tokens, read from top to bottom.

Dimension key, used as suffixes everywhere in this project:
    B  sequences                     H  attention heads          E  late-interaction width
    T  tokens of the whole batch     K  width of one head        N  documents
    S  longest sequence              F  MLP width                Q  query tokens, or the rows that are asked for
    D  model width                   V  vocabulary               R  rotary frequencies, K / 2
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint

import modernbert_kernels as ops
from modernbert_kernels.dispatch import recorded

from .checkpoint import Content, load_weights, state_of
from .config import EncoderConfig
from .modules import Linear, Norm, add_norm, adds_in_place, are_plain, autocast_dtype, has_options, is_plain
from .outputs import EncoderOutput as EncoderOutput
from .packed import Packed, check_packed, check_rows
from .packing import unpack
from .padded import pack_padded
from .pretrained import Pretrained

if TYPE_CHECKING:
    from typing_extensions import Self


class Rope:
    """cos and sin of the rotary angle of each token, `[T, R]` float32; and `ranges`, `ops.token_ranges` or None.

    Not a tuple or dataclass: with mixed precision, FSDP casts the tensors in these to the dtype of the parameters.
    """

    def __init__(self, cos: Tensor, sin: Tensor, ranges: Tensor | None = None) -> None:
        self.cos, self.sin, self.ranges = cos, sin, ranges

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Rope:
        """The same angles on `device`, for libraries that place layers on several."""
        cos, sin = (table.to(device, non_blocking=non_blocking) for table in (self.cos, self.sin))
        return Rope(cos, sin, None if self.ranges is None else self.ranges.to(device, non_blocking=non_blocking))


def ropes(batch: Packed, thetas: Iterable[float], head_dim: int) -> dict[float, Rope]:
    """The tables of a forward pass, for each of these bases of the angles."""
    # Only kernels on a GPU read the ranges.
    on_gpu = batch.cu_seqlens.is_cuda and not recorded()
    ranges = ops.token_ranges(batch.cu_seqlens, batch.key_lengths, batch.num_tokens) if on_gpu else None
    return {theta: Rope(*ops.rotary_table(batch.positions, theta, head_dim), ranges) for theta in set(thetas)}


def no_states() -> tuple[()] | None:
    """`hidden_states` of a caller that has not asked for them: None, which a trace cannot return."""
    return () if torch.jit.is_tracing() else None  # pyright: ignore[reportPrivateImportUsage]


class Embeddings(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        # Not drawn from a normal distribution first: on the meta device that alone imports the compiler, for a second.
        weight_VD = torch.empty(config.vocab_size, config.hidden_size)
        self.tok_embeddings = nn.Embedding.from_pretrained(weight_VD, freeze=False)
        self.norm = Norm(config)
        self.dropout_p = config.embedding_dropout

    def forward(self, input_ids_T: Tensor, inputs_embeds_TD: Tensor | None) -> Tensor:
        table, norm = self.tok_embeddings, self.norm
        if inputs_embeds_TD is not None:
            x_TD = norm(inputs_embeds_TD)
        elif is_plain(norm, Norm) and is_plain(table, nn.Embedding) and not has_options(table):
            x_TD = ops.embed_layer_norm(input_ids_T, table.weight, norm.weight, norm.bias, norm.eps)
        else:
            x_TD = norm(table(input_ids_T))
        return dropout(x_TD, self.dropout_p, self.training)


class Attention(nn.Module):
    def __init__(self, config: EncoderConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.window = None if config.is_global(layer) else config.window
        # Of the probabilities and of the output. Hugging Face has one number for both, ModernBERT was trained with two.
        self.dropout_p = self.output_dropout_p = config.attention_dropout
        self.Wqkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.Wo = Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(
        self, x_TD: Tensor, batch: Packed, rope: Rope, rows_Q: Tensor | None, into_QD: Tensor | None = None
    ) -> Tensor | None:
        """The output; None if it has been added to `into_QD`."""
        out_THK = ops.attention(
            # Not unflatten: the older ONNX exporter would keep the number of tokens of its example.
            self.Wqkv(x_TD).reshape(x_TD.shape[0], 3, self.heads, self.head_dim),
            batch.cu_seqlens,
            batch.max_seqlen,
            rope=(rope.cos, rope.sin),
            window=self.window,
            key_lengths=batch.key_lengths,
            dropout_p=self.dropout_p if self.training else 0.0,
            ranges_3T=rope.ranges,
        )
        out_QD = take_rows(out_THK.flatten(1), rows_Q)
        if into_QD is not None:
            into_QD.addmm_(out_QD, self.Wo.weight.T)
            return None
        return dropout(self.Wo(out_QD), self.output_dropout_p, self.training)


class MLP(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.activation, self.dropout_p = config.hidden_activation, config.mlp_dropout
        self.Wi = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.Wo = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_TD: Tensor, into_TD: Tensor | None = None) -> Tensor | None:
        """The output; None if it has been added to `into_TD`."""
        y_TF = ops.geglu(self.Wi(x_TD), self.activation)
        if into_TD is not None:
            into_TD.addmm_(y_TF, self.Wo.weight.T)
            return None
        return self.Wo(dropout(y_TF, self.dropout_p, self.training))


class Layer(nn.Module):
    """Pre-norm block. `x` is the residual stream, `delta` what the last sublayer has yet to add to it.

    Every token is attended to, but only the rows `rows_Q` go on from there (None: all of them).

    In inference on a GPU, plain layers write into the stream: both Wo add to `x` in one GEMM, and there is no `delta`.
    A layer then overwrites the `x` that it was given, if that came without a `delta`, from another such layer. Of five
    passes over memory beside the products that is one less. In training it would not be: the norm alone leaves the sum
    of two gradients to one more kernel, and under autocast the stream has twice the bytes of a product.
    """

    def __init__(self, config: EncoderConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = Norm(config) if layer > 0 else None  # the embeddings are normed already
        self.attn = Attention(config, layer)
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config)

    def forward(
        self, x_TD: Tensor, delta_TD: Tensor | None, batch: Packed, rope: Rope, rows_Q: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        dtype, in_place = autocast_dtype(x_TD), self._adds_in_place(x_TD)
        x_TD, h_TD = (x_TD, x_TD) if self.attn_norm is None else add_norm(x_TD, delta_TD, self.attn_norm, dtype)
        x_QD = take_rows(x_TD, rows_Q)
        # The first layer's x is the output of the embeddings, which the caller may keep.
        into_QD = x_QD if in_place and self.attn_norm is not None else None
        x_QD, h_QD = add_norm(x_QD, self.attn(h_TD, batch, rope, rows_Q, into_QD), self.mlp_norm, dtype)
        return x_QD, self.mlp(h_QD, x_QD if in_place else None)

    def _adds_in_place(self, x_TD: Tensor) -> bool:
        attn, mlp, norm = self.attn, self.mlp, self.mlp_norm
        return (
            x_TD.is_cuda
            and not (torch.is_grad_enabled() or self.training or attn.training or mlp.training)
            # Compilers fuse the sum themselves, and would copy what is written in place.
            and not (torch.compiler.is_compiling() or recorded())
            # What a hook has seen is not overwritten.
            and are_plain(
                *((self, Layer), (attn, Attention), (mlp, MLP), (attn.Wo, Linear), (mlp.Wo, Linear)),
                *((norm, Norm), (self.attn_norm or norm, Norm)),
            )
            and adds_in_place(x_TD, attn.Wo, mlp.Wo)
        )


class Encoder(Pretrained):
    """ModernBERT, Ettin and every checkpoint of their family, without padding.

    Parameter names are those of Hugging Face's `ModernBertModel`. `Pretrained` loads and saves it.

    Attributes:
        config: the `EncoderConfig`.
        gradient_checkpointing: set to True to recompute each layer in the backward pass instead of keeping it.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = replace(config)  # a copy: transformers' Trainer writes to it
        self.gradient_checkpointing = False
        self.thetas = tuple(config.rope_theta(layer) for layer in range(config.num_hidden_layers))
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.final_norm = Norm(config)
        self.reset_parameters()

    def __prepare_scriptable__(self) -> Encoder:
        raise TypeError("torch.jit.script cannot compile an Encoder: use torch.export, or torch.jit.trace")

    @overload
    def forward(self, batch: Packed, *, rows: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor: ...
    @overload
    def forward(
        self,
        batch: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        input_ids: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> EncoderOutput: ...

    def forward(
        self,
        batch: Packed | Tensor | None = None,
        attention_mask: Tensor | None = None,
        rows: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        input_ids: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> Tensor | EncoderOutput:
        """`[T]` tokens to `[T, D]`; with `rows` `[Q]` to the `[Q, D]` of these, which the last layer computes alone.

        Padded tensors are accepted too: `encoder(input_ids, attention_mask)` gives an `EncoderOutput`.
        `integrations.transformers` has the rest of Hugging Face's signature.

        Args:
            batch: a `Packed`; or `[B, S]` token ids. Both are checked if they are on the CPU.
            rows: `[Q]` integers, increasing. `batch.cu_seqlens[:-1]` are the rows of [CLS].
            inputs_embeds: `[T, D]` (`[B, S, D]` padded) in place of the embedding table's rows, before their norm.
            attention_mask: `[B, S]`, nonzero at real tokens, which must be adjacent in each row. Elsewhere, rows of
                `config.pad_token_id` (0 if None) are padding. Others, such as unattended [MASK] tokens of query
                expansion, get Hugging Face's numbers: see `padded.pack_padded`.
            input_ids: `[B, S]`, another name of `batch` for padded callers.
            return_dict: True or None, since the output has names; sentence-transformers passes it.

        Raises:
            ValueError: rows out of order or out of range, ids out of range, a mask with holes, a `Packed` whose parts
                do not fit together, contradictory arguments.
        """
        if isinstance(batch, torch.fx.Proxy):
            raise TypeError("torch.fx.symbolic_trace cannot follow lengths and masks: use torch.export")
        if batch is not None and input_ids is not None:
            raise ValueError("input_ids is another name of batch for padded callers: pass one of them")
        if return_dict is False:
            raise ValueError("return_dict=False: the output is a named tuple already; index it instead")
        if not isinstance(batch, Packed):
            return self._padded(batch if input_ids is None else input_ids, attention_mask, rows, inputs_embeds)
        if attention_mask is not None:
            raise ValueError("a Packed carries its own mask and positions: leave out attention_mask")
        if inputs_embeds is not None and not recorded() and inputs_embeds.shape[0] != batch.num_tokens:
            raise ValueError(f"inputs_embeds has {inputs_embeds.shape[0]} rows, the batch {batch.num_tokens} tokens")
        check_packed(batch)
        self._check_length(batch)
        if rows is not None:
            check_rows(rows, batch.num_tokens)

        rope_of = ropes(batch, self.thetas, self.config.head_dim)
        x_TD, delta_TD = self.embeddings(batch.input_ids, inputs_embeds), None
        rows_of_layer = [None] * (len(self.layers) - 1) + [rows]
        for layer, theta, wanted in zip(self.layers, self.thetas, rows_of_layer, strict=True):
            run: Callable[..., tuple[Tensor, Tensor | None]] = layer
            if self.gradient_checkpointing and torch.is_grad_enabled():
                run = partial(checkpoint, layer, use_reentrant=False)
            x_TD, delta_TD = run(x_TD, delta_TD, batch, rope_of[theta], wanted)
        return add_norm(x_TD, delta_TD, self.final_norm)[1]

    def _padded(
        self, ids_BS: Tensor | None, mask_BS: Tensor | None, rows: Tensor | None, embeds_BSD: Tensor | None
    ) -> EncoderOutput:
        """Pack, call, unpack."""
        if rows is not None:
            raise ValueError("rows count the tokens of a Packed; index last_hidden_state of a padded batch instead")
        batch = pack_padded(ids_BS, mask_BS, embeds_BSD, self.config)
        embeds_TD = None if embeds_BSD is None else embeds_BSD.flatten(0, 1)[batch.padded_rows]
        return EncoderOutput(unpack(self.forward(batch, inputs_embeds=embeds_TD), batch), no_states())

    def _check_length(self, batch: Packed) -> None:
        limit = self.config.max_position_embeddings
        if not torch.compiler.is_compiling() and batch.lengths and batch.max_seqlen > limit:
            warnings.warn(
                f"a sequence is longer than max_position_embeddings, {limit} tokens. It is encoded, but the model was "
                "not trained on such distances",
                stacklevel=3,
            )

    @classmethod
    def from_config(cls, config: EncoderConfig | str) -> Encoder:
        """A freshly initialised encoder from an `EncoderConfig` or the name of a preset such as `"ettin-17m"`."""
        config = EncoderConfig.preset(config) if isinstance(config, str) else config
        if not isinstance(config, EncoderConfig):
            kind = type(config).__name__
            raise TypeError(f"config is a {kind}; EncoderConfig.from_hf(config.to_dict()) reads one of transformers")
        return cls(config)

    @classmethod
    def _read(
        cls,
        folder: Path,
        config: EncoderConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        elsewhere: tuple[str, ...] = (),
    ) -> Self:
        with torch.device("meta"):
            encoder = cls(config)
        load_weights(encoder, folder, device=device, dtype=dtype, elsewhere=elsewhere)
        return encoder

    def _content(self, state: Mapping[str, Tensor] | None) -> Content:
        return Content(self.config.to_hf(), state_of(self, state))

    def resize_token_embeddings(self, vocab_size: int, *, pad_to_multiple_of: int | None = None) -> nn.Embedding:
        """Grow or cut the vocabulary in place; new rows are drawn like those of a new model. Updates `config`.

        The table stays the same module, with its hooks and options.

        Raises:
            ValueError: a table that an adapter wraps, or whose weight is sharded or computed from others.
        """
        if pad_to_multiple_of is not None:
            vocab_size = -(-vocab_size // pad_to_multiple_of) * pad_to_multiple_of
        config = self.config.changed({"vocab_size": vocab_size})  # refuses a wrong one before anything is made
        table = self.embeddings.tok_embeddings
        if type(table) is not nn.Embedding or "weight" not in table._parameters:
            raise ValueError(
                f"the table is a {type(table).__name__} that is wrapped, sharded or pruned: resize it before"
            )
        old_VD, kept = table.weight, min(vocab_size, table.num_embeddings)
        new_VD = nn.Parameter(old_VD.new_empty(vocab_size, old_VD.shape[1]), requires_grad=old_VD.requires_grad)
        with torch.no_grad():
            self._truncated_normal(new_VD, self.config.initializer_range)
            new_VD[:kept] = old_VD[:kept]
        table.weight, table.num_embeddings = new_VD, vocab_size
        self.config = config
        return table

    def reset_parameters(self) -> None:
        """The "full Megatron" initialisation of ModernBERT (paper, appendix A): outputs of a block start smaller."""
        std_in = self.config.initializer_range
        std_out = std_in / (2 * len(self.layers)) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" in name:
                nn.init.ones_(parameter)
            else:
                self._truncated_normal(parameter, std_out if name.endswith("Wo.weight") else std_in)

    def _truncated_normal(self, parameter: Tensor, std: float) -> None:
        limit = self.config.initializer_cutoff_factor * std
        nn.init.trunc_normal_(parameter, std=std, a=-limit, b=limit)


def take_rows(x_TD: Tensor, rows_Q: Tensor | None) -> Tensor:
    return x_TD if rows_Q is None else x_TD.index_select(0, rows_Q)
