"""What this machine reaches in one dtype: the yardstick of every model suite, measured in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch

from benchmarks import gpu
from benchmarks.harness import read_clocks
from benchmarks.models.case import Build, Case, Place, Way
from modernbert_kernels import linear


def rates(device: torch.device, dtype: torch.dtype, *, quick: bool) -> dict[str, list[float]]:
    """Samples of bytes copied (read and written) and of operations of a product of square matrices, per second.

    Random data, because zeros are multiplied faster.
    """
    is_gpu = device.type == "cuda"
    if is_gpu and dtype is torch.bfloat16:
        return gpu.rates(gpu.this_machine(), quick=quick)[0]
    machine = gpu.Machine(device, gpu.read_gpu if is_gpu else read_clocks, 0.0, 20 if is_gpu else 3)
    rows, width, samples = (1 << 14, 4096, 5) if is_gpu else (1 << 12, 512, 3) if quick else (1 << 13, 1024, 7)
    x = torch.randn(rows, 4096, device=device, dtype=dtype)
    y = torch.empty_like(x)
    a, b = torch.randn(2, width, width, device=device, dtype=dtype)
    products = [lambda: a @ b]
    if not is_gpu:
        # On some processors oneDNN, which our layers use, multiplies twice as fast as what `@` calls.
        weight = torch.nn.Parameter(b, requires_grad=False)
        products.append(lambda: linear(a, weight))

    def of(call: Callable[[], object], amount: int) -> list[float]:
        several = partial(gpu.repeat, 4, call)  # beside them the start of the first is nothing
        gpu.settle(several, machine)
        return [4 * amount / machine.read(several).seconds for _ in range(samples)]

    copies = of(lambda: y.copy_(x), 2 * x.nbytes)
    return {"copy": copies, "matmul": max((of(call, 2 * width**3) for call in products), key=median)}


def build(place: Place) -> Build:
    """For a process that is only asked for the rates."""

    def ways(case: Case) -> Iterator[Way]:
        yield from ()

    return ways
