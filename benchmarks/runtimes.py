"""transformers' model as a graph that ONNX Runtime or OpenVINO runs on a CPU."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.worker import Setup

Feed = dict[str, np.ndarray]


@cache
def onnx_session(setup: Setup, *, spins: bool) -> Callable[[Feed], Tensor]:
    """ONNX Runtime, with threads that spin between runs or sleep."""
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = setup.threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins)))
    session = runtime.InferenceSession(onnx_file(setup.folder), options, providers=["CPUExecutionProvider"])
    return lambda feed: torch.from_numpy(session.run(None, feed)[0])


@cache
def openvino_model(
    setup: Setup, hint: str
) -> tuple[Callable[[Feed], Tensor], Callable[[list[Feed]], list[Tensor]] | None]:
    """OpenVINO on one batch after another, and for throughput on several at once, one stream for each thread."""
    runtime = import_module("openvino")
    core = runtime.Core()
    model = core.read_model(onnx_file(setup.folder))
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": setup.threads,
        "PERFORMANCE_HINT": hint.upper(),
        "NUM_STREAMS": 1 if hint == "latency" else setup.threads,
        "ENABLE_CPU_PINNING": False,  # it would keep other processes off these cores
    }
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


def onnx_file(folder: str) -> Path:
    file = Path(folder) / "model.onnx"
    if not file.exists():
        axes = {0: torch.export.Dim("batch", min=1, max=512), 1: torch.export.Dim("length", min=1, max=8192)}
        known: dict[str, Any] = {"dynamo": True, "dynamic_shapes": (axes, axes), "verbose": False}
        known |= {"input_names": ["input_ids", "attention_mask"], "output_names": ["last_hidden_state"]}
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        ids, mask = torch.full((2, 70), 100), torch.ones(2, 70, dtype=torch.int64)
        mask[1, 40:] = 0  # one of the texts is padded
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about tracing; the output is compared before anything is timed
            torch.onnx.export(LastHiddenState(folder), (ids, mask), file, **known)
    return file


class LastHiddenState(nn.Module):
    """transformers' model with its hidden states as the only output."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModel

        super().__init__()
        self.model: Any = AutoModel.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
