"""Other ways to do what an op does: the reference compiled, other libraries, other parts of PyTorch and of our own.

Packages are optional: a way stands here only where its package is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import modernbert_kernels as ops
from benchmarks.kernels.calls import Way
from benchmarks.kernels.cases import Case
from modernbert_kernels.flash import packages


def plain(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` with the reference of every op that it calls in turn."""

    @wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        with ops.backend("reference"):
            return call(*args, **kwargs)

    return run


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    # What was compiled before of the same function counts towards a limit, beyond which nothing is compiled any more.
    torch._dynamo.reset()
    return plain(torch.compile(call, dynamic=False))


def exact_rotary_table(positions: Tensor, theta: float, head_dim: int) -> tuple[Tensor, Tensor]:
    """`rotary_table` in float64, which its specification does not reach: no argument of it has a dtype to raise."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device).double() / head_dim
    angle = positions.double()[:, None] * theta**-exponent
    return angle.cos(), angle.sin()


def liger(case: Case) -> tuple[Way, ...]:
    """Liger's kernel for this op, if it has one. It gets contiguous halves and a bias of zeros ready made."""
    make = LIGER.get(case.op.name)
    return make(case) if make and find_spec("liger_kernel") and find_spec("triton") else ()


def _liger_geglu(case: Case) -> tuple[Way, ...]:
    silu = case.args[1:] == ("silu",)
    name = "swiglu.LigerSiLUMulFunction" if silu else "geglu.LigerGELUMulFunction"
    file, function = name.split(".")
    run = getattr(import_module(f"liger_kernel.ops.{file}"), function)
    return (
        Way(
            "liger",
            lambda a, gate: run.apply(a, gate),
            "two halves" if silu else "two halves, tanh in place of erf",
            prepare=lambda args: tuple(half.contiguous() for half in args[0].chunk(2, dim=-1)),
            restore=lambda gradients: [torch.cat(gradients, dim=-1)] if gradients else [],
        ),
    )


def _liger_layer_norm(case: Case) -> tuple[Way, ...]:
    run = import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction

    def with_bias(args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, weight, bias, eps = args
        return x, weight, (torch.zeros_like(weight).detach() if bias is None else bias), eps

    return (Way("liger", run.apply, prepare=with_bias),)


def _liger_cross_entropy(case: Case) -> tuple[Way, ...]:
    run = import_module("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction

    def call(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        found = run.apply(x, weight, targets, bias)
        return found[0] if isinstance(found, tuple) else found

    return (Way("liger", call, "fused linear cross-entropy"),)


LIGER: dict[str, Callable[[Case], tuple[Way, ...]]] = {
    "geglu": _liger_geglu,
    "layer_norm": _liger_layer_norm,
    "linear_cross_entropy": _liger_cross_entropy,
}


def cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """What people write: logits of all tokens, in float32 for the softmax."""
    return F.cross_entropy(F.linear(x, weight, bias).float(), targets)


def rotations(case: Case) -> tuple[Way, ...]:
    """Our kernel with q and k rotated as they are loaded, and rotated once before it. One of them is what `triton`
    does: the difference to it says how much two equal ways differ.
    """
    if "triton" not in case.op.backends or not case.args[0].is_cuda:
        return ()
    function = import_module("modernbert_kernels.fused.attention")._Attention

    def way(name: str, rotate: bool) -> Way:
        def call(qkv: Tensor, cu_seqlens: Tensor, longest: int, *, rope: Any, window: int | None) -> Tensor:
            return function.apply(qkv, cu_seqlens, None, *rope, window, rotate)

        return Way(f"triton, rotated {name}", call)

    return way("on load", True), way("before", False)


def flash(case: Case) -> tuple[Way, ...]:
    """Every FlashAttention that runs here, behind our rotation."""
    qkv, cu_seqlens, longest = case.args
    if packages.choose(qkv, cu_seqlens, longest, **case.kwargs) is None:
        return ()
    function = import_module("modernbert_kernels.flash")._Flash

    def way(name: str) -> Way:
        def call(qkv: Tensor, cu_seqlens: Tensor, longest: int, *, rope: Any, window: int | None) -> Tensor:
            return function.apply(qkv, cu_seqlens, None, *rope, longest, window, name)

        return Way(f"flash: {name}", call, "rotated before")

    return tuple(map(way, packages.usable(qkv.device)))


class _Cudnn(torch.autograd.Function):
    """PyTorch's packed cuDNN attention, which has no public name: q, k and v `[T, H, K]` of texts side by side."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:  # pyright: ignore
        bounds = (cu_seqlens, cu_seqlens, longest, longest)
        found = torch.ops.aten._cudnn_attention_forward(q, k, v, None, *bounds, True, 0.0, False, False)
        out, lse, seed, offset = found[0], found[1], found[6], found[7]
        ctx.save_for_backward(q, k, v, out, lse, seed, offset, cu_seqlens)
        ctx.longest = longest
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore
        *saved, cu_seqlens = ctx.saved_tensors
        bounds = (cu_seqlens, cu_seqlens, ctx.longest, ctx.longest)
        # No bias is an undefined tensor here, which None stands for.
        gradients = torch.ops.aten._cudnn_attention_backward(dout, *saved, None, *bounds, 0.0, False)
        return *gradients, None, None


def cudnn(case: Case) -> tuple[Way, ...]:
    """cuDNN's attention over packed texts, for layers without a window."""
    qkv = case.args[0]
    if not qkv.is_cuda or qkv.element_size() != 2 or case.kwargs["window"] is not None:
        return ()

    def call(qkv: Tensor, cu_seqlens: Tensor, longest: int, *, rope: Any, window: int | None) -> Tensor:
        return _Cudnn.apply(*ops.rotary(qkv, *rope).unbind(1), cu_seqlens, longest)

    return (Way("cuDNN, packed", call, "rotated before"),)


def flex(case: Case, count: int) -> tuple[Way, ...]:
    """FlexAttention under torch.compile over texts of one length; a window is a mask by blocks."""
    qkv, _, length = case.args
    if not qkv.is_cuda:
        return ()
    package, window = import_module("torch.nn.attention.flex_attention"), case.kwargs["window"]
    torch._dynamo.reset()
    attend = torch.compile(package.flex_attention, dynamic=False)
    near = lambda batch, head, query, key: (query - key).abs() <= window  # noqa: E731
    blocks = None if window is None else package.create_block_mask(near, None, None, length, length, qkv.device)

    def call(qkv: Tensor, cu_seqlens: Tensor, longest: int, *, rope: Any, window: int | None) -> Tensor:
        q, k, v = ops.rotary(qkv, *rope).unflatten(0, (count, length)).permute(2, 0, 3, 1, 4)
        return attend(q, k, v, block_mask=blocks).transpose(1, 2).flatten(0, 1)

    return (Way("FlexAttention", call, "rotated before, torch.compile"),)


def sdpa(case: Case, count: int) -> tuple[Way, ...]:
    """PyTorch's attention over texts of one length, which need no padding; a window is a mask of all pairs."""
    qkv, _, length = case.args
    place = torch.arange(length, device=qkv.device)
    window = case.kwargs["window"]
    mask = None if window is None else (place[:, None] - place).abs() <= window

    def call(qkv: Tensor, cu_seqlens: Tensor, longest: int, *, rope: Any, window: int | None) -> Tensor:
        q, k, v = ops.rotary(qkv, *rope).unflatten(0, (count, length)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(0, 1)

    def with_cudnn(*args: Any, **kwargs: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return call(*args, **kwargs)

    ways = (Way("sdpa", call, "rotated before, as PyTorch chooses"),)
    if mask is None and qkv.is_cuda:
        ways += (Way("sdpa, cuDNN", with_cudnn, "rotated before"),)
    return ways


def in_float32(queries: int, documents: int) -> Callable[..., Tensor]:
    """`maxsim` of sides that are all of one length, in one product in place of a loop over pairs."""
    return products(queries, documents, torch.float32)


def products(queries: int, documents: int, dtype: torch.dtype) -> Callable[..., Tensor]:
    def call(q: Tensor, cu_queries: Tensor, d: Tensor, cu_documents: Tensor) -> Tensor:
        q, d = q.to(dtype).unflatten(0, (queries, -1)), d.to(dtype).unflatten(0, (documents, -1))
        return torch.einsum("ase,bte->abst", q, d).max(dim=-1).values.float().sum(dim=-1)

    return call


def maxsims(queries: int, documents: int) -> tuple[Way, ...]:
    """Of sides that are all of one length: late-interaction-kernels, packed and padded, and plain products."""
    ways = [
        Way("einsum, max and sum", products(queries, documents, torch.bfloat16), "padded"),
        Way("einsum, max and sum in float32", in_float32(queries, documents), "padded"),
    ]
    if find_spec("late_interaction_kernels") and find_spec("triton"):
        package = import_module("late_interaction_kernels")

        def packed(q: Tensor, cu_queries: Tensor, d: Tensor, cu_documents: Tensor) -> Tensor:
            longest = len(q) // queries, len(d) // documents
            return package.maxsim_varlen(q, d, cu_queries, cu_documents, *longest)

        def padded(q: Tensor, cu_queries: Tensor, d: Tensor, cu_documents: Tensor) -> Tensor:
            return package.maxsim(q.unflatten(0, (queries, -1)), d.unflatten(0, (documents, -1)))

        ways += [Way("late-interaction-kernels, packed", packed), Way("late-interaction-kernels, padded", padded)]
    return (*ways, *flash_maxsims(queries, documents))


def flash_maxsims(queries: int, documents: int) -> tuple[Way, ...]:
    """flash-maxsim, which computes in float16 whatever it gets: its batch, and for one query its packed documents."""
    if not (find_spec("flash_maxsim") and find_spec("triton")):
        return ()
    package = import_module("flash_maxsim")

    def padded(q: Tensor, cu_queries: Tensor, d: Tensor, cu_documents: Tensor) -> Tensor:
        q, d = q.unflatten(0, (queries, -1)), d.unflatten(0, (documents, -1))
        wanted = torch.is_grad_enabled() and q.requires_grad
        return package.flash_maxsim_batched_train(q, d) if wanted else package.flash_maxsim_batched(q, d)

    def packed(q: Tensor, cu_queries: Tensor, d: Tensor, cu_documents: Tensor) -> Tensor:
        return package.flash_maxsim_packed(q, d, cu_documents, len(d) // documents)[None]

    ways = (Way("flash-maxsim, padded", padded, "in float16"),)
    return (*ways, Way("flash-maxsim, packed", packed, "in float16, no gradient")) if queries == 1 else ways
