"""Peers that run an exported graph: ONNX Runtime and OpenVINO, in float32 and with int8 products."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cpu.contenders import ONNX_RUNTIME, OPENVINO, transformers_model
from benchmarks.harness import Contender
from benchmarks.inputs import Batch, real_rows

Feed = dict[str, Any]
Outputs = list[np.ndarray]

INT8 = ", int8"
GROUP = 128
"""Inputs of OpenVINO's int8 products that share a scale: from 32 to a whole row, more is faster and less exact."""


def onnx_runtime(
    folder: Path, batches: list[Batch], settings: str, threads: int, *, int8: bool = False
) -> Iterator[Contender]:
    """Exported both ways that torch has, as neither is the faster one everywhere; none where not installed.

    With threads that spin for a while when a run is over, and with threads that sleep; the untimed call before the next
    sample outlasts them. With `int8` every product with a weight is dynamically quantised: a scale for each output of a
    weight, one for all of the input.
    """
    if not find_spec("onnxruntime"):
        return
    for exporter, spins in product(exporters(), (True, False)):
        session = _onnx_session(folder, exporter, threads, spins, int8)
        yield Contender(
            ONNX_RUNTIME + INT8 * int8,
            f"{exporter} export, {settings}, {'' if spins else 'no '}spinning" + ", scales per channel" * int8,
            partial(_each, partial(_onnx_run, session), _feeds(batches)),
            partial(_rows, batches=batches),
        )


def openvino(
    folder: Path,
    batches: list[Batch],
    settings: str,
    threads: int,
    *,
    int8: bool = False,
    sources: Sequence[str] = ("torch", "onnx"),
) -> Iterator[Contender]:
    """Made from the torch model and from its ONNX file, tuned for latency and, for several batches, for throughput.

    Its idle threads sleep. None where not installed. With `int8` weights have a scale for each output, and inputs one
    for each `GROUP` of a row, which needs no packages beside OpenVINO. Padded batches go to the ONNX file alone: what
    it makes of the torch model returns NaN around a token whose whole window is padding.
    """
    if not find_spec("openvino"):
        return
    if any(mask is not None for _, mask, _ in batches):
        sources = ("onnx",)
    feeds = _feeds(batches)
    for source in sources:
        hints: dict[str, Callable[[Any, list[Feed]], Outputs]] = {"latency": _one_after_another}
        if len(batches) > 1:
            hints["throughput"] = partial(_several_at_once, at_once=threads)
        for hint, run in hints.items():
            compiled = _openvino_model(folder, source, hint, threads, int8)
            yield Contender(
                OPENVINO + INT8 * int8,
                f"from {source}, {settings}, {hint} hint" + f", groups of {GROUP}" * int8,
                partial(run, compiled, feeds),
                partial(_rows, batches=batches),
            )


def exporters() -> tuple[str, ...]:
    return ("dynamo", "legacy") if find_spec("onnxscript") else ("legacy",)


def _feeds(batches: list[Batch]) -> list[Feed]:
    return [
        {"input_ids": ids.numpy(), "attention_mask": (torch.ones_like(ids) if mask is None else mask).numpy()}
        for ids, mask, _ in batches
    ]


def _rows(outputs: Outputs, batches: list[Batch]) -> Tensor:
    return real_rows([torch.from_numpy(output) for output in outputs], batches)


def _each(run: Callable[[Feed], np.ndarray], feeds: list[Feed]) -> Outputs:
    return [run(feed) for feed in feeds]


def _onnx_run(session: Any, feed: Feed) -> np.ndarray:
    return session.run(None, feed)[0]


def _one_after_another(compiled: Any, feeds: list[Feed]) -> Outputs:
    return [compiled(feed, share_inputs=True)[0] for feed in feeds]


def _several_at_once(compiled: Any, feeds: list[Feed], at_once: int) -> Outputs:
    """One stream for each thread, so that a core works on a batch of its own."""
    outputs: Outputs = [np.empty(0)] * len(feeds)

    def keep(request: Any, place: int) -> None:
        outputs[place] = request.get_output_tensor().data.copy()

    queue = import_module("openvino").AsyncInferQueue(compiled, at_once)
    queue.set_callback(keep)
    for place, feed in enumerate(feeds):
        queue.start_async(feed, place, share_inputs=True)
    queue.wait_all()
    return outputs


@cache
def _onnx_session(folder: Path, exporter: str, threads: int, spins: bool, int8: bool) -> Any:
    onnxruntime = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins)))
    file = _onnx_int8_file(folder, exporter) if int8 else _onnx_file(folder, exporter)
    return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


@cache
def _openvino_model(folder: Path, source: str, hint: str, threads: int, int8: bool) -> Any:
    openvino = import_module("openvino")
    core = openvino.Core()
    if source == "onnx":
        model = core.read_model(_onnx_file(folder, exporters()[0]))
    else:
        logging.getLogger("openvino").setLevel(logging.ERROR)
        names = ("input_ids", "attention_mask")
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tracing; the output is compared before anything is timed
            example = dict(zip(names, _example(), strict=True))
            model = openvino.convert_model(_last_hidden_state(folder), example_input=example)
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": hint.upper(),
        "NUM_STREAMS": 1 if hint == "latency" else threads,
        # Otherwise its threads claim cores that the threads of the others in this process stand on.
        "ENABLE_CPU_PINNING": False,
    }
    if int8:
        _compress(model)
        settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = GROUP
    return core.compile_model(model, "CPU", settings)


def _compress(model: Any) -> None:
    """Put int8 weights with a scale for each output in the place of float32 ones."""
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


def _onnx_int8_file(folder: Path, exporter: str) -> Path:
    """int8 weights: unsigned ones, the other choice, are slower on a CPU with VNNI."""
    file = folder / f"{exporter}-int8.onnx"
    if not file.exists():
        quantization = import_module("onnxruntime.quantization")
        logging.disable(logging.WARNING)  # it asks for a preparation that changes nothing here
        quantization.quantize_dynamic(
            _onnx_file(folder, exporter), file, per_channel=True, weight_type=quantization.QuantType.QInt8
        )
        logging.disable(logging.NOTSET)
    return file


def _onnx_file(folder: Path, exporter: str) -> Path:
    file = folder / f"{exporter}.onnx"
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
        torch.onnx.export(_last_hidden_state(folder), _example(), file, **names, **options)
    return file


def _example() -> tuple[Tensor, Tensor]:
    """Ids and mask with a second text that is padded."""
    ids, mask = torch.full((2, 70), 100), torch.ones(2, 70, dtype=torch.int64)
    mask[1, 40:] = 0
    return ids, mask


def _last_hidden_state(folder: Path) -> torch.nn.Module:
    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers_model(folder)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    return LastHiddenState()
