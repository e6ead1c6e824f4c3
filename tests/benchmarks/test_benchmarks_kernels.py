"""The suite `kernels` refuses what is wrong, counts what must be moved, and takes its figures as it says."""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import modernbert_kernels as ops
from benchmarks import gpu, gpu_state
from benchmarks.gpu import Machine, Rates
from benchmarks.harness import Reading, WrongOutput
from benchmarks.kernels import peers, questions, tasks
from benchmarks.kernels import suite as kernels
from benchmarks.kernels.calls import Task, Way, check, copied, truth_and_yardstick
from benchmarks.kernels.cases import CASES, Case
from benchmarks.kernels.work import Work, visible_pairs, work
from benchmarks.model_work import DATASHEETS, Datasheet
from benchmarks.report import reading, tables

CPU = torch.device("cpu")
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


class Clock:
    """Does the work and says what a script says it took; the last of it holds on."""

    def __init__(self, *seconds: float) -> None:
        self.script = list(seconds)
        self.read = 0

    def __call__(self, work: Any) -> Reading:
        work()
        self.read += 1
        return Reading(self.script.pop(0) if len(self.script) > 1 else self.script[0], 0.0)


def machine(*seconds: float, window: float = 0.0) -> Machine:
    return Machine(CPU, Clock(*(seconds or (0.001,))), window, 3)


class PretendedGpu(Machine):
    """A CPU that is taken for a GPU with a cache of 1,000 bytes."""

    is_gpu = True
    cache = 1000


class PretendedGraph:
    """Replays what was captured."""

    def __init__(self, calls: Any, turns: int) -> None:
        self.calls, self.turns, self.replays = calls, turns, 0

    def replay(self) -> None:
        self.replays += 1
        for _ in range(self.turns):
            for call in self.calls:
                call()


def doubled(x: Tensor) -> Tensor:
    return 2 * x


def task(*ways: Way, dtype: torch.dtype = FLOAT32, **more: Any) -> Task:
    return Task("doubling", (torch.randn(50, dtype=dtype),), {}, doubled, ways, **more)


def row_of(result: Any, name: str) -> dict[str, Any]:
    return next(row for row in result.rows if row["implementation"] == name)


RATES = Rates(10_000.0, 5_000.0)


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_way_gets_no_row_and_its_reason(backward: bool) -> None:
    called = []

    def wrong(x: Tensor) -> Tensor:
        called.append(x)
        return 2.001 * x

    result = kernels.measure(
        "w", task(Way("right", doubled), Way("wrong", wrong)), backward, machine(), RATES, rounds=2
    )
    assert [row["implementation"] for row in result.rows] == ["right"]
    ((name, reason),) = result.refused.items()
    assert name.endswith(": wrong")
    assert "differs from the reference by 0.0005" in reason
    assert len(called) == 1  # to be checked, and never again


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore
        return -2 * grad


def test_a_wrong_gradient_is_refused_where_gradients_are_timed() -> None:
    one = task(Way("flipped", _WrongGradient.apply))
    assert kernels.measure("w", one, False, machine(), RATES, rounds=1).rows
    assert "differs" in str(kernels.measure("w", one, True, machine(), RATES, rounds=1).refused)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(bad: float) -> None:
    one = task(Way("bad", lambda x: 2 * x + bad))
    with pytest.raises(WrongOutput):
        check(one.ways[0], one, False, *truth_and_yardstick(doubled, one, False))


def test_the_tolerance_is_twice_the_error_of_the_dtype_and_one_step() -> None:
    """The reference errs by rounding; three times its error is refused, unless a step allows it."""
    one = task(dtype=BFLOAT16)
    exact, plain = [torch.ones(4)], [torch.ones(4) * 1.25]
    step = torch.finfo(BFLOAT16).eps
    within, beyond = (Way("w", lambda x, y=y: torch.ones(4) * y) for y in (1.5 + 0.9 * step, 1.5 + 1.1 * step))
    error = check(within, one, False, exact, plain)
    assert error.found == pytest.approx(0.5 + 0.9 * step)
    assert error.allowed == pytest.approx(0.5 + step)
    with pytest.raises(WrongOutput, match=r"allowed are 0\.51"):
        check(beyond, one, False, exact, plain)


def test_another_shape_is_refused() -> None:
    one = task(Way("flat", lambda x: 2 * x[:-1]))
    with pytest.raises(WrongOutput, match="returned shape"):
        check(one.ways[0], one, False, *truth_and_yardstick(doubled, one, False))


def test_a_way_that_raises_costs_no_other_its_row() -> None:
    def broken(x: Tensor) -> Tensor:
        raise AttributeError("no such kernel")

    result = kernels.measure("w", task(Way("broken", broken), Way("right", doubled)), False, machine(), RATES, rounds=1)
    assert not kernels.measure(
        "w", replace(task(Way("a", doubled)), reference=broken), False, machine(), RATES, rounds=1
    ).rows
    assert list(result.refused.values()) == ["fails: AttributeError: no such kernel"]
    assert [row["implementation"] for row in result.rows] == ["right"]


def test_a_call_that_takes_too_long_is_not_timed() -> None:
    clock = Clock(2 * gpu.SLOWEST)
    with pytest.raises(gpu.TooSlow, match=r"takes 0\.5 s a call"):
        gpu.loop([lambda: None] * 30, Machine(CPU, clock, 0.0, 3))
    assert clock.read == 1


def test_prepared_arguments_are_checked_as_those_of_the_task() -> None:
    """A way that wants two halves returns the gradient of the whole; order matters."""

    def halves(order: int) -> Way:
        return Way(
            "halves",
            lambda a, b: torch.cat([2 * a, 3 * b]),
            prepare=lambda args: tuple(args[0].chunk(2)),
            restore=lambda gradients: [torch.cat(gradients[::order])] if gradients else [],
        )

    reference = lambda x: torch.cat([2 * x[:25], 3 * x[25:]])  # noqa: E731
    one = replace(task(), reference=reference)
    known = truth_and_yardstick(reference, one, True)
    assert check(halves(1), one, True, *known).found < 1e-7
    with pytest.raises(WrongOutput):
        check(halves(-1), one, True, *known)


def test_copies_share_no_memory_and_keep_their_numbers() -> None:
    x, ids = torch.randn(3), torch.arange(3)
    one = Task("t", (x, ids, 5), {"rope": (x, x)}, doubled, ())
    (y, other, five), kwargs = copied(one, True, torch.float64)
    assert (y.dtype, y.requires_grad, other.dtype, five) == (torch.float64, True, torch.int64, 5)
    assert torch.equal(y, x.double())
    assert kwargs["rope"][0].dtype is FLOAT32
    assert not {x.data_ptr(), ids.data_ptr()} & {kwargs["rope"][0].data_ptr(), other.data_ptr()}


def test_what_is_overwritten_is_checked_with_the_numbers_of_before() -> None:
    inplace = next(c for c in CASES["rotary"](BFLOAT16, "cpu", 8) if c.name == "12 x 64, in place")
    before = inplace.kwargs["qkv_T3HK"].clone()
    one = tasks.of_op(inplace, "rotary")
    assert one.passes == (False,)
    assert one.dtype is BFLOAT16
    result = kernels.measure("w", one, False, machine(), RATES, rounds=2)
    assert not result.refused
    assert torch.equal(inplace.kwargs["qkv_T3HK"], before)


def test_a_row_says_what_one_call_took_and_what_it_reached() -> None:
    """A clock that says 0.2 s for a loop of two calls: 0.1 s for a call of 100 and 200 bytes."""
    one = task(Way("a", doubled), Way("b", doubled), work=Work(100, 200, 60, 140), dtype=BFLOAT16)
    result = kernels.measure("w", one, True, machine(0.2), RATES, rounds=3)
    row = row_of(result, "a")
    assert (row["unit"], row["median"], row["samples"], row["calls_per_sample"]) == ("us", 1e5, 3, 2)
    assert row["times_better_than"] == {"b": 1.0}
    assert row["gb_per_s"] == pytest.approx(3000 * 1e-9)
    assert row["percent_of_copy"] == pytest.approx(30)
    assert row["tflop_per_s"] == pytest.approx(2000 * 1e-12)
    assert row["percent_of_matmul"] == pytest.approx(40)
    forward = row_of(kernels.measure("w", one, False, machine(0.2), RATES, rounds=3), "a")
    assert (forward["pass"], forward["percent_of_copy"]) == ("forward", 10.0)


def test_what_is_repeated_within_a_call_is_divided() -> None:
    one = task(Way("a", doubled, repeats=10))
    row = row_of(kernels.measure("w", one, False, machine(0.2), RATES, rounds=1), "a")
    assert row["median"] == 1e4


def test_ways_that_do_other_amounts_are_no_rivals() -> None:
    one = task(Way("a", doubled, work=Work(100, None)), Way("b", doubled, work=Work(50, None)))
    result = kernels.measure("w", one, False, machine(0.2), RATES, rounds=1)
    assert [row["times_better_than"] for row in result.rows] == [{}, {}]
    assert [row["percent_of_copy"] for row in result.rows] == [10.0, 5.0]


def test_float32_is_no_share_of_a_bfloat16_product() -> None:
    one = task(Way("a", doubled), work=Work(100, 200, 60, 140))
    row = row_of(kernels.measure("w", one, False, machine(0.2), RATES, rounds=1), "a")
    assert row["tflop_per_s"] is not None
    assert row["percent_of_matmul"] is None


def test_a_share_of_the_datasheet_is_that_of_what_bounds_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 bytes and 60 operations in 0.1 s are 1000 and 600 per second."""
    known = gpu_state.identity(CPU)
    monkeypatch.setattr(gpu_state, "identity", lambda device: known | {"gpu": "Test GPU"})
    monkeypatch.setitem(DATASHEETS, "Test GPU", Datasheet(bfloat16=2000.0, float32=900.0, bytes=4000.0))
    shares = []
    for dtype, work_ in ((BFLOAT16, Work(100, 0, 60, 0)), (FLOAT32, Work(100, 0, 60, 0)), (BFLOAT16, Work(100, 0))):
        one = task(Way("a", doubled), work=work_, dtype=dtype)
        result = kernels.measure("w", one, False, machine(0.2), RATES, rounds=1)
        shares.append(row_of(result, "a")["percent_of_datasheet"])
    assert shares == pytest.approx([30, 66.67, 25])
    (row,) = kernels.measure("w", task(Way("a", doubled)), False, machine(0.2), RATES, rounds=1).rows
    assert row["percent_of_datasheet"] is None


def test_rows_are_complete_and_can_be_written_as_json() -> None:
    result = kernels.measure("w", task(Way("a", doubled)), False, machine(0.1), RATES, rounds=2)
    rates = kernels.rates_rows({"copy": [1e9, 3e9], "matmul": [2e12]}, machine(), gpu_state.sensors(CPU, lambda: None))
    for row in [*result.rows, *rates]:
        assert row["suite"] == "kernels"
        assert {"gpu", "driver", "capability", "state", "pass", "dtype", *kernels.FIGURES} <= row.keys()
        assert {"triton", "liger-kernel", "torch"} <= row["versions"].keys()
        assert row["state"].keys() == set(gpu_state.SENSORS.values())
        assert {"command", "commit", "dirty", "date", "kind", "clean"} <= row.keys()
        json.dumps(row)
    assert [(row["median"], row["unit"]) for row in rates] == [(2.0, "GB/s"), (2.0, "TFLOP/s")]


def test_rates_count_bytes_read_and_written() -> None:
    """Eight copies of 256 x 8192 numbers of 2 bytes, and eight products of 256 x 256, in a millisecond each."""
    samples, _ = gpu.rates(machine(), quick=True)
    found = gpu.median_rates(samples)
    assert found == pytest.approx((8 * 2 * 256 * 8192 * 2 / 1e-3, 8 * 2 * 256**3 / 1e-3))


def test_warming_up_ends_when_three_times_agree() -> None:
    stable = Clock(5.0, 3.0, 1.0, 1.01, 1.0, 9.0)
    assert gpu.settle(lambda: None, Machine(CPU, stable, 0.0, 20)) == 5
    assert gpu.settle(lambda: None, Machine(CPU, Clock(*range(1, 40)), 0.0, 20)) == 20


@pytest.mark.parametrize(
    ("nbytes", "cache", "expected"), [(25, 60, 8), (100, 60, 2), (180, 60, 2), (60, 60, 3), (0, 60, 32), (5, 0, 2)]
)
def test_copies_hold_three_times_the_cache(nbytes: int, cache: int, expected: int) -> None:
    assert gpu.copies_beyond_cache(nbytes, cache) == expected


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, waits: bool = False) -> list[PretendedGraph]:
    graphs: list[PretendedGraph] = []

    def capture(calls: Any, turns: int) -> PretendedGraph:
        graphs.append(PretendedGraph(calls, turns))
        return graphs[-1]

    monkeypatch.setattr(gpu, "capture", capture)
    monkeypatch.setattr(gpu, "never_waits", lambda call: not waits)
    return graphs


def test_a_graph_holds_calls_on_all_memory_and_is_replayed_for_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of 0.1 ms on 4 memories: 10 turns would last 4 ms, 8 make 32 calls; 4 replays of 1 ms each."""
    graphs, log = pretend_gpu(monkeypatch), []
    calls = [lambda at=at: log.append(at) for at in range(4)]
    clock = Clock(*[1e-4] * 5, 1e-3)
    looped = gpu.loop(calls, PretendedGpu(CPU, clock, 0.004, 3))
    assert (graphs[0].turns, looped.calls, looped.how) == (8, 128, "replays of a graph of 32 calls")
    log.clear()
    assert looped.run() is None  # results that are kept would fill the memory
    assert log == [0, 1, 2, 3] * 32


@pytest.mark.parametrize(("waits", "graph"), [(True, True), (False, False)])
def test_without_a_graph_calls_are_made_one_by_one(monkeypatch: pytest.MonkeyPatch, waits: bool, graph: bool) -> None:
    graphs, log = pretend_gpu(monkeypatch, waits), []
    calls = [lambda at=at: log.append(at) for at in range(2)]
    looped = gpu.loop(calls, PretendedGpu(CPU, Clock(1e-3), 0.004, 3), graph=graph)
    assert not graphs
    log.clear()
    looped.run()
    assert (looped.calls, looped.how, log) == (4, "single calls", [0, 1, 0, 1])


def test_a_task_on_a_gpu_has_memory_beyond_the_cache_and_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = pretend_gpu(monkeypatch)
    monkeypatch.setattr(kernels, "peak_mb", lambda call: len(call()))
    pretended = PretendedGpu(CPU, Clock(1e-3), 0.004, 3)
    one = task(Way("a", doubled), Way("b", doubled), memory=True)
    result = kernels.measure("w", one, True, pretended, RATES, rounds=2)
    assert [len(graph.calls) for graph in graphs] == [15, 15]  # copies of 200 bytes, three times 1,000 bytes
    assert [row["unit"] for row in result.rows] == ["us", "us", "MB", "MB"]
    memory = result.rows[2]
    assert (memory["median"], memory["times_better_than"]) == (2, {"b": 1.0})
    assert memory["what"].endswith("forward + backward, peak memory")
    assert {row["foreign_percent"] for row in result.rows} == {None}


def test_calls_that_share_leaves_return_outputs_and_gradients_without_history() -> None:
    from benchmarks.kernels.calls import call_of

    args = (torch.randn(5, requires_grad=True),)
    outputs = call_of(Way("a", doubled), args, {}, True)()
    assert [x.requires_grad for x in outputs] == [False, False]
    assert args[0].grad is None


@pytest.mark.parametrize(
    ("text", "expected"), [("1980", 1980.0), (" 71.32".strip(), 71.32), ("[N/A]", None), ("", None)]
)
def test_figures_of_nvidia_smi(text: str, expected: float | None) -> None:
    assert gpu_state.number(text) == expected


# Bytes and operations, counted by hand.


def case(op: str, name: str, dtype: torch.dtype, tokens: int) -> Case:
    return next(iter(tasks.named(op, (name,), dtype, "cpu", tokens)))


HAND = {
    # 10 tokens of 768 in 2 bytes are 15,360 bytes.
    "layer_norm 768": (("layer_norm", "768", BFLOAT16, 10), (2 * 15_360, 3 * 15_360, None, None)),
    # x, delta, sum, norm; back the gradients of sum and norm, the sum, and one gradient for both.
    "add_layer_norm 768": (("add_layer_norm", "768", BFLOAT16, 10), (4 * 15_360, 4 * 15_360, None, None)),
    # x, its sum and their gradients have 30,720 bytes each.
    "add_layer_norm 768 float32 stream": (
        ("add_layer_norm", "768 float32 stream", BFLOAT16, 10),
        (2 * 30_720 + 2 * 15_360, 3 * 30_720 + 2 * 15_360, None, None),
    ),
    # 10 x 768 in float32: h of two halves of 384.
    "geglu 384 gelu": (("geglu", "384 gelu", FLOAT32, 10), (46_080, 76_800, None, None)),
    # qkv 46,080 bytes read and written; cos and sin 10 x 32 x 4 bytes each.
    "rotary 12 x 64": (("rotary", "12 x 64", BFLOAT16, 10), (92_160 + 2_560, 92_160 + 2_560, None, None)),
    # 10 positions of 8 bytes; two tables of 10 x 32 x 4.
    "rotary_table": (("rotary_table", "64, theta 160,000", BFLOAT16, 10), (80 + 2_560, None, None, None)),
    # q and k only.
    "rotary in place": (("rotary", "12 x 64, in place", BFLOAT16, 10), (61_440 + 2_560, 61_440 + 2_560, None, None)),
    # ids 80 bytes; a table of 50,368 x 768 x 2 bytes.
    "embed_layer_norm 768": (
        ("embed_layer_norm", "768", BFLOAT16, 10),
        (80 + 2 * 15_360, 80 + 2 * 15_360 + 77_365_248, None, None),
    ),
    # x 5,120 bytes, weight 24,576, out 960; 2 x 10 x 256 x 48 operations.
    "project_normalize 256 to 48": (
        ("project_normalize", "256 to 48", BFLOAT16, 10),
        (5_120 + 24_576 + 960, 2 * 960 + 2 * 5_120 + 2 * 24_576, 245_760, 491_520),
    ),
    # 5 of 10 rows; the gradient of x has all.
    "project_normalize, half of the rows": (
        ("project_normalize", "256 to 48, half of the rows", BFLOAT16, 10),
        (2_560 + 24_576 + 480, 2 * 480 + 2_560 + 5_120 + 2 * 24_576, 122_880, 245_760),
    ),
    # 3 of 10 tokens have a target: 2 x 3 x 256 x 50,368.
    "linear_cross_entropy 256 to 50368": (
        ("linear_cross_entropy", "256 to 50368", BFLOAT16, 10),
        (None, None, 77_365_248, 154_730_496),
    ),
}


@pytest.mark.parametrize("name", HAND)
def test_bytes_and_operations_are_those_counted_by_hand(name: str) -> None:
    made, expected = HAND[name]
    assert work(case(*made)) == expected


def test_bytes_of_pooling_are_rows_or_all() -> None:
    x, cu = torch.zeros(10, 4), torch.tensor([0, 4, 10], dtype=torch.int32)
    assert work(Case(ops.pool, "", (x, cu, "cls"), {"normalize": True})) == (64, 32 + 160, None, None)
    assert work(Case(ops.pool, "", (x, cu, "mean"), {})) == (160 + 32, 32 + 160, None, None)


def test_pairs_and_operations_of_attention() -> None:
    qkv, rope = torch.zeros(7, 3, 2, 8, dtype=BFLOAT16), (torch.zeros(7, 4), torch.zeros(7, 4))
    cu = torch.tensor([0, 4, 7], dtype=torch.int32)
    local, everything = (Case(ops.attention, "", (qkv, cu, 4), {"rope": rope, "window": w}) for w in (1, None))
    # Windows of 1: 2 + 3 + 3 + 2 and 2 + 3 + 2 pairs; without one 16 + 9. Two products of 2 x 2 heads x 8 each.
    assert work(local).forward_flops == 17 * 64
    assert work(everything).forward_flops == 25 * 64
    assert work(everything).backward_flops == 25 * 160
    # qkv 672 bytes, out 224, tables 224.
    assert work(local)[:2] == (672 + 224 + 224, 2 * 672 + 2 * 224 + 224)


@pytest.mark.parametrize("window", [0, 1, 3, 64, None])
def test_visible_pairs_are_those_of_a_mask(window: int | None) -> None:
    for length in (0, 1, 2, 5, 130):
        place = torch.arange(length)
        distance = (place[:, None] - place).abs()
        seen = distance >= 0 if window is None else distance <= window
        assert visible_pairs(length, window) == int(seen.sum())


def test_bytes_and_operations_of_maxsim() -> None:
    q, d = torch.zeros(6, 4, dtype=BFLOAT16), torch.zeros(20, 4, dtype=BFLOAT16)
    cu = torch.tensor([0, 3, 6]), torch.tensor([0, 10, 15, 20])
    # q 48 bytes, d 160, 2 x 3 scores of 4 bytes; 6 x 20 products of 2 x 4; backward 6 x 3 pairs twice.
    made = work(Case(ops.maxsim, "", (q, cu[0], d, cu[1]), {}))
    assert made == (208 + 24, 416 + 24, 960, 288)


def test_work_of_both_passes_is_their_sum_where_both_are_known() -> None:
    assert Work(1, 2, 3, 4).of(False) == (1, 3)
    assert Work(1, 2, 3, 4).of(True) == (3, 7)
    assert Work(1, None, None, 4).of(True) == (None, None)


# The tasks.


def test_every_backend_that_takes_the_call_is_there() -> None:
    (one,) = tasks.attention(CPU, True)
    assert [(way.implementation, way.settings) for way in one.ways] == [
        ("cpu", tables.CHOSEN),
        ("reference", ""),
        ("sdpa", "rotated before, as PyTorch chooses"),
    ]
    pool = Case(ops.pool, "", (torch.zeros(3, 4), torch.tensor([0, 3]), "cls"), {})
    assert [(way.implementation, way.settings) for way in tasks.of_op(pool, "p").ways] == [("reference", tables.CHOSEN)]


@pytest.mark.parametrize("window", [3, None])
def test_attention_of_pytorch_is_ours(window: int | None) -> None:
    qkv, rope = torch.randn(24, 3, 2, 8), tuple(torch.randn(2, 24, 4))
    made = Case(ops.attention, "", (qkv, tasks.offsets(3, 8, CPU), 8), {"rope": rope, "window": window})
    one = tasks.of_op(made, "a", peers.sdpa(made, 3))
    known = truth_and_yardstick(one.reference, one, True)
    for way in one.ways:
        check(way, one, True, *known)


def test_tables_are_compared_with_float64_and_not_with_float32() -> None:
    """Theirs would be refused: it is right, and float32 is not."""
    positions = torch.arange(8000, 8100)
    one = tasks.of_op(Case(ops.rotary_table, "", (positions,), {"theta": 1e4, "head_dim": 64}), "t")
    assert (one.passes, one.dtype) == ((False,), FLOAT32)
    known = truth_and_yardstick(one.reference, one, False)
    exact = Way("exact", lambda *a, **k: tuple(x.float() for x in peers.exact_rotary_table(*a, **k)))
    plain = check(one.ways[0], one, False, *known)
    assert check(exact, one, False, *known).found < 1e-7 < plain.found < plain.allowed


def test_flash_maxsim_is_called_as_its_functions_are_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of the same signatures, which computes what it should."""
    package = ModuleType("flash_maxsim")
    called = []

    def flash_maxsim_batched(Q, D, doc_lengths=None, shared_docs=True):
        called.append("batched")
        return torch.einsum("ase,bte->abst", Q, D).max(-1).values.sum(-1)

    def flash_maxsim_batched_train(Q, D, shared_docs=True, doc_lengths=None, query_lengths=None):
        called.append("train")
        return torch.einsum("ase,bte->abst", Q, D).max(-1).values.sum(-1)

    def flash_maxsim_packed(Q, D_packed, cu_seqlens_d, max_seqlen_d=None, query_chunk_size=128):
        called.append("packed")
        documents = D_packed.unflatten(0, (-1, max_seqlen_d))
        assert len(documents) == len(cu_seqlens_d) - 1
        return torch.einsum("se,bte->bst", Q, documents).max(-1).values.sum(-1)

    vars(package).update(locals())
    monkeypatch.setitem(sys.modules, "flash_maxsim", package)
    monkeypatch.setattr(peers, "find_spec", lambda name: name in ("flash_maxsim", "triton"))
    for queries in (1, 2):
        args = (
            torch.randn(3 * queries, 8),
            tasks.offsets(queries, 3, CPU),
            torch.randn(20, 8),
            tasks.offsets(4, 5, CPU),
        )
        case = Case(ops.maxsim, "", args, {})
        one = Task("m", args, {}, case.op.reference, tuple(
            way for way in peers.maxsims(queries, 4) if way.implementation.startswith("flash-maxsim")
        ))  # fmt: skip
        assert [way.implementation.split(", ")[1] for way in one.ways] == ["padded", "packed"][: 3 - queries]
        for backward in (False, True):
            for way in one.ways:
                check(way, one, backward, *truth_and_yardstick(one.reference, one, backward))
    assert {"batched", "train", "packed"} == set(called)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [3, None])
def test_flex_attention_is_ours(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """Without a compiler, and so without a GPU: its own plain way."""
    qkv, rope = torch.randn(24, 3, 2, 8), tuple(torch.randn(2, 24, 4))
    made = Case(ops.attention, "", (qkv, tasks.offsets(3, 8, CPU), 8), {"rope": rope, "window": window})
    assert peers.flex(made, 3) == peers.cudnn(made) == ()
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    (way,) = peers.flex(made, 3)
    monkeypatch.undo()
    one = tasks.of_op(made, "a")
    check(way, one, False, *truth_and_yardstick(one.reference, one, False))


def test_cudnn_gets_what_its_operators_declare(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none on a CPU: plain functions of the declared order stand in for it."""
    qkv, rope = torch.randn(24, 3, 2, 8), tuple(torch.randn(2, 24, 4))
    offsets = tasks.offsets(3, 8, CPU)
    kept: list[Any] = []

    def texts(x: Tensor) -> Tensor:
        return x.detach().unflatten(0, (3, 8)).transpose(1, 2).requires_grad_()

    def forward(query, key, value, attn_bias, cum_seq_q, cum_seq_k, max_q, max_k, compute_log_sumexp,
                dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):  # fmt: skip
        assert (attn_bias, max_q, max_k, dropout_p, is_causal, compute_log_sumexp) == (None, 8, 8, 0.0, False, True)
        assert cum_seq_q is cum_seq_k
        kept[:] = [texts(x) for x in (query, key, value)]
        with torch.enable_grad():
            kept.append(torch.nn.functional.scaled_dot_product_attention(*kept))
        seed = torch.zeros(())
        return kept[3].detach().transpose(1, 2).flatten(0, 1), seed, cum_seq_q, cum_seq_k, 8, 8, seed, seed, seed

    def backward(grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q,
                 cum_seq_k, max_q, max_k, dropout_p, is_causal, *, scale=None):  # fmt: skip
        assert (attn_bias, max_q, max_k, dropout_p, is_causal) == (None, 8, 8, 0.0, False)
        *leaves, attended = kept
        gradients = torch.autograd.grad(attended, leaves, texts(grad_out))
        return tuple(x.transpose(1, 2).flatten(0, 1) for x in gradients)

    for name, plain in (("forward", forward), ("backward", backward)):
        declared = [
            argument.name for argument in getattr(torch.ops.aten, f"_cudnn_attention_{name}").default._schema.arguments
        ]
        assert list(inspect.signature(plain).parameters) == declared
        monkeypatch.setattr(torch.ops.aten, f"_cudnn_attention_{name}", plain)
    made = Case(ops.attention, "", (qkv, offsets, 8), {"rope": rope, "window": None})
    pretended = SimpleNamespace(is_cuda=True, element_size=lambda: 2)
    (way,) = peers.cudnn(made._replace(args=(pretended,)))
    assert peers.cudnn(made._replace(args=(pretended,), kwargs={"window": 64})) == ()
    one = tasks.of_op(made, "a")
    check(way, one, True, *truth_and_yardstick(one.reference, one, True))


def test_one_product_is_maxsim_of_all_pairs() -> None:
    q, d = torch.randn(2 * 3, 8), torch.randn(4 * 5, 8)
    args = (q, tasks.offsets(2, 3, CPU), d, tasks.offsets(4, 5, CPU))
    one = tasks.of_op(Case(ops.maxsim, "", args, {}), "m", (Way("one", peers.in_float32(2, 4)),))
    known = truth_and_yardstick(one.reference, one, True)
    assert [way.implementation for way in one.ways] == ["cpu", "reference", "one"]
    for way in one.ways:
        check(way, one, True, *known)


def test_the_cross_entropy_of_pytorch_is_ours() -> None:
    made = Case(ops.linear_cross_entropy, "", (torch.randn(9, 4), torch.randn(7, 4), None, torch.arange(9) - 2), {})
    made.args[3][:2] = -100
    one = tasks.of_op(made, "c", (Way("torch", peers.cross_entropy),))
    for way in one.ways:
        check(way, one, True, *truth_and_yardstick(one.reference, one, True))


@pytest.mark.parametrize("at", range(3))
def test_ways_to_add_the_residual_are_one(at: int) -> None:
    one = list(questions.residual(CPU, 40))[at]
    for backward in one.passes:
        known = truth_and_yardstick(one.reference, one, backward)
        for way in one.ways:
            check(way, one, backward, *known)


def test_chunks_of_layers_are_the_layers() -> None:
    one = questions.chain(CPU, 2100, layers=1)
    assert [way.implementation for way in one.ways] == ["all at once", "chunks of 2,048"]
    assert one.work == Work(None, None, 2 * 2100 * 3 * 768 * 1152)
    known = truth_and_yardstick(one.reference, one, False)
    for way in one.ways:
        check(way, one, False, *known)


def test_waves_are_compared_by_what_they_compute() -> None:
    one = questions.waves(CPU)
    assert [way.settings for way in one.ways if way.implementation in ("2,816 tokens", "5,632 tokens")] == [
        "full waves",
        "full waves",
    ]
    assert one.nbytes == 2560 * 768 * 2
    smallest = one.ways[0]
    assert smallest.work == Work(2 * (2 * 2560 * 768 + 768 * 768), None, 2 * 2560 * 768 * 768)
    assert smallest.reference is not None
    assert smallest.reference(*one.args).shape == (2560, 768)


def test_a_chain_of_kernels_is_divided_by_their_number() -> None:
    one = questions.gap(CPU, kernels=5)
    assert [(way.repeats, way.graph) for way in one.ways] == [(5, True), (5, False)]
    assert one.reference(torch.zeros(1)).item() == 5


def test_names_of_cases_are_those_of_the_shared_cases() -> None:
    for op, names in tasks.ELEMENTWISE.items():
        assert {made.name for made in tasks.named(op, names, BFLOAT16, "cpu", 2)} == set(names)
    with pytest.raises(ValueError, match="has no case 7"):
        list(tasks.named("layer_norm", ("7",), BFLOAT16, "cpu", 2))


def test_what_is_called_inside_of_our_backends_is_still_there() -> None:
    """Ways of attention that no argument of the op chooses; without a GPU only their arguments can be compared."""
    from modernbert_kernels import flash

    common = ["ctx", "qkv_T3HK", "cu_seqlens", "key_lengths", "cos_TR", "sin_TR"]
    assert list(inspect.signature(flash._Flash.forward).parameters) == [*common, "max_seqlen", "window", "name"]
    if "triton" in ops.attention.backends:
        function = ops.fused.attention._Attention
        assert list(inspect.signature(function.forward).parameters) == [*common, "window", "rotate"]


# The whole path.


def test_a_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="needs a GPU"):
        next(kernels.run(quick=False, only=[], machine=machine()))
    with pytest.raises(SystemExit, match="only attention and elementwise"):
        next(kernels.run(quick=True, only=["maxsim"], machine=machine()))


def test_nothing_new_is_begun_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ON_CPU", ("a", "b"))
    monkeypatch.setattr(kernels, "TASKS", {name: lambda device, quick: iter([task(), task()]) for name in "ab"})
    found = list(kernels.run(quick=True, only=[], minutes=0, machine=machine()))
    assert [result.workload for result in found] == ["rates", "a", "b"]
    assert found[1].refused == {"the rest": "was not reached within 0 minutes: ask for it with --only a"}
    monkeypatch.setattr(kernels, "MINUTES", 0)
    assert next(iter(list(kernels.run(quick=True, only=["a"], machine=machine()))[1].refused)) == "the rest"


def test_every_workload_has_a_line_and_its_tasks() -> None:
    assert kernels.WORKLOADS.keys() == tasks.TASKS.keys()
    assert all(20 < len(line) < 110 for line in kernels.WORKLOADS.values())


def test_quick_on_a_cpu_takes_the_whole_path(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psutil")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = list(kernels.run(quick=True, only=[]))
    assert {result.workload for result in found} == {"rates", *kernels.ON_CPU}
    assert not any(result.refused for result in found)
    rows = [row for result in found for row in result.rows]
    assert {row["gpu"] for row in rows} == {None}
    ops_seen = {row["what"].split()[0] for row in rows if row["workload"] == "elementwise"}
    assert ops_seen == {*tasks.ELEMENTWISE, "pool"}
    for row in rows:
        assert row["median"] > 0
        if row["workload"] != "rates":
            assert row["max_error"] <= row["tolerance"]
    keys = [(row["what"], row["implementation"]) for row in rows]
    assert len(set(keys)) == len(keys)
    text = tables.markdown(rows)
    assert all(f"### {row['what']}" in text for row in rows)
    assert all(tables.rich_table(result.rows).row_count == len(result.rows) for result in found)


def gpu_row(name: str, median: float, what: str = "geglu, forward", **more: Any) -> dict[str, Any]:
    row = kernels.measure("w", task(Way(name, doubled)), False, machine(0.1), RATES, rounds=1).rows[0]
    state = {"sm_mhz": 1980.0, "memory_mhz": None, "watts": 512.5, "celsius": 50.0}
    machine_ = {"gpu": "Test GPU", "driver": "1.2", "capability": "9.0", "system": "Linux x", "state": state}
    return row | machine_ | {"what": what, "median": median, "date": "2026-01-01"} | more


def test_tables_say_which_way_is_the_fastest() -> None:
    rows = [
        gpu_row("triton", 10.0, settings=f"{tables.CHOSEN}, replays", times_better_than={"liger": 0.8}),
        gpu_row("liger", 8.0, gb_per_s=2000.0, percent_of_copy=46.5, times_better_than={"triton": 1.25}),
        gpu_row("triton", 5.0, "norm, forward", settings=tables.CHOSEN),
    ]
    text = tables.markdown(rows)
    assert "## Test GPU, compute capability 9.0, driver 1.2, Linux x" in text
    assert "| geglu, forward | liger, 8 us | triton, 10 us | 1.25x |" in text
    assert "| norm, forward | triton, 5 us | triton, 5 us | 1.00x |" in text
    assert "| 0.80x | 2,000 | 46.5 % |  |  | 1980 MHz, 512.5 W, 50 °C |" in text
    assert text.count("### ") == 3  # the fastest, and a table each
    assert tables.rich_fastest(rows).row_count == 2


def test_the_committed_table_is_that_of_the_committed_rows() -> None:
    committed = reading.latest(reading.rows_of("kernels"))
    if committed:
        assert (reading.RESULTS / "kernels" / "README.md").read_text("utf-8") == tables.markdown(committed)
        assert all(row["gpu"] for row in committed), "figures of a CPU are no results of this suite"
