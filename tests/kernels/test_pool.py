"""Pooling: the formula, ties, empty sequences, and every backend."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from kernel_calls import DEVICE, FLOAT32, TRITON, assert_equal_in_float64, check, cu, fast, implementations, randn
from torch import Tensor

import modernbert_kernels as ops

MODES = ("cls", "last", "mean", "max")
MIXES = {
    "no sequence": [],
    "one": [1],
    "empty": [0],
    "mix": [1, 2, 0, 31, 32, 33, 0, 65],
    "long": [300, 5],
}


def formula(x: Tensor, cu_seqlens: Tensor, mode: str, *, normalize: bool) -> Tensor:
    """By a weight of every token in every sequence; the largest number by sorting."""
    rows = []
    for start, end in pairwise(cu_seqlens.tolist()):
        weight = torch.zeros(len(x), dtype=x.dtype)
        if mode == "mean":
            weight[start:end] = 1 / max(1, end - start)
        elif end > start:
            weight[start if mode == "cls" else end - 1] = 1
        largest = mode == "max" and end > start
        row = x[start:end].sort(dim=0).values[-1] if largest else weight @ x
        rows.append(row / row.square().sum().sqrt().clamp_min(1e-12) if normalize and end > start else row)
    return torch.stack(rows)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_reference_is_the_formula(mode: str, normalize: bool) -> None:
    options = {"normalize": normalize}
    assert_equal_in_float64(ops.pool.reference, formula, randn(20, 24), cu([3, 1, 0, 16]), mode, **options)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("backend", "dtype"), implementations(ops.pool))
def test_backend(backend: str, dtype: torch.dtype, mode: str, normalize: bool, mix: str) -> None:
    lengths = MIXES[mix]
    x, offsets = randn(sum(lengths), 40 if mix == "mix" else 130, dtype=dtype), cu(lengths)
    check(ops.pool, backend, x, offsets, mode, normalize=normalize, gradients=bool(lengths and sum(lengths)))


@pytest.mark.parametrize("backend", fast(ops.pool))
def test_max_gives_ties_to_the_first(backend: str) -> None:
    """Inside of a block of rows, across blocks, and where all are the lowest that there is."""
    x = torch.zeros(70, 3, device=DEVICE)
    x[[4, 9, 40], 0] = 1
    x[[35, 69], 1] = 1
    x[:, 2] = float("-inf")
    x.requires_grad_()
    ops.pool.backends[backend](x, cu([70]).to(DEVICE), "max").sum().backward()
    assert x.grad is not None
    assert x.grad.nonzero().tolist() == [[0, 2], [4, 0], [35, 1]]


@pytest.mark.parametrize("backend", fast(ops.pool))
@pytest.mark.parametrize("mode", MODES)
def test_backend_takes_views_and_gives_the_same_bits_again(backend: str, mode: str) -> None:
    x, offsets, results = randn(90, 40).to(DEVICE), cu([40, 50], torch.int64).to(DEVICE), []
    for view in (x, x.T.contiguous().T):
        leaf = view.detach().requires_grad_()
        y = ops.pool.backends[backend](leaf, offsets, mode, normalize=True)
        results.append((y, *torch.autograd.grad(y.sum(), leaf)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mode", [pytest.param(mode, marks=TRITON) for mode in ("mean", "max")])
def test_operators(mode: str) -> None:
    """Their schemas and fake outputs are right."""
    x, offsets = randn(7, 24).to(DEVICE), cu([3, 4]).to(DEVICE)
    library = torch.ops.modernbert_kernels
    torch.library.opcheck(library.pool_forward.default, (x, offsets, mode, FLOAT32))
    pooled, places = library.pool_forward(x, offsets, mode, FLOAT32)
    torch.library.opcheck(library.pool_backward.default, (pooled, offsets, places, mode, 7, FLOAT32))


@TRITON
@pytest.mark.parametrize("mode", MODES)
def test_rows_after_the_last_sequence_have_no_gradient(mode: str) -> None:
    """The offsets behind the last one were read, and decided."""
    offsets = torch.tensor([0, 3, 8, 1000], dtype=torch.int32, device=DEVICE)[:3]
    leaf = randn(10, 5).to(DEVICE).requires_grad_()
    ops.pool.backends["triton"](leaf, offsets, mode).sum().backward()
    real = leaf.detach()[:8].cpu().requires_grad_()
    ops.pool.reference(real, cu([3, 5]), mode).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad[8:].eq(0).all()
    torch.testing.assert_close(leaf.grad[:8].cpu(), real.grad)
