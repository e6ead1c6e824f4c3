"""CUDA graphs: small batches without the launches that cost more than their work."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modernbert_kernels.dispatch import LONG

from ..packing import Packed, check_rows

MAX_TOKENS = 16_384
"""Above these even the smallest model keeps a large GPU busy between launches (about 12,000 by estimate)."""

SMALLEST = 32

TOKENS_OF_A_TEXT = 8
"""A graph of T tokens has places for T / 8 sequences: queries of fewer tokens are rare."""

Replay = Callable[[], Any]
Capture = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]


class Bucket(NamedTuple):
    """What a graph is captured for: at most so many tokens and sequences, none longer than `longest`."""

    tokens: int
    longest: int
    keys: bool  # whether sequences end in query-only rows

    @property
    def places(self) -> int:
        return self.tokens // TOKENS_OF_A_TEXT


@dataclass
class Graph:
    """One captured forward pass and the memory around it.

    Attributes:
        host, inputs: int32, ids, positions, cu_seqlens and key lengths in one row, so that one copy brings them all.
        output: `[tokens, D]`, overwritten by every replay.
        copied: what to wait for before `host` is written again.
    """

    host: Tensor
    inputs: Tensor
    replay: Replay
    output: Tensor
    copied: torch.cuda.Event | None


class Graphed:
    """A model in evaluation mode that replays CUDA graphs; called like the model, with a `Packed` on the CPU.

    A batch is rounded up to the next of a few sizes by short sequences that nobody sees, and copied to the GPU in one
    piece; nothing is allocated. The first batch of a size captures its graph, which takes a few forward passes. One
    thread at a time may call it.

    Attributes:
        max_tokens: of the largest graph. Batches beyond it run without one, and the first of them says so.
    """

    def __init__(self, model: nn.Module, max_tokens: int = MAX_TOKENS, *, capture: Capture | None = None) -> None:
        weight = next(model.parameters())
        if capture is None and not weight.is_cuda:
            raise ValueError(f"CUDA graphs need the model on a GPU, and it is on {weight.device}: model.to('cuda')")
        if max_tokens < SMALLEST:
            raise ValueError(f"max_tokens is {max_tokens}: the smallest graph has {SMALLEST} tokens")
        self.model, self.max_tokens, self.device = model, max_tokens, weight.device
        self._capture = capture or partial(_captured, weight.device, torch.cuda.graph_pool_handle())
        self._sizes = bucket_sizes(max_tokens)
        self._graphs: dict[Bucket, Graph] = {}
        # Held, so that a graph never reads memory that was freed when somebody replaced a parameter.
        self._parameters = list(model.parameters())
        self._addresses = list(map(Tensor.data_ptr, self._parameters))
        self._warned = False

    @torch.no_grad()
    def __call__(self, batch: Packed, *, rows: Tensor | None = None) -> Tensor:
        """The model's rows for the batch, `[T, ...]`, or those of `rows` `[Q]`, without a gradient.

        They are the graph's own memory: THE NEXT CALL OVERWRITES THEM (not where `rows` are given). Clone what is kept.

        Raises:
            ValueError: the batch is not on the CPU, rows out of range, training mode, or autocast.
            RuntimeError: the weights have moved since (`to`, `half`). Parameters that are replaced are not seen.
        """
        if self.model.training:
            raise ValueError("graphs hold the forward pass of evaluation, and the model is in training mode: eval()")
        if not batch.input_ids.is_cpu:
            raise ValueError("the batch is on a GPU: leave it on the CPU, from where one copy brings it over")
        if torch.is_autocast_enabled(self.device.type):
            raise ValueError("graphs compute in the dtype of the model: leave autocast, and load it in the other dtype")
        if rows is not None:
            check_rows(rows, batch.num_tokens)
        if list(map(Tensor.data_ptr, self._parameters)) != self._addresses:
            raise RuntimeError("the model's weights have moved since its graphs were made: make them again")
        bucket = self.bucket(batch)
        if bucket is None:
            self._warn(batch)
            moved = batch.to(self.device)
            return self.model(moved, rows=None if rows is None else rows.to(self.device))
        graph = self._graphs.get(bucket)
        if graph is None:
            graph = self._graphs[bucket] = self._make(bucket)
        if graph.copied is not None:
            graph.copied.synchronize()
        fill(graph.host, batch, bucket)
        graph.inputs.copy_(graph.host, non_blocking=True)
        if graph.copied is not None:
            graph.copied.record(torch.cuda.current_stream(self.device))
        graph.replay()
        if rows is None:
            return graph.output[: batch.num_tokens]
        return graph.output.index_select(0, rows.to(self.device, non_blocking=True))

    def bucket(self, batch: Packed) -> Bucket | None:
        """The smallest bucket that holds the batch, or None."""
        keys = batch.key_lengths is not None
        # Beyond LONG other kernels take over, whose number of programs grows with the longest sequence.
        longest = max(LONG, 1 << (batch.max_seqlen - 1).bit_length())
        for size in self._sizes:
            bucket = Bucket(size, min(size, longest), keys)
            # What is left over needs places, and may not be longer than the longest.
            left, free = size - batch.num_tokens, bucket.places - len(batch)
            if 0 <= left <= free * bucket.longest and free >= 0:
                return bucket
        return None

    def _warn(self, batch: Packed) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{batch.num_tokens} tokens in {len(batch)} sequences are more than the largest graph holds "
                f"({self.max_tokens} in {self.max_tokens // TOKENS_OF_A_TEXT}): they run without one. Raise "
                "max_tokens, or send smaller batches; this is said once",
                stacklevel=4,
            )

    @torch.inference_mode(False)  # what is made in inference mode could not be written to outside of it
    @torch.no_grad()
    def _make(self, bucket: Bucket) -> Graph:
        sizes = [bucket.tokens, bucket.tokens, bucket.places + 1] + [bucket.places] * bucket.keys
        host = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=self.device.type == "cuda")
        empty = torch.zeros(0, dtype=torch.int64)
        keys = empty.int() if bucket.keys else None
        fill(host, Packed(empty, empty, torch.zeros(1, dtype=torch.int32), (), 0, keys), bucket)
        inputs = host.to(self.device)
        ids, positions, cu_seqlens, *key_lengths = inputs.split(sizes)
        batch = Packed(ids, positions, cu_seqlens, (), bucket.longest, key_lengths[0] if bucket.keys else None)
        replay, output = self._capture(lambda: self.model(batch))
        return Graph(host, inputs, replay, output, torch.cuda.Event() if self.device.type == "cuda" else None)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy of the model has no graphs: they hold addresses of the weights of this one."""
        return type(None), ()


def bucket_sizes(max_tokens: int) -> list[int]:
    """Four sizes in every octave, so that less than a fifth of a batch is filled up, and `max_tokens` itself."""
    sizes, octave = [], SMALLEST
    while octave < max_tokens:
        sizes += range(octave, 2 * octave, octave // 4)
        octave *= 2
    return [size for size in sizes if size < max_tokens] + [max_tokens]


def fill(row: Tensor, batch: Packed, bucket: Bucket) -> None:
    """Write a batch into the inputs of a graph; the free places share the tokens that are left over."""
    tokens, count = batch.num_tokens, len(batch)
    ids, positions, cu_seqlens, key_lengths = row.tensor_split(
        (bucket.tokens, 2 * bucket.tokens, 2 * bucket.tokens + bucket.places + 1)
    )
    ids[:tokens], positions[:tokens], cu_seqlens[: count + 1] = batch.input_ids, batch.positions, batch.cu_seqlens
    free = bucket.places - count
    if free:
        cu_seqlens[count + 1 :] = torch.arange(1, free + 1) * (bucket.tokens - tokens) // free + tokens
    if batch.key_lengths is not None:
        key_lengths[:count] = batch.key_lengths
        key_lengths[count:] = cu_seqlens.diff()[count:]


def _captured(device: torch.device, pool: Any, run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """A CUDA graph of `run`, and the memory that it writes its result to. Graphs of one pool take turns in it."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # kernels are compiled and loaded, workspaces allocated
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as one that pins memory, may go on.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            output = run()
        return graph.replay, output
