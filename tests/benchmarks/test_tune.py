"""`benchmarks.tune` writes the fastest tile that is right and clearly faster, and no other, as ruff formats it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton, which has no wheel for this platform")

from benchmarks import tune
from benchmarks.cases import Case
from benchmarks.clock import Machine, Reading
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

        def cases(device: str, tokens: int) -> Iterator[Case]:
            for name in "ab":
                yield Case(op, name, (torch.randn(tokens),))

        return Subject(KEY, "doubling_kernel", False, tuple(self.seconds), cases)

    def read(self, work: Any) -> Reading:
        before = self.passed
        work()
        return Reading(max(self.passed - before, 1e-6), 0.0)

    def tune(self) -> tune.Outcome:
        tiles = [Tile(*one) for one in self.seconds if one != PRESENT]
        return tune.tune(self.subject(), tiles, Machine(CPU, self.read, 0.0, 3), tokens=4, rounds=2, duel=3)


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


def test_a_tile_that_was_lucky_once_has_to_win_again() -> None:
    bench = Bench({PRESENT: 0.02, FAST: 0.01})
    compared = tune.compared

    def lucky_once(*args: Any) -> Any:
        found = compared(*args)
        bench.seconds[FAST] = 0.02
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune, "compared", lucky_once)
        assert bench.tune().best == Tile(*PRESENT)


def test_where_the_present_tile_is_wrong_nothing_is_compared() -> None:
    bench = Bench({PRESENT: 0.02, FAST: 0.01})
    TILES[KEY][80] = Tile(*WRONG)
    bench.seconds[WRONG] = 0.02
    outcome = bench.tune()
    assert outcome.best == outcome.present == Tile(*WRONG)
    assert "the present tile 32 x 8, 4 warps, 1 stages differs from the reference" in tune.summary(outcome, 2)


def test_a_backward_pass_runs_with_the_candidate_too() -> None:
    """Autograd calls it after the call has returned."""
    from benchmarks.ops import Way, call_of

    seen = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore
            seen.append(tile_for(CPU, *KEY)[:4])
            return 2 * grad

    way = Way("w", Double.apply, around=lambda: tune.using(KEY, 80, Tile(*FAST)))
    call_of(way, (torch.randn(3, requires_grad=True),), {}, True)()
    assert seen == [FAST]


def test_the_committed_file_is_what_would_be_written() -> None:
    text = tune.FILE.read_text("utf-8")
    assert tune.with_table(text, {key: entries for key, entries in TILES.items() if key != KEY}) == text


def test_an_outcome_is_written_for_its_architecture_alone() -> None:
    outcome = tune.Outcome(KEY, Tile(*PRESENT), Tile(*FAST), 1.5, {})
    table = tune.with_outcome(TILES, outcome, 90, "NVIDIA H200")
    assert table[KEY] == {80: Tile(*PRESENT), 90: Tile(*FAST, "NVIDIA H200")}
    text = tune.with_table(tune.FILE.read_text("utf-8"), table)
    assert '90: Tile(16, 8, 4, 1, "NVIDIA H200")' in text


def test_ruff_likes_what_is_written(tmp_path: Path) -> None:
    ruff = shutil.which("ruff") or str(Path(sys.executable).with_name("ruff"))
    if not Path(ruff).exists():
        pytest.skip("needs ruff")
    file = tmp_path / "tiles.py"
    table = TILES | {("one",): {80: Tile(1, 2, 3, 4, "a GPU")}}
    file.write_text(tune.with_table(tune.FILE.read_text("utf-8"), table), "utf-8")
    done = subprocess.run([ruff, "format", "--check", "--line-length", "120", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_entry_can_be_tuned_and_has_its_present_tile_among_the_candidates() -> None:
    assert {subject.key for subject in SUBJECTS} == TILES.keys() - {KEY}
    for subject in SUBJECTS:
        for arch, entry in TILES[subject.key].items():
            # Small tiles of wide heads in float32 are found by hand.
            assert entry[:4] in subject.candidates or subject.key[1:] == (128, 4), (subject.key, arch)


def test_what_spills_or_does_not_fit_is_no_candidate() -> None:
    subject = next(at for at, one in enumerate(SUBJECTS) if one.key == ("geglu forward",))
    assert tune.fits(subject, 89, Tile(2048, 512, 4, 3))
    assert not tune.fits(subject, 89, Tile(4096, 512, 1, 3)), "256 numbers for each thread"


def test_quick_tries_one_entry_of_each_op_and_the_time_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def pretended(subject: Subject, tiles: Any, machine: Any, **more: int) -> tune.Outcome:
        called.append((subject.key[0], len(tiles), more["tokens"]))
        return tune.Outcome(subject.key, tiles[0], tiles[0], 1.0, {})

    monkeypatch.setattr(tune, "tune", pretended)
    monkeypatch.setattr(tune, "compiling_candidates", lambda subject, arch: [Tile(*PRESENT)] * 3)
    machine = Machine(CPU, Bench({}).read, 0.0, 3)
    list(tune.run(machine, [], quick=True))
    assert sorted(called) == [
        ("attention forward", 1, tune.FEW),
        ("geglu forward", 1, tune.FEW),
        ("maxsim", 1, tune.FEW),
    ]
    called.clear()
    list(tune.run(machine, ["geglu"], quick=False))
    assert called == [("geglu forward", 3, tune.TOKENS), ("geglu backward", 3, tune.TOKENS)]
    monkeypatch.setattr(tune, "MINUTES", -1)
    assert list(tune.run(machine, [], quick=False)) == []


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["tune"])
    with pytest.raises(SystemExit, match="there is no GPU here"):
        tune.main()
    monkeypatch.setattr(sys, "argv", ["tune", "--quick", "--write"])
    monkeypatch.setattr(tune, "interpreted", lambda: True)
    with pytest.raises(SystemExit, match="--write takes what a GPU measured"):
        tune.main()
