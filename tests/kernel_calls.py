"""Shared by the tests of the kernels: the backends that run here, and how they are called."""

from __future__ import annotations

import os
from itertools import accumulate
from typing import Any

import pytest
import torch
from accuracy import assert_as_accurate, results
from torch import Tensor

import modernbert_kernels as ops

FLOAT16, FLOAT32, BFLOAT16, FLOAT64 = torch.float16, torch.float32, torch.bfloat16, torch.float64
DTYPES = [FLOAT32, BFLOAT16, FLOAT64]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
TRITON = pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu
"""Triton's kernels run on a GPU, or in a process of its interpreter (`make test` starts one)."""


def fast(op: ops.Op) -> list[Any]:
    """The backends of an op but its reference, as parameters of a test."""
    marks = {"triton": [TRITON], "flash": [pytest.mark.gpu]}
    return [pytest.param(name, marks=marks.get(name, [])) for name in op.backends if name != "reference"]


def implementations(op: ops.Op) -> list[Any]:
    """Every backend but the reference, with every dtype that it takes, as parameters of a test."""
    pairs = [(name, dtype) for name in op.backends if name not in ("reference", "triton", "flash") for dtype in DTYPES]
    if "triton" in op.backends:
        pairs += [pytest.param("triton", dtype, marks=TRITON) for dtype in (FLOAT32, BFLOAT16, FLOAT16)]
    return pairs


def place(backend: str) -> str:
    """The device that a backend is tested on."""
    return DEVICE if backend in ("triton", "flash") else "cpu"


def check(op: ops.Op, backend: str, *args: Any, **kwargs: Any) -> None:
    """Values and gradients of a backend, as accurate as the reference (see `accuracy.py`)."""
    assert_as_accurate(op.backends[backend], op.reference, *args, device=place(backend), **kwargs)


def randn(*shape: int, dtype: torch.dtype = FLOAT32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).to(dtype)


def cu(lengths: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=dtype)


def rope(lengths: list[int], head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    positions = torch.cat([torch.arange(n) for n in lengths]).float()
    angle = positions[:, None] / theta ** (torch.arange(0, head_dim, 2) / head_dim)
    return angle.cos(), angle.sin()


def assert_equal_in_float64(reference: Any, definition: Any, *args: Any, **kwargs: Any) -> None:
    """Two ways of writing one formula: outputs and gradients agree to float64's rounding."""
    got, wanted = (results(op, args, kwargs, FLOAT64) for op in (reference, definition))
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
