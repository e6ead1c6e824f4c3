"""How batches reach the model: sort by length, pack to a token budget, restore the order."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .packing import Packed, Ragged

CPU_TOKENS = 2048
"""Tokens of a micro-batch on a CPU: activations of one layer stay in the cache (measured by `benchmarks cpu`)."""

GPU_TOKENS = 65_536
"""Tokens of a batch on a GPU: enough rows to fill every GEMM of the small models."""

TEXTS = 4096
"""Texts tokenised and sorted at a time, so that memory does not grow with the corpus."""

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
    matrices: list[Tensor] = []
    with _bar(len(texts), progress) as advance:
        for start in range(0, len(texts), TEXTS):
            tokens = getattr(model, tokenize)(texts[start : start + TEXTS])
            matrices += encode_tokens(model, tokens, batch_tokens, advance)
    # Joined outside of inference mode: an ordinary tensor, which may meet autograd later.
    return Ragged.from_list(matrices) if matrices else Ragged(torch.zeros(0, model.dim), torch.zeros(1).long())


def encode_tokens(
    model: Any,
    tokens: Any,
    batch_tokens: int | None = None,
    advance: Callable[[int], None] = lambda texts: None,
) -> list[Tensor]:
    """The scored rows of each text of `tokens` (`Tokens`), `[n_i, E]` float32 on the CPU, in the order given."""
    device = next(model.parameters()).device
    budget = batch_tokens or (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS)
    matrices: list[Tensor] = [torch.empty(0)] * len(tokens.batch)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for indices in plan(tokens.batch.lengths, budget):
                part = tokens.select(indices)
                rows = part.ragged(model(part.batch.to(device)))
                for index, matrix in zip(indices, Ragged(rows.values.float().cpu(), rows.offsets), strict=True):
                    matrices[index] = matrix
                advance(len(indices))
    finally:
        model.train(was_training)
    return matrices


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
    size = max(1, min(TEXTS, -(-len(texts) // len(devices))))
    parts = [texts[start : start + size] for start in range(0, len(texts), size)]
    # As bytes and arrays: tensors would go through /dev/shm, which is small in containers.
    weights = pickle.dumps(copy.deepcopy(model).cpu())
    matrices: list[Tensor] = []
    with (
        ProcessPoolExecutor(len(devices), context, _start_worker, (weights, queue, threads)) as pool,
        _bar(len(texts), progress) as advance,
    ):
        jobs = [pool.submit(_encode_in_worker, tokenize, part, batch_tokens) for part in parts]
        for job, part in zip(jobs, parts, strict=True):
            matrices += Ragged(*map(torch.from_numpy, job.result()))
            advance(len(part))
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
