"""Session: a model made ready to answer, the one visible way to be faster than its modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from operator import is_
from typing import Generic, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from modernbert_kernels.cpu import linear
from modernbert_kernels.dispatch import forced

from ..encoder import Linear
from ..late_interaction import Ragged, pool_documents
from ..packing import Packed, Tokens, check_rows
from .batches import CPU_TOKENS, micro_batches, split_rows
from .callers import callers, map_callers
from .encode import Caller, Modules, TextModel, encode_texts, encode_tokens, list_of_texts, placement
from .graphs import Graphs
from .replica import evaluated, replicate, with_weight
from .short import LONGEST, Layouts, ShortEncoder, has_short_way

M = TypeVar("M", bound=nn.Module)


class Session(Generic[M]):
    """An encoder or a head, ready to answer: called like the model, with batches that are on the CPU.

    It holds the weights of the moment it was made, and answers in evaluation mode, whatever mode the modules are in.
    Make a new one after the weights change: what can be seen of a change at little cost raises an error. Results have
    no gradient, and are the model's within rounding. Threads may share it.

    - On a CPU, one short text takes bare operations, on weights in the layout that was measured to be the fastest. A
      large
      batch is cut into micro-batches, which a thread a core encodes. With AVX-512, weights are packed for oneDNN, and
      row counts are rounded up to a step. This costs the memory of the weights once or twice more.
    - On a GPU, a small batch is rounded up to a step and replays a CUDA graph.

    Attributes:
        model: what it was made of. device: of the model. width: of its embeddings.
    """

    def __init__(self, model: M) -> None:
        self.model = model
        self.device, self.width = placement(model)
        self._weights = _Weights(model)
        self._bulk = replicate(model, _pack_linear) if self.device.type == "cpu" else evaluated(model)
        self._graphs = Graphs(self._bulk, self.device) if self.device.type == "cuda" else None

    def __call__(self, batch: Packed, *, rows: Tensor | None = None) -> Tensor:
        """The model's rows, `[T, ...]`, or those of `rows` `[Q]`, on the model's device.

        Raises:
            ValueError: a batch that is not on the CPU, rows out of order or range, autocast, or a forced backend.
            RuntimeError: the weights have changed.
        """
        if not batch.input_ids.is_cpu:
            raise ValueError("the batch is on a GPU: leave it on the CPU, from where the session copies it at once")
        if torch.is_autocast_enabled(self.device.type) or forced() is not None:
            raise ValueError(
                "a Session computes in the model's dtype on its own backends: leave autocast and backend()"
            )
        if rows is not None:
            check_rows(rows, batch.num_tokens)
        self._weights.check()
        with torch.no_grad():
            return self._on_cpu(batch, rows) if self.device.type == "cpu" else self._on_device(batch, rows)

    def encode_queries(
        self, texts: Sequence[str], *, batch_tokens: int | None = None, progress: bool | None = None
    ) -> Ragged:
        """As the model's `encode_queries`."""
        model = self._text_model()
        return encode_texts(
            self,
            model.tokenize_queries,
            list_of_texts(texts),
            dim=model.dim,
            batch_tokens=batch_tokens,
            progress=progress,
        )

    def encode_documents(
        self,
        texts: Sequence[str],
        *,
        batch_tokens: int | None = None,
        progress: bool | None = None,
        pool_factor: int = 1,
    ) -> Ragged:
        """As the model's `encode_documents`."""
        model = self._text_model()
        ragged = encode_texts(
            self,
            model.tokenize_documents,
            list_of_texts(texts),
            dim=model.dim,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        return pool_documents(ragged, pool_factor)

    def encode_tokens(
        self,
        tokens: Tokens,
        *,
        batch_tokens: int | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> Ragged:
        """The scored rows of each text of `tokens`, `[n_i, E]` float32 on the CPU; `advance` gets counts of texts.

        The same tokens give the same bits in every session on a machine: no layout of a weight is chosen by measuring.
        """
        self._weights.check()
        caller: Caller = Modules(self._bulk) if self.device.type == "cpu" else self
        return encode_tokens(caller, tokens, batch_tokens=batch_tokens, advance=advance)

    def _on_cpu(self, batch: Packed, rows: Tensor | None) -> Tensor:
        if len(batch) == 1 and batch.num_tokens <= LONGEST:
            return self._one_text(batch, rows=rows)
        parts = micro_batches(batch, CPU_TOKENS)
        if len(parts) == 1:
            return self._bulk(batch, rows=rows)
        sizes = [part.num_tokens for part in parts]
        split = [None] * len(parts) if rows is None else split_rows(rows, sizes)
        calls = list(zip(parts, split, strict=True))
        return torch.cat(list(map_callers(lambda call: self._bulk(call[0], rows=call[1]), calls, callers(self.device))))

    def _on_device(self, batch: Packed, rows: Tensor | None) -> Tensor:
        bucket = None if self._graphs is None else self._graphs.bucket(batch)
        if self._graphs is not None and bucket is not None:
            return self._graphs.replay(bucket, batch, rows)
        return self._bulk(batch.to(self.device), rows=None if rows is None else rows.to(self.device))

    @cached_property
    def _one_text(self) -> nn.Module:
        """The model with the short way of `short.py` in its encoder, if there is one; made at the first short text."""
        layouts = Layouts()

        def prepare(module: nn.Module) -> nn.Module | None:
            if has_short_way(module):
                return ShortEncoder(module, layouts)
            return with_weight(module, layouts(module.weight)) if _is_plain(module) else None

        return replicate(self.model, prepare)

    def _text_model(self) -> TextModel:
        if not isinstance(self.model, TextModel):
            raise TypeError(f"{type(self.model).__name__} encodes no texts: make a Session of a head such as ColBERT")
        return self.model


class _Weights:
    """The weights of a model as they were, and a check that costs some microseconds.

    Seen are modules and parameters that were replaced or moved, and writes in place. Some writes (of fused optimizers,
    through `.data`) leave no trace in PyTorch's version counter, so a few numbers of each parameter are compared too.
    """

    def __init__(self, model: nn.Module) -> None:
        members = [(m._parameters, *item) for m in model.modules() for item in m._parameters.items()]
        members += [(m._modules, *item) for m in model.modules() for item in m._modules.items()]
        self._owners, self._names, self._members = zip(*members, strict=True)
        self._tensors = list(model.parameters())
        self._counted = [p for p in self._tensors if not p.is_inference()]
        # A copy of these from a GPU would wait for it.
        self._samples = [_few(p) for p in self._tensors if p.is_cpu and p.numel()]
        self._state = self._now()
        self._numbers = torch.cat(self._samples) if self._samples else None

    def check(self) -> None:
        """Raise RuntimeError if the weights have changed."""
        same = (
            all(map(is_, map(dict.get, self._owners, self._names), self._members))
            and self._now() == self._state
            and (self._numbers is None or torch.equal(torch.cat(self._samples), self._numbers))
        )
        if not same:
            raise RuntimeError("the model's weights have changed since this Session was made: make a new one")

    def _now(self) -> tuple[list[int], list[int]]:
        return list(map(Tensor.data_ptr, self._tensors)), [p._version for p in self._counted]


def _few(parameter: nn.Parameter, count: int = 4) -> Tensor:
    """Some numbers of a parameter, which follow it: a view."""
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // count)][:count]


def _is_plain(module: nn.Module) -> TypeGuard[Linear]:
    return type(module) is Linear and module.weight.is_cpu and module.weight.dtype is torch.float32


def _pack_linear(module: nn.Module) -> nn.Module | None:
    """A linear layer with its weight packed for oneDNN, where that is faster at any number of rows."""
    if linear.FASTER_THAN_MKL and linear.AVAILABLE and _is_plain(module):
        return with_weight(module, linear.pack_weight(module.weight))
    return None
