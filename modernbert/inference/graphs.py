"""CUDA graphs: small batches without the launches that cost more than their work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
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

SPARE_PLACES = 8
"""Places of a graph of long sequences beyond those that its tokens fill: for short texts among them, and filler."""

Replay = Callable[[], Any]
Capture = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]


class Bucket(NamedTuple):
    """What a graph is captured for: at most so many tokens and sequences, none longer than `longest`."""

    tokens: int
    longest: int
    keys: bool  # whether sequences end in query-only rows

    @property
    def places(self) -> int:
        places = self.tokens // TOKENS_OF_A_TEXT
        if self.longest <= LONG:
            return places
        # FlashAttention starts programs for the longest sequence in every place. Sequences of this bucket have more
        # than half of the longest, so that the tokens fill up to twice as many places as sequences of the longest.
        return min(places, 2 * self.tokens // self.longest + SPARE_PLACES)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of ids, positions, cu_seqlens, key lengths and rows in the inputs of a graph."""
        return self.tokens, self.tokens, self.places + 1, self.places * self.keys, self.tokens


class NoEvent:
    """In the place of `torch.cuda.Event` where the host does all work in order."""

    def record(self) -> None: ...
    def wait(self) -> None: ...
    def synchronize(self) -> None: ...


@dataclass
class Graph:
    """One captured forward pass and the memory around it.

    Attributes:
        host, inputs: int32, ids, positions, cu_seqlens, key lengths and the rows that are asked for in one row, so that
            one copy brings them all. A copy of pageable memory after the replay would wait for it.
        output: `[tokens, D]`, overwritten by every replay.
        copied: what to wait for before `host` is written again.
    """

    host: Tensor
    inputs: Tensor
    replay: Replay
    output: Tensor
    copied: torch.cuda.Event | NoEvent


class Graphs:
    """The CUDA graphs of a model in evaluation mode, which replay a batch that is on the CPU.

    A batch is rounded up to the next of a few sizes by short filler sequences, and copied to the GPU in one piece.
    Nothing is allocated. The first batch of a size captures its graph, which takes a few forward passes. Graphs share
    their memory, but for inputs and outputs. So one thread at a time replays, and a replay waits for the one before it,
    whatever stream that was on.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, capture: Capture | None = None) -> None:
        self._model, self._device = model, device
        self._capture = capture or capture_on(device)
        self._event = torch.cuda.Event if device.type == "cuda" else NoEvent
        self._replayed = self._event()
        self._largest_first = capture is None
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
            graph = self._graph(bucket)
            graph.copied.synchronize()
            fill(graph.host, batch, bucket, rows)
            with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
                # The memory of the graphs is free when the replay before has ended, which may be on another stream.
                self._replayed.wait()
                graph.inputs.copy_(graph.host, non_blocking=True)
                graph.copied.record()
                graph.replay()
                # A copy in either case: the next replay overwrites the output.
                if rows is not None:
                    *_, rows_T = graph.inputs.split(bucket.sizes)
                    found = graph.output.index_select(0, rows_T[: len(rows)])
                else:
                    one_a_text = len(graph.output) == bucket.places  # of a head that pools
                    found = graph.output[: len(batch) if one_a_text else batch.num_tokens].clone()
                self._replayed.record()
            return found

    def _graph(self, bucket: Bucket) -> Graph:
        if self._largest_first and not self._graphs:
            # Its memory has room for every other graph. In a pool that grew with the sizes, each would find the blocks
            # of those before it too small.
            largest = Bucket(self._sizes[-1], LONG, keys=False)
            self._graphs[largest] = self._make(largest)
        if bucket not in self._graphs:
            self._graphs[bucket] = self._make(bucket)
        return self._graphs[bucket]

    @torch.inference_mode(False)  # what is made in inference mode could not be written to outside of it
    @torch.no_grad()
    def _make(self, bucket: Bucket) -> Graph:
        host = torch.zeros(sum(bucket.sizes), dtype=torch.int32, device="cpu", pin_memory=self._device.type == "cuda")
        empty = torch.zeros(0, dtype=torch.int64, device="cpu")
        keys = empty.int() if bucket.keys else None
        fill(host, Packed(empty, empty, empty.new_zeros(1, dtype=torch.int32), (), 0, keys), bucket)
        inputs = host.to(self._device)
        ids, positions, cu_seqlens, key_lengths, _ = inputs.split(bucket.sizes)
        batch = Packed(ids, positions, cu_seqlens, (), bucket.longest, key_lengths if bucket.keys else None)
        replay, output = self._capture(lambda: self._model(batch))
        return Graph(host, inputs, replay, output, self._event())


def bucket_sizes(max_tokens: int) -> list[int]:
    """Four sizes in every octave, so that less than a fifth of a batch is filled up, and `max_tokens` itself."""
    sizes, octave = [], SMALLEST
    while octave < max_tokens:
        sizes += range(octave, 2 * octave, octave // 4)
        octave *= 2
    return [size for size in sizes if size < max_tokens] + [max_tokens]


def fill(host: Tensor, batch: Packed, bucket: Bucket, rows: Tensor | None = None) -> None:
    """Write a batch and the rows that are asked for into the inputs of a graph.

    The tokens that are left over are in as few sequences as `longest` allows; the places after them are empty.
    """
    tokens, count = batch.num_tokens, len(batch)
    ids, positions, cu_seqlens, key_lengths, rows_T = host.split(bucket.sizes)
    ids[:tokens], positions[:tokens], cu_seqlens[: count + 1] = batch.input_ids, batch.positions, batch.cu_seqlens
    fillers = torch.arange(1, bucket.places - count + 1, device="cpu")
    cu_seqlens[count + 1 :] = (tokens + fillers * bucket.longest).clamp(max=bucket.tokens)
    if batch.key_lengths is not None:
        key_lengths[:count] = batch.key_lengths
        key_lengths[count:] = cu_seqlens.diff()[count:]
    if rows is not None:
        rows_T[: len(rows)] = rows


def capture_on(device: torch.device) -> Capture:
    """Captures CUDA graphs that share their memory: one pool, and one stream.

    In a pool too, PyTorch's allocator gives a block that is free only to the stream that it was allocated on. With a
    stream for each capture, every graph had memory of its own, and cuBLAS a workspace for each stream.
    """
    return partial(_captured, torch.cuda.graph_pool_handle(), torch.cuda.Stream(device))


def _captured(pool: Any, stream: torch.cuda.Stream, run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """A CUDA graph of `run`, and the memory that it writes its result to. Graphs of one pool take turns in it."""
    with torch.cuda.device(stream.device):
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
