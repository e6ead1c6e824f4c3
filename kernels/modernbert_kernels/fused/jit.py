"""A Triton kernel whose launches find their binary by a short key.

Triton's own launch binds and inspects every argument anew, and asks for hooks and settings: about 10 us, which for a
short text is longer than the kernel runs. Here the first call of a key goes through Triton, and later ones launch the
binary that it has found.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from ..launch import common_device

NUMBERS = (int, float)
WIDE = 1 << 31
"""Numbers from here on have 64 bits in a kernel."""


class Kernel:
    """`kernel[grid](*args, num_warps=, num_stages=)`, as of `triton.jit`. The first argument is a tensor.

    Attributes:
        jit: what Triton compiles, or interprets.
    """

    def __init__(self, function: Callable[..., None], do_not_specialize: Sequence[str]) -> None:
        self.jit: Any = triton.jit(function, do_not_specialize=list(do_not_specialize))
        parameters = inspect.signature(function).parameters
        self._names = list(parameters)
        constants = {name for name, one in parameters.items() if "constexpr" in str(one.annotation)}
        # Of each argument: whether it is a constant of the compiled code, and whether a number is specialized.
        self._kinds = [(name in constants, name not in do_not_specialize) for name in self._names]
        self._binaries: dict[tuple[Any, ...], tuple[Any, Any, Any]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return partial(self._launch, grid)

    def key(self, args: Sequence[Any], num_warps: int, num_stages: int) -> tuple[Any, ...]:
        """All that a binary depends on. Tensors at multiples of 16 bytes are loaded from more widely."""
        return (
            num_warps,
            num_stages,
            *[
                x
                if constant or x is None
                else (type(x), x >= WIDE, specialized and (x == 1, x % 16 == 0))
                if type(x) in NUMBERS
                else (x.dtype, x.device, x.data_ptr() % 16 == 0)
                for x, (constant, specialized) in zip(args, self._kinds, strict=True)
            ],
        )

    def _launch(self, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int = 3, **named: Any) -> Any:
        if named:
            args += tuple(map(named.__getitem__, self._names[len(args) :]))
        first = args[0]
        if not first.is_cuda:  # there is no GPU: the kernel is interpreted, or only compiled
            return self.jit[grid](*args, num_warps=num_warps, num_stages=num_stages)
        device, gpu = first.device.index, driver.active
        if device != gpu.get_current_device():
            # Triton launches on the current GPU, which need not be the one that holds the tensors.
            with torch.cuda.device(device):
                return self._launch(grid, *args, num_warps=num_warps, num_stages=num_stages)
        key = self.key(args, num_warps, num_stages)
        found = self._binaries.get(key)
        if found is None:
            common_device([x.device for x in args if isinstance(x, Tensor)])
            binary = self.jit[grid](*args, num_warps=num_warps, num_stages=num_stages)
            self._binaries[key] = binary.run, binary.function, binary.packed_metadata
            return binary
        run, function, metadata = found
        (x, y), stream = (*grid, 1)[:2], gpu.get_current_stream(device)
        run(x, y, 1, stream, function, metadata, None, None, None, *args)
        return None


def jit(*, do_not_specialize: Sequence[str] = ()) -> Callable[[Callable[..., None]], Kernel]:
    """Decorator, in the place of `triton.jit`. `do_not_specialize`: numbers that change from call to call."""
    return lambda function: Kernel(function, do_not_specialize)
