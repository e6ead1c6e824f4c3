"""Every suite runs on a CPU with small models and --quick: implementations, right answers, rows."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from local_worker import LocalWorker

import modernbert_kernels as ops
from benchmarks import __main__ as commands
from benchmarks import breakdown, clock, harness, inputs, peers, retrieval, tasks, training, worker
from benchmarks import ops as kernels
from benchmarks.drop_in import PACKED, STOCK
from benchmarks.harness import Result, Run
from benchmarks.peers import PEERS, SDPA
from benchmarks.rows import append, read, row
from benchmarks.worker import OURS, SESSION, Job, Setup
from modernbert import EncoderConfig
from modernbert_kernels.flash import packages

TRAINER = "transformers Trainer"
SMALL = EncoderConfig(
    vocab_size=16_384, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2
)


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "Worker", LocalWorker)
    monkeypatch.setattr(worker, "release", lambda **_: None)  # the objects of all tests are many
    monkeypatch.setattr(retrieval, "THREADS", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(EncoderConfig, "preset", lambda name: SMALL)
    # What depends on how busy the machine is.
    monkeypatch.setattr(harness, "FOREIGN_LIMIT", float("inf"))
    monkeypatch.setattr(clock, "SLOWEST", float("inf"))
    prepare = worker.prepare
    monkeypatch.setattr(worker, "prepare", lambda state, job, window, seconds: prepare(state, job, 0.0, 0.0))


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Results of workloads of a suite."""

    def measured(suite: str, *names: str) -> list[Result]:
        here = Run(suite, tmp_path, quick=True)
        return list(commands.SUITES[suite].measure(here, names or list(commands.SUITES[suite].workloads)))

    return measured


def names_of(result: Result) -> set[str]:
    return {one["implementation"] for one in result.rows}


@pytest.mark.parametrize(
    ("suite", "workloads", "wanted"),
    [
        ("paper-table", ["variable-short"], {OURS, SESSION, SDPA}),
        ("memory", ["forward"], {OURS, SDPA}),
        ("latency", ["query-32"], {OURS, SESSION, SDPA}),
        ("training", ["masked-lm"], {OURS, TRAINER, f"{TRAINER}, sparse"}),
        ("training", ["dense", "late-interaction"], {OURS, "sentence-transformers"}),
        ("colbert", ["queries"], {OURS, SESSION, "sentence-transformers"}),
        ("cpu", ["maxsim-128"], {OURS, "padded einsum, as PyLate"}),
        ("cpu", ["documents-short"], {OURS, SESSION, "sentence-transformers"}),
        ("cpu", ["search-10k"], {OURS}),
        ("drop-in", ["transformers", "multi-vector"], {PACKED, STOCK}),
        ("drop-in", ["transformers-step", "sentence-transformers-step"], {PACKED, STOCK}),
    ],
)
def test_a_suite_has_rows_of_every_implementation_that_is_right(
    run: Any, suite: str, workloads: list[str], wanted: set[str]
) -> None:
    results = run(suite, *workloads)
    assert {result.workload for result in results} == set(workloads or commands.SUITES[suite].workloads)
    for result in results:
        assert wanted <= names_of(result), result.refused
        for one in result.rows:
            assert one["suite"] == suite
            assert one["median"] > 0
            assert set(one["times_better_than"]) == {
                other["implementation"]
                for other in result.rows
                if other is not one
                and (other["figure"], other["pass"]) == (one["figure"], one["pass"])
                and other["tolerance"] is not None
            }


def test_steps_with_other_losses_are_refused(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = training.packed
    monkeypatch.setattr(training, "packed", lambda model, loss_of: packed(model, lambda step: 1.001 * loss_of(step)))
    for result in run("training", "dense"):
        (reason,) = result.refused.values()
        assert "differs from the reference by" in reason
        assert names_of(result) == {"sentence-transformers"}


@pytest.mark.sweep
def test_compiled_graphs_give_the_hidden_states_of_padded_batches(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    inputs.save_seeded(replace(SMALL, num_hidden_layers=2), tmp_path)
    setup, job = Setup(str(tmp_path), "float32", "cpu", 1, True), Job((5, 90, 33), (0, 1, 2))
    (exact,) = [one.answer() for one in peers.alone(setup)(job)]
    for name in ("ONNX Runtime", "OpenVINO"):
        if harness.find_spec(PEERS[name].package or ""):
            for one in PEERS[name].builder(setup)(job):
                assert (one.answer() - exact).abs().max() < 1e-4, one.settings


def test_flash_attention_of_torch_is_called_with_texts_in_a_row(tmp_path: Path, monkeypatch: Any) -> None:
    """A kernel of the specification takes the place of that for CUDA."""

    def exact(q: Any, k: Any, v: Any, at: packages.Varlen) -> tuple[torch.Tensor, None]:
        still = (torch.ones(len(q), q.shape[-1] // 2), torch.zeros(len(q), q.shape[-1] // 2))
        qkv, known = torch.stack([q, k, v], 1), {"rope": still, "window": at.window}
        return ops.attention.reference(qkv, at.cu_seqlens_q, at.max_seqlen, **known), None

    inputs.save_seeded(SMALL, tmp_path)
    monkeypatch.setattr(packages, "usable", lambda device: ("exact",))
    monkeypatch.setitem(packages.PACKAGES, "exact", SimpleNamespace(forward=exact))
    setup, job = Setup(str(tmp_path), "float32", "cpu", 1, True), Job((5, 200, 33), (0, 1, 2))
    (expected,) = [one.answer() for one in peers.alone(setup)(job)]
    (one,) = peers.transformers(setup, attention="flash")(job)
    assert (one.answer() - expected).abs().max() < 1e-4, one.settings


def test_packed_encoders_is_called_with_texts_in_a_row_and_padded(tmp_path: Path, monkeypatch: Any) -> None:
    """The functions of the package by their names and arguments, in plain PyTorch."""

    def forward(model: Any, _: Any, ids: Any, cu_seqlens: Any, longest: int, positions: Any) -> torch.Tensor:
        texts = ids.tensor_split(cu_seqlens[1:-1].long())
        assert max(map(len, texts)) == longest == positions.max() + 1
        return torch.cat([model(input_ids=text[None]).last_hidden_state[0] for text in texts])

    parameters = SimpleNamespace(from_hf_config=lambda config: config)
    package = SimpleNamespace(pack=lambda model, cuda_graph: model, GraphConfig=dict)
    monkeypatch.setitem(sys.modules, "packed_encoders", package)
    monkeypatch.setitem(sys.modules, "packed_encoders.config", SimpleNamespace(ModernBertParams=parameters))
    monkeypatch.setitem(sys.modules, "packed_encoders.forward", SimpleNamespace(packed_forward=forward))
    inputs.save_seeded(SMALL, tmp_path)
    setup, job = Setup(str(tmp_path), "float32", "cpu", 1, True), Job((5, 20, 33), (0, 1, 2))
    (expected,) = [one.answer() for one in peers.alone(setup)(job)]
    variants = list(peers.packed_encoders(setup)(job))
    assert variants[0].settings == "packed_forward, flattened"
    assert all((one.answer() - expected).abs().max() < 1e-4 for one in variants)


@pytest.mark.parametrize("workload", ["attention", "cross-entropy", "maxsim"])
def test_kernels_are_measured_by_pass_and_cache(run: Any, workload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "FEWEST", 32)
    *results, missing = run("kernels", workload)
    assert all({"reference", kernels.CHOSEN} & names_of(one) for one in results), results[0].refused
    # The forward pass of the loss computes its gradients.
    passes = (kernels.FORWARD, kernels.BOTH) if workload == "cross-entropy" else kernels.PASSES
    found = {(one["pass"], one["cache"]) for result in results for one in result.rows}
    assert found == {(which, cache) for which in passes for cache in kernels.CACHES}
    assert all("is not installed" in reason for reason in missing.refused.values())
    for one in results[0].rows:
        assert (one["percent_of_roofline"] is None) == (one["cache"] == kernels.WARM)
        assert one["sensors"] == {}, "without a GPU there are none"


def test_every_workload_of_kernels_has_its_share_of_the_time(tmp_path: Path) -> None:
    here = Run("kernels", tmp_path, quick=True, minutes=1.0, until=0.0)
    results = [one for one in tasks.measure(here, ["maxsim", "elementwise"]) if one.refused.get("the rest")]
    assert [one.workload for one in results] == ["maxsim", "elementwise"]


def test_a_wrong_way_is_refused_and_one_that_is_not_installed_is_left_out() -> None:
    wrong = kernels.Way("wrong", lambda h, activation: h[:, :8] + 1)
    more = (wrong, tasks.peer("gone", "no_such_package", lambda home, *_: home.run()))
    task = kernels.Task("geglu", ops.geglu, (torch.randn(8, 16), "gelu"), more=more)
    rates = clock.Rates(1e9, 1e9)
    result = kernels.timed("w", task, tuple(task.ways()), kernels.FORWARD, clock.this_machine(), rates, rounds=1)
    assert names_of(result) == {"reference"}
    assert "differs from the reference" in result.refused["geglu, forward: wrong"]
    one = result.rows[0]
    moved = one["gb_per_s"] * one["median"] * 1e3  # GB/s by us
    assert moved == pytest.approx(3 * 8 * 8 * 4, rel=1e-3), "two halves are read and one is written"
    assert task.work(kernels.BACKWARD)[1] == 5 * 8 * 8 * 4, "and backward the gradients of both halves are written"


def test_only_what_must_move_is_counted() -> None:
    """A row has T x H x K numbers. Rotary leaves v alone, and its gradient needs no q and k."""
    cpu, row = torch.device("cpu"), 256 * 12 * 64 * 2
    rotary, in_place, *_ = (task for task in tasks.elementwise(cpu, 256) if task.op is ops.rotary)
    tables = sum(rotary.kwargs[name].nbytes for name in ("cos_TR", "sin_TR"))
    assert [rotary.work(which)[1] - tables for which in (kernels.FORWARD, kernels.BACKWARD)] == [6 * row, 6 * row]
    assert in_place.work(kernels.FORWARD)[1] - tables == 4 * row
    (truth,), (rounded,) = kernels.truth_of(in_place, False)
    assert (truth.dtype, rounded.dtype) == (torch.float32, torch.bfloat16), "what is rotated in place, too"
    machine = SimpleNamespace(is_gpu=True, cache=4 * row + tables)
    assert kernels.caches_of(in_place, kernels.FORWARD, machine) == kernels.CACHES
    assert kernels.caches_of(rotary, kernels.FORWARD, machine) == (kernels.COLD,), "the result needs room too"
    attend = tasks.attention_task([256], 12, 64, None, dtype=torch.bfloat16, device=cpu)
    assert [attend.work(which)[1] for which in (kernels.FORWARD, kernels.BACKWARD)] == [4 * row, 8 * row]


def test_too_little_memory_costs_only_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("of a GPU")

    left = iter(range(9))

    def dies(h: torch.Tensor, activation: str) -> torch.Tensor:
        return ops.geglu(h, activation) if next(left, None) is not None else out_of_memory()

    task = kernels.Task("geglu", ops.geglu, (torch.randn(8, 16), "gelu"), more=(kernels.Way("dies", dies),))
    known = tuple(task.ways()), kernels.FORWARD, clock.this_machine(), clock.Rates(1e9, 1e9)
    result = kernels.timed("w", task, *known, rounds=9)
    assert names_of(result) == {"reference"}
    assert result.refused == {"geglu, forward: dies": "fails: OutOfMemoryError: of a GPU"}
    monkeypatch.setattr(kernels, "memory_of", out_of_memory)
    result = kernels.timed("w", task, *known, rounds=1)
    assert not result.rows
    assert result.refused["geglu, forward: reference"] == "fails: OutOfMemoryError: of a GPU"


def test_a_small_call_is_timed_between_fills_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock.Machine, "cache", property(lambda machine: 1 << 20))
    task, machine = kernels.Task("geglu", ops.geglu, (torch.randn(8, 16), "gelu")), clock.this_machine()
    slots, flush = kernels.memory_of(task, kernels.FORWARD, machine, kernels.COLD)
    assert (len(slots), flush and flush().nbytes) == (clock.COPIES, 3 << 20)
    assert len({slot[0][0].data_ptr() for slot in slots}) == clock.COPIES
    assert kernels.memory_of(task, kernels.FORWARD, machine, kernels.WARM)[1] is None
    known = kernels.FORWARD, machine, clock.Rates(1e9, 1e9)
    assert kernels.timed("w", task, tuple(task.ways()), *known, rounds=1).rows[0]["median"] > 0


def test_a_backward_pass_alone_is_the_gradients_of_both() -> None:
    task = kernels.Task("geglu", ops.geglu, (torch.randn(8, 16), "gelu"))
    way, slot = next(task.ways()), kernels.copied(task, True)
    alone, both = (kernels.call_of(task, way, slot, which) for which in (kernels.BACKWARD, kernels.BOTH))
    for _ in range(2):
        assert [torch.equal(a, b) for a, b in zip(alone(), both()[1:], strict=True)] == [True]
    assert not kernels.call_of(task, way, slot, kernels.FORWARD)()[0].requires_grad
    assert kernels.call_of(task, way, slot, kernels.TRAINING)()[0].requires_grad


def test_what_is_made_ready_is_not_timed() -> None:
    def ready(h: torch.Tensor, activation: str) -> tuple[Any, ...]:
        return (ops.geglu(h, activation),)

    task = kernels.Task("geglu", ops.geglu, (torch.randn(8, 16), "gelu"))
    way = kernels.Way("ready", lambda y: y, ready=ready, trains=False)
    known = kernels.truth_of(task, False)
    assert kernels.check(way, task, False, *known).found < 1e-6
    assert kernels.checked(task, [way], kernels.BACKWARD) == ([], {})


def test_flash_attention_is_right_alone_and_rotated_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of the specification takes the place of that for CUDA."""

    def exact(qkv: Any, cu_seqlens: Any, keys: None, longest: int, window: int | None, name: str) -> tuple[Any, None]:
        still = (torch.ones(len(qkv), 32), torch.zeros(len(qkv), 32))
        return ops.attention.reference(qkv, cu_seqlens, longest, rope=still, window=window), None

    monkeypatch.setattr(tasks.packages, "usable", lambda device: ("flash9",))
    monkeypatch.setattr(tasks, "flash_forward", exact)
    task = next(tasks.attention(torch.device("cpu"), 32))
    right, refused = kernels.checked(task, tuple(task.ways()), kernels.FORWARD)
    assert not refused
    names = {way.name for way, _ in right}
    assert {"FlashAttention (flash9) alone", "FlashAttention (flash9), rotated in place", "sdpa"} <= names


def test_every_elementwise_task_is_right_by_the_specification() -> None:
    for task in tasks.elementwise(torch.device("cpu"), 256):
        assert kernels.check(next(task.ways()), task, False, *kernels.truth_of(task, False)).found < 0.01


def test_a_breakdown_has_every_kernel_and_their_sum_next_to_the_whole(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "FEWEST", 64)
    forward, *_, step = run("breakdown", "forward", "step")
    assert not forward.refused
    assert not step.refused
    *parts, whole, cold, warm = forward.rows
    assert whole["implementation"] == "whole"
    assert sum(one["percent_of_pass"] for one in parts) == pytest.approx(
        100 * warm["median"] / whole["median"], rel=0.02
    )
    names = {one["implementation"]: one for one in parts}
    assert {"Wqkv", "attention Wo, added", "Wi", "MLP Wo, added", "local attention", "geglu"} <= set(names)
    assert names["Wqkv"]["launches"] == SMALL.num_hidden_layers
    assert names["Wqkv"]["us_of_pass"] == pytest.approx(3 * names["Wqkv"]["median"], rel=0.01)
    assert warm["median"] == pytest.approx(sum(one["us_of_pass"] for one in parts), rel=0.01)
    assert whole["times_better_than"][warm["implementation"]] > 0
    assert "cold caches" in cold["implementation"]
    found = {one["implementation"] for one in step.rows}
    assert {
        "Wqkv, backward",
        "geglu, forward in training",
        "loss, forward in training",
        "token_ranges",
        "AdamW",
        "clipping",
    } <= found


def test_a_breakdown_of_what_no_cache_holds(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "FEWEST", 64)
    monkeypatch.setattr(breakdown, "caches_of", lambda *_: (kernels.COLD,))
    (forward,) = run("breakdown", "forward")
    *parts, _, cold, warm = forward.rows
    assert cold["median"] == warm["median"]
    assert all(one["cold_us"] == pytest.approx(one["median"], rel=1e-3) for one in parts)
    assert all(one["percent_of_roofline"] > 0 for one in parts)


def test_one_call_is_recorded(run: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "FEWEST", 64)
    name = "geglu 1152 gelu, 64 tokens, backward: reference"
    tasks.profile(name, list(tasks.TASKS), quick=True)
    told = capsys.readouterr().out
    assert f"one call of {name}" in told
    assert "ncu --profile-from-start off" in told
    assert f"python -m benchmarks kernels --only elementwise --profile '{name}' --quick" in told
    with pytest.raises(SystemExit, match=f"Near it are:\n{name}"):
        tasks.profile(f"{name}s", ["elementwise"], quick=True)


def test_a_gpu_says_its_clocks_and_why_they_are_low() -> None:
    told = clock.sensors_of("1755, 2619, 690.12, 71, 0x0000000000000024\n")
    assert told == {
        "sm_mhz": 1755,
        "memory_mhz": 2619,
        "watts": 690.12,
        "celsius": 71,
        "throttled": ["power cap", "heat"],
    }
    assert clock.sensors_of("210, 405, [N/A], 30, 0x0000000000000001")["throttled"] == []
    assert clock.sensors_of("210, 405, 99, 30, [N/A]")["throttled"] == []
    assert clock.sensors_of("") == {}


@pytest.mark.parametrize("known", clock.THROTTLED)
def test_the_gpu_of_torch_is_asked_under_load(known: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script in place of nvidia-smi, which knows one of the two names of the reasons."""
    script = tmp_path / "nvidia-smi"
    script.write_text(f"""#!/bin/sh
case "$*" in "-i GPU-of-torch "*{known}*) echo "1755, 2619, 690, 71, 0x4" ;; *) echo "not a valid field"; exit 2 ;; esac
""")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="of-torch"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls: list[int] = []
    assert clock.sensors(lambda: calls.append(1))["throttled"] == ["power cap"]
    assert calls
    assert clock.output_during(lambda: None, ["sleep", "9"], 0.01) == ""


def test_stores_are_searched_and_indexed(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "QUERIES", 8)
    found, rates = run("retrieval", "search-10k", "index-5000")
    assert names_of(found) == {retrieval.EXACT, retrieval.PREFILTER}, found.refused
    figures = {(one["implementation"], one["figure"]): one["median"] for one in found.rows}
    assert 0 < figures[retrieval.EXACT, "p50"] <= figures[retrieval.EXACT, "p99"]
    assert figures[retrieval.PREFILTER, "recall@10 of exact search"] > 0.9
    assert names_of(rates) == {"index", "bare encoder"}, rates.refused


def test_texts_have_the_lengths_that_were_asked_for(tmp_path: Path) -> None:
    lengths, default = (3, 8, 100), inputs.default()
    assert tuple(default.tokenize_documents(inputs.of_lengths(lengths)).batch.lengths) == lengths
    inputs.write_corpus(tmp_path / "c.jsonl", 200)
    passages = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text("utf-8").splitlines()]
    tokens = default.tokenize_documents([f"{one['title']} {one['text']}" for one in passages], truncate=False).batch
    assert tokens.num_tokens / 200 == pytest.approx(retrieval.TOKENS, rel=0.1)
    queries = inputs.queries(20)
    assert default.tokenize_queries(queries).batch.num_tokens / 20 == pytest.approx(30, rel=0.1)
    assert not any(query in one["text"] for query in queries for one in passages)
    assert sum(inputs.SETS["variable-short"].first(8192)) / 8192 == pytest.approx(256, abs=2)


def test_all_runs_every_suite_in_its_process_and_writes_a_report(tmp_path: Path, monkeypatch: Any) -> None:
    def pretended(name: str, minutes: float, rows: Path, quick: bool) -> list[str]:
        return ["sh", "-c", "exit 3" if name == "memory" else f"echo measured {name}"]

    monkeypatch.setattr(commands, "suite_command", pretended)
    commands.run_all(tmp_path, 1.0, quick=True)
    outcomes = (tmp_path / "suites.txt").read_text().splitlines()
    assert "- memory: failed with status 3" in outcomes
    assert outcomes.count("- training: done") == 1
    assert len(outcomes) == sum(suite.weight > 0 for suite in commands.SUITES.values())
    assert "- memory: failed" in (tmp_path / "README.md").read_text()


def test_a_suite_writes_rows_and_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(here: harness.Run, names: list[str]) -> list[Result]:
        made = row([1.0], suite="paper-table", workload="fixed-512", what="w", implementation=OURS, unit="ms")
        return [Result("fixed-512", [made], {"b": "differs"})]

    monkeypatch.setitem(commands.SUITES, "paper-table", commands.SUITES["paper-table"]._replace(measure=measure))
    monkeypatch.setattr("sys.argv", ["benchmarks", "paper-table", "--quick", "--output", str(tmp_path)])
    commands.main()
    good, bad = read(tmp_path)
    assert good["median"] == 1.0
    assert (bad["kind"], bad["implementation"], bad["reason"]) == ("refused", "b", "differs")
    for percent, status in ((0.9, 0), (1.1, 1)):
        folder = tmp_path / str(percent)
        append([good | {"median": good["median"] / percent}], folder / "rows" / "of-all.jsonl")
        monkeypatch.setattr("sys.argv", ["benchmarks", "paper-table", "--quick", "--compare", str(folder)])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        assert ended.value.code == status
    monkeypatch.setattr("sys.argv", ["benchmarks", "breakdown"])
    with pytest.raises(SystemExit, match="needs a GPU, and there is none here"):
        commands.main()
    for wrong in (["--only", "no-such"], ["--threshold", "nan"], ["--threshold=-1"], ["--minutes", "soon"]):
        monkeypatch.setattr("sys.argv", ["benchmarks", "paper-table", "--quick", *wrong])
        with pytest.raises(SystemExit):
            commands.main()


def test_a_loop_lasts_its_window_and_slow_calls_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = clock.Machine(torch.device("cpu"), lambda work: (work(), clock.Reading(0.01, 0.0))[1], 0.1)
    calls: list[int] = []
    made = clock.loop([lambda: calls.append(1), lambda: calls.append(2)], machine)
    assert (made.calls, made.how) == (10, "single calls")
    calls.clear()
    made.run()
    assert calls == [1, 2] * 5
    slow = machine._replace(read=lambda work: clock.Reading(1.0, 0.0))
    monkeypatch.setattr(clock, "SLOWEST", 0.25)
    with pytest.raises(clock.Refused, match="takes 1 s a call"):
        clock.loop([lambda: None], slow)
    assert worker.memory("VmRSS") > 1e6


def test_between_two_uses_of_a_copy_three_times_the_cache_is_touched() -> None:
    for nbytes, moved in ((100, 200), (1, 2), (10**10, 2), (10**10, 10**11), (0, 0)):
        count, fill = clock.copies_beyond_cache(nbytes, moved, 1000)
        assert 2 <= count <= clock.COPIES
        assert (count - 1) * moved // 2 + fill >= 3000
        assert count * nbytes <= clock.COPIED or count == 2
    assert clock.copies_beyond_cache(100, 200, 1000) == (31, 0)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_fills_the_cache_does_not_count(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph of CUDA is a function here that makes the calls."""
    passed, log = [0.0], []
    monkeypatch.setattr(clock, "never_waits", lambda call: True)
    monkeypatch.setattr(
        clock, "capture", lambda calls, turns: SimpleNamespace(replay=lambda: clock.repeat(turns, *calls))
    )

    def call(name: str, seconds: float) -> Any:
        return lambda: (log.append(name), passed.__setitem__(0, passed[0] + seconds))

    def read(work: Any) -> clock.Reading:
        before = passed[0]
        work()
        return clock.Reading(passed[0] - before, 0.0)

    machine = clock.Machine(torch.device(kind), read, 0.03)
    made = clock.loop([call("a", 0.01), call("b", 0.01)], machine, call("fill", 7.0))
    log.clear()
    assert made.seconds(read(made.run)) == pytest.approx(0.01)
    assert "".join(log) == "abfill" * 2
    assert (made.calls, made.how) == (4, "single calls" if kind == "cpu" else "replays of a graph of 4 calls")


def test_without_a_graph_single_calls_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(calls: Any, turns: int) -> Any:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(clock, "never_waits", lambda call: True)
    monkeypatch.setattr(clock, "capture", capture)
    machine = clock.Machine(torch.device("cuda"), lambda work: (work(), clock.Reading(0.01, 0.0))[1], 0.05)
    made = clock.loop([lambda: None], machine)
    assert (made.calls, made.how) == (5, "single calls, as a graph fails: operation not permitted")
