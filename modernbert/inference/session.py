"""Session: a model prepared for inference, the one visible way to be faster than its modules."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from operator import is_
from typing import Generic, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from modernbert_kernels.cpu import linear
from modernbert_kernels.dispatch import forced

from ..late_interaction import Ragged, check_pool_factor, pool_documents, pool_tokens
from ..modules import Linear, is_plain
from ..packed import Packed, check_packed, check_rows
from ..packing import Tokenized, Tokens
from .batches import CPU_TOKENS, micro_batches, split_rows, token_budget
from .callers import callers, check_process, map_callers
from .encode import Caller, Modules, TextModel, encode_texts, encode_tokens, placement, stream_texts
from .graph_engine import LONGEST_TEXT, ROW_TOKENS, GraphEngine, save_graph
from .graphs import Graphs
from .replica import evaluated, forward_hooks, replicate, with_weight
from .short import LONGEST, ShortEncoder, has_short_way

M = TypeVar("M", bound=nn.Module)


class Session(Generic[M]):
    """An encoder or a head prepared for inference: called like the model, with batches that are on the CPU.

    It holds the weights of the moment it was made, and answers in evaluation mode, whatever mode the modules are in.
    Make a new one after the weights change. Changes that are cheap to detect raise an error; a write through `.data` to
    a few numbers, and changed attributes of modules, are not detected. Results have no gradient, and are the model's
    within rounding. Threads may share a Session.

    - On a CPU, one short text runs as plain tensor operations, on weights in the layout that was measured to be the
      fastest. A large batch is cut into micro-batches, each encoded by one thread; there is one thread per core. On
      AMD processors with AVX-512, weights are packed for oneDNN, and row counts are rounded up to a step. This costs
      one or two extra copies of the weights.
    - On a GPU, a small batch is rounded up to a step and replays a CUDA graph.

    Args:
        engine: on a CPU, `"onnxruntime"` (extra `cpu`) or `"openvino"` (extra `openvino`) runs the model as a graph,
            which is faster. `"onnxruntime-int8"` multiplies in int8: faster and less exact. Texts of more than 768
            tokens run as modules.

    Raises:
        ValueError: an unknown engine, or a model that it cannot run. ImportError: its package is missing.
        RuntimeError: the process was forked after this thread had encoded or had made a Session.

    Attributes:
        model: what it was made of. device: of the model. engine: as given.
    """

    def __init__(self, model: M, *, engine: str | None = None) -> None:
        check_process()  # what follows may use the threads that a fork does not copy
        self.model, self.engine = model, engine
        self.device, self._width = placement(model)
        self._weights = _Weights(model)
        packs = self.device.type == "cpu" and engine is None
        self._bulk = replicate(model, _pack_linear) if packs else evaluated(model)
        self._graph_engine = None if engine is None else GraphEngine.of(self._bulk, engine)
        self._hooks = [] if engine is None else forward_hooks(self._bulk)  # may be filled later
        # No layout of a weight is chosen by measuring here: the same tokens give the same bits.
        self._batches: Caller = Modules(self._bulk) if packs else self
        self._graphs = Graphs(self._bulk, self.device) if self.device.type == "cuda" else None

    def __call__(self, batch: Packed, *, rows: Tensor | None = None) -> Tensor:
        """The model's rows, `[T, ...]`, or those of `rows` `[Q]`, on the model's device.

        Raises:
            TypeError: a batch that is not a Packed.
            ValueError: a batch that is not on the CPU or whose parts do not fit together, rows out of order or range,
                autocast, or a forced backend.
            RuntimeError: the weights have changed, or the process was forked after this thread had encoded.
        """
        self._check()
        if not isinstance(batch, Packed):
            what = f"a Session is called with a Packed, got {type(batch).__name__}"
            raise TypeError(f"{what}: make one with pack(...), or call encode_tokens with Tokens")
        if not batch.input_ids.is_cpu:
            device = batch.input_ids.device
            raise ValueError(f"the batch is on {device}: leave it on the CPU, from where the session copies it at once")
        check_packed(batch)
        if rows is not None:
            check_rows(rows, batch.num_tokens)
        with torch.no_grad():
            return self._on_cpu(batch, rows) if self.device.type == "cpu" else self._on_device(batch, rows)

    def budget(self, total: int) -> int:
        """Tokens of one call when `total` are to be encoded."""
        if self.engine is not None:
            return ROW_TOKENS
        return token_budget(self.device, self._width, total, callers(self.device))

    def encode_queries(
        self, texts: Iterable[str], *, batch_tokens: int | None = None, progress: bool | None = None
    ) -> Ragged:
        """As the model's `encode_queries`."""
        return self._encode(self._text_model().tokenize_queries, texts, batch_tokens, progress)

    def encode_documents(
        self,
        texts: Iterable[str],
        *,
        batch_tokens: int | None = None,
        progress: bool | None = None,
        pool_factor: int = 1,
    ) -> Ragged:
        """As the model's `encode_documents`."""
        check_pool_factor(pool_factor)
        ragged = self._encode(self._text_model().tokenize_documents, texts, batch_tokens, progress)
        return pool_documents(ragged, pool_factor)

    def stream_documents(
        self, texts: Iterable[str], *, batch_tokens: int | None = None, pool_factor: int = 1
    ) -> Iterator[Tensor]:
        """As the model's `stream_documents`."""
        check_pool_factor(pool_factor)
        rows = stream_texts(self, self._text_model().tokenize_documents, texts, batch_tokens=batch_tokens)
        return (pool_tokens(x_NE, pool_factor) for x_NE in rows)

    def encode_tokens(
        self,
        tokens: Tokenized,
        *,
        batch_tokens: int | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> Ragged:
        """The scored rows of each text of `tokens`, `[n_i, E]` float32 on the CPU; `advance` gets counts of texts.

        Each text of `Texts` has one row.

        The same tokens give the same bits in every session on a machine: no layout of a weight is chosen by measuring.
        """
        self._check()
        return encode_tokens(self._batches, tokens, batch_tokens=batch_tokens, advance=advance)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model's graph with its weights as an ONNX file, which `GraphEngine.load` and other programs run.

        The docstring of `onnx_graph.py` describes its inputs and its output. Metadata of the file: `model`, the class;
        `config`, the encoder's config.json; `fingerprint`, the SHA-256 of the weights in the graph's order. Atomic.

        Raises:
            ImportError: the extra of the engine is missing (`cpu` if the session has none).
            TypeError: neither an encoder nor a late-interaction head.
            ValueError: weights of more than 2 GB or not in float32, or a model that computes something else than its
                graph, with a hook or a replaced module for example.
        """
        self._check()
        # The model itself, whose weights are not packed.
        save_graph(evaluated(self.model), path, "openvino" if self.engine == "openvino" else "onnxruntime")

    def __reduce__(self) -> tuple[Callable[[M], Session[M]], tuple[M]]:
        """A copy, pickled or deep, is a Session of the copied model."""
        return partial(Session[M], engine=self.engine), (self.model,)

    def _check(self) -> None:
        check_process()
        if torch.is_autocast_enabled(self.device.type) or forced() is not None:
            raise ValueError(
                "a Session computes in the model's dtype on its own backends: leave autocast and backend()"
            )
        self._weights.check()
        if any(self._hooks):
            raise RuntimeError(
                "a module has a hook, which no graph runs: remove it, or make a new Session without engine"
            )

    def _on_cpu(self, batch: Packed, rows: Tensor | None) -> Tensor:
        if self.engine is None and len(batch) == 1 and batch.num_tokens <= LONGEST:
            return self._one_text(batch, rows=rows)
        parts = micro_batches(batch, CPU_TOKENS if self.engine is None else ROW_TOKENS)
        if len(parts) == 1:
            return self._part(batch, rows)
        sizes = [part.num_tokens for part in parts]
        split = [None] * len(parts) if rows is None else split_rows(rows, sizes)
        calls = list(zip(parts, split, strict=True))
        return torch.cat(list(map_callers(lambda call: self._part(*call), calls, callers(self.device))))

    def _part(self, batch: Packed, rows: Tensor | None) -> Tensor:
        if self._graph_engine is None or not 0 < batch.max_seqlen <= LONGEST_TEXT:
            return self._bulk(batch, rows=rows)
        return self._graph_engine(batch, rows=rows)

    def _on_device(self, batch: Packed, rows: Tensor | None) -> Tensor:
        bucket = None if self._graphs is None else self._graphs.bucket(batch)
        if self._graphs is not None and bucket is not None:
            return self._graphs.replay(bucket, batch, rows)
        return self._bulk(batch.to(self.device), rows=None if rows is None else rows.to(self.device))

    @cached_property
    def _one_text(self) -> nn.Module:
        """The model with the short way of `short.py` in its encoder, if there is one; made at the first short text."""

        def prepare(module: nn.Module) -> nn.Module | None:
            return ShortEncoder(evaluated(module)) if has_short_way(module) else _pack_linear(module)

        return replicate(self.model, prepare)

    def _encode(
        self, tokenize: Callable[..., Tokens], texts: Iterable[str], batch_tokens: int | None, progress: bool | None
    ) -> Ragged:
        dim = self._text_model().dim
        return encode_texts(self, tokenize, texts, dim=dim, batch_tokens=batch_tokens, progress=progress)

    def _text_model(self) -> TextModel:
        if not isinstance(self.model, TextModel):
            kind = type(self.model).__name__
            raise TypeError(f"a Session of {kind} encodes no texts: make one of a head such as ColBERT")
        return self.model


class _Weights:
    """The weights of a model as they were, and a check that costs some microseconds.

    Seen are modules and parameters that were replaced or moved, and writes in place. Some writes (of fused optimizers,
    through `.data`) leave no trace in PyTorch's version counter, so a few numbers of each parameter are compared too.
    """

    def __init__(self, model: nn.Module) -> None:
        owners = [owner for m in model.modules() for owner in (m._parameters, m._buffers, m._modules)]
        members = [(owner, *item) for owner in owners for item in owner.items()]
        self._owners, self._names, self._members = zip(*members, strict=True)
        self._containers = [m._modules for m in model.modules() if m._modules]
        self._sizes = list(map(len, self._containers))
        self._tensors = list(model.parameters())
        self._counted = [p for p in self._tensors if not p.is_inference()]
        # Numbers on a GPU would have to be copied, and the copy would wait for the GPU.
        self._samples = [_few(p) for p in self._tensors if p.is_cpu and p.numel()]
        self._state, self._numbers = self._now(), b"".join(self._samples)

    def check(self) -> None:
        """Raise RuntimeError if the weights have changed."""
        same = (
            list(map(len, self._containers)) == self._sizes
            and all(map(is_, map(dict.get, self._owners, self._names), self._members))
            and self._now() == self._state
            and b"".join(self._samples) == self._numbers
        )
        if not same:
            raise RuntimeError("the model's weights have changed since this Session was made: make a new one")

    def _now(self) -> tuple[list[int], list[int]]:
        return list(map(Tensor.data_ptr, self._tensors)), [p._version for p in self._counted]


def _few(parameter: nn.Parameter) -> memoryview:
    """The bytes of some numbers of a parameter, from within, which follow it."""
    row = parameter.detach().view(parameter.shape or (1,))
    while row.dim() > 1:
        row = row[len(row) // 3]
    few = row[len(row) // 3 :][: 4 if row.stride(0) == 1 else 1]
    return few.as_strided((len(few),), (1,)).view(torch.uint8).numpy().data


def _packs(module: nn.Module) -> TypeGuard[Linear]:
    return is_plain(module, Linear) and module.weight.is_cpu and module.weight.dtype is torch.float32


def _pack_linear(module: nn.Module) -> nn.Module | None:
    """A linear layer with its weight packed for oneDNN, where that is faster at any number of rows."""
    if linear.FASTER_THAN_MKL and linear.AVAILABLE and _packs(module):
        return with_weight(module, linear.pack_weight(module.weight))
    return None
