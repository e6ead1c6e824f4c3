"""Encoding with one process for each device."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.queues import Queue
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..late_interaction import Ragged
from ..packing import Tokens
from ..progress import progress_bar
from .encode import PROGRESS_TEXTS, TEXTS, Modules, encode_texts, joined


class _Worker(NamedTuple):
    """What a process encodes with: a model on its device, and how its texts become tokens."""

    caller: Modules
    tokenize: Callable[..., Tokens]
    dim: int


_worker: _Worker | None = None  # of a worker process, which serves one pool


def encode_in_processes(
    model: nn.Module,
    tokenize: Callable[..., Tokens],
    texts: list[str],
    *,
    dim: int,
    devices: Sequence[str],
    batch_tokens: int | None,
    progress: bool | None,
) -> Ragged:
    """As `encode_texts`, in one process for each of `devices`, each with a copy of the model.

    Args:
        tokenize: a function of the model and texts, such as `ColBERT.tokenize_queries`, that can be pickled.

    Raises:
        ValueError: no device.
    """
    if not devices:
        raise ValueError("devices is empty: name at least one, such as ['cuda:0'], or leave it out")
    threads = max(1, torch.get_num_threads() // len(devices))
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    for device in devices:
        queue.put(device)
    # Several parts for each process, so that none waits long for the last one.
    size = max(1, min(4 * TEXTS, -(-len(texts) // (4 * len(devices)))))
    parts = [texts[start : start + size] for start in range(0, len(texts), size)]
    # Bytes and arrays: tensors would go through /dev/shm, which is small in containers.
    pickled = pickle.dumps((copy.deepcopy(model).cpu(), tokenize, dim))
    shown = progress if progress is not None else None if len(texts) >= PROGRESS_TEXTS else False
    matrices: list[Tensor] = []
    with (
        ProcessPoolExecutor(len(devices), context, _start, (pickled, queue, threads)) as pool,
        progress_bar("encoding", len(texts), shown) as advance,
    ):
        jobs = [pool.submit(_encode, part, batch_tokens) for part in parts]
        try:
            for job, part in zip(jobs, parts, strict=True):
                matrices += Ragged(*map(torch.from_numpy, job.result()))
                advance(len(part))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # an error is raised now, not after all other parts
            raise
    return joined(matrices, dim)


def _start(pickled: bytes, devices: Queue[str], threads: int) -> None:
    global _worker
    torch.set_num_threads(threads)
    model, tokenize, dim = pickle.loads(pickled)
    _worker = _Worker(Modules(model.to(devices.get())), lambda texts, **options: tokenize(model, texts, **options), dim)


def _encode(texts: list[str], batch_tokens: int | None) -> tuple[np.ndarray, np.ndarray]:
    assert _worker is not None
    caller, tokenize, dim = _worker
    ragged = encode_texts(caller, tokenize, texts, dim=dim, batch_tokens=batch_tokens, progress=False)
    return ragged.values.numpy(), ragged.offsets.numpy()
