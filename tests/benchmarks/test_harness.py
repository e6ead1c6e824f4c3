"""The method: turns, quiet samples, refusal of wrong answers, processes that fail, and the conditions in a row."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from local_worker import LocalWorker, pretend, where_from

from benchmarks import clock, harness, rows, worker
from benchmarks.clock import Reading, Refused, Sample
from benchmarks.harness import FOREIGN_LIMIT, Difference, Measured, Run, Table, difference, in_turns
from benchmarks.worker import BEFORE, OURS, SESSION, Job, Peer, Setup, State, Variant, Worker

RIGHT = torch.tensor([1.0, 2.0])
LENGTHS = (21, 3, 40, 1)
SETUP = Setup("", "float32", "cpu", 1, True)


def test_rounds_take_turns() -> None:
    log: list[str] = []
    taken, _ = in_turns({name: lambda name=name: log.append(name) for name in "ABC"}, 4)
    assert "".join(log) == "ABC" + "BCA" + "CAB" + "ABC"
    assert all(len(samples) == 4 for samples in taken.values())


def test_a_busy_sample_is_repeated_and_the_quietest_is_kept() -> None:
    script = iter([50.0, 9.0, 20.0, 1.0, 40.0, 30.0])
    taken, _ = in_turns({"a": lambda: Sample([1.0], next(script))}, 2, retries=4)
    # Three retries in the first round end with a quiet sample; the last one is left for the second.
    assert [one.foreign for one in taken["a"]] == [1.0, 30.0]
    limits = iter([FOREIGN_LIMIT + 0.1, FOREIGN_LIMIT, 0.0])
    assert in_turns({"a": lambda: Sample([1.0], next(limits))}, 1)[0]["a"][0].foreign == FOREIGN_LIMIT


def test_an_implementation_that_fails_leaves_and_the_others_go_on() -> None:
    def fail() -> None:
        raise Refused("its process ended")

    taken, refused = in_turns({"good": lambda: 1, "bad": fail}, 3)
    assert taken == {"good": [1, 1, 1]}
    assert refused == {"bad": "its process ended"}


def test_after_the_time_no_third_round_is_begun() -> None:
    assert in_turns({"a": lambda: 1}, 9, until=0.0)[0] == {"a": [1, 1]}


@pytest.mark.parametrize("bad", [RIGHT + torch.tensor([0.0, 0.5]), RIGHT * float("nan"), torch.ones(3)])
def test_wrong_outputs_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(Refused, match=r"differs from the reference by|returned shape"):
        difference(bad, RIGHT, None, absolute=True)


def test_what_is_allowed_depends_on_dtype_and_device() -> None:
    off = RIGHT + 0.9e-4
    assert difference(off, RIGHT, None, absolute=True).allowed == 1e-4
    assert difference(off, RIGHT, None, absolute=False).found == pytest.approx(harness.rms(off, RIGHT))
    with pytest.raises(Refused):
        difference(RIGHT + 1.1e-4, RIGHT, None, absolute=True)
    # Twice the error of the reference in the same dtype, and one rounding step.
    plain = RIGHT * 1.01
    assert difference(RIGHT * 1.025, RIGHT, plain, absolute=False).allowed == pytest.approx(0.02 + 2**-7, rel=1e-3)
    with pytest.raises(Refused):
        difference(RIGHT * 1.03, RIGHT, plain, absolute=False)


def test_foreign_cpu_is_what_is_neither_idle_nor_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    idle, own, wall = iter([10.0, 11.5]), iter([5.0, 5.9]), iter([0.0, 1.0])
    monkeypatch.setattr(clock, "_idle_seconds", lambda: next(idle))
    monkeypatch.setattr(clock.time, "process_time", lambda: next(own))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(clock.os, "cpu_count", lambda: 4)
    assert clock.read_clocks(lambda: None) == pytest.approx((1.0, 160.0))


def test_factors_compare_samples_of_one_round() -> None:
    mine = Measured("a", "", Difference(0, 1), costs=[1.0, 2.0, 4.0])
    other = Measured("b", "", Difference(0, 1), costs=[3.0, 4.0, 4.0])
    assert mine.times_better_than(other) == 2.0
    rough = Measured("rough", "", Difference(0, None), costs=[1.0, 1.0, 1.0], exact=False)
    made = mine.row([mine, other, rough], lambda cost: 1000 * cost, unit="ms")
    assert made["times_better_than"] == {"b": 2.0}, "an exact one is not compared with a rough one"
    assert rough.row([mine, other, rough], float)["times_better_than"] == {"a": 2.0, "b": 4.0}
    assert (made["median"], made["min"], made["max"], made["samples"]) == (2000.0, 1000.0, 4000.0, 3)


def table(**peers: Peer) -> Table:
    job = Job(LENGTHS, tuple(range(len(LENGTHS))))
    return Table("w", "what", "m", "float32", job, peers, Peer(pretend), model_pass=False, rounds=3)


@pytest.fixture
def here(tmp_path: Path) -> Run:
    (tmp_path / "m").mkdir()
    return Run("suite", tmp_path, quick=True)


def test_the_fastest_right_variant_is_measured_and_the_wrong_are_refused(
    here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "Worker", LocalWorker)
    found = {how: Peer(pretend, {"how": how}) for how in ("right", "wrong", "short", "nan", "fails", "cannot load")}
    found |= {
        "elsewhere": Peer(pretend, applies=lambda setup: setup.is_gpu),
        "not installed": Peer(pretend, package="no_such_package"),
        "inexact": Peer(pretend, {"how": "wrong"}, exact=False),
    }
    (result,) = harness.measure(here, [table(**found)])
    assert [one["implementation"] for one in result.rows] == ["right", "inexact"]
    right, inexact = result.rows
    assert right["settings"] == "fast"
    assert right["samples"] == 2
    assert (right["max_error"], right["tolerance"]) == (0.0, 1e-4)
    assert (inexact["max_error"], inexact["tolerance"]) == (1.0, None)
    assert right["lengths"] == {"sequences": 4, "tokens": 65, "longest": 40}
    assert right["min"] <= right["median"] <= 65 / 0.001
    reasons = {name.removeprefix("what: "): reason for name, reason in result.refused.items()}
    assert set(reasons) == {"wrong", "short", "nan", "fails", "cannot load", "not installed"}
    assert reasons["not installed"] == "no_such_package is not installed"
    assert reasons["cannot load"] == "fails: ImportError: no such kernel"


def test_without_a_reference_nothing_is_judged(here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "Worker", LocalWorker)
    made = harness.replace(table(right=Peer(pretend)), reference=Peer(pretend, {"how": "cannot load"}))
    (result,) = harness.measure(here, [made])
    assert not result.rows
    assert "cannot be judged" in result.refused["what: every implementation"]


def test_what_is_not_reached_is_said(here: Run) -> None:
    here.until, here.minutes = 0.0, 1.0
    (result,) = harness.measure(here, [table(right=Peer(pretend))])
    assert result.refused == {"the rest": "was not reached within 1 minutes: ask for it with --only w"}


def test_processes_answer_fail_die_and_hang_alone(tmp_path: Path) -> None:
    asked = partial(Worker.ask, request=worker.prepare, timeout=120, job=Job(LENGTHS, (0,)), window=0.0, seconds=0.0)
    right, dies, hangs = (Worker(SETUP, Peer(pretend, {"how": how}), tmp_path) for how in ("right", "dies", "hangs"))
    with pytest.raises(Refused, match="fails: RuntimeError: no job is prepared"):
        right.ask(worker.sample, timeout=120)
    told = asked(right)
    assert told["answer"].shape == (sum(LENGTHS),)
    sample = right.ask(worker.sample, timeout=60)
    assert len(sample.seconds) == told["calls"]
    assert min(sample.seconds) >= 0.001
    assert sample.foreign >= 0
    for _ in range(2):
        with pytest.raises(Refused, match="its process ended with exit code 3: a kernel has crashed"):
            asked(dies)
    assert not dies.is_alive
    with pytest.raises(Refused, match="did not answer within 0 s"):
        asked(hangs, timeout=0.1)
    assert not hangs.is_alive
    assert right.is_alive
    right.close()
    assert not right.is_alive


def test_another_checkout_takes_part_with_our_plain_modules_alone(here: Run, tmp_path: Path) -> None:
    here.against = tmp_path
    peers = {OURS: Peer(pretend, {"how": "right"}), SESSION: Peer(pretend), "transformers": Peer(pretend)}
    found = here.peers(harness.replace(table(), peers=peers))
    assert list(found) == [SESSION, OURS, BEFORE]
    assert found[BEFORE] == peers[OURS]._replace(paths=(str(tmp_path), str(tmp_path / "kernels")))
    assert not list(harness.measure(here, [table(other=Peer(pretend))])), "a table without ours is left out"


def test_another_checkout_is_imported_in_its_process_alone(tmp_path: Path) -> None:
    root = Path(rows.ROOT)
    checkout = tmp_path / "another checkout"
    for name in ("modernbert", "kernels", "benchmarks"):
        shutil.copytree(root / name, checkout / name, ignore=shutil.ignore_patterns("assets", "results", "__pycache__"))
    (checkout / "benchmarks" / "worker.py").write_text("raise ImportError('of the other checkout')")
    for peer, expected in (
        (Peer(where_from), root),
        (Peer(where_from, paths=(str(checkout), str(checkout / "kernels"))), checkout),
    ):
        one = Worker(SETUP, peer, tmp_path)
        assert one.ask(worker.answer, timeout=120, job=Job((1,))).item() == len(str(expected))
        one.close()


def test_a_sample_is_taken_after_an_untimed_call(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    variant = Variant("", lambda: log.append("run"), lambda: RIGHT, warm=lambda: log.append("warm"))
    state = State(SETUP, lambda job: [], variant, calls=3)
    monkeypatch.setattr(clock, "read_clocks", lambda work: (work(), Reading(9.0, 2.0))[1])
    assert worker.sample(state).foreign == 2.0
    assert log == ["warm", "run", "run", "run"]
    assert len(worker.sample(state, count=5).seconds) == 5


def test_a_table_of_latencies_has_p50_and_p99(here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "Worker", LocalWorker)
    made = harness.replace(table(right=Peer(pretend)), measure=partial(harness.speed, count=20))
    (result,) = harness.measure(here, [made])
    assert [(one["figure"], one["calls_per_sample"]) for one in result.rows] == [("p50", 20), ("p99", 20)]
    assert harness.p99(list(range(200))) == 197, "the third slowest of 200"


def test_a_row_says_where_and_when(monkeypatch: pytest.MonkeyPatch) -> None:
    made = rows.row([3.0, 1.0, 2.0], suite="s", unit="ms", max_error=1.23456e-7)
    assert made["max_error"] == 1.2e-7
    assert made["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    known = {"cpu", "cores", "threads", "system", "versions", "commit", "dirty", "date", "command"}
    assert known <= made.keys()
    rows.circumstances.cache_clear()
    monkeypatch.setattr("sys.argv", ["", "cpu", "--only", "variable", "--against=/home/me/old", "--quick"])
    assert rows.circumstances("cpu")["command"] == "python -m benchmarks cpu --only variable --quick"
    rows.circumstances.cache_clear()
