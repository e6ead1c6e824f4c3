"""What all Triton kernels share: how a launcher becomes an operator of torch, and which configuration it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C")

LIBRARY = torch.library.Library("modernbert_kernels", "FRAGMENT")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

OLDEST = 80
"""Ampere; older cards lack bfloat16 and the asynchronous copies that the kernels are written for."""


def operator(
    schema: str, *, fake: Callable[..., R], tags: Sequence[torch.Tag] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: a function that launches kernels becomes `torch.ops.modernbert_kernels.<name of the schema>`.

    Compilers take it as one opaque step. It has no gradient: an `autograd.Function` goes around it.

    Args:
        schema: as `torch.library.define` takes it, with the name and without the namespace.
        fake: allocates outputs of the right shape, dtype and strides for the same arguments, and computes nothing.
        tags: what else compilers must know.
    """

    def add(launcher: Callable[P, R]) -> Callable[P, R]:
        def on_its_gpu(*args: P.args, **kwargs: P.kwargs) -> R:
            # Triton launches on the current GPU, which need not be the one that holds the tensors.
            with torch.cuda.device(_shared(x.device for x in args if isinstance(x, Tensor))):
                return launcher(*args, **kwargs)

        name = LIBRARY.define(schema, tags=tuple(tags))
        LIBRARY.impl(name, on_its_gpu, "CUDA")
        LIBRARY.impl(name, launcher, "CPU")  # for Triton's interpreter
        torch.library.register_fake(f"{LIBRARY.ns}::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.modernbert_kernels, name).default

    return add


def _shared(devices: Iterable[torch.device]) -> torch.device:
    """The one device of all tensors. A kernel that follows an address of another GPU would break every later call."""
    first, *others = dict.fromkeys(devices)
    if others:
        raise ValueError(f"tensors lie on {', '.join(map(str, (first, *others)))}: move them to one device")
    return first


def supported(*tensors: Tensor) -> bool:
    """Whether Triton compiles for where these tensors lie, and the kernels know their dtype."""
    return all(x.is_cuda and x.dtype in DTYPES and arch(x.device) >= OLDEST for x in tensors)


_properties = lru_cache(torch.cuda.get_device_properties)


def arch(device: torch.device) -> int:
    """The compute capability of a GPU, 89 for 8.9; of a CPU, where the interpreter runs, the oldest there is."""
    if device.type == "cpu":
        return OLDEST
    # A compiler knows that the properties of a device are constant, and would trace into a cache.
    found = torch.cuda.get_device_properties(device) if torch.compiler.is_compiling() else _properties(device)
    return 10 * found.major + found.minor


def newest(table: Mapping[int, C], device: torch.device) -> C:
    """The entry of a table by compute capability for this device: the newest that is not newer than it."""
    return table[max(known for known in table if known <= max(OLDEST, arch(device)))]


def precision(x: Tensor) -> str:
    """How `tl.dot` multiplies: float32 exactly, unless PyTorch's own switch allows TF32."""
    # The older `allow_tf32` cannot be read any more once somebody has set this one; this one follows both.
    return "tf32" if x.dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def owners(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """`[T]` int32, the sequence of every token; waits for nothing."""
    token_T = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(token_T, cu_seqlens[1:], right=True, out_int32=True)
