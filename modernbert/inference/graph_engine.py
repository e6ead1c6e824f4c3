"""A model as a graph that ONNX Runtime or OpenVINO runs on a CPU, for packed rows of some hundred tokens."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..files import replacing
from ..packing import Packed, pack

if TYPE_CHECKING:
    from .onnx_graph import Graph

Feed = Mapping[str, np.ndarray]
Run = Callable[[Feed], np.ndarray]

ROW_TOKENS = 128
"""Tokens of a row, unless one text has more: attention is dense over the row. In CPU time, a token in a row of 512
costs 1.4 times as much as in one of 128 (Ettin-17m, ONNX Runtime)."""

INT8 = "onnxruntime-int8"

LONGEST_TEXT = 768
"""Tokens of the longest text. Beyond it the local attention of the modules, which is not dense, is faster."""


class GraphEngine:
    """Calls a graph, with as many threads as PyTorch has in the calling thread. Threads may share it.

    Args:
        make: gives a run of the graph with so many threads.
    """

    def __init__(self, make: Callable[[int], Run]) -> None:
        self._make = make
        self._runs: dict[int, Run] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, model: nn.Module, name: str) -> GraphEngine:
        """The graph of an `Encoder` or a late-interaction head in evaluation mode.

        Raises:
            ImportError: the package of the engine is missing.
            ValueError: no such engine; a model that is not float32 on the CPU, or computes something else than its
                graph, with adapters or hooks for example.
        """
        engine = _named(name)
        check_float32(model)
        onnx_graph = imported(f"{__package__}.onnx_graph", name)
        if name == INT8:
            cls.of(model, "onnxruntime")  # whose numbers are near enough to be compared with those of the modules
            return cls(engine(onnx_graph.write(model, int8=True), name))
        made = cls(engine(onnx_graph.write(model), name))
        made._compare(model)
        return made

    @classmethod
    def load(cls, path: str | os.PathLike[str], name: str = "onnxruntime") -> GraphEngine:
        """The graph in a file that `Session.save` wrote.

        Raises:
            FileNotFoundError: the file does not exist. ImportError: as `of`.
            ValueError: no such engine, or a file that is damaged or holds another graph.
        """
        if not os.path.isfile(path):
            raise FileNotFoundError(f"there is no file {os.fspath(path)}")
        make = _named(name)
        try:
            graph = cls(make(os.fspath(path), name))
            graph(pack([[0]]))
        except ImportError:
            raise
        except Exception as error:  # the errors of the two engines have no other class in common
            raise ValueError(f"{os.fspath(path)} is damaged, or no graph that Session.save wrote: {error}") from error
        return graph

    def __call__(self, batch: Packed, *, rows: Tensor | None = None) -> Tensor:
        """The rows of a batch on the CPU with at least one token, `[T, ...]`, or those of `rows` `[Q]`; float32."""
        return torch.from_numpy(self._run()(feed(batch, rows)))

    def _run(self) -> Run:
        threads = torch.get_num_threads()
        with self._lock:
            if threads not in self._runs:
                self._runs[threads] = self._make(threads)
            return self._runs[threads]

    @torch.no_grad()
    def _compare(self, model: nn.Module) -> None:
        """Any module may compute something else than ours, so a small batch takes both ways."""
        vocab_size = len(next(model.parameters()))  # the embedding table
        batch = pack([[token % vocab_size for token in range(7)], [1 % vocab_size, 0]])
        batch = replace(batch, key_lengths=torch.tensor([6, 2], dtype=torch.int32, device="cpu"))
        check_graph(self(batch), model(batch), model, ", so that no engine can run it: leave out engine. ")


def check_graph(found: Tensor, wanted: Tensor, model: nn.Module, todo: str = ": ") -> None:
    """Raise a ValueError, which goes on with `todo`, if a graph gave other numbers than its model."""
    try:
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    except AssertionError as error:
        name, why = type(model).__name__, "an adapter, NaN, a forward of its own?"
        raise ValueError(f"{name} is not what its graph computes ({why}){todo}{error}") from None


def feed(batch: Packed, rows: Tensor | None) -> Feed:
    """The inputs of `onnx_graph` for a batch."""
    lengths = np.asarray(batch.lengths)
    segments_T = np.repeat(np.arange(len(lengths)), lengths)
    keys_T = segments_T
    if batch.key_lengths is not None:
        row_T = np.arange(batch.num_tokens) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        keys_T = np.where(row_T < batch.key_lengths.numpy()[segments_T], segments_T, -1)
    return {
        "input_ids": batch.input_ids.long().numpy(),
        "positions": batch.positions.long().numpy(),
        "segment_ids": segments_T,
        "key_segment_ids": keys_T,
        "rows": np.arange(batch.num_tokens) if rows is None else rows.long().numpy(),
    }


def save_graph(model: nn.Module, path: str | os.PathLike[str], name: str) -> None:
    """`Session.save`. The file is loaded by the engine of this name, and compared with the model."""
    check_float32(model)
    onnx_graph = imported(f"{__package__}.onnx_graph", name)
    graph = onnx_graph.write(model)
    file, digest = graph.file(weights=True), hashlib.sha256()
    for weight in graph.weights.values():
        digest.update(weight.numpy().data)
    config = json.dumps(onnx_graph.encoder_of(model).config.to_hf())
    for key, value in {"model": type(model).__name__, "config": config, "fingerprint": digest.hexdigest()}.items():
        file.metadata_props.add(key=key, value=value)
    with replacing(Path(path)) as beside:
        beside.write_bytes(file.SerializeToString())
        GraphEngine.load(beside, name)._compare(model)


def check_float32(model: nn.Module) -> None:
    if any(p.dtype is not torch.float32 or not p.is_cpu for p in model.parameters()):
        raise ValueError("a graph computes in float32 on the CPU: load the model so, or leave out engine")


def _onnxruntime(graph: Graph | str, name: str) -> Callable[[int], Run]:
    """ONNX Runtime, which reads the weights where the model has them."""
    runtime = imported("onnxruntime", name)
    source, weights = graph, {}
    if not isinstance(graph, str):
        weights = {key: runtime.OrtValue.ortvalue_from_numpy(w.numpy()) for key, w in graph.weights.items()}
        source = graph.file().SerializeToString()

    def make(threads: int) -> Run:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_mem_pattern = False  # it would keep a plan of the memory for each number of tokens
        options.add_session_config_entry("session.force_spinning_stop", "1")  # threads wait actively in a run only
        options.add_external_initializers(list(weights), list(weights.values()))
        session = runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        return lambda feed: session.run(None, feed)[0]

    return make


def _openvino(graph: Graph | str, name: str) -> Callable[[int], Run]:
    """OpenVINO, with a request for every thread that calls."""
    cores, process = torch.get_num_threads(), os.getpid()
    core = core_of(process, imported("openvino", name).Core)
    model = core.read_model(graph if isinstance(graph, str) else graph.file(weights=True).SerializeToString())

    def check_process() -> None:
        if os.getpid() != process:  # which waits for threads of OpenVINO that a fork does not copy, without end
            raise RuntimeError("OpenVINO does not survive a fork: make the Session in the forked process")

    def make(threads: int) -> Run:
        check_process()
        bulk = threads == 1  # each core has a caller, which gets a stream
        settings = {
            "INFERENCE_NUM_THREADS": cores if bulk else threads,
            "PERFORMANCE_HINT": "THROUGHPUT" if bulk else "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        }
        compiled, of_thread = core.compile_model(model, "CPU", settings), threading.local()

        def run(feed: Feed) -> np.ndarray:
            check_process()
            if not hasattr(of_thread, "request"):
                of_thread.request = compiled.create_infer_request()
            return of_thread.request.infer(feed)[0].copy()

        return run

    return make


@functools.cache
def core_of(process: int, make: Callable[[], Any]) -> Any:
    """OpenVINO's core of this process, kept to its end.

    A core gives the thread that makes it a stack for the handlers of signals. If another thread deletes the core,
    the first keeps the address of a stack that is freed, and its next signal is a SIGSEGV.
    """
    return make()


def _named(name: str) -> Callable[[Graph | str, str], Callable[[int], Run]]:
    if name not in ENGINES:
        raise ValueError(f"engine is {name!r}, but must be one of {', '.join(ENGINES)}, or None")
    return ENGINES[name]


def imported(module: str, engine: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        extra = "openvino" if engine == "openvino" else "cpu"
        raise ImportError(f"engine {engine!r} needs the {extra} extra: pip install 'modernbert[{extra}]'") from error


ENGINES: dict[str, Callable[[Graph | str, str], Callable[[int], Run]]] = {
    "onnxruntime": _onnxruntime,
    INT8: _onnxruntime,
    "openvino": _openvino,
}
