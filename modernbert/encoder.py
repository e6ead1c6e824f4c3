"""The ModernBERT encoder on packed tokens, read from top to bottom.

Dimension key, used as suffixes everywhere in this project:
    B  sequences                     H  attention heads          E  late-interaction width
    T  tokens of the whole batch     K  width of one head        N  documents
    S  longest sequence              F  MLP width                Q  query tokens, or the rows that are asked for
    D  model width                   V  vocabulary               R  rotary frequencies, K / 2
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

import modernbert_kernels as ops

from . import checkpoint as files
from .config import EncoderConfig
from .inference import short
from .inference.encode import micro_batches, split_rows
from .inference.graphs import MAX_TOKENS, Graphed
from .packing import Packed, check_rows, pack, pack_static, unpack, unpack_static

Rope = tuple[Tensor, Tensor]


class EncoderOutput(NamedTuple):
    """What the encoder returns when more than the packed rows is asked for.

    Attributes:
        last_hidden_state: after the final norm, `[B, S, D]` (padding rows are zero) or `[T, D]` for a `Packed`.
        hidden_states: None, or N + 1 tensors of that shape: the embeddings, then the residual stream after each layer,
            except that the last entry is `last_hidden_state`, after the final norm (transformers 5; before it in 4).
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


# So that torch.export.save can write a program that returns one; its error message names this function.
_pytree._register_namedtuple(EncoderOutput, serialized_type_name="modernbert.EncoderOutput")


class Linear(nn.Linear):
    """`torch.nn.Linear` that computes through the `linear` op."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)

    def train(self, mode: bool = True) -> Linear:
        ops.cpu.linear.forget(self.weight)  # whoever trains may write weights in ways that no version counter sees
        return super().train(mode)


class Norm(nn.LayerNorm):
    """LayerNorm of `x + delta`; hands on the sum too, so that adding and normalising can be one kernel."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)

    def forward(self, x_TD: Tensor, delta_TD: Tensor | None) -> tuple[Tensor, Tensor]:  # pyright: ignore
        if delta_TD is None:
            return x_TD, ops.layer_norm(x_TD, self.weight, self.bias, self.eps)
        return ops.add_layer_norm(x_TD, delta_TD, self.weight, self.bias, self.eps)


class Embeddings(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        # Not drawn from a normal distribution first: on the meta device that alone imports the compiler, for a second.
        weight_VD = torch.empty(config.vocab_size, config.hidden_size)
        self.tok_embeddings = nn.Embedding.from_pretrained(weight_VD, freeze=False)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)
        self.dropout_p = config.embedding_dropout

    def forward(self, input_ids_T: Tensor, inputs_embeds_TD: Tensor | None) -> Tensor:
        norm = self.norm
        if inputs_embeds_TD is None:
            table_VD = self.tok_embeddings.weight
            x_TD = ops.embed_layer_norm(input_ids_T, table_VD, norm.weight, norm.bias, norm.eps)
        else:
            x_TD = ops.layer_norm(inputs_embeds_TD, norm.weight, norm.bias, norm.eps)
        return dropout(x_TD, self.dropout_p, self.training)


class Attention(nn.Module):
    def __init__(self, config: EncoderConfig, layer: int) -> None:
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.window = None if config.is_global(layer) else config.window
        self.dropout_p = config.attention_dropout
        self.Wqkv = Linear(config.hidden_size, 3 * config.hidden_size, bias=config.attention_bias)
        self.Wo = Linear(config.hidden_size, config.hidden_size, bias=config.attention_bias)

    def forward(self, x_TD: Tensor, batch: Packed, rope: Rope, rows_Q: Tensor | None) -> Tensor:
        out_THK = ops.attention(
            self.Wqkv(x_TD).unflatten(-1, (3, self.heads, self.head_dim)),
            batch.cu_seqlens,
            batch.max_seqlen,
            rope=rope,
            window=self.window,
            key_lengths=batch.key_lengths,
            dropout_p=self.dropout_p if self.training else 0.0,
        )
        return dropout(self.Wo(chosen(out_THK.flatten(1), rows_Q)), self.dropout_p, self.training)


class MLP(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.activation, self.dropout_p = config.hidden_activation, config.mlp_dropout
        self.Wi = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.Wo = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.Wo(dropout(ops.geglu(self.Wi(x_TD), self.activation), self.dropout_p, self.training))


class Layer(nn.Module):
    """Pre-norm block. `x` is the residual stream, `delta` what the last sublayer has yet to add to it.

    Every token is attended to, but only the rows `rows_Q` go on from there (None: all of them).
    """

    def __init__(self, config: EncoderConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = Norm(config) if layer > 0 else None  # the embeddings are normed already
        self.attn = Attention(config, layer)
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config)

    def forward(
        self, x_TD: Tensor, delta_TD: Tensor | None, batch: Packed, rope: Rope, rows_Q: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        x_TD, h_TD = (x_TD, x_TD) if self.attn_norm is None else self.attn_norm(x_TD, delta_TD)
        x_QD, h_QD = self.mlp_norm(chosen(x_TD, rows_Q), self.attn(h_TD, batch, rope, rows_Q))
        return x_QD, self.mlp(h_QD)


class Encoder(nn.Module):
    """ModernBERT, Ettin and every checkpoint of their family, without padding.

    Parameter names are those of Hugging Face's `ModernBertModel`. Two ways in, one model inside:
    `encoder(batch)` on a `Packed`, and `encoder(input_ids, attention_mask)` on padded tensors.

    Attributes:
        config: the `EncoderConfig`.
        gradient_checkpointing: set to True to recompute each layer in the backward pass instead of keeping it.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.warned_of_length = False
        self.thetas = tuple(config.rope_theta(layer) for layer in range(config.num_hidden_layers))
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.final_norm = Norm(config)
        self.reset_parameters()

    @overload
    def forward(
        self, input_ids: Packed, *, rows: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        input_ids: Packed | Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        query_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
    ) -> EncoderOutput: ...

    def forward(
        self,
        input_ids: Packed | Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        rows: Tensor | None = None,
        query_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        return_dict: bool = True,
    ) -> Tensor | EncoderOutput:
        """Encode a `Packed` batch to `[T, D]`, or padded ids `[B, S]` to an `EncoderOutput`.

        Args:
            input_ids: a `Packed` (trusted as it is), or `[B, S]` token ids, checked when they lie on the CPU.
            rows: `[Q]` integers, increasing: which rows of a `Packed` are wanted, as `[Q, D]`. The last layer skips all
                others after its attention. `batch.cu_seqlens[:-1]` are the rows of [CLS].
            attention_mask: `[B, S]`, nonzero at real tokens, which must stand together in each row.
            query_mask: `[B, S]`, nonzero at tokens that see the real ones and are seen by nobody (see `pack`).
            position_ids: `[B, S]` rotary positions; default 0, 1, 2, ... from each sequence's first real token.
            inputs_embeds: `[B, S, D]` (`[T, D]` for a `Packed`) in place of the embedding table's rows; the embedding
                norm still applies.
            output_hidden_states: also return every layer's output; a `Packed` then gives an `EncoderOutput` too.

        `token_type_ids`, `output_attentions` and `return_dict=False` exist in Hugging Face's signature and are refused.
        Under `torch.export` (padded tensors only) the checks of ids and masks are off, and every op is its reference.

        Raises:
            ValueError: masks with holes, ids out of range, arguments that contradict each other or are refused.
        """
        if token_type_ids is not None:
            raise ValueError("token_type_ids: ModernBERT has no token types; leave the argument out")
        if output_attentions:
            raise ValueError("output_attentions: attention probabilities are never materialised here")
        if return_dict is False:
            raise ValueError("return_dict=False: the output is a named tuple already; index it instead")
        if isinstance(input_ids, Packed):
            if attention_mask is not None or query_mask is not None or position_ids is not None:
                raise ValueError("a Packed carries its own masks and positions; pass it alone")
            if rows is not None:
                check_rows(rows, input_ids.num_tokens)
            if rows is not None and output_hidden_states:
                raise ValueError("hidden states have all rows: choose either rows or output_hidden_states")
            x_TD, states = self._encode(input_ids, inputs_embeds, output_hidden_states, rows)
            return EncoderOutput(x_TD, states) if output_hidden_states else x_TD
        if rows is not None:
            raise ValueError("rows count the tokens of a Packed; index last_hidden_state of a padded batch instead")
        if input_ids is not None and inputs_embeds is None:
            ids_BS = input_ids
        elif input_ids is None and inputs_embeds is not None:
            ids_BS = torch.zeros(inputs_embeds.shape[:2], dtype=torch.int64, device=inputs_embeds.device)
        else:
            raise ValueError("pass either input_ids or inputs_embeds")

        # Not is_exporting(), which in torch 2.11 is true under torch.compile too.
        if torch.compiler._is_exporting_flag:  # static shapes: padding travels as query-only rows, nothing is checked
            batch = pack_static(ids_BS, attention_mask, query_mask, position_ids)
            restore = unpack_static
        else:
            masks = {"query_mask": query_mask, "position_ids": position_ids}
            batch = pack(ids_BS, attention_mask, **masks, vocab_size=self.config.vocab_size)
            restore = unpack
        embeds_TD = None if inputs_embeds is None else inputs_embeds.flatten(0, 1)[batch.padded_rows]
        x_TD, states = self._encode(batch, embeds_TD, output_hidden_states, None)
        return EncoderOutput(restore(x_TD, batch), states and tuple(restore(state, batch) for state in states))

    def _encode(
        self, batch: Packed, inputs_embeds_TD: Tensor | None, output_hidden_states: bool, rows_Q: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """In inference on a CPU, a large batch runs in parts that stay in the cache; the rows are the same."""
        if not torch.compiler.is_compiling() and batch.lengths:  # a graph's batch stands for many, and has none
            self._warn_of_length(batch.max_seqlen)
        if inputs_embeds_TD is None and not output_hidden_states:
            x_TD = short.forward(self, batch, rows_Q)
            if x_TD is not None:
                return x_TD, None
        parts = micro_batches(batch) if not torch.is_grad_enabled() else [batch]
        if len(parts) == 1:
            return self._forward(batch, inputs_embeds_TD, output_hidden_states, rows_Q)
        sizes = [part.num_tokens for part in parts]
        embeds = [None] * len(parts) if inputs_embeds_TD is None else inputs_embeds_TD.split(sizes)
        rows = [None] * len(parts) if rows_Q is None else split_rows(rows_Q, sizes)
        results = [
            self._forward(part, embed, output_hidden_states, row)
            for part, embed, row in zip(parts, embeds, rows, strict=True)
        ]
        states = tuple(torch.cat(level) for level in zip(*(s for _, s in results if s is not None), strict=True))
        return torch.cat([x_TD for x_TD, _ in results]), states or None

    def _warn_of_length(self, length: int) -> None:
        limit = self.config.max_position_embeddings
        if length > limit and not self.warned_of_length:
            self.warned_of_length = True
            warnings.warn(
                f"a sequence of {length} tokens is longer than max_position_embeddings, {limit}: the model has not "
                "seen such distances in training. It is encoded all the same; this is said once",
                stacklevel=2,
            )

    def _forward(
        self, batch: Packed, inputs_embeds_TD: Tensor | None, output_hidden_states: bool, rows_Q: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        rope_of = {theta: ops.rotary_table(batch.positions, theta, self.config.head_dim) for theta in set(self.thetas)}
        states = []
        x_TD, delta_TD = self.embeddings(batch.input_ids, inputs_embeds_TD), None
        rows_of_layer = [None] * (len(self.layers) - 1) + [rows_Q]
        for layer, theta, rows in zip(self.layers, self.thetas, rows_of_layer, strict=True):
            if output_hidden_states:
                states.append(x_TD if delta_TD is None else x_TD + delta_TD)
            inputs = x_TD, delta_TD, batch, rope_of[theta], rows
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_TD, delta_TD = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                x_TD, delta_TD = layer(*inputs)
        _, x_TD = self.final_norm(x_TD, delta_TD)
        return x_TD, (*states, x_TD) if output_hidden_states else None

    def graphed(self, max_tokens: int = MAX_TOKENS) -> Graphed:
        """A callable in the place of this encoder, on a GPU and in evaluation, that replays CUDA graphs.

        It takes a `Packed` on the CPU (and `rows`) and returns `[T, D]` in memory that the next call overwrites. For a
        query, and for small models up to some thousand tokens, launching kernels takes longer than running them.

        Args:
            max_tokens: of the largest graph; batches beyond it run without one.

        Raises:
            ValueError: the encoder is not on a GPU.
        """
        return Graphed(self, max_tokens)

    @classmethod
    def from_config(cls, config: EncoderConfig | str) -> Encoder:
        """A freshly initialised encoder from an `EncoderConfig` or the name of a preset such as `"ettin-17m"`."""
        return cls(EncoderConfig.preset(config) if isinstance(config, str) else config)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> Encoder:
        """Load a Hugging Face checkpoint of the family, in evaluation mode; a head in the file is left out.

        Args:
            folder_or_hub_id: a local folder, or the id of a repository on the Hugging Face hub.
            dtype: of the parameters; None means float32, whatever the file holds.
            device: where the parameters go; None means the CPU.
            revision, token, local_files_only: passed to `huggingface_hub`.

        Raises:
            ValueError: a config value that is not supported, or weights that do not match the config, all listed.
        """
        folder = files.locate(folder_or_hub_id, revision=revision, token=token, local_files_only=local_files_only)
        config = EncoderConfig.from_hf(files.read_json(folder, "config.json"))
        with torch.device("meta"):
            encoder = cls(config)
        state = files.read_state_dict(folder, device=device or "cpu", dtype=dtype or torch.float32)
        files.load_state_dict(encoder, state)
        return encoder.eval()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors, which `ModernBertModel.from_pretrained` reads. Atomic."""
        files.save(folder, config=self.config.to_hf(), state=self.state_dict())

    def resize_token_embeddings(self, vocab_size: int) -> None:
        """Grow or cut the vocabulary in place; new rows are drawn like those of a new model. Updates `config`."""
        config = replace(self.config, vocab_size=vocab_size)
        old = self.embeddings.tok_embeddings
        kept = min(vocab_size, old.num_embeddings)
        new = nn.Embedding(vocab_size, old.embedding_dim, device=old.weight.device, dtype=old.weight.dtype)
        self._truncated_normal(new.weight, self.config.initializer_range)
        with torch.no_grad():
            new.weight[:kept] = old.weight[:kept]
        new.weight.requires_grad_(old.weight.requires_grad)
        self.embeddings.tok_embeddings = new
        self.config = config

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


def chosen(x_TD: Tensor, rows_Q: Tensor | None) -> Tensor:
    return x_TD if rows_Q is None else x_TD.index_select(0, rows_Q)
