"""One short text on a CPU: the forward pass of `encoder.py` as bare tensor operations on prepared weights.

Through the modules, the products of 16 tokens take 40 % of the time. The rest is Python, dispatch and small operations,
slow because the weights drive them out of the cache. Here the stream and the scores are overwritten in place, rotary is
one complex product, and each weight has the layout that multiplies a few rows fastest on this machine.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modernbert_kernels as ops
from modernbert_kernels.cpu import linear

from ..encoder import Attention, Encoder, Layer
from ..modules import Linear
from ..packing import Packed
from .replica import changed_module, forward_hooks

LONGEST = 64
"""Tokens of the longest text. Beyond it the products are most of the time, and published models have a window of 64."""

ROWS = 24
"""Rows of the products by which a layout is chosen."""

MEASURED = 4
"""Layers whose products are measured: more than the cache of a core holds."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}

Product = Callable[[Tensor], Tensor]
"""`x W^T + b` on a weight that was copied into a layout."""

Layout = Callable[[Tensor, Tensor | None], Product]


def fastest_layout(weights: Sequence[Tensor], rounds: int = 9) -> Layout:
    """The layout in which these weights multiply `ROWS` rows fastest, measured.

    No fixed rule is right on every processor. The weights are multiplied one after another, as in a model: a single
    product finds its weight in the cache, where a transposed copy has an advantage that it has not in a model.
    """
    layouts: list[Layout] = [linear.transposed, *([linear.packed] if linear.AVAILABLE else [])]
    calls = [
        [(torch.rand(ROWS, w.shape[1], dtype=w.dtype, device="cpu"), make(w, None)) for w in weights]
        for make in layouts
    ]
    seconds: list[list[float]] = [[] for _ in layouts]
    for _, (products, times) in itertools.product(range(rounds), list(zip(calls, seconds, strict=True))):
        start = time.perf_counter()
        for x_TD, product in products:
            product(x_TD)
        times.append(time.perf_counter() - start)
    return min(zip(layouts, seconds, strict=True), key=lambda measured: statistics.median(measured[1]))[0]


class _Norm(NamedTuple):
    """What `torch.layer_norm` takes after the tensor."""

    shape: tuple[int, ...]
    weight: Tensor
    bias: Tensor | None
    eps: float


class _Layer(NamedTuple):
    """The weights of a layer in the order of their use. `following` is the norm after it."""

    theta: float
    Wqkv: Product
    attn_Wo: Product
    mlp_norm: _Norm
    Wi: Product
    activate: Callable[[Tensor], Tensor]
    mlp_Wo: Product
    following: _Norm


class ShortEncoder(nn.Module):
    """An encoder that takes a short way for one short text, and else runs the modules.

    Args:
        encoder: a float32 encoder on the CPU in evaluation mode, which runs every other batch. The copies of its
            weights are those of this moment.
    """

    @torch.no_grad()
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder, self.config = encoder, encoder.config
        self.hooks = forward_hooks(encoder)
        self.table_VD = encoder.embeddings.tok_embeddings.weight.detach()
        self.norm = _norm(encoder.embeddings.norm)
        layers = cast("list[Layer]", list(encoder.layers))
        norms = [*(layer.attn_norm for layer in layers[1:]), encoder.final_norm]
        product = fastest_layout([m.weight for layer in layers[:MEASURED] for m in _linears(layer)])
        self.weights = [
            _Layer(
                theta,
                product(*_qkv(layer.attn)),
                product(layer.attn.Wo.weight, layer.attn.Wo.bias),
                _norm(layer.mlp_norm),
                product(layer.mlp.Wi.weight, layer.mlp.Wi.bias),
                ACTIVATIONS[layer.mlp.activation],
                product(layer.mlp.Wo.weight, layer.mlp.Wo.bias),
                _norm(following),
            )
            for layer, theta, following in zip(layers, encoder.thetas, norms, strict=True)
        ]
        windows = [layer.attn.window for layer in layers if layer.attn.window is not None]
        self.longest = min([LONGEST, *(window + 1 for window in windows)])
        self.positions = torch.arange(self.longest, device="cpu")
        filled = torch.arange(self.longest + linear.row_step(self.longest), device="cpu")
        width = encoder.config.head_dim
        self.rope_of = {
            theta: torch.complex(*ops.rotary_table(filled, theta, width))[:, None, None]
            for theta in set(encoder.thetas)
        }

    def forward(self, batch: Packed, *, rows: Tensor | None = None) -> Tensor:
        """`[T]` tokens to `[T, D]`, or the `[Q, D]` of `rows`, as `Encoder.forward`."""
        tokens = batch.num_tokens
        if (
            len(batch) == 1
            and 0 < tokens <= self.longest
            and not any(self.hooks)
            and torch.equal(batch.positions, self.positions[:tokens])
        ):
            return self._one_text(batch, rows)
        return self.encoder(batch, rows=rows)

    def _one_text(self, batch: Packed, rows_Q: Tensor | None) -> Tensor:
        tokens, heads, width = batch.num_tokens, self.config.num_attention_heads, self.config.head_dim
        keys = tokens if batch.key_lengths is None else int(batch.key_lengths)
        fill = -tokens % linear.row_step(tokens)  # rows of token 0 that no row sees
        ids_T = F.pad(batch.input_ids, (0, fill)) if fill else batch.input_ids
        rope_of = {theta: rope[: tokens + fill] for theta, rope in self.rope_of.items()}
        h_TD = x_TD = torch.layer_norm(torch.embedding(self.table_VD, ids_T), *self.norm)
        for theta, Wqkv, attn_Wo, mlp_norm, Wi, activate, mlp_Wo, following in self.weights:
            qkv_T3HK = Wqkv(h_TD).view(-1, 3, heads, width)
            pairs_T2HR2 = qkv_T3HK.view(-1, 3, heads, width // 2, 2)[:, :2]
            torch.view_as_complex(pairs_T2HR2).mul_(rope_of[theta])
            q_HTK, k_HTK, v_HTK = qkv_T3HK.transpose(0, 2).unbind(1)
            k_HSK, v_HSK = k_HTK[:, :keys], v_HTK[:, :keys]
            scores_HTS = torch.bmm(q_HTK, k_HSK.transpose(1, 2))
            out_HTK = torch.bmm(torch.softmax(scores_HTS, -1, out=scores_HTS), v_HSK)
            x_TD.add_(attn_Wo(out_HTK.transpose(0, 1).flatten(1)))
            a_TF, gate_TF = Wi(torch.layer_norm(x_TD, *mlp_norm)).chunk(2, 1)
            x_TD.add_(mlp_Wo(activate(a_TF).mul_(gate_TF)))
            h_TD = torch.layer_norm(x_TD, *following)
        return h_TD[:tokens] if rows_Q is None else h_TD.index_select(0, rows_Q)


def has_short_way(encoder: nn.Module) -> TypeGuard[Encoder]:
    """Whether `ShortEncoder` computes what this encoder does: float32 on a CPU, only modules of ours."""
    return (
        isinstance(encoder, Encoder)
        and [i for i, layer in enumerate(encoder.layers) if getattr(layer, "attn_norm", None) is None] == [0]
        and all(p.is_cpu and p.dtype is torch.float32 for p in encoder.parameters())
        and changed_module(encoder) is None
    )


def _norm(norm: nn.Module | None) -> _Norm:
    assert isinstance(norm, nn.LayerNorm)
    return _Norm(tuple(norm.normalized_shape), norm.weight, norm.bias, norm.eps)


def _linears(layer: Layer) -> tuple[Linear, Linear, Linear, Linear]:
    return layer.attn.Wqkv, layer.attn.Wo, layer.mlp.Wi, layer.mlp.Wo


def _qkv(attn: Attention) -> tuple[Tensor, Tensor | None]:
    """Wqkv for complex rotary: the rows of a pair are neighbours, in q and in k, and q has the scale of the scores."""
    heads, width = attn.heads, attn.head_dim
    rows_3H2R = torch.arange(3 * heads * width, device="cpu").view(3, heads, 2, width // 2)
    pairs_2HR2 = rows_3H2R[:2].transpose(2, 3)
    order = torch.cat([pairs_2HR2.flatten(), rows_3H2R[2].flatten()])
    scale = attn.Wqkv.weight.new_tensor([width**-0.5, 1.0, 1.0]).repeat_interleave(heads * width)
    bias_F = None if attn.Wqkv.bias is None else attn.Wqkv.bias[order] * scale
    return attn.Wqkv.weight[order] * scale[:, None], bias_F
