"""Tiles other than those of the table give the same results: `benchmarks.tune` tries them on the real kernels."""

from __future__ import annotations

import pytest
import torch
from kernel_calls import TRITON

pytest.importorskip("triton", reason="needs Triton, which has no wheel for this platform")

from benchmarks import clock, tune
from benchmarks.clock import Machine, Reading
from modernbert_kernels.fused.tiles import Tile


def test_a_measured_tile_is_for_its_architecture_alone() -> None:
    """An entry serves newer architectures too, so the next one gets the tile that it had."""
    old, new = Tile(8, 8, 4, 1), Tile(16, 8, 4, 1)
    outcome = tune.Outcome(("kernel",), old, new, 1.5, {})
    table = tune.with_outcome({("kernel",): {80: old}}, outcome, 90, "a GPU")
    assert table["kernel",] == {80: old, 90: new._replace(measured="a GPU"), 100: old}
    table = tune.with_outcome({("kernel",): {80: old}}, outcome, 120, "a GPU")
    assert table["kernel",] == {80: old, 120: new._replace(measured="a GPU")}


@TRITON
@pytest.mark.parametrize("op", ["attention", "maxsim", "geglu"])
def test_another_tile_is_right(op: str) -> None:
    machine = clock.this_machine()
    if not machine.is_gpu:
        # Calls of the interpreter take so long that they would not be timed.
        machine = Machine(torch.device("cpu"), lambda work: (work(), Reading(1e-3, 0.0))[1], 0.0)
    ((outcome, tried),) = tune.run(machine, [op], quick=True)
    assert tried == 1
    assert not outcome.refused, outcome.refused
