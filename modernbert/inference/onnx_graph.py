"""The forward pass of `encoder.py` as an ONNX graph for packed rows: the same order, the same names.

It is written from the modules in a fraction of a second, not traced. Attention is dense over the row of tokens, under a
mask, so a row is a few short texts or one longer text.

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
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from ..encoder import MLP, Attention, Embeddings, Encoder, Layer
from ..modules import Linear
from .replica import changed_module, hooked_module

INPUTS = {"input_ids": "T", "positions": "T", "segment_ids": "T", "key_segment_ids": "T", "rows": "Q"}
OUTPUT = "vectors"
OPSET = 23
LARGEST = 2_000_000_000

INT8_WEIGHT = 63
"""The largest number of an int8 weight. With 127, AVX2 would cut sums of two products off at 16 bits."""

TINY = 1e-20
HIDDEN = -1e30
"""Added to the score of a key that is not seen. Infinity would make a row that sees no key NaN."""


class DenseLayer(Protocol):
    """`heads.dense.Dense`."""

    linear: nn.Linear
    activation: nn.Module
    residual: nn.Module | None


@runtime_checkable
class Head(Protocol):
    """`heads.colbert.ColBERT`."""

    encoder: Encoder
    dense: nn.ModuleList


class Graph:
    """The nodes and weights of a graph. A call adds a node and gives the name of its output.

    Args:
        int8: multiply by the weights in int8.
    """

    def __init__(self, *, int8: bool = False) -> None:
        self.int8 = int8
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self.weights: dict[str, Tensor] = {}

    def __call__(self, operator: str, *inputs: str, **attributes: Any) -> str:
        return self.split(operator, *inputs, outputs=1, **attributes)[0]

    def split(self, operator: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """A node with several outputs."""
        names = [f"{operator}_{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(operator, list(inputs), names, **attributes))
        return names

    def constant(self, values: object, dtype: type[np.generic] = np.int64) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def weight(self, tensor: Tensor) -> str:
        """A weight of the model, which is not copied."""
        name = f"weight_{len(self.weights)}"
        self.weights[name] = tensor.detach().contiguous()
        return name

    def file(self, *, weights: bool = False) -> onnx.ModelProto:
        """The model with its weights, or without: an engine is given them by name.

        Raises:
            ValueError: weights of more than 2 GB, which the format does not hold.
        """
        if weights and sum(w.nbytes for w in self.weights.values()) > LARGEST:
            raise ValueError("the weights have more than 2 GB, which a single ONNX file does not hold")
        tensors = [
            numpy_helper.from_array(w.numpy(), name) if weights else _absent(name, w)
            for name, w in self.weights.items()
        ]
        inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, [size]) for name, size in INPUTS.items()]
        output = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["Q", None])
        graph = helper.make_graph(self.nodes, "modernbert", inputs, [output], self.constants + tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=11)


def _absent(name: str, weight: Tensor) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=weight.shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="given to the engine")
    return tensor


def encoder(g: Graph, encoder: Encoder) -> str:
    """`Encoder.forward`: the hidden states of the rows that are asked for."""
    config = encoder.config
    seen_of = {window: _seen(g, window) for window in {_window(layer) for layer in encoder.layers}}
    rope_of = {theta: _rope(g, theta, config.head_dim) for theta in set(encoder.thetas)}
    x = _embeddings(g, encoder.embeddings)
    delta = None
    rows_of_layer = [None] * (len(encoder.layers) - 1) + ["rows"]
    for module, theta, wanted in zip(encoder.layers, encoder.thetas, rows_of_layer, strict=True):
        x, delta = _layer(g, cast("Layer", module), x, delta, rope_of[theta], seen_of[_window(module)], wanted)
    return _norm(g, encoder.final_norm, x, delta)[1]


def normalized(g: Graph, x: str, layers: Iterable[DenseLayer]) -> str:
    """The head of `heads.colbert`: its layers, and unit vectors as `torch.nn.functional.normalize` makes them."""
    for layer in layers:
        y = ACTIVATIONS[type(layer.activation).__name__](g, linear(g, layer.linear, x))
        x = y if layer.residual is None else g("Add", y, _residual(g, layer.residual, x))
    length = g("ReduceL2", x, g.constant([-1]), keepdims=1)
    return g("Div", x, g("Max", length, g.constant(1e-12, np.float32)))


def _embeddings(g: Graph, embeddings: Embeddings) -> str:
    return _layer_norm(g, embeddings.norm, g("Gather", g.weight(embeddings.tok_embeddings.weight), "input_ids"))


def _layer(
    g: Graph, layer: Layer, x: str, delta: str | None, rope: Rope, seen: Seen, rows: str | None
) -> tuple[str, str]:
    x, h = (x, x) if layer.attn_norm is None else _norm(g, layer.attn_norm, x, delta)
    attended = _attention(g, layer.attn, h, rope, seen, rows)
    x, h = _norm(g, layer.mlp_norm, x if rows is None else g("Gather", x, rows), attended)
    return x, _mlp(g, layer.mlp, h)


def _attention(g: Graph, attn: Attention, x: str, rope: Rope, seen: Seen, rows: str | None) -> str:
    heads = attn.heads
    qkv_1TD = g("Unsqueeze", linear(g, attn.Wqkv, x), g.constant([0]))
    q_1TD, k_1TD, v_1TD = g.split("Split", qkv_1TD, outputs=3, axis=2, num_outputs=3)
    q_1TD, k_1TD = (g("RotaryEmbedding", y, rope.cos, rope.sin, num_heads=heads) for y in (q_1TD, k_1TD))
    out_1TD = g("Attention", q_1TD, k_1TD, v_1TD, seen.bias, q_num_heads=heads, kv_num_heads=heads)
    out_TD = g("Squeeze", g("Mul", out_1TD, seen.any), g.constant([0]))
    return linear(g, attn.Wo, out_TD if rows is None else g("Gather", out_TD, rows))


def _mlp(g: Graph, mlp: MLP, x: str) -> str:
    a, gate = g.split("Split", linear(g, mlp.Wi, x), outputs=2, axis=-1, num_outputs=2)
    return linear(g, mlp.Wo, g("Mul", ACTIVATIONS[{"gelu": "GELU", "silu": "SiLU"}[mlp.activation]](g, a), gate))


def linear(g: Graph, module: nn.Module, x: str) -> str:
    if not isinstance(module, nn.Linear) or type(module) not in (Linear, nn.Linear):
        raise ValueError(f"a graph has no {type(module).__name__}: merge adapters first, or leave out engine")
    if g.int8:
        y = _int8_product(g, x, module.weight)
        return y if module.bias is None else g("Add", y, g.weight(module.bias))
    bias = [] if module.bias is None else [g.weight(module.bias)]
    return g("Gemm", x, g.weight(module.weight), *bias, transB=1)


def _int8_product(g: Graph, x: str, weight_FD: Tensor) -> str:
    """`x W^T` in int8: a scale for each output of the weight, and one for each row of `x`.

    One scale for all of `x`, which is usual, would let a text depend on what else is in the batch.
    """
    largest_F1 = weight_FD.detach().abs().amax(1, keepdim=True).clamp(min=TINY)
    weight_DF = g.constant((weight_FD.detach() * (INT8_WEIGHT / largest_F1)).round().t().numpy(), np.int8)
    largest_T1 = g("Max", g("ReduceMax", g("Abs", x), g.constant([1]), keepdims=1), g.constant(TINY, np.float32))
    zero = g.constant(128, np.uint8)
    x_TD = g("QuantizeLinear", g("Div", x, largest_T1), g.constant(1 / 127, np.float32), zero)
    y_TF = g("Cast", g("MatMulInteger", x_TD, weight_DF, zero), to=TensorProto.FLOAT)
    scale_F = g.constant(largest_F1[:, 0].numpy() / (127 * INT8_WEIGHT), np.float32)
    return g("Mul", g("Mul", y_TF, scale_F), largest_T1)


def _norm(g: Graph, norm: nn.LayerNorm, x: str, delta: str | None) -> tuple[str, str]:
    x = x if delta is None else g("Add", x, delta)
    return x, _layer_norm(g, norm, x)


def _layer_norm(g: Graph, norm: nn.LayerNorm, x: str) -> str:
    bias = [] if norm.bias is None else [g.weight(norm.bias)]
    return g("LayerNormalization", x, g.weight(norm.weight), *bias, axis=-1, epsilon=norm.eps)


class Rope(NamedTuple):
    """Cosine and sine of every position, `[1, T, R]`."""

    cos: str
    sin: str


def _rope(g: Graph, theta: float, head_dim: int) -> Rope:
    frequency_R = 1.0 / np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    position_1T1 = g("Unsqueeze", g("Cast", "positions", to=TensorProto.FLOAT), g.constant([0, 2]))
    angle_1TR = g("Mul", position_1T1, g.constant(frequency_R, np.float32))
    return Rope(g("Cos", angle_1TR), g("Sin", angle_1TR))


class Seen(NamedTuple):
    """What a layer adds to its scores, `[T, T]`; and 1 for rows that see any key, else 0, `[T, 1]`."""

    bias: str
    any: str


def _window(layer: nn.Module) -> int | None:
    return cast("Layer", layer).attn.window


def _seen(g: Graph, window: int | None) -> Seen:
    first, second = g.constant([0]), g.constant([1])
    seen_TT = g("Equal", g("Unsqueeze", "segment_ids", second), g("Unsqueeze", "key_segment_ids", first))
    if window is not None:
        row_T = g("Range", g.constant(0), g("Size", "input_ids"), g.constant(1))
        distance_TT = g("Abs", g("Sub", g("Unsqueeze", row_T, second), g("Unsqueeze", row_T, first)))
        seen_TT = g("And", seen_TT, g("LessOrEqual", distance_TT, g.constant(window)))
    bias_TT = g("Where", seen_TT, g.constant(0, np.float32), g.constant(HIDDEN, np.float32))
    any_T1 = g("ReduceMax", g("Cast", seen_TT, to=TensorProto.FLOAT), second, keepdims=1)
    return Seen(bias_TT, any_T1)


def _residual(g: Graph, residual: nn.Module, x: str) -> str:
    return linear(g, residual, x) if isinstance(residual, nn.Linear) else x


def _operator(name: str, **attributes: float) -> Activation:
    return lambda g, x: g(name, x, **attributes)


def _clip(low: float, high: float) -> Activation:
    return lambda g, x: g("Clip", x, g.constant(low, np.float32), g.constant(high, np.float32))


Activation = Callable[[Graph, str], str]

ACTIVATIONS: dict[str, Activation] = {
    "CELU": _operator("Celu"),
    "ELU": _operator("Elu"),
    "GELU": _operator("Gelu"),
    "Hardsigmoid": _operator("HardSigmoid", alpha=1 / 6, beta=0.5),
    "Hardswish": _operator("HardSwish"),
    "Hardtanh": _clip(-1, 1),
    "Identity": lambda g, x: x,
    "LeakyReLU": _operator("LeakyRelu", alpha=0.01),
    "LogSigmoid": lambda g, x: g("Neg", g("Softplus", g("Neg", x))),
    "Mish": _operator("Mish"),
    "ReLU": _operator("Relu"),
    "ReLU6": _clip(0, 6),
    "SELU": _operator("Selu"),
    "SiLU": lambda g, x: g("Mul", x, g("Sigmoid", x)),
    "Sigmoid": _operator("Sigmoid"),
    "Softplus": _operator("Softplus"),
    "Softsign": _operator("Softsign"),
    "Tanh": _operator("Tanh"),
    "Tanhshrink": lambda g, x: g("Sub", x, g("Tanh", x)),
}
"""The activations of `torch.nn` that a head may have, with their default arguments."""


def write(model: nn.Module, *, int8: bool = False) -> Graph:
    """The graph of an `Encoder`, or of a late-interaction head: its encoder, its layers, and the norm.

    Raises:
        TypeError: another model. ValueError: a module that was replaced, or has hooks.
    """
    g, inner = Graph(int8=int8), encoder_of(model)
    if changed := changed_module(inner) or hooked_module(model):
        raise ValueError(f"a graph has no {changed}: merge adapters and remove hooks first, or leave out engine")
    result = encoder(g, inner)
    if isinstance(model, Head):
        result = normalized(g, result, cast("Iterable[DenseLayer]", model.dense))
    g.nodes.append(helper.make_node("Identity", [result], [OUTPUT]))
    return g


def encoder_of(model: nn.Module) -> Encoder:
    """The model if it is an `Encoder`, or that of a head."""
    if isinstance(model, Head):
        return model.encoder
    if isinstance(model, Encoder):
        return model
    raise TypeError(
        f"a graph can be written of an Encoder or of a late-interaction head, not of {type(model).__name__}"
    )
