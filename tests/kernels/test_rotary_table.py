"""The tables of the rotary embedding: those of the formula, as accurate as the reference at every position."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch
from accuracy import assert_accurate
from kernel_calls import DEVICE, FLOAT32, FLOAT64, INTERPRETED, fast, place
from torch import Tensor

import modernbert_kernels as ops


def truth(positions_T: Tensor, theta: float, head_dim: int) -> tuple[Tensor, Tensor]:
    frequency_R = theta ** -(torch.arange(0, head_dim, 2, dtype=FLOAT64) / head_dim)
    angle_TR = positions_T.to(FLOAT64)[:, None] * frequency_R
    return angle_TR.cos(), angle_TR.sin()


def test_the_first_frequency_is_one_and_the_next_are_powers() -> None:
    cos, sin = ops.rotary_table.reference(torch.arange(4), 10_000.0, 4)
    torch.testing.assert_close(cos[:, 0], torch.tensor([0.0, 1.0, 2.0, 3.0]).cos())
    torch.testing.assert_close(sin[:, 1], torch.tensor([0.0, 0.01, 0.02, 0.03]).sin())


@pytest.mark.parametrize("backend", [*fast(ops.rotary_table), "reference"])
@pytest.mark.parametrize(
    "positions", [[], [0], [7, 0, 1], [*range(70), *range(8100, 8192)], [32_767, 32_768, 0, 20_000]], ids=len
)
@pytest.mark.parametrize(("theta", "head_dim"), [(10_000.0, 64), (160_000.0, 64), (1e6, 128), (1e4, 12), (1.0, 2)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_rotary_table_backend(
    backend: str, positions: list[int], theta: float, head_dim: int, dtype: torch.dtype
) -> None:
    positions_T = torch.tensor(positions, dtype=dtype)
    plain = ops.rotary_table.reference(positions_T, theta, head_dim)
    got = ops.rotary_table.backends[backend](positions_T.to(place(backend)), theta, head_dim)
    for name, mine, yardstick, exact in zip(
        ("cos", "sin"), got, plain, truth(positions_T, theta, head_dim), strict=True
    ):
        assert mine.dtype == FLOAT32
        assert_accurate(mine.cpu(), yardstick, exact, name)


@pytest.mark.parametrize("backend", fast(ops.rotary_table))
def test_rotary_table_backend_is_right_to_the_last_bits_far_out(backend: str) -> None:
    """Of the angles that the reference rounds to float32. All eighths of a turn come up, of both signs."""
    positions_T = torch.cat([torch.arange(-40, 64), torch.arange(32_700, 32_769)])
    got = ops.rotary_table.backends[backend](positions_T.to(DEVICE), 160_000.0, 64)
    frequency_R = 1.0 / 160_000.0 ** (torch.arange(0, 64, 2).float() / 64)
    angle_TR = (positions_T.float()[:, None] * frequency_R).double()
    for mine, exact in zip(got, (angle_TR.cos(), angle_TR.sin()), strict=True):
        assert (mine.cpu() - exact).abs().max() < 1.5 * torch.finfo(FLOAT32).eps


@pytest.mark.parametrize("backend", fast(ops.rotary_table))
def test_rotary_table_backend_reads_views_and_is_compiled(backend: str) -> None:
    positions_T = (torch.arange(20) % 7).to(DEVICE)
    op = ops.rotary_table.backends[backend]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: op(x[::2] + 1, 10_000.0, 32), fullgraph=True, backend="aot_eager")
    plain = op((positions_T[::2] + 1).contiguous(), 10_000.0, 32)
    for run in (compiled(positions_T), op(torch.stack([positions_T + 1, positions_T], 1)[::2, 0], 10_000.0, 32)):
        assert all(torch.equal(mine, wanted) for mine, wanted in zip(run, plain, strict=True))


@pytest.mark.skipif("triton" not in ops.rotary_table.backends, reason="needs Triton")
def test_other_dtypes_of_positions_are_left_to_the_reference() -> None:
    ((_, when, _),) = ops.rotary_table._choices
    positions = torch.arange(3)
    assert not when(positions, 10_000.0, 64)  # on a CPU
    gpu = mock.Mock(is_cuda=True, dtype=torch.int64, device=positions.device)
    gpu.dim.return_value = 1
    assert when(gpu, 10_000.0, 64)
    gpu.dtype = torch.float32
    assert not when(gpu, 10_000.0, 64)


@pytest.mark.skipif(INTERPRETED or "triton" not in ops.rotary_table.backends, reason="needs Triton's compiler")
def test_no_approximation_of_the_hardware_is_compiled_and_constants_keep_their_digits() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from modernbert_kernels.fused.rotary_table import rotary_table_kernel

    step = -0.5402410118609203
    signature = {"positions": "*i64", "cos": "*fp32", "sin": "*fp32", "T": "i32"}
    constants = {"STEP": step, "R": 32, "ROWS": 32, "COLUMNS": 32}
    source = ASTSource(rotary_table_kernel.jit, signature | dict.fromkeys(constants, "constexpr"), constants)
    ptx = compile(source, target=GPUTarget("cuda", 89, 32)).asm["ptx"]
    assert not re.findall(r"(?:sin|cos|ex2)\.approx", ptx)
    digits = {torch.tensor(int(bits, 16) - (int(bits, 16) >> 63 << 64)).view(FLOAT64).item()
              for bits in re.findall("0d([0-9A-F]{16})", ptx)}  # fmt: skip
    assert {step, 2 / torch.pi, -torch.pi / 2} <= digits
