"""transformers' model as a graph that ONNX Runtime or OpenVINO runs on a CPU, in float32 and with int8 products."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.worker import Setup

Feed = dict[str, np.ndarray]

EXPORTERS = ("dynamo", "legacy") if find_spec("onnxscript") else ("legacy",)
GROUP = 128
"""Inputs of OpenVINO's int8 products that share a scale: from 32 to a whole row, more is faster and less exact."""


@cache
def onnx_session(setup: Setup, exporter: str, *, spins: bool, int8: bool) -> Callable[[Feed], Tensor]:
    """ONNX Runtime on this export. `int8` quantises every product with a weight dynamically: a scale for each output of
    a weight, one for all of the input.
    """
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = setup.threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins)))
    file = onnx_int8_file(setup.folder, exporter) if int8 else onnx_file(setup.folder, exporter)
    session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda feed: torch.from_numpy(session.run(None, feed)[0])


@cache
def openvino_model(
    setup: Setup, source: str, hint: str, *, int8: bool
) -> tuple[Callable[[Feed], Tensor], Callable[[list[Feed]], list[Tensor]] | None]:
    """OpenVINO on one batch after another, and for throughput on several at once, one stream for each thread.

    With `int8` weights have a scale for each output, and inputs one for each `GROUP` of a row, which needs no packages
    beside OpenVINO.
    """
    runtime = import_module("openvino")
    core = runtime.Core()
    if source == "onnx":
        model = core.read_model(onnx_file(setup.folder, EXPORTERS[0]))
    else:
        logging.getLogger("openvino").setLevel(logging.ERROR)
        example = dict(zip(("input_ids", "attention_mask"), padded_example(), strict=True))
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tracing; the output is compared before anything is timed
            model = runtime.convert_model(LastHiddenState(setup.folder), example_input=example)
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": setup.threads,
        "PERFORMANCE_HINT": hint.upper(),
        "NUM_STREAMS": 1 if hint == "latency" else setup.threads,
        "ENABLE_CPU_PINNING": False,  # it would keep other processes off these cores
    }
    if int8:
        compress(model)
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = GROUP
    compiled = core.compile_model(model, "CPU", settings)

    def several(feeds: list[Feed]) -> list[Tensor]:
        outputs: list[Any] = [None] * len(feeds)

        def keep(request: Any, index: int) -> None:
            outputs[index] = torch.from_numpy(request.get_output_tensor().data.copy())

        queue = runtime.AsyncInferQueue(compiled, setup.threads)
        queue.set_callback(keep)
        for index, feed in enumerate(feeds):
            queue.start_async(feed, index, share_inputs=True)
        queue.wait_all()
        return outputs

    def one(feed: Feed) -> Tensor:
        return torch.from_numpy(compiled(feed, share_inputs=True)[0])

    return one, several if hint == "throughput" else None


def compress(model: Any) -> None:
    """Put int8 weights with a scale for each output in place of float32 ones."""
    ops = import_module("openvino.opset15")
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        constant, transposed = node.input_value(1).get_node(), node.get_attributes()["transpose_b"]
        if constant.get_type_name() != "Constant" or len(constant.shape) != 2:
            continue
        weight_FD = constant.data if transposed else constant.data.T
        scale_F1 = np.abs(weight_FD).max(1, keepdims=True).clip(1e-12) / np.float32(127)
        quantised_FD = np.ascontiguousarray(np.round(weight_FD / scale_F1).astype(np.int8))
        weight = ops.multiply(ops.convert(ops.constant(quantised_FD), "f32"), ops.constant(scale_F1))
        product = ops.matmul(node.input_value(0), weight, node.get_attributes()["transpose_a"], True)
        node.output(0).replace(product.output(0))
    model.validate_nodes_and_infer_types()


def onnx_int8_file(folder: str, exporter: str) -> Path:
    """int8 weights: unsigned ones, the other choice, are slower on a CPU with VNNI."""
    file = Path(folder) / f"{exporter}-int8.onnx"
    if not file.exists():
        package = import_module("onnxruntime.quantization")
        logging.disable(logging.WARNING)  # it asks for a preparation that changes nothing here
        package.quantize_dynamic(
            onnx_file(folder, exporter), file, per_channel=True, weight_type=package.QuantType.QInt8
        )
        logging.disable(logging.NOTSET)
    return file


def onnx_file(folder: str, exporter: str) -> Path:
    file = Path(folder) / f"{exporter}.onnx"
    if file.exists():
        return file
    names = {"input_names": ["input_ids", "attention_mask"], "output_names": ["last_hidden_state"]}
    if exporter == "dynamo":
        axes = {0: torch.export.Dim("batch", min=1, max=512), 1: torch.export.Dim("length", min=1, max=8192)}
        options = {"dynamo": True, "dynamic_shapes": (axes, axes), "verbose": False}
    else:
        axes = {name: {0: "batch", 1: "length"} for name in names["input_names"]}
        options = {"dynamo": False, "dynamic_axes": axes}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        torch.onnx.export(LastHiddenState(folder), padded_example(), file, **names, **options)
    return file


def padded_example() -> tuple[Tensor, Tensor]:
    """Ids and mask with a second text that is padded."""
    ids, mask = torch.full((2, 70), 100), torch.ones(2, 70, dtype=torch.int64)
    mask[1, 40:] = 0
    return ids, mask


@cache
def model_of(folder: str) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32).eval()


class LastHiddenState(nn.Module):
    """transformers' model with its hidden states as the only output."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.model = model_of(folder)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
