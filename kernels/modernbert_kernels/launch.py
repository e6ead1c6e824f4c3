"""What all Triton kernels share: how a launcher becomes an operator of torch, what tensors and devices it takes."""

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
"""Ampere. Older GPUs lack bfloat16 and the asynchronous copies that the kernels are written for."""


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
            with torch.cuda.device(_common_device([x.device for x in args if isinstance(x, Tensor)])):
                return launcher(*args, **kwargs)

        name = LIBRARY.define(schema, tags=tuple(tags))
        LIBRARY.impl(name, on_its_gpu, "CUDA")
        LIBRARY.impl(name, launcher, "CPU")  # for Triton's interpreter
        torch.library.register_fake(f"{LIBRARY.ns}::{name}", fake, lib=LIBRARY)
        return getattr(torch.ops.modernbert_kernels, name).default

    return add


def _common_device(devices: Iterable[torch.device]) -> torch.device:
    """The device of all tensors. A kernel that reads an address of another GPU breaks every later call."""
    first, *others = dict.fromkeys(devices)
    if others:
        raise ValueError(f"tensors are on {', '.join(map(str, (first, *others)))}: move them to one device")
    return first


def supported(*tensors: Tensor) -> bool:
    """Whether Triton compiles for the GPU of these tensors, and the kernels take their dtype."""
    return all(x.dtype in DTYPES and on_gpu(x) for x in tensors)


def on_gpu(x: Tensor) -> bool:
    """Whether the tensor is on a GPU that the kernels are written for, which are NVIDIA's from `OLDEST` on."""
    return x.is_cuda and torch.version.hip is None and arch(x.device) >= OLDEST


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward pass will ask for a gradient of one of these; without, no `autograd.Function` is called."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def autocast_float32(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a norm: under autocast, torch computes norms on a GPU in float32 and returns that."""
    return torch.float32 if x.is_cuda and torch.is_autocast_enabled("cuda") else dtype


def rope_fits(qkv_T3HK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> bool:
    """Whether the kernels take these rotary tables: float32 without gradients, a row for each token."""
    T, three, _, K = qkv_T3HK.shape
    return three == 3 and all(
        x.dtype == torch.float32 and not x.requires_grad and 2 * x.shape[1] == K and x.shape[0] == T
        for x in (cos_TR, sin_TR)
    )


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous copies where needed: the kernels take no strides."""
    return [x if x is None else x.contiguous() for x in tensors]


_properties = lru_cache(torch.cuda.get_device_properties)


def arch(device: torch.device) -> int:
    """The compute capability of a GPU, 89 for 8.9. For a CPU, where the interpreter runs, `OLDEST`."""
    if device.type == "cpu":
        return OLDEST
    # A compiler knows that the properties of a device are constant, and would trace into a cache.
    found = torch.cuda.get_device_properties(device) if torch.compiler.is_compiling() else _properties(device)
    return 10 * found.major + found.minor


def for_arch(table: Mapping[int, C], device: torch.device) -> C:
    """The entry of a table by compute capability for this device: the newest that is not newer than it."""
    return table[max(known for known in table if known <= max(OLDEST, arch(device)))]


def precision(x: Tensor) -> str:
    """How `tl.dot` multiplies: float32 exactly, unless PyTorch's own switch allows TF32."""
    # The older `allow_tf32` raises once this one has been set; this one follows both.
    return "tf32" if x.dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def segment_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """`[T]` int32, the sequence of each token. Does not wait for the device."""
    token_T = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(token_T, cu_seqlens[1:], right=True, out_int32=True)


def multiprocessors(device: torch.device) -> int:
    """The multiprocessors of a GPU; for a CPU, where the interpreter runs, those of an A100."""
    return _properties(device).multi_processor_count if device.type == "cuda" else 108


def attention_outputs(qkv_T3HK: Tensor, *__: object) -> tuple[Tensor, Tensor]:
    """Memory for the output of attention, `[T, H, K]`, and the log-sum-exp of each softmax, `[H, T]` float32."""
    tokens, _, heads, width = qkv_T3HK.shape
    return qkv_T3HK.new_empty(tokens, heads, width), qkv_T3HK.new_empty(heads, tokens, dtype=torch.float32)
