"""Encoding with one process for each device."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from multiprocessing.queues import Queue
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..late_interaction import Ragged, check_count
from ..packing import Tokenized
from ..progress import progress_bar
from ..truncation import Cut
from .encode import PROGRESS_TEXTS, TEXTS, Modules, encode_texts, joined, list_of_texts, warn_of


class _Worker(NamedTuple):
    """What a process encodes with: a model on its device, and how its texts become tokens."""

    caller: Modules
    tokenize: Callable[..., Tokenized]
    dim: int


_worker: Callable[[], _Worker] | None = None  # of a worker process, which serves one pool


def encode_here_or_on(
    model: nn.Module,
    tokenize: Callable[..., Tokenized],
    texts: Iterable[str],
    *,
    dim: int,
    devices: Sequence[str] | None,
    batch_tokens: int | None,
    progress: bool | None,
) -> Ragged:
    """What the `encode` methods of a head do: `encode_in_processes` on `devices`, or with None `encode_texts` here.

    Args:
        tokenize: as in `encode_in_processes`.
    """
    if devices is None:
        encode = partial(encode_texts, Modules(model), partial(tokenize, model), texts)
    else:
        encode = partial(encode_in_processes, model, tokenize, list_of_texts(texts), devices=devices)
    return encode(dim=dim, batch_tokens=batch_tokens, progress=progress)


def encode_in_processes(
    model: nn.Module,
    tokenize: Callable[..., Tokenized],
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
        ValueError: no device, or one that is not there.
        RuntimeError: a process has died.
    """
    devices = _checked(devices)
    if batch_tokens is not None:
        check_count("batch_tokens", batch_tokens)
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
    cuts: list[Cut] = []
    with (
        ProcessPoolExecutor(len(devices), context, _start, (pickled, queue, threads)) as pool,
        progress_bar("encoding", len(texts), shown) as advance,
    ):
        jobs = [pool.submit(_encode, part, batch_tokens) for part in parts]
        try:
            for job, part in zip(jobs, parts, strict=True):
                *arrays, found = job.result()
                cuts += [Cut(len(matrices) + cut.index, *cut[1:-1], len(matrices) + cut.seen) for cut in found]
                matrices += Ragged(*map(torch.from_numpy, arrays))
                advance(len(part))
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process of devices= has died, with its reason on stderr: out of memory, or a script that does not "
                'encode below `if __name__ == "__main__":`, which a spawned process needs'
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # an error is raised now, not after all other parts
            raise
    for cut in cuts[:1]:
        warn_of(cut)
    return joined(matrices, dim)


def _checked(devices: Sequence[str]) -> list[str]:
    """The names of the devices. ValueError for none, for one that is not in a list, or that this machine has not."""
    if isinstance(devices, (str, torch.device)):
        raise ValueError(f"devices is one device, {str(devices)!r}: put it in a list")
    if not devices:
        raise ValueError("devices is empty: name at least one, such as ['cuda:0'], or leave it out")
    for index, device in enumerate(devices):
        if not isinstance(device, (str, torch.device)) or not is_there(device):
            what = f"devices[{index}] is {device!r:.80}, which this machine does not have"
            raise ValueError(f"{what}: name one such as 'cpu' or 'cuda:0'")
    return [str(device) for device in devices]


def is_there(device: str | torch.device) -> bool:
    try:
        found = torch.device(device)
        return (found.index or 0) < torch.get_device_module(found).device_count()
    except RuntimeError:  # not the name of a device, or one without memory, such as "meta"
        return False


def _start(pickled: bytes, devices: Queue[str], threads: int) -> None:
    global _worker
    torch.set_num_threads(threads)
    # Made by the first job, which hands on its error. The error of an initializer would be lost.
    _worker = cache(partial(_made, pickled, devices.get()))


def _made(pickled: bytes, device: str) -> _Worker:
    model, tokenize, dim = pickle.loads(pickled)
    return _Worker(Modules(model.to(device)), partial(tokenize, model), dim)


def _encode(texts: list[str], batch_tokens: int | None) -> tuple[np.ndarray, np.ndarray, list[Cut]]:
    assert _worker is not None
    caller, tokenize, dim = _worker()
    cuts: list[Cut] = []
    encode = partial(encode_texts, caller, tokenize, texts, on_cut=cuts.append)
    ragged = encode(dim=dim, batch_tokens=batch_tokens, progress=False)
    return ragged.values.numpy(), ragged.offsets.numpy(), cuts
