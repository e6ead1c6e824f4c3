"""How batches reach the model: sort by length, pack to a token budget, restore the order."""

from __future__ import annotations

import copy
import math
import multiprocessing
import pickle
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..late_interaction import Ragged
from ..packing import Packed

T = TypeVar("T")
R = TypeVar("R")

CPU_TOKENS = 2048
"""Tokens of a micro-batch on a CPU: activations of one layer stay in the cache (measured by `benchmarks cpu`)."""

GPU_TOKENS = 65_536
"""Tokens of a batch on a GPU at most: enough rows to fill every GEMM of the small models."""

TEXTS = 1024
"""Texts tokenised and sorted at a time, so that memory does not grow with the corpus, and a GPU soon has work."""

PROGRESS_TEXTS = 500
"""Fewer texts than this show no progress bar unless one is asked for."""


def micro_batches(batch: Packed, tokens: int = CPU_TOKENS) -> list[Packed]:
    """Cut a large batch on the CPU between sequences into parts of about `tokens` tokens; any other stays whole.

    The order is kept. A sequence longer than `tokens` is a part of its own.
    """
    whole = torch.compiler.is_compiling() or not batch.input_ids.is_cpu
    if whole or batch.num_tokens <= tokens:
        return [batch]
    cuts, filled = [0], 0
    for index, length in enumerate(batch.lengths):
        if filled and filled + length > tokens:
            cuts.append(index)
            filled = 0
        filled += length
    cuts.append(len(batch))
    return [batch.select(range(start, stop)) for start, stop in pairwise(cuts)]


def split_rows(rows_Q: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Increasing rows of a batch as rows of its parts, which have `sizes` tokens."""
    starts = list(accumulate(sizes, initial=0))
    cuts = torch.searchsorted(rows_Q, torch.tensor(starts, dtype=rows_Q.dtype, device=rows_Q.device)).tolist()
    return [rows_Q[first:last] - start for (first, last), start in zip(pairwise(cuts), starts[:-1], strict=True)]


def plan(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Group texts of similar length: lists of indices, longest first, of at most `tokens` tokens each.

    A text longer than `tokens` is a batch of its own. Every index comes once.
    """
    batches: list[list[int]] = []
    filled = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or filled + lengths[index] > tokens:
            batches.append([])
            filled = 0
        batches[-1].append(index)
        filled += lengths[index]
    return batches


def encode_texts(
    model: Any,
    tokenize: str,
    texts: Sequence[str],
    batch_tokens: int | None,
    progress: bool | None,
    devices: Sequence[str] | None,
) -> Ragged:
    """Texts to float32 rows on the CPU through `model`, whose method named `tokenize` gives the `Tokens` of texts."""
    if isinstance(texts, str):
        raise TypeError("texts must be a list of str, got one str: put it in a list")
    texts = list(texts)
    if devices is not None:
        return _encode_in_processes(model, tokenize, texts, batch_tokens, progress, devices)
    parts = [texts[start : start + TEXTS] for start in range(0, len(texts), TEXTS)]
    tokenized: Callable[[list[str]], Any] = partial(getattr(model, tokenize), spans=False)
    # While a GPU encodes one part, the CPU tokenises the next; on a CPU they would only share its cores.
    in_turn = one_ahead if next(model.parameters()).is_cuda else map
    with _bar(len(texts), progress) as advance:
        matrices = _encode(model, in_turn(tokenized, parts), batch_tokens, advance)
    # Joined outside of inference mode: an ordinary tensor, which may meet autograd later.
    return Ragged.from_list(matrices) if matrices else Ragged(torch.zeros(0, model.dim), torch.zeros(1).long())


def encode_tokens(
    model: Any,
    tokens: Any,
    batch_tokens: int | None = None,
    advance: Callable[[int], None] = lambda texts: None,
) -> list[Tensor]:
    """The scored rows of each text of `tokens` (`Tokens`), `[n_i, E]` float32 on the CPU, in the order given."""
    return _encode(model, [tokens], batch_tokens, advance)


def one_ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map`, but a thread works on the next item while the caller uses this one."""
    with ThreadPoolExecutor(1) as thread:
        coming: deque[Future[R]] = deque()
        for item in items:
            coming.append(thread.submit(function, item))
            if len(coming) > 1:
                yield coming.popleft().result()
        yield from (last.result() for last in coming)


def _encode(model: Any, parts: Iterable[Any], batch_tokens: int | None, advance: Callable[[int], None]) -> list[Tensor]:
    """The rows of all texts of all `parts` (`Tokens`). A GPU is given a batch before the last one is back."""
    matrices: list[Tensor] = []
    underway: deque[tuple[list[int], Tensor, Tensor, torch.cuda.Event | None]] = deque()

    def finish() -> None:
        places, rows, offsets, done = underway.popleft()
        if done is not None:
            done.synchronize()
            rows = rows.clone()  # pinned memory is scarce: two batches share it in turns
        for place, matrix in zip(places, Ragged(rows, offsets), strict=True):
            matrices[place] = matrix
        advance(len(places))

    device = next(model.parameters()).device
    budget = batch_tokens or token_budget(device, model.encoder.config.hidden_size)
    was_training = model.training
    # Only where it changes something: layers forget what they have prepared when they are told their mode.
    if any(module.training for module in model.modules()):
        model.eval()
    try:
        with torch.inference_mode():
            for tokens in parts:
                first = len(matrices)
                matrices += [torch.empty(0)] * len(tokens.batch)
                for indices in plan(tokens.batch.lengths, budget):
                    part = tokens.select(indices)
                    underway.append(([first + i for i in indices], *_begin(model, part, device)))
                    if device.type != "cuda" or len(underway) > 1:
                        finish()
            while underway:
                finish()
    finally:
        if was_training:
            model.train()
    return matrices


def _begin(model: Any, part: Any, device: torch.device) -> tuple[Tensor, Tensor, torch.cuda.Event | None]:
    """Scored rows, float32 on the CPU, their offsets, and what to wait for before the rows are read."""
    rows, offsets = part.rows, part.offsets
    if device.type != "cuda":
        x_QE = model(part.batch.to(device), rows=None if rows is None else rows.to(device))
        return x_QE.float().cpu(), offsets, None
    if model.graphs is not None and model.graphs.bucket(part.batch) is not None:
        x_QE = model.graphs(part.batch, rows=rows)
    else:
        batch = part.batch.pin_memory().to(device, non_blocking=True)
        x_QE = model(batch, rows=None if rows is None else rows.pin_memory().to(device, non_blocking=True))
    x_QE = x_QE.float().to("cpu", non_blocking=True)  # into pinned memory of its own
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    return x_QE, offsets, done


def token_budget(device: torch.device, width: int) -> int:
    """Tokens of a batch: on a GPU the most up to `GPU_TOKENS` of which every product's tiles fill all processors."""
    if device.type != "cuda":
        return CPU_TOKENS if device.type == "cpu" else GPU_TOKENS
    wave = full_wave(torch.cuda.get_device_properties(device).multi_processor_count, width)
    return max(1, GPU_TOKENS // wave) * wave


def full_wave(processors: int, width: int, tile: int = 128) -> int:
    """The fewest rows of a product `width` wide whose square tiles give every processor the same number."""
    across = -(-width // tile)
    return tile * processors // math.gcd(across, processors)


def _encode_in_processes(
    model: nn.Module,
    tokenize: str,
    texts: list[str],
    batch_tokens: int | None,
    progress: bool | None,
    devices: Sequence[str],
) -> Ragged:
    """One process per device, each with a copy of the model; texts are dealt out in parts, the order is restored."""
    if not devices:
        raise ValueError("devices is empty: name at least one, such as ['cuda:0'], or leave it out")
    threads = max(1, torch.get_num_threads() // len(devices))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for device in devices:
        queue.put(device)
    # Several parts for each, so that none waits long for the last one.
    size = max(1, min(4 * TEXTS, -(-len(texts) // (4 * len(devices)))))
    parts = [texts[start : start + size] for start in range(0, len(texts), size)]
    # As bytes and arrays: tensors would go through /dev/shm, which is small in containers.
    weights = pickle.dumps(copy.deepcopy(model).cpu())
    matrices: list[Tensor] = []
    with (
        ProcessPoolExecutor(len(devices), context, _start_worker, (weights, queue, threads)) as pool,
        _bar(len(texts), progress) as advance,
    ):
        jobs = [pool.submit(_encode_in_worker, tokenize, part, batch_tokens) for part in parts]
        try:
            for job, part in zip(jobs, parts, strict=True):
                matrices += Ragged(*map(torch.from_numpy, job.result()))
                advance(len(part))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # an error is shown now, not after all other parts
            raise
    return Ragged.from_list(matrices) if matrices else encode_texts(model, tokenize, [], None, False, None)


_worker_model: Any = None


def _start_worker(model: bytes, devices: Any, threads: int) -> None:
    global _worker_model
    torch.set_num_threads(threads)
    _worker_model = pickle.loads(model).to(devices.get())


def _encode_in_worker(tokenize: str, texts: list[str], batch_tokens: int | None) -> tuple[Any, Any]:
    ragged = encode_texts(_worker_model, tokenize, texts, batch_tokens, False, None)
    return ragged.values.numpy(), ragged.offsets.numpy()


@contextmanager
def _bar(total: int, progress: bool | None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr: asked for, or long work on a terminal."""
    if progress is False or (progress is None and (total < PROGRESS_TEXTS or not sys.stderr.isatty())):
        yield lambda texts: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("encoding"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("encoding", total=total)
        yield lambda texts: bar.advance(task, texts)
