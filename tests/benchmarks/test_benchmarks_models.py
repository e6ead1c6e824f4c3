"""Whole models in processes: who is wrong, dead or late costs nobody else, and every way computes the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_models import LENGTHS
from torch import Tensor

from benchmarks import model_work
from benchmarks.harness import FOREIGN_LIMIT, Failed, Sample, WrongOutput, in_turns
from benchmarks.models import batches, flash, latency, memory, ours, padding, paper_table, peers, texts, throughput
from benchmarks.models.case import Case, Order, Place, Way, some_places
from benchmarks.models.comparison import ABSOLUTE, Taken, error, largest_batch
from benchmarks.models.implementations import IMPLEMENTATIONS, OURS, SDPA, Implementation, taking_part
from benchmarks.models.measure import Table, bench
from benchmarks.models.rows import SHARES, Rates, shares
from benchmarks.models.workers import Worker
from benchmarks.seeded import save_seeded
from modernbert.config import EncoderConfig

ROOT = Path(__file__).parents[2]
SUITES = {
    "throughput": throughput,
    "paper-table": paper_table,
    "padding": padding,
    "latency": latency,
    "memory": memory,
}
TINY = EncoderConfig(
    vocab_size=16_000,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=2,
    local_attention=16,
)
RAGGED = Case(LENGTHS, tuple(range(5)))


def pretended(how: str) -> Implementation:
    return Implementation("pretended_models:pretend", options={"how": how})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("tiny")
    save_seeded(TINY, folder)
    return Place(str(folder), "float32", "cpu", False)


@pytest.fixture(scope="module")
def expected(tiny: Place) -> Tensor:
    return next(iter(peers.alone(tiny)(RAGGED))).answer()


def table(case: Case = RAGGED, **changes: Any) -> Table:
    return Table("ragged", "tiny, 5 texts", "ragged", case, **changes)


# Processes.


def test_who_is_wrong_fails_dies_or_cannot_load_has_a_reason_and_costs_nobody_else() -> None:
    names = {how: pretended(how) for how in ("right", "wrong", "fails", "dies", "cannot load", "also right")}
    with (
        bench("throughput", quick=True, minutes=None, models={"tiny": TINY}, device="cpu") as here,
        here.team("tiny", "float32", names, reference=pretended("right")) as team,
    ):
        here.known_rates["float32"] = Rates(1e9, 1e9)
        result = team.measure(table())
    assert [row["implementation"] for row in result.rows] == ["right", "also right"]
    assert result.rows[0]["times_better_than"].keys() == {"also right"}
    reasons = {name.rpartition(": ")[2]: reason for name, reason in result.refused.items()}
    assert reasons["wrong"] == "differs from the reference by 1, allowed are 0.0001"
    assert reasons["fails"] == "fails: ValueError: unknown shape"
    assert reasons["dies"] == "its process ended with exit code 3: a kernel has crashed"
    assert reasons["cannot load"] == "fails: ImportError: no such kernel"
    assert not any(worker.process.is_alive() for worker in team.workers.values())


def test_a_process_that_hangs_is_ended(tmp_path: Path, tiny: Place) -> None:
    worker = Worker(Order("pretended_models:pretend", tiny, 1, {"how": "hangs"}), tmp_path)
    worker.ask("hello", timeout=60)
    arguments = {"case": RAGGED, "file": str(tmp_path / "answer"), "window": 0.0, "seconds": 0.0}
    with pytest.raises(Failed, match="did not answer within 1 s"):
        worker.ask("prepare", timeout=1, **arguments)
    assert not worker.process.is_alive()
    with pytest.raises(Failed):
        worker.ask("hello", timeout=5)


def test_without_a_reference_nobody_is_judged() -> None:
    with (
        bench("throughput", quick=True, minutes=None, models={"tiny": TINY}, device="cpu") as here,
        here.team("tiny", "float32", {}, reference=pretended("cannot load")) as team,
    ):
        result = team.measure(table())
    assert not result.rows
    assert "cannot be judged: the reference fails: ImportError" in result.refused["tiny, 5 texts: every implementation"]


def test_real_models_are_measured_and_their_rows_have_every_field() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("psutil")
    names = {name: IMPLEMENTATIONS[name] for name in (OURS, SDPA)}
    goals = {"goals": {OURS: {SDPA: 2.0}}, "goal": {OURS: 1e6}, "x": ("fill", 0.5)}
    with (
        bench("padding", quick=True, minutes=None, models={"tiny": TINY}, device="cpu") as here,
        here.team("tiny", "float32", names) as team,
    ):
        here.known_rates["float32"] = Rates(1e9, 1e9)
        result = team.measure(table(**goals))
        second = team.measure(table(Case((5, 5), (0,), backward=True), passes="forward + backward"))
    assert not result.refused
    assert not second.refused
    ours_row, theirs = result.rows
    assert {row["implementation"] for row in second.rows} == {OURS, SDPA}
    for row in (ours_row, theirs):
        assert row["max_error"] <= row["tolerance"] == ABSOLUTE
        assert (row["suite"], row["kind"], row["dtype"], row["model"]) == ("padding", "measured", "float32", "tiny")
        assert (row["figure"], row["unit"], row["pass"]) == ("throughput", "tokens/s", "forward")
        assert row["lengths"] == {"name": "ragged", "sequences": 5, "tokens": 105, "longest": 40}
        assert row["x"] == {"name": "fill", "value": 0.5}
        assert row["percent_of_matmul"] == pytest.approx(100 * row["tflop_per_s"] / 1e-3, rel=1e-3)
        assert row["goal"] is None  # meant for another machine
        assert row["state"].keys() == {"sm_mhz", "memory_mhz", "watts", "celsius"}
        assert {"gpu", "driver", "capability", "versions", "clean", "foreign_percent", "settings", *SHARES} <= set(row)
        json.dumps(row)
    assert ours_row["goals"] == {SDPA: 2.0}
    assert theirs["goals"] == {}
    assert ours_row["times_better_than"][SDPA] == pytest.approx(1 / theirs["times_better_than"][OURS], rel=1)


@pytest.mark.parametrize("name", SUITES)
def test_a_deadline_that_has_passed_says_what_is_left(name: str) -> None:
    suite = SUITES[name]
    found = list(suite.run(quick=True, only=[], minutes=0))
    assert found
    assert suite.__doc__
    for result in found:
        assert result.workload in suite.WORKLOADS
        assert not result.rows
        command = f"ask for it with --only {result.workload}"
        assert result.refused == {"the rest": f"was not reached within 0 minutes: {command}"}


def test_a_cold_start_prints_the_first_vector(tiny: Place, expected: Tensor) -> None:
    command = [sys.executable, "-m", "benchmarks.models.cold_start", OURS, tiny.folder, "float32", "cpu"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    began = time.perf_counter()
    ids = json.dumps(texts.ids(0, LENGTHS[0]).tolist())
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, input=ids, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert began < told["until"] < time.perf_counter()
    torch.testing.assert_close(torch.tensor(told["vector"]), expected[0], atol=1e-5, rtol=0)


# Turns and judgement.


def test_samples_are_taken_in_turns_and_who_fails_leaves() -> None:
    log: list[str] = []

    def ask(name: str) -> str:
        log.append(name)
        if name == "B" and log.count("B") == 2:
            raise Failed("died")
        return name

    taken, failed = in_turns({name: lambda name=name: ask(name) for name in "ABC"}, 4)
    assert "".join(log) == "ABC" + "BCA" + "AC" + "CA"
    assert taken == {"A": ["A"] * 4, "C": ["C"] * 4}
    assert failed == {"B": "died"}


def test_busy_samples_are_repeated_and_late_rounds_are_not_begun() -> None:
    busy = FOREIGN_LIMIT + 1
    script = iter([Sample(1.0, busy), Sample(2.0, busy + 1), Sample(3.0, 0.0), Sample(4.0, busy), Sample(5.0, busy)])
    taken, _ = in_turns({"A": lambda: next(script)}, 5, until=0.0, retries=2)
    assert taken["A"] == [Sample(3.0, 0.0), Sample(4.0, busy)]


def test_factors_compare_samples_of_one_round() -> None:
    judged = error(torch.ones(2), torch.ones(2), None, absolute=True)
    mine, theirs = (Taken(name, "", judged, costs=costs) for name, costs in (("a", [1.0, 6.0, 1.0]), ("b", [2, 12, 4])))
    assert mine.times_better_than(theirs) == 2.0


def test_errors_of_a_half_are_allowed_as_transformers_makes_them() -> None:
    exact = torch.randn(1000)
    plain, step = exact * 1.01, torch.finfo(torch.bfloat16).eps
    assert error(exact * 1.015, exact, plain, absolute=False).allowed == pytest.approx(0.02 + step)
    with pytest.raises(WrongOutput, match=r"by 0\.029"):
        error(exact * 1.029, exact, plain, absolute=False)


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("bad", [torch.tensor([1.0, 2.001]), torch.tensor([1.0, float("nan")]), torch.ones(3)])
def test_float32_must_be_close(bad: Tensor, absolute: bool) -> None:
    with pytest.raises(WrongOutput):
        error(bad, torch.tensor([1.0, 2.0]), None, absolute=absolute)


@pytest.mark.parametrize("most", [0, 1, 2, 3, 31, 64, 100, 1604, 8191, 8192, 9000])
def test_the_largest_batch_is_found(most: int) -> None:
    asked: list[int] = []
    found = largest_batch(lambda count: asked.append(count) or count <= most, 8192)
    assert found <= min(most, 8192)
    assert found >= min(most, 8192) * 63 / 64
    assert max(asked) <= 8192
    assert len(asked) <= 24


def test_shares_are_of_the_rates_of_the_run_and_of_the_datasheet() -> None:
    base = EncoderConfig.preset("modernbert-base")
    one = Table("w", "", "fixed 512", Case((512,) * 4, (0,)))
    flops = model_work.flops(base, (512,) * 4)
    found = shares(one, 1e-3, Rates(4e12, 800e12), "bfloat16", base, "NVIDIA H200")
    assert found["tflop_per_s"] == pytest.approx(flops / 1e9, rel=1e-3)
    assert found["percent_of_matmul"] == pytest.approx(100 * flops / 1e-3 / 800e12, rel=1e-3)
    assert found["percent_of_datasheet"] == pytest.approx(100 * flops / 1e-3 / 989.4e12, rel=1e-3)
    least = model_work.least_seconds(base, (512,) * 4, 2, 800e12, 4e12)
    assert found["percent_of_roofline"] == pytest.approx(100 * least / 1e-3, rel=1e-3)
    assert one.in_unit(1e-3) == 2048 / 1e-3
    assert shares(one, 1e-3, Rates(4e12, 8e14), "bfloat16", base, None)["percent_of_datasheet"] is None


# What runs the models.


def ways_of(place: Place, case: Case) -> Iterator[tuple[str, Way]]:
    """Every way that a CPU has, and those of a GPU with a stand-in for its kernel."""
    for build in (ours.packed, lambda at: peers.transformers(at, "sdpa"), lambda at: peers.transformers(at, "eager")):
        yield from ((way.settings, way) for way in build(place)(case))
    flash.register(loop_over_texts)
    model = peers.load(place, flash.NAME)
    forward = peers.forward_of(model)
    yield "flattened", peers.flattened_way("flattened", case, place, model, forward)
    yield from ((way.settings, way) for way in peers.batchings("flash", case, place, model, forward))


def loop_over_texts(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, cu_seqlens: Tensor, longest: int, window: int | None, scale: float
) -> Tensor:
    """Stands for the kernel of a GPU: one text after another, with the window that it is told."""
    pieces = []
    bounds = cu_seqlens.tolist()
    assert cu_seqlens.dtype == torch.int32
    assert longest == max(end - start for start, end in pairwise(bounds))
    for start, end in pairwise(bounds):
        q, k, v = (x[start:end].transpose(0, 1) for x in (q_THK, k_THK, v_THK))
        place = torch.arange(end - start)
        far = (place[:, None] - place).abs() > (end - start if window is None else window)
        pieces.append(((q @ k.mT * scale).masked_fill(far, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(pieces)


@pytest.mark.parametrize("case", [RAGGED, Case((40, 40, 40), (0, 2)), Case(LENGTHS, (1, 2), batch=2)])
def test_every_way_returns_the_rows_of_the_reference_in_order(tiny: Place, case: Case) -> None:
    pytest.importorskip("transformers")
    right = next(iter(peers.alone(tiny)(case))).answer()
    assert len(right) == sum(case.lengths[place] for place in case.checked)
    seen = set()
    for settings, way in ways_of(tiny, case):
        way.run()
        torch.testing.assert_close(way.answer(), right, atol=2e-5, rtol=0, msg=settings)
        seen.add(settings)
    assert any("length-sorted" in settings for settings in seen) == (case is RAGGED)
    assert {"packed; packing is timed", "flattened"} <= seen


def test_every_way_has_the_gradients_of_the_reference(tiny: Place) -> None:
    pytest.importorskip("transformers")
    case = Case(LENGTHS, (0,), backward=True)
    right = next(iter(peers.alone(tiny)(case))).answer()
    assert right.shape == (32, 32)
    for settings, way in ways_of(tiny, case):
        way.run()  # gradients of an earlier call do not add up
        assert error(way.answer(), right, None, absolute=False).found < 1e-5, settings
    assert batches.GRADIENT in dict(ours.load(tiny).named_parameters())


@pytest.mark.parametrize("side", ["right", "left"])
def test_flash_behind_the_interface_of_transformers_is_sdpa(tiny: Place, side: str) -> None:
    pytest.importorskip("transformers")
    flash.register(loop_over_texts)
    ids, mask = torch.randint(100, 16_000, (4, 40)), torch.zeros(4, 40, dtype=torch.int64)
    for row, length in enumerate((40, 7, 21, 1)):
        mask[row, slice(length) if side == "right" else slice(40 - length, None)] = 1
    with torch.inference_mode():
        sdpa, wired = (
            peers.load(tiny, name)(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
            for name in ("sdpa", flash.NAME)
        )
    torch.testing.assert_close(wired, sdpa, atol=2e-5, rtol=0)


def test_the_kernel_of_torch_takes_what_it_is_given() -> None:
    """Its arguments by name, which nothing else can try without a GPU."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[:8] == ["query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p"]
    named = {"is_causal", "return_debug_mask", "scale", "window_size_left", "window_size_right"}
    assert named <= set(names)


def test_sentence_transformers_on_ids_is_the_reference(tiny: Place, expected: Tensor) -> None:
    pytest.importorskip("sentence_transformers")
    found = list(peers.sentence_transformers(tiny)(RAGGED))
    assert {way.settings.partition(", ")[2] for way in found} >= {"batches of 1"}
    for way in found:
        torch.testing.assert_close(way.answer(), expected, atol=2e-5, rtol=0)


def test_ids_on_the_host_and_compared_texts_are_those_of_the_case(tiny: Place) -> None:
    case = Case((20,), (0,), from_host=True)
    right = next(iter(peers.alone(tiny)(case))).answer()
    (mine,) = ours.packed(tiny)(case)
    torch.testing.assert_close(mine.answer(), right, atol=2e-5, rtol=0)
    assert some_places([5, 900, 40, 7], 1000) == (0, 1, 3)
    assert some_places([5, 2000, 40, 7], 1000) == (1,)
    assert some_places([8], 1) == (0,)


def test_who_takes_part_depends_on_the_place(tiny: Place) -> None:
    on_cpu = taking_part(IMPLEMENTATIONS, tiny)
    assert OURS in on_cpu
    assert not any("flash" in name or "compiled" in name or "graphs" in name for name in on_cpu)
    gpu = Place("", "float32", "cuda", False)
    assert not any("flash" in name for name in taking_part(IMPLEMENTATIONS, gpu))
    missing = {"x": Implementation("a:b", package="no_such_package")}
    assert not taking_part(missing, tiny)


@pytest.mark.parametrize(("minutes", "there"), [(None, True), (10.0, True), (1.0, False)])
def test_what_compiles_is_left_out_of_short_runs_and_said(minutes: float | None, there: bool) -> None:
    names = {"fast": pretended("right"), "slow": pretended("right")._replace(slow=True)}
    with (
        bench("throughput", quick=False, minutes=minutes, models={"tiny": TINY}, device="cpu") as here,
        here.team("tiny", "float32", names) as team,
    ):
        assert set(team.names) == ({"fast", "slow"} if there else {"fast"})
        assert team.left_out == ({} if there else {"slow": "is left out: it compiles for minutes"})


# Lengths.


def test_the_sets_are_those_of_the_paper() -> None:
    assert sum(texts.in_set("variable short", 8192)) == pytest.approx(2_096_510, rel=2e-3)
    assert sum(texts.in_set("variable long", 8192)) == pytest.approx(33_604_913, rel=2e-3)
    assert texts.in_set("variable long", 20) == texts.in_set("variable long", 8192)[:20]
    assert texts.in_set("fixed 8192", 2, short=True) == (1024, 1024)
    assert texts.in_set("fixed 512", 2, short=True) == (512, 512)
    assert texts.groups((5, 1, 9, 3), 2, by_length=True) == [[1, 3], [0, 2]]
    assert texts.groups((5, 1, 9, 3), 3) == [[0, 1, 2], [3]]
    ids = texts.ids(3, 5000)
    assert (int(ids.min()) >= 100, int(ids.max()) < 16_000) == (True, True)
    assert texts.ids(3, 7).tolist() == texts.ids(3, 7).tolist() != texts.ids(4, 7).tolist()


@pytest.mark.parametrize("fill", padding.FILLS)
def test_lengths_fill_a_batch_as_they_should(fill: float) -> None:
    lengths = padding.lengths_of(fill, 64, 512)
    assert max(lengths) == 512
    assert sum(lengths) / (64 * 512) == pytest.approx(fill, abs=0.015)


def test_percentiles_of_latency() -> None:
    seconds = [float(one) for one in range(200, 0, -1)]
    assert latency.percentile(seconds) == 198.0
    ready = {"a": Taken("a", "", error(torch.ones(1), torch.ones(1), None, absolute=True))}
    rounds = {"a": [{"host": seconds, "device": []}] * 2}
    assert latency.figures(ready, rounds, "p50")[0].costs == [100.5, 100.5]
    assert latency.figures(ready, rounds, "device") == []
    assert latency.lengths_of(8)[0] == 32
    assert latency.lengths_of(8)[-1] == 8
