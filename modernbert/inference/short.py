"""One short text on a CPU: the forward pass of `encoder.py` as bare tensor operations on prepared weights.

Through the modules, the products of 16 tokens take 40 % of the time. The rest is Python, dispatch and small operations,
slow because the weights drive them out of the cache. Here the stream and the scores are overwritten in place, rotary is
one complex product, and each weight has the layout that multiplies a few rows fastest on this machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modernbert_kernels as ops
from modernbert_kernels.cpu import linear

from ..encoder import MLP, Attention, Embeddings, Encoder, Layer, Linear, Norm
from ..packing import Packed

LONGEST = 64
"""Tokens of the longest text. Beyond it the products are most of the time, and published models have a window of 64."""

ROWS = 32
"""Rows of the product by which a layout is chosen."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu}

ORDINARY = {Encoder, Embeddings, Layer, Attention, MLP, Linear, Norm, nn.Embedding, nn.LayerNorm, nn.ModuleList}
"""The modules whose forward pass is repeated here. Any other, such as an adapter, may compute something else."""

Layout = Callable[[Tensor], Tensor]


class Layouts:
    """The layout of a weight that multiplies `ROWS` rows fastest, measured once for each shape.

    No fixed rule is right on every processor: with AVX-512 a weight packed for oneDNN wins, without it a transposed
    copy does for small matrices.
    """

    def __init__(self) -> None:
        self._fastest: dict[torch.Size, Layout] = {}

    def __call__(self, weight_FD: Tensor) -> Tensor:
        """A copy of a float32 weight that `ops.linear` takes in its place."""
        if weight_FD.shape not in self._fastest:
            self._fastest[weight_FD.shape] = self._measure(weight_FD)
        return self._fastest[weight_FD.shape](weight_FD)

    def _measure(self, weight_FD: Tensor, rounds: int = 5) -> Layout:
        layouts: list[Layout] = [linear.transpose_weight, *([linear.pack_weight] if linear.AVAILABLE else [])]
        x_TD = torch.rand(ROWS, weight_FD.shape[1], dtype=torch.float32, device="cpu")
        weights = [layout(weight_FD) for layout in layouts]
        seconds = [float("inf")] * len(layouts)
        for _ in range(1 + rounds):  # the first ones are slower for all, and never the fastest
            for index, weight in enumerate(weights):
                start = time.perf_counter()
                ops.linear(x_TD, weight)
                seconds[index] = min(seconds[index], time.perf_counter() - start)
        return layouts[seconds.index(min(seconds))]


class _Norm(NamedTuple):
    """What `torch.layer_norm` takes after the tensor."""

    shape: tuple[int, ...]
    weight: Tensor
    bias: Tensor | None
    eps: float


class _Layer(NamedTuple):
    """The weights of a layer in the order of their use. `following` is the norm after it."""

    theta: float
    Wqkv: tuple[Tensor, Tensor | None]
    attn_Wo: tuple[Tensor, Tensor | None]
    mlp_norm: _Norm
    Wi: tuple[Tensor, Tensor | None]
    activate: Callable[[Tensor], Tensor]
    mlp_Wo: tuple[Tensor, Tensor | None]
    following: _Norm


class ShortEncoder(nn.Module):
    """An encoder that takes a short way for one short text, and else runs the modules.

    Args:
        encoder: a float32 encoder on the CPU in evaluation mode, which runs every other batch.
        layouts: chooses the copies of the weights, which are those of this moment.
    """

    @torch.no_grad()
    def __init__(self, encoder: Encoder, layouts: Layouts) -> None:
        super().__init__()
        self.encoder, self.config = encoder, encoder.config
        # Dictionaries of the modules, which may be filled later.
        self.hooks = [hooks for module in encoder.modules() for hooks in _hooks(module)]
        self.table_VD = encoder.embeddings.tok_embeddings.weight.detach()
        self.norm = _norm(encoder.embeddings.norm)
        layers = cast("list[Layer]", list(encoder.layers))
        norms = [*(layer.attn_norm for layer in layers[1:]), encoder.final_norm]
        self.weights = [
            _Layer(
                theta,
                _qkv(layer.attn, layouts),
                _linear(layer.attn.Wo, layouts),
                _norm(layer.mlp_norm),
                _linear(layer.mlp.Wi, layouts),
                ACTIVATIONS[layer.mlp.activation],
                _linear(layer.mlp.Wo, layouts),
                _norm(following),
            )
            for layer, theta, following in zip(layers, encoder.thetas, norms, strict=True)
        ]
        windows = [layer.attn.window for layer in layers if layer.attn.window is not None]
        self.longest = min([LONGEST, *(window + 1 for window in windows)])
        self.positions = torch.arange(self.longest, device="cpu")
        width = encoder.config.head_dim
        self.rope_of = {
            theta: torch.complex(*ops.rotary_table(self.positions, theta, width))[:, None, None]
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
        keys = None if batch.key_lengths is None else int(batch.key_lengths)
        rope_of = {theta: rope[:tokens] for theta, rope in self.rope_of.items()}
        h_TD = x_TD = torch.layer_norm(torch.embedding(self.table_VD, batch.input_ids), *self.norm)
        for theta, Wqkv, attn_Wo, mlp_norm, Wi, activate, mlp_Wo, following in self.weights:
            qkv_T3HK = ops.linear(h_TD, *Wqkv).view(tokens, 3, heads, width)
            pairs_T2HR2 = qkv_T3HK.view(tokens, 3, heads, width // 2, 2)[:, :2]
            torch.view_as_complex(pairs_T2HR2).mul_(rope_of[theta])
            q_HTK, k_HSK, v_HSK = qkv_T3HK.transpose(0, 2).unbind(1)
            if keys is not None:
                k_HSK, v_HSK = k_HSK[:, :keys], v_HSK[:, :keys]
            scores_HTS = torch.bmm(q_HTK, k_HSK.transpose(1, 2))
            out_HTK = torch.bmm(torch.softmax(scores_HTS, -1, out=scores_HTS), v_HSK)
            x_TD.add_(ops.linear(out_HTK.transpose(0, 1).reshape(tokens, -1), *attn_Wo))
            a_TF, gate_TF = ops.linear(torch.layer_norm(x_TD, *mlp_norm), *Wi).chunk(2, 1)
            x_TD.add_(ops.linear(activate(a_TF).mul_(gate_TF), *mlp_Wo))
            h_TD = torch.layer_norm(x_TD, *following)
        return h_TD if rows_Q is None else h_TD.index_select(0, rows_Q)


def has_short_way(encoder: nn.Module) -> TypeGuard[Encoder]:
    """Whether `ShortEncoder` computes what this encoder does: float32 on a CPU, only modules of ours."""
    return (
        isinstance(encoder, Encoder)
        and [i for i, layer in enumerate(encoder.layers) if getattr(layer, "attn_norm", None) is None] == [0]
        and all(p.is_cpu and p.dtype is torch.float32 for p in encoder.parameters())
        and all(type(module) in ORDINARY for module in encoder.modules())
        and not any("forward" in module.__dict__ for module in encoder.modules())
    )


def _hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    return module._forward_hooks, module._forward_pre_hooks


def _norm(norm: nn.Module | None) -> _Norm:
    assert isinstance(norm, (Norm, nn.LayerNorm))
    return _Norm(tuple(norm.weight.shape), norm.weight, norm.bias, norm.eps)


def _linear(module: nn.Linear, layouts: Layouts) -> tuple[Tensor, Tensor | None]:
    return layouts(module.weight), module.bias


def _qkv(attn: Attention, layouts: Layouts) -> tuple[Tensor, Tensor | None]:
    """Wqkv for complex rotary: the rows of a pair are neighbours, in q and in k, and q has the scale of the scores."""
    heads, width = attn.heads, attn.head_dim
    rows_3H2R = torch.arange(3 * heads * width, device="cpu").view(3, heads, 2, width // 2)
    pairs_2HR2 = rows_3H2R[:2].transpose(2, 3)
    order = torch.cat([pairs_2HR2.flatten(), rows_3H2R[2].flatten()])
    scale = attn.Wqkv.weight.new_tensor([width**-0.5, 1.0, 1.0]).repeat_interleave(heads * width)
    bias_F = None if attn.Wqkv.bias is None else attn.Wqkv.bias[order] * scale
    return layouts(attn.Wqkv.weight[order] * scale[:, None]), bias_F
