"""The one tolerance of this project, derived and never tuned: twice the error of the same maths in the same dtype.

A result is accurate if its error against float64 is at most twice the error of the plain computation in the
same dtype, plus one rounding step of the truth. Errors and step are root mean squares over the tensor: the
largest errors of two equally good computations easily differ by a factor of three, their root mean squares by
a few percent. The same holds for its worst row (`benchmarks/gate.py`), which a whole tensor hides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from benchmarks.gate import worst_row


def assert_accurate(got: Tensor, plain: Tensor, truth: Tensor, name: str = "result") -> None:
    """`got` against `truth` (float64), no worse than twice `plain` (the same maths in the dtype of `got`)."""
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)} instead of {tuple(truth.shape)}"
    assert got.dtype == plain.dtype, f"{name}: {got.dtype} instead of {plain.dtype}"
    if truth.numel() == 0:
        return
    infinite, eps = truth.isinf(), torch.finfo(got.dtype).eps
    for x in (got, plain):
        assert torch.equal(x[infinite].double(), truth[infinite]), f"{name}: infinities differ"
    got, plain, truth = (x.double().masked_fill(infinite, 0) for x in (got, plain, truth))
    got_error, plain_error, size = (x.square().mean().sqrt().item() for x in (got - truth, plain - truth, truth))
    allowed = 2 * plain_error + eps * size
    worst = worst_row(got, plain, truth, eps)
    # Written so that a NaN fails.
    assert got_error <= allowed, (
        f"{name}: off by {got_error:.2e}, allowed {allowed:.2e} (plain {plain_error:.2e}); {worst}"
    )
    assert worst.is_right, f"{name}: {worst}"


def assert_as_accurate(
    fast: Callable[..., Any],
    reference: Callable[..., Any],
    *args: Any,
    gradients: bool = True,
    device: str = "cpu",
    plain: Callable[..., Any] | None = None,
    **kwargs: Any,
) -> None:
    """Every output and every gradient of `fast` is as accurate as `reference` in the dtype of the arguments.

    The truth is `reference` on the same numbers in float64. For float64 arguments there is not a better truth:
    their plain error is that of float32, scaled by the ratio of the two rounding steps. Arguments must stay
    unchanged; keyword arguments keep their dtype. `fast` runs on `device`, the reference on the CPU. Where `fast`
    computes by another formula than the reference, `plain` is that formula in PyTorch, whose error is the yardstick.
    """
    dtype = next(x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point())
    got = results(fast, args, kwargs, dtype, gradients, device)
    truth = results(reference, args, kwargs, torch.float64, gradients)
    dtype_of_plain = torch.float32 if dtype is torch.float64 else dtype
    yardsticks = results(plain or reference, args, kwargs, dtype_of_plain, gradients)
    assert got.keys() == truth.keys()
    for name, value in got.items():
        yardstick = yardsticks[name]
        if dtype is torch.float64:
            ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            finite = truth[name].isfinite()
            error = torch.where(finite, yardstick.double() - truth[name], 0)
            yardstick = truth[name] + ratio * error
        assert_accurate(value, yardstick, truth[name], name)


def results(
    op: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    dtype: torch.dtype,
    gradients: bool = True,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Outputs of `op` in `dtype`, and gradients of its float arguments by a fixed cotangent, all on the CPU."""
    args, kwargs = tree_map_only(Tensor, lambda x: x.to(device), (args, kwargs))
    leaves = [
        x.detach().to(dtype, copy=True).requires_grad_(gradients)
        if isinstance(x, Tensor) and x.is_floating_point()
        else x
        for x in args
    ]
    before = [x.clone() for x in _tensors([leaves, kwargs])]
    outputs = op(*leaves, **kwargs)
    for x, copy in zip(_tensors([leaves, kwargs]), before, strict=True):
        assert torch.equal(x, copy), "the call changed an argument"
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {f"output {i}": output.detach().cpu() for i, output in enumerate(outputs)}
    if gradients:
        generator = torch.Generator().manual_seed(1)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for output in outputs:
            # In bfloat16, so that every dtype sees the same numbers.
            cotangent = torch.randn(output.shape, generator=generator).bfloat16().to(device)
            loss = loss + (output * cotangent.to(output.dtype)).masked_fill(output.isinf(), 0).double().sum()
        wanted = {i: x for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad}
        grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
        for i, grad in zip(wanted, grads, strict=True):
            found[f"gradient of argument {i}"] = torch.zeros_like(wanted[i]).cpu() if grad is None else grad.cpu()
    return found


def _tensors(values: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = list(values.values())
    return [x for value in values for x in _tensors(value)] if isinstance(values, list | tuple) else []
