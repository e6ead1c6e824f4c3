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
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.utils.checkpoint import checkpoint

import modernbert_kernels as ops

from .checkpoint import check_same, load_weights, locate, read_json, save, state_of
from .config import EncoderConfig
from .packing import Packed, check_rows, pack, padded_ids, unpack

Rope = tuple[Tensor, Tensor]


class EncoderOutput(NamedTuple):
    """What a padded caller gets back, under Hugging Face's names.

    Attributes:
        last_hidden_state: `[B, S, D]`, after the final norm; zero in padding.
        hidden_states: None, or the tuple that `integrations.transformers` fills in.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


def no_states() -> tuple[()] | None:
    """`hidden_states` of a caller that has not asked for them: None, which a trace cannot return."""
    return () if torch.jit.is_tracing() else None


class Linear(nn.Linear):
    """`torch.nn.Linear` that computes through the `linear` op.

    `torch.ao.quantization` does not find it, because it looks for layers by their exact type. It is refused before it
    leaves a model as it was: it sets `qconfig` on each module first.
    """

    @property
    def qconfig(self) -> None:
        raise AttributeError("a modernbert.encoder.Linear has no qconfig")

    @qconfig.setter
    def qconfig(self, _: object) -> None:
        raise TypeError(
            "torch.ao.quantization takes torch.nn.Linear by its exact type, and this layer is one of "
            "modernbert.encoder: quantize modernbert.integrations.quantization.plain_linears(model) instead"
        )

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)


class Norm(nn.Module):
    """LayerNorm of `x + delta`; returns the sum too, so that adding and normalising can be one kernel."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(config.hidden_size))  # `Encoder.reset_parameters` fills it
        self.bias = nn.Parameter(torch.empty(config.hidden_size)) if config.norm_bias else None

    def forward(self, x_TD: Tensor, delta_TD: Tensor | None) -> tuple[Tensor, Tensor]:
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
            # Not unflatten: the older ONNX exporter would keep the number of tokens of its example.
            self.Wqkv(x_TD).reshape(x_TD.shape[0], 3, self.heads, self.head_dim),
            batch.cu_seqlens,
            batch.max_seqlen,
            rope=rope,
            window=self.window,
            key_lengths=batch.key_lengths,
            dropout_p=self.dropout_p if self.training else 0.0,
        )
        return dropout(self.Wo(take_rows(out_THK.flatten(1), rows_Q)), self.dropout_p, self.training)


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
        x_QD, h_QD = self.mlp_norm(take_rows(x_TD, rows_Q), self.attn(h_TD, batch, rope, rows_Q))
        return x_QD, self.mlp(h_QD)


class Encoder(nn.Module):
    """ModernBERT, Ettin and every checkpoint of their family, without padding.

    Parameter names are those of Hugging Face's `ModernBertModel`.

    Attributes:
        config: the `EncoderConfig`.
        gradient_checkpointing: set to True to recompute each layer in the backward pass instead of keeping it.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
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
    ) -> EncoderOutput: ...

    def forward(
        self,
        batch: Packed | Tensor | None = None,
        attention_mask: Tensor | None = None,
        rows: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        input_ids: Tensor | None = None,
    ) -> Tensor | EncoderOutput:
        """`[T]` tokens to `[T, D]`; with `rows` `[Q]` to the `[Q, D]` of these, which the last layer computes alone.

        Padded tensors are accepted too: `encoder(input_ids, attention_mask)` gives an `EncoderOutput`.
        `integrations.transformers` has the rest of Hugging Face's signature.

        Args:
            batch: a `Packed`, which is trusted; or `[B, S]` token ids, checked if they are on the CPU.
            rows: `[Q]` integers, increasing. `batch.cu_seqlens[:-1]` are the rows of [CLS].
            inputs_embeds: `[T, D]` (`[B, S, D]` padded) in place of the embedding table's rows, before their norm.
            attention_mask: `[B, S]`, nonzero at real tokens, which must be adjacent in each row.
            input_ids: `[B, S]`, another name of `batch` for padded callers.

        Raises:
            ValueError: rows out of order or out of range, ids out of range, a mask with holes, contradictory arguments.
        """
        if isinstance(batch, torch.fx.Proxy):
            raise TypeError("torch.fx.symbolic_trace cannot follow lengths and masks: use torch.export")
        if batch is not None and input_ids is not None:
            raise ValueError("input_ids is another name of batch for padded callers: pass one of them")
        if not isinstance(batch, Packed):
            return self._padded(batch if input_ids is None else input_ids, attention_mask, rows, inputs_embeds)
        if attention_mask is not None:
            raise ValueError("a Packed carries its own mask and positions: leave out attention_mask")
        if inputs_embeds is not None and inputs_embeds.shape[0] != batch.num_tokens:
            raise ValueError(f"inputs_embeds has {inputs_embeds.shape[0]} rows, the batch {batch.num_tokens} tokens")
        self._check_length(batch)
        if rows is not None:
            check_rows(rows, batch.num_tokens)

        rope_of = {theta: ops.rotary_table(batch.positions, theta, self.config.head_dim) for theta in set(self.thetas)}
        x_TD, delta_TD = self.embeddings(batch.input_ids, inputs_embeds), None
        rows_of_layer = [None] * (len(self.layers) - 1) + [rows]
        for layer, theta, wanted in zip(self.layers, self.thetas, rows_of_layer, strict=True):
            run: Callable[..., tuple[Tensor, Tensor]] = layer
            if self.gradient_checkpointing and torch.is_grad_enabled():
                run = partial(checkpoint, layer, use_reentrant=False)
            x_TD, delta_TD = run(x_TD, delta_TD, batch, rope_of[theta], wanted)
        return self.final_norm(x_TD, delta_TD)[1]

    def _padded(
        self, ids_BS: Tensor | None, mask_BS: Tensor | None, rows: Tensor | None, embeds_BSD: Tensor | None
    ) -> EncoderOutput:
        """Pack, call, unpack."""
        if rows is not None:
            raise ValueError("rows count the tokens of a Packed; index last_hidden_state of a padded batch instead")
        batch = pack(padded_ids(ids_BS, embeds_BSD), mask_BS, vocab_size=self.config.vocab_size)
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
        return cls(EncoderConfig.preset(config) if isinstance(config, str) else config)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
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
        folder = locate(folder_or_hub_id, revision=revision, token=token, local_files_only=local_files_only)
        config = EncoderConfig.from_hf(read_json(folder, "config.json"))
        with torch.device("meta"):
            encoder = cls(config)
        load_weights(encoder, folder, device=device or "cpu", dtype=dtype or torch.float32)
        return encoder.eval()

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json and model.safetensors, which `ModernBertModel.from_pretrained` reads. Atomic.

        The new folder is loaded before it replaces the old one.

        Raises:
            ValueError: a model that would not load again, such as one with an adapter or with NaN; nothing is written.
            NotADirectoryError: `folder` is a file, or a link that leads nowhere.
        """

        def check(new: Path) -> None:
            check_same(self, Encoder.from_pretrained(new, dtype=self.embeddings.tok_embeddings.weight.dtype))

        save(folder, config=self.config.to_hf(), state=state_of(self), check=check)

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


def take_rows(x_TD: Tensor, rows_Q: Tensor | None) -> Tensor:
    return x_TD if rows_Q is None else x_TD.index_select(0, rows_Q)
