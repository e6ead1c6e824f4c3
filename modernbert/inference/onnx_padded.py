"""The pass of `onnx_graph.py` with the inputs of hosts that pad, such as sentence-transformers and optimum.

Real tokens are packed inside the graph, so that all but attention computes them alone.

Inputs:
    input_ids: `[B, S]` int64.
    attention_mask: `[B, S]` int64, 1 at the real tokens of a text, which are adjacent, and 0 elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from onnx import TensorProto

from ..encoder import Encoder
from .onnx_graph import HIDDEN, Layout, Seen, encoder, near, seen_of
from .onnx_layers import Graph

INPUTS = ("input_ids", "attention_mask")


class Padded(NamedTuple):
    """What is known of the tokens of a padded batch.

    Attributes:
        mask: `[B, S]` bool, real tokens. place: `[B, S]` int64, from 0 at the first real token of a text.
        states: `[T, D]`, the hidden states of the tokens that are computed.
        layout: of the batch; where `spread` has no row of its own for a place, it takes that of another token.
    """

    mask: str
    place: str
    states: str
    layout: Layout


def write_padded(g: Graph, model: Encoder, *, query_only: bool) -> Padded:
    """The pass of the encoder.

    Args:
        query_only: compute tokens under the mask too. They see the real ones, and none sees them.
    """
    g.inputs |= {name: ["batch", "sequence"] for name in INPUTS}
    mask_BS = g("Cast", "attention_mask", to=TensorProto.BOOL)
    column_S = g("Range", g.constant(0), g("Gather", g("Shape", "input_ids"), g.constant(1)), g.constant(1))
    ones_BS = g("Cast", mask_BS, to=TensorProto.INT64)
    first_B1 = g("ArgMax", ones_BS, axis=1, keepdims=1)
    place_BS = g("Sub", column_S, first_B1)
    all_BS = g("Equal", place_BS, place_BS)
    # A text without tokens keeps its first place, so that no batch is empty.
    empty_B1 = g("Equal", g("ReduceMax", ones_BS, g.constant([1]), keepdims=1), g.constant(0))
    alone_BS = g("And", empty_B1, g("Equal", place_BS, g.constant(0)))
    kept_BS = all_BS if query_only else g("Or", mask_BS, alone_BS)

    flat = g.constant([-1])
    kept_N = g("Reshape", kept_BS, flat)
    token_T = g("Squeeze", g("NonZero", kept_N), g.constant([0]))
    row_N = g("Sub", g("CumSum", g("Cast", kept_N, to=TensorProto.INT64), g.constant(0)), g.constant(1))
    row_BS = g("Reshape", g("Max", row_N, g.constant(0)), g("Shape", "input_ids"))

    def seen(window: int | None) -> Seen:
        seen_BSS = g("And", g("Unsqueeze", mask_BS, g.constant([1])), g("Unsqueeze", all_BS, g.constant([2])))
        seen_BSS = seen_BSS if window is None else g("And", seen_BSS, near(g, column_S, window))
        bias_BSS, any_BS1 = seen_of(g, seen_BSS)
        return Seen(g("Unsqueeze", bias_BSS, g.constant([1])), any_BS1)

    layout = Layout(
        input_ids=g("Gather", g("Reshape", "input_ids", flat), token_T),
        positions=g("Unsqueeze", g("Cast", place_BS, to=TensorProto.FLOAT), g.constant([2])),
        rows=None,
        seen=seen,
        spread=lambda x_TF: g("Gather", x_TF, row_BS),
        collect=lambda x_BSF: g("Gather", g("Flatten", x_BSF, axis=2), token_T),
    )
    return Padded(mask_BS, place_BS, encoder(g, model, layout), layout)


def unpacked(g: Graph, padded: Padded, x_TF: str, *, query_only: bool) -> str:
    """`[T, F]` to `[B, S, F]`, zero in padding. Query-only tokens keep their rows."""
    x_BSF = padded.layout.spread(x_TF)
    return x_BSF if query_only else g("Mul", x_BSF, g("Unsqueeze", as_float(g, padded.mask), g.constant([2])))


def pooled(g: Graph, padded: Padded, mode: str) -> str:
    """`[B, D]`, one row for each text, as `heads.pooling` makes it; zeros for a text without tokens."""
    x_BSD = padded.layout.spread(padded.states)
    mask_BS, ones_BS = padded.mask, as_float(g, padded.mask)
    if mode == "max":
        mask_BS1 = g("Unsqueeze", mask_BS, g.constant([2]))
        largest_BD = g("ReduceMax", g("Where", mask_BS1, x_BSD, _number(g, HIDDEN)), g.constant([1]), keepdims=0)
        return g("Mul", largest_BD, g("ReduceMax", ones_BS, g.constant([1]), keepdims=1))
    count_B1 = g("ReduceSum", ones_BS, g.constant([1]), keepdims=1)
    number_BS = g("Mul", g("Cast", g("Add", padded.place, g.constant(1)), to=TensorProto.FLOAT), ones_BS)
    if mode in ("cls", "lasttoken"):
        wanted = _number(g, 1) if mode == "cls" else count_B1
        weight_BS = g("Mul", as_float(g, g("Equal", number_BS, wanted)), ones_BS)
    else:
        weight_BS = number_BS if mode == "weightedmean" else ones_BS
        total_B1 = g("ReduceSum", weight_BS, g.constant([1]), keepdims=1)
        total_B1 = g("Max", g("Sqrt", total_B1) if mode == "mean_sqrt_len_tokens" else total_B1, _number(g, 1))
        weight_BS = g("Div", weight_BS, total_B1)
    return g("Squeeze", g("MatMul", g("Unsqueeze", weight_BS, g.constant([1])), x_BSD), g.constant([1]))


def as_float(g: Graph, x: str) -> str:
    return g("Cast", x, to=TensorProto.FLOAT)


def _number(g: Graph, value: float) -> str:
    return g.constant(value, np.float32)
