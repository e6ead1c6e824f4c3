"""An ONNX graph that is written node by node, and the layers that an encoder and a head have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from ..modules import Linear

Sizes = Sequence[str | int | None]
OPSET = 23
LARGEST = 2_000_000_000

INT8_WEIGHT = 63
"""The largest number of an int8 weight. With 127, AVX2 would cut sums of two products off at 16 bits."""

TINY = 1e-20


@runtime_checkable
class DenseLayer(Protocol):
    """`heads.dense.Dense`."""

    linear: nn.Linear
    activation: nn.Module
    residual: nn.Module | None


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
        self.inputs: dict[str, Sizes] = {}
        self.outputs: dict[str, Sizes] = {}

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

    def output(self, name: str, result: str, sizes: Sizes) -> None:
        """Give a result a name, and float32 as its type."""
        self.nodes.append(helper.make_node("Identity", [result], [name]))
        self.outputs[name] = sizes

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
        inputs, outputs = (
            [helper.make_tensor_value_info(name, kind, sizes) for name, sizes in named.items()]
            for kind, named in ((TensorProto.INT64, self.inputs), (TensorProto.FLOAT, self.outputs))
        )
        graph = helper.make_graph(self.nodes, "modernbert", inputs, outputs, self.constants + tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=11)


def _absent(name: str, weight: Tensor) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=weight.shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="given to the engine")
    return tensor


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


def layer_norm(g: Graph, norm: nn.LayerNorm, x: str) -> str:
    bias = [] if norm.bias is None else [g.weight(norm.bias)]
    return g("LayerNormalization", x, g.weight(norm.weight), *bias, axis=-1, epsilon=norm.eps)


def dense(g: Graph, x: str, layers: Iterable[DenseLayer]) -> str:
    """The layers of a head, one after the other."""
    for layer in layers:
        if not isinstance(layer, DenseLayer):
            raise ValueError(f"a graph has no {type(layer).__name__} as a layer of a head: leave out engine")
        activation = type(layer.activation).__name__
        if activation not in ACTIVATIONS:
            raise ValueError(f"a graph has no {activation} as an activation of a head: leave out engine")
        y = ACTIVATIONS[activation](g, linear(g, layer.linear, x))
        x = y if layer.residual is None else g("Add", y, _residual(g, layer.residual, x))
    return x


def normalized(g: Graph, x: str) -> str:
    """Unit vectors, as `torch.nn.functional.normalize` makes them."""
    length = g("ReduceL2", x, g.constant([-1]), keepdims=1)
    return g("Div", x, g("Max", length, g.constant(1e-12, np.float32)))


def _residual(g: Graph, residual: nn.Module, x: str) -> str:
    return x if type(residual) is nn.Identity else linear(g, residual, x)


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
