"""CUDA graphs: small batches without the launches that cost more than their work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modernbert_kernels.dispatch import LONG

from ..packing import Packed

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


class Graphs:
    """The CUDA graphs of a model in evaluation mode, which replay a batch that is on the CPU.

    A batch is rounded up to the next of a few sizes by short filler sequences, and copied to the GPU in one piece.
    Nothing is allocated. The first batch of a size captures its graph, which takes a few forward passes. Graphs share
    their memory, so one thread at a time replays.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, capture: Capture | None = None) -> None:
        self._model, self._device = model, device
        self._capture = capture or partial(_captured, device, torch.cuda.graph_pool_handle())
        self._sizes = bucket_sizes(MAX_TOKENS)
        self._graphs: dict[Bucket, Graph] = {}
        self._lock = threading.Lock()

    def bucket(self, batch: Packed) -> Bucket | None:
        """The smallest bucket that holds the batch, or None."""
        keys = batch.key_lengths is not None
        # Beyond LONG other kernels take over, whose number of programs grows with the longest sequence.
        longest = max(LONG, 1 << (batch.max_seqlen - 1).bit_length())
        for size in self._sizes:
            bucket = Bucket(size, min(size, longest), keys)
            # The filler tokens need free sequence slots of at most `longest` tokens each.
            left, free = size - batch.num_tokens, bucket.places - len(batch)
            if 0 <= left <= free * bucket.longest and free >= 0:
                return bucket
        return None

    def replay(self, bucket: Bucket, batch: Packed, rows: Tensor | None) -> Tensor:
        """The model's rows for the batch, `[T, ...]` or one a text, or those of `rows` `[Q]`, on the GPU."""
        with self._lock:
            graph = self._graphs.get(bucket)
            if graph is None:
                graph = self._graphs[bucket] = self._make(bucket)
            if graph.copied is not None:
                graph.copied.synchronize()
            fill(graph.host, batch, bucket)
            graph.inputs.copy_(graph.host, non_blocking=True)
            if graph.copied is not None:
                graph.copied.record(torch.cuda.current_stream(self._device))
            graph.replay()
            # A copy in either case: the next replay overwrites the output.
            if rows is None:
                one_a_text = len(graph.output) == bucket.places  # of a head that pools
                return graph.output[: len(batch) if one_a_text else batch.num_tokens].clone()
            return graph.output.index_select(0, rows.to(self._device, non_blocking=True))

    @torch.inference_mode(False)  # what is made in inference mode could not be written to outside of it
    @torch.no_grad()
    def _make(self, bucket: Bucket) -> Graph:
        sizes = [bucket.tokens, bucket.tokens, bucket.places + 1] + [bucket.places] * bucket.keys
        host = torch.zeros(sum(sizes), dtype=torch.int32, device="cpu", pin_memory=self._device.type == "cuda")
        empty = torch.zeros(0, dtype=torch.int64, device="cpu")
        keys = empty.int() if bucket.keys else None
        fill(host, Packed(empty, empty, empty.new_zeros(1, dtype=torch.int32), (), 0, keys), bucket)
        inputs = host.to(self._device)
        ids, positions, cu_seqlens, *key_lengths = inputs.split(sizes)
        batch = Packed(ids, positions, cu_seqlens, (), bucket.longest, key_lengths[0] if bucket.keys else None)
        replay, output = self._capture(lambda: self._model(batch))
        return Graph(host, inputs, replay, output, torch.cuda.Event() if self._device.type == "cuda" else None)


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
        cu_seqlens[count + 1 :] = torch.arange(1, free + 1, device="cpu") * (bucket.tokens - tokens) // free + tokens
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
