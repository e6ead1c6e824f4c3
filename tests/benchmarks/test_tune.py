"""`benchmarks.tune` writes the fastest tile that is right and clearly faster, and no other, as ruff formats it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton, which has no wheel for this platform")

from benchmarks import tune
from benchmarks.clock import Machine, Reading
from benchmarks.ops import Task
from benchmarks.tune import SUBJECTS, Subject
from modernbert_kernels import Op
from modernbert_kernels.fused.tiles import TILES, Tile, tile_for

CPU = torch.device("cpu")
KEY = ("doubling", 7)
PRESENT, FAST, WRONG, RAISES = (8, 8, 4, 1), (16, 8, 4, 1), (32, 8, 4, 1), (64, 8, 4, 1)


@dataclass
class Bench:
    """An op whose kernel takes as long as a table says of its tile, and the clock that reads it."""

    seconds: dict[tuple[int, ...], float]
    passed: float = 0.0
    taken: list[tuple[int, ...]] = field(default_factory=list)

    def subject(self) -> Subject:
        def doubling(x: Tensor) -> Tensor:
            return 2 * x

        op = Op(doubling)

        @op.register("triton", when=lambda x: True)
        def kernel(x: Tensor) -> Tensor:
            tile = tile_for(CPU, *KEY)[:4]
            self.taken.append(tile)
            self.passed += self.seconds[tile]
            if tile == RAISES:
                raise RuntimeError("out of shared memory")
            return 2 * x + (tile == WRONG)

        def tasks(device: str, tokens: int) -> Iterator[Task]:
            for name in "ab":
                yield Task(name, op, (torch.randn(tokens),))

        return Subject(KEY, "doubling_kernel", False, tuple(self.seconds), tasks)

    def read(self, work: Any) -> Reading:
        before = self.passed
        work()
        return Reading(max(self.passed - before, 1e-6), 0.0)

    def tune(self) -> tune.Outcome:
        tiles = [Tile(*one) for one in self.seconds if one != PRESENT]
        return tune.tune(self.subject(), tiles, Machine(CPU, self.read, 0.0), tokens=4, rounds=2, duel=3)


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TILES, KEY, {80: Tile(*PRESENT)})


def test_the_fastest_right_tile_wins_and_the_table_is_as_before() -> None:
    bench = Bench({PRESENT: 0.02, FAST: 0.01, WRONG: 0.001, RAISES: 0.001, (8, 8, 8, 1): 0.015})
    outcome = bench.tune()
    assert outcome.best == Tile(*FAST)
    assert outcome.factor == pytest.approx(2)
    assert {name.split()[0]: reason.split()[0] for name, reason in outcome.refused.items()} == {
        "32": "differs",
        "64": "fails:",
    }
    assert bench.taken.count(WRONG) == 1  # checked in the first case, and never again
    assert TILES[KEY] == {80: Tile(*PRESENT)}
    assert "16 x 8, 4 warps, 1 stages is 2.000 times as fast as 8 x 8" in tune.summary(outcome, 4)


@pytest.mark.parametrize(("rival", "wins"), [(0.0199, False), (0.0197, False), (0.0195, True), (0.03, False)])
def test_within_noise_the_present_tile_stays(rival: float, wins: bool) -> None:
    outcome = Bench({PRESENT: 0.02, FAST: rival}).tune()
    assert (outcome.best == Tile(*FAST)) is wins
    assert (outcome.factor > 1) is wins
    assert ("stays" in tune.summary(outcome, 1)) is not wins


def test_an_outcome_is_an_entry_for_its_architecture_alone() -> None:
    outcome = tune.Outcome(KEY, Tile(*PRESENT), Tile(*FAST), 1.5, {})
    table = tune.with_outcome(TILES, outcome, 90, "NVIDIA H200")
    # The next architecture keeps its tile.
    assert table[KEY] == {80: Tile(*PRESENT), 90: Tile(*FAST, "NVIDIA H200"), 100: Tile(*PRESENT)}
    key, entries = next(iter(eval(f"{{{tune.entry(KEY, table[KEY])}}}", {"Tile": Tile}).items()))
    assert (key, entries) == (KEY, table[KEY])


def test_the_table_is_written_into_its_file(tmp_path: Path) -> None:
    file = tmp_path / "tiles.py"
    file.write_text(tune.TILES_FILE.read_text("utf-8"), encoding="utf-8")
    table = tune.with_outcome(TILES, tune.Outcome(KEY, Tile(*PRESENT), Tile(*FAST), 1.5, {}), 90, "NVIDIA H200")
    for wanted in (table, TILES):  # a written table can be written again
        tune.write(wanted, file)
        found: dict[str, Any] = {
            "__name__": "modernbert_kernels.fused.written",
            "__package__": "modernbert_kernels.fused",
        }
        exec(compile(file.read_text("utf-8"), file, "exec"), found)
        assert {key: {arch: tuple(one) for arch, one in of.items()} for key, of in found["TILES"].items()} == wanted


def test_what_spills_or_fails_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch is replaced by what Triton knows of the compiled kernel."""
    from triton.runtime import jit

    subject = next(at for at, one in enumerate(SUBJECTS) if one.key == ("geglu backward",))
    spills = {"geglu_forward_kernel": 4, "geglu_backward_kernel": 0}

    def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        if kernel.__name__ not in spills:
            raise RuntimeError("out of shared memory")
        return SimpleNamespace(metadata=SimpleNamespace(name=kernel.__name__), n_spills=spills[kernel.__name__])

    monkeypatch.setattr(jit.JITFunction, "run", run)
    fits = partial(tune.fits, subject, "cpu", Tile(2048, 512, 4, 3))
    assert fits(), "another kernel of the call may spill"
    spills["geglu_backward_kernel"] = 8
    assert not fits()
    del spills["geglu_backward_kernel"]
    assert not fits()
