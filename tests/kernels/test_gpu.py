"""Tests that need a GPU: races, addresses beyond 32 bits, long documents, the same bits twice."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from accuracy import assert_accurate
from kernel_calls import BFLOAT16, FLOAT32, cu, rope
from torch import Tensor

import modernbert_kernels as ops

pytestmark = pytest.mark.gpu

MILLION = 1 << 20


def attend(qkv: Tensor, lengths: list[int], window: int | None, backend: str) -> Tensor:
    cos, sin = (table.cuda() for table in rope(lengths, qkv.shape[-1]))
    offsets = cu(lengths).cuda()
    return ops.attention.backends[backend](qkv, offsets, max(lengths), rope=(cos, sin), window=window)


@pytest.mark.parametrize("window", [None, 64])
def test_documents_of_8192_tokens(window: int | None) -> None:
    """Against the reference in float32 on the same numbers, within twice its own error in bfloat16, and every row."""
    lengths = [8192, 1, 3000]
    qkv = torch.randn(sum(lengths), 3, 2, 64, device="cuda", dtype=BFLOAT16, requires_grad=True)
    cotangent = torch.randn(sum(lengths), 2, 64, device="cuda", dtype=BFLOAT16)

    def run(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        out = attend(x, lengths, window, backend)
        return out, torch.autograd.grad(out, x, cotangent.to(out.dtype))[0]

    truth = run(qkv.detach().float().requires_grad_(), "reference")
    plain, got = run(qkv, "reference"), run(qkv, "triton")
    for value, yardstick, exact in zip(got, plain, truth, strict=True):
        assert_accurate(value.detach(), yardstick.detach(), exact.detach().double())


@pytest.mark.parametrize("window", [None, 64])
def test_attention_over_a_million_tokens(window: int | None) -> None:
    """More than 2 ** 31 numbers: the last sequences give what they give alone."""
    length, last = 256, 8 * 256
    lengths = [length] * (MILLION // length)
    qkv = torch.randn(MILLION, 3, 12, 64, device="cuda", dtype=BFLOAT16, requires_grad=True)
    alone = qkv.detach()[-last:].clone().requires_grad_()
    out, expected = attend(qkv, lengths, window, "triton"), attend(alone, lengths[:8], window, "triton")
    assert torch.equal(out[-last:], expected)
    out[-last:].float().sum().backward()
    expected.float().sum().backward()
    assert qkv.grad is not None
    assert alone.grad is not None
    assert torch.equal(qkv.grad[-last:], alone.grad)
    assert not qkv.grad[:-last].any()


def test_rows_beyond_32_bits() -> None:
    """GeGLU of a million rows of ModernBERT-large: 5.5 billion numbers."""
    h = torch.randn(MILLION, 2 * 2624, device="cuda", dtype=BFLOAT16)
    assert torch.equal(ops.geglu.backends["triton"](h)[-5:], ops.geglu.backends["triton"](h[-5:]))


RUNS: dict[str, Callable[[Tensor], Tensor]] = {
    "local attention": lambda x: attend(x.view(-1, 3, 4, 64), [700, 30, 294], 64, "triton"),
    "global attention": lambda x: attend(x.view(-1, 3, 4, 64), [700, 30, 294], None, "triton"),
    "add and norm": lambda x: ops.add_layer_norm.backends["triton"](x, x * 2, x[0].detach(), None, 1e-5)[1],
    "geglu": lambda x: ops.geglu.backends["triton"](x),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_same_bits_twice(name: str) -> None:
    x = torch.randn(1024, 768, device="cuda", dtype=FLOAT32, requires_grad=True)

    def run() -> tuple[Tensor, Tensor]:
        out = RUNS[name](x)
        return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_nothing_is_read_out_of_bounds_or_in_a_race(tool: str) -> None:
    """NVIDIA's compute-sanitizer over the small tests of every kernel."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer of the CUDA toolkit")
    tests = ["tests/kernels", "-m", "gpu", "-k", "triton and (zero or 63 or edges) and not compile", "-x", "-q"]
    command = [sanitizer, "--tool", tool, "--error-exitcode", "99", sys.executable, "-m", "pytest", *tests]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
