"""Projection and normalisation: the formula, chosen rows, rows of no length, and every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_calls import DEVICE, FLOAT32, TRITON, assert_equal_in_float64, check, fast, implementations, randn
from torch import Tensor

import modernbert_kernels as ops


def arguments(tokens: int, width: int, bias: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    weight = randn(width, 40, dtype=dtype, scale=40**-0.5)
    return randn(tokens, 40, dtype=dtype), weight, randn(width, dtype=dtype) if bias else None


def formula(x: Tensor, weight: Tensor, bias: Tensor | None, rows_Q: Tensor | None = None) -> Tensor:
    y = x @ weight.T if bias is None else x @ weight.T + bias
    y = y / y.square().sum(-1, keepdim=True).sqrt()
    return y if rows_Q is None else y[rows_Q]


@pytest.mark.parametrize("rows", [None, [0, 3, 4, 62]])
@pytest.mark.parametrize("bias", [False, True])
def test_reference_is_the_formula(bias: bool, rows: list[int] | None) -> None:
    options = {} if rows is None else {"rows_Q": torch.tensor(rows)}
    assert_equal_in_float64(ops.project_normalize.reference, formula, *arguments(63, 48, bias, FLOAT32), **options)


@pytest.mark.parametrize(("tokens", "width", "bias"), [(0, 48, True), (1, 48, False), (63, 7, True), (65, 128, False)])
@pytest.mark.parametrize(("backend", "dtype"), implementations(ops.project_normalize))
def test_backend(backend: str, dtype: torch.dtype, tokens: int, width: int, bias: bool) -> None:
    check(ops.project_normalize, backend, *arguments(tokens, width, bias, dtype))


@pytest.mark.parametrize("rows", [[], [5], [0, 2, 3, 64], [7, 7, 1, 7]], ids=["none", "one", "some", "one twice"])
@pytest.mark.parametrize(("backend", "dtype"), implementations(ops.project_normalize))
def test_backend_of_chosen_rows(backend: str, dtype: torch.dtype, rows: list[int]) -> None:
    chosen = torch.tensor(rows, dtype=torch.int64)
    check(ops.project_normalize, backend, *arguments(65, 48, True, dtype), rows_Q=chosen)


@pytest.mark.parametrize("backend", fast(ops.project_normalize))
@pytest.mark.parametrize("size", [0.0, 1e-14])
def test_backend_of_a_row_shorter_than_the_shortest(backend: str, size: float) -> None:
    """It is divided by 1e-12, a constant, and so is its gradient."""
    x, weight, _ = arguments(3, 16, False, FLOAT32)
    x[1] *= size
    check(ops.project_normalize, backend, x, weight, None)


@pytest.mark.parametrize("backend", fast(ops.project_normalize))
def test_backend_takes_views_and_gives_the_same_bits_again(backend: str) -> None:
    x, weight, _ = (x if x is None else x.to(DEVICE) for x in arguments(50, 32, False, FLOAT32))
    rows, op = torch.arange(0, 50, 3, device=DEVICE), ops.project_normalize.backends[backend]
    views = x.T.contiguous().T, weight.repeat(1, 2)[:, :40]
    assert torch.equal(op(*views, None, rows.repeat(2)[: len(rows)]), op(x, weight, None, rows))
    grads = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        op(leaf, weight, None, rows).square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("rows", [None, [4, 0]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [pytest.param(name, marks=TRITON) for name in ("forward", "backward")])
def test_operators(step: str, dtype: torch.dtype, rows: list[int] | None) -> None:
    """Their schemas and fake outputs are right."""
    u = randn(5, 24).to(DEVICE)
    chosen = None if rows is None else torch.tensor(rows, device=DEVICE)
    last = dtype if step == "forward" else randn(5 if rows is None else 2, 24, dtype=dtype).to(DEVICE)
    torch.library.opcheck(getattr(torch.ops.modernbert_kernels, f"normalize_{step}").default, (u, chosen, last))
