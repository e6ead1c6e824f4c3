"""The forward pass of `encoder.py` as an ONNX graph for packed rows: the same order, the same names.

It is written from the modules in a fraction of a second, not traced. Attention is dense over the row of tokens, under a
mask, so a row is a few short texts or one longer text. `onnx_padded.py` writes the same pass for hosts that pad.

Inputs:
    input_ids: `[T]` int64.
    positions: `[T]` int64 rotary positions.
    segment_ids: `[T]` int64, equal for the tokens of one sequence.
    key_segment_ids: `[T]` int64, the same, but -1 for tokens that no token sees: query-only rows.
    rows: `[Q]` int64, increasing, the rows that are asked for.
Output:
    vectors: `[Q, D]`, the hidden states of these rows, or `[Q, E]`, their vectors after a late-interaction head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
from onnx import TensorProto
from torch import nn

from ..encoder import MLP, Attention, Encoder, Layer
from .onnx_layers import ACTIVATIONS, DenseLayer, Graph, dense, layer_norm, linear, normalized
from .replica import changed_module, hooked_module

INPUTS = {"input_ids": "T", "positions": "T", "segment_ids": "T", "key_segment_ids": "T", "rows": "Q"}
OUTPUT = "vectors"

HIDDEN = -1e30
"""Added to the score of a key that is not seen. Infinity would make a row that sees no key NaN."""


@runtime_checkable
class Head(Protocol):
    """`heads.colbert.ColBERT`."""

    encoder: Encoder
    dense: nn.ModuleList


class Rope(NamedTuple):
    """Cosine and sine of every position, `[B, S, R]`."""

    cos: str
    sin: str


class Seen(NamedTuple):
    """What a layer adds to its scores; and 1 for rows that see any key, else 0, `[.., S, 1]`."""

    bias: str
    any: str


class Layout(NamedTuple):
    """The rows of tokens as attention takes them: B texts of S tokens with padding, or all rows as one of them.

    Attributes:
        input_ids: `[T]`. positions: `[B, S, 1]` float32.
        rows: those that leave the last layer; None: all.
        seen: the keys that each row sees within so many neighbours, or everywhere.
        spread: `[T, F]` to `[B, S, F]`. collect: the way back.
    """

    input_ids: str
    positions: str
    rows: str | None
    seen: Callable[[int | None], Seen]
    spread: Callable[[str], str]
    collect: Callable[[str], str]


def _packed(g: Graph) -> Layout:
    first, second = g.constant([0]), g.constant([1])
    row_T = g("Range", g.constant(0), g("Size", "input_ids"), g.constant(1))

    def seen(window: int | None) -> Seen:
        seen_TT = g("Equal", g("Unsqueeze", "segment_ids", second), g("Unsqueeze", "key_segment_ids", first))
        return seen_of(g, seen_TT if window is None else g("And", seen_TT, near(g, row_T, window)))

    return Layout(
        input_ids="input_ids",
        positions=g("Unsqueeze", g("Cast", "positions", to=TensorProto.FLOAT), g.constant([0, 2])),
        rows="rows",
        seen=seen,
        spread=lambda x: g("Unsqueeze", x, first),
        collect=lambda x: g("Squeeze", x, first),
    )


def near(g: Graph, place_S: str, window: int) -> str:
    """`[S, S]`, whether two places are at most so far from each other."""
    row_S1, column_1S = g("Unsqueeze", place_S, g.constant([1])), g("Unsqueeze", place_S, g.constant([0]))
    return g("LessOrEqual", g("Abs", g("Sub", row_S1, column_1S)), g.constant(window))


def seen_of(g: Graph, seen: str) -> Seen:
    bias = g("Where", seen, g.constant(0, np.float32), g.constant(HIDDEN, np.float32))
    return Seen(bias, g("ReduceMax", g("Cast", seen, to=TensorProto.FLOAT), g.constant([-1]), keepdims=1))


def encoder(g: Graph, encoder: Encoder, layout: Layout) -> str:
    """`Encoder.forward`: the hidden states of the rows that are asked for, `[T, D]` or `[Q, D]`."""
    config = encoder.config
    windows = {window: layout.seen(window) for window in {_window(layer) for layer in encoder.layers}}
    rope_of = {theta: _rope(g, layout.positions, theta, config.head_dim) for theta in set(encoder.thetas)}
    table = g.weight(encoder.embeddings.tok_embeddings.weight)
    x = layer_norm(g, encoder.embeddings.norm, g("Gather", table, layout.input_ids))
    delta = None
    rows_of_layer = [None] * (len(encoder.layers) - 1) + [layout.rows]
    for module, theta, rows in zip(encoder.layers, encoder.thetas, rows_of_layer, strict=True):
        layer = cast("Layer", module)
        x, h = (x, x) if layer.attn_norm is None else _norm(g, layer.attn_norm, x, delta)
        attended = _attention(g, layer.attn, h, rope_of[theta], windows[_window(layer)], layout, rows)
        x, h = _norm(g, layer.mlp_norm, x if rows is None else g("Gather", x, rows), attended)
        delta = _mlp(g, layer.mlp, h)
    return _norm(g, encoder.final_norm, x, delta)[1]


def _attention(g: Graph, attn: Attention, x: str, rope: Rope, seen: Seen, layout: Layout, rows: str | None) -> str:
    heads = attn.heads
    qkv_BSD = layout.spread(linear(g, attn.Wqkv, x))
    q_BSD, k_BSD, v_BSD = g.split("Split", qkv_BSD, outputs=3, axis=2, num_outputs=3)
    q_BSD, k_BSD = (g("RotaryEmbedding", y, rope.cos, rope.sin, num_heads=heads) for y in (q_BSD, k_BSD))
    out_BSD = g("Attention", q_BSD, k_BSD, v_BSD, seen.bias, q_num_heads=heads, kv_num_heads=heads)
    out_TD = layout.collect(g("Mul", out_BSD, seen.any))
    return linear(g, attn.Wo, out_TD if rows is None else g("Gather", out_TD, rows))


def _mlp(g: Graph, mlp: MLP, x: str) -> str:
    a, gate = g.split("Split", linear(g, mlp.Wi, x), outputs=2, axis=-1, num_outputs=2)
    return linear(g, mlp.Wo, g("Mul", ACTIVATIONS[{"gelu": "GELU", "silu": "SiLU"}[mlp.activation]](g, a), gate))


def _norm(g: Graph, norm: nn.LayerNorm, x: str, delta: str | None) -> tuple[str, str]:
    x = x if delta is None else g("Add", x, delta)
    return x, layer_norm(g, norm, x)


def _rope(g: Graph, position_BS1: str, theta: float, head_dim: int) -> Rope:
    frequency_R = 1.0 / np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    angle_BSR = g("Mul", position_BS1, g.constant(frequency_R, np.float32))
    return Rope(g("Cos", angle_BSR), g("Sin", angle_BSR))


def _window(layer: nn.Module) -> int | None:
    return cast("Layer", layer).attn.window


def write(model: nn.Module, *, int8: bool = False) -> Graph:
    """The graph of an `Encoder`, or of a late-interaction head: its encoder, its layers, and the norm.

    Raises:
        TypeError: another model. ValueError: a module that was replaced, or has hooks.
    """
    g, inner = Graph(int8=int8), encoder_of(model)
    check_plain(model, inner)
    g.inputs |= {name: [size] for name, size in INPUTS.items()}
    result = encoder(g, inner, _packed(g))
    if isinstance(model, Head):
        result = normalized(g, dense(g, result, cast("Iterable[DenseLayer]", model.dense)))
    g.output(OUTPUT, result, ["Q", None])
    return g


def check_plain(model: nn.Module, encoder: Encoder) -> None:
    """Raise ValueError for modules of the encoder that were replaced, and for hooks anywhere in the model."""
    if changed := changed_module(encoder) or hooked_module(model):
        raise ValueError(f"a graph has no {changed}: merge adapters and remove hooks first, or leave out engine")


def encoder_of(model: nn.Module) -> Encoder:
    """The model if it is an `Encoder`, or that of a head."""
    if isinstance(model, Head):
        return model.encoder
    if isinstance(model, Encoder):
        return model
    raise TypeError(
        f"a graph can be written of an Encoder or of a late-interaction head, not of {type(model).__name__}"
    )
