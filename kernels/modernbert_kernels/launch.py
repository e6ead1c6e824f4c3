"""What all Triton kernels share: how a launcher becomes an operator of torch, what tensors and devices it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils import _python_dispatch as modes

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C")

LIBRARY = torch.library.Library("modernbert_kernels", "FRAGMENT")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

OLDEST = 80
"""Ampere. Older GPUs lack bfloat16 and the asynchronous copies that the kernels are written for."""


PLAIN = frozenset((Tensor, Parameter, type(None), bool, int, float, str, list, tuple, torch.dtype))
"""Types that a launcher takes as they are. A subclass of Tensor or a symbolic size is for the dispatcher."""


def operator(
    schema: str, *, fake: Callable[..., R], tags: Sequence[torch.Tag] = ()
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: a function that launches kernels becomes `torch.ops.modernbert_kernels.<name of the schema>`.

    Compilers take it as one opaque step. It has no gradient: an `autograd.Function` goes around it. Where neither a
    compiler nor a mode nor a subclass of Tensor looks at the call, it is that of the function: torch's dispatcher and
    the wrapping of the arguments take longer than a launch.

    Args:
        schema: as `torch.library.define` takes it, with the name and without the namespace.
        fake: allocates outputs of the right shape, dtype and strides for the same arguments, and computes nothing.
        tags: what else compilers must know.
    """

    def add(launcher: Callable[P, R]) -> Callable[P, R]:
        name = LIBRARY.define(schema, tags=tuple(tags))
        LIBRARY.impl(name, launcher, "CUDA")
        LIBRARY.impl(name, launcher, "CPU")  # for Triton's interpreter
        torch.library.register_fake(f"{LIBRARY.ns}::{name}", fake, lib=LIBRARY)
        registered = getattr(torch.ops.modernbert_kernels, name).default
        if "!" in schema:
            return registered  # which counts that the tensor was written to

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_dynamo_compiling() or modes._is_in_torch_dispatch_mode:
                return registered(*args, **kwargs)
            for x in args:
                if type(x) not in PLAIN:
                    return registered(*args, **kwargs)
            return launcher(*args, **kwargs)

        return call

    return add


def common_device(devices: Iterable[torch.device]) -> torch.device:
    """The device of all tensors. A kernel that reads an address of another GPU breaks every later call."""
    first, *others = dict.fromkeys(devices)
    if others:
        raise ValueError(f"tensors are on {', '.join(map(str, (first, *others)))}: move them to one device")
    return first


def supported(*tensors: Tensor) -> bool:
    """Whether Triton compiles for the GPU of these tensors, and the kernels take their dtype."""
    for x in tensors:
        if x.dtype not in DTYPES or not x.is_cuda:
            return False
    return torch.version.hip is None and arch(tensors[0].device) >= OLDEST


def on_gpu(x: Tensor) -> bool:
    """Whether the tensor is on a GPU that the kernels are written for, which are NVIDIA's from `OLDEST` on."""
    return x.is_cuda and torch.version.hip is None and arch(x.device) >= OLDEST


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward pass will ask for a gradient of one of these; without, no `autograd.Function` is called."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def autocast_float32(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a norm: under autocast, torch computes norms on a GPU in float32 and returns that."""
    return torch.float32 if x.is_cuda and torch.is_autocast_enabled("cuda") else dtype


def rope_fits(qkv_T3HK: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> bool:
    """Whether the kernels take these rotary tables: float32 without gradients, a row for each token."""
    T, three, _, K = qkv_T3HK.shape
    for x in (cos_TR, sin_TR):
        if x.dtype != torch.float32 or x.requires_grad or 2 * x.shape[1] != K or x.shape[0] != T:
            return False
    return three == 3


def contiguous(x: Tensor | None) -> Tensor | None:
    """A contiguous copy where one is needed: the kernels take no strides."""
    return None if x is None else x.contiguous()


_properties = lru_cache(torch.cuda.get_device_properties)


def arch(device: torch.device) -> int:
    """The compute capability of a GPU, 89 for 8.9. For a CPU, where the interpreter runs, `OLDEST`."""
    if device.type == "cpu":
        return OLDEST
    # A compiler knows that the properties of a device are constant, and would trace into a cache.
    found = torch.cuda.get_device_properties(device) if torch.compiler.is_dynamo_compiling() else _properties(device)
    return 10 * found.major + found.minor


def for_arch(table: Mapping[int, C], device: torch.device) -> C:
    """The entry of a table by compute capability for this device: the newest that is not newer than it.

    A table has an entry for `OLDEST`.
    """
    mine, best = arch(device), OLDEST
    for known in table:
        if best < known <= mine:
            best = known
    return table[best]


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
