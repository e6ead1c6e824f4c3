"""Tiles other than those of the table give the same results: `benchmarks.tune` tries them on the real kernels."""

from __future__ import annotations

import pytest
import torch
from kernel_calls import TRITON

pytest.importorskip("triton", reason="needs Triton, which has no wheel for this platform")

from benchmarks import clock, tune
from benchmarks.clock import Machine, Reading


@TRITON
@pytest.mark.parametrize("op", ["attention", "maxsim", "geglu"])
def test_another_tile_is_right(op: str) -> None:
    machine = clock.this_machine()
    if not machine.is_gpu:
        # Calls of the interpreter take so long that they would not be timed.
        machine = Machine(torch.device("cpu"), lambda work: (work(), Reading(1e-3, 0.0))[1], 0.0, 3)
    ((outcome, tried),) = tune.run(machine, [op], quick=True)
    assert tried == 1
    assert not outcome.refused, outcome.refused
