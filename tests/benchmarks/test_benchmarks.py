"""The harness refuses what it must and compares what belongs together; its tables say what the rows say."""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import rows
from benchmarks.cpu import contenders, exported, int8, int8_retrieval, workloads
from benchmarks.cpu import suite as cpu
from benchmarks.harness import (
    FOREIGN_LIMIT,
    Contender,
    Measured,
    Reading,
    Sample,
    WrongOutput,
    check,
    interleave,
    measure,
    read_clocks,
    take,
)
from benchmarks.inputs import batched, paper_lengths, random_ids, real_rows
from benchmarks.report import reading, readme, tables
from benchmarks.retrieval import figures, process, search, stores, synthetic
from benchmarks.retrieval import suite as retrieval
from benchmarks.seeded import save_seeded
from modernbert import ColBERT, Encoder, EncoderConfig, pack
from modernbert.encoder import Linear
from modernbert.retrieval import Store

RIGHT = torch.tensor([1.0, 2.0])
# The weights that whole models are compared with.
TINY_SHAPE = replace(
    EncoderConfig.preset("ettin-17m"), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48
)


class Clocks:
    """Stands for `read_clocks`: works and gives the next reading of a script (seconds, foreign percent)."""

    def __init__(self, *script: tuple[float, float]) -> None:
        self.script = list(script)

    def __call__(self, work) -> Reading:
        work()
        return Reading(*self.script.pop(0)) if self.script else Reading(1.0, 0.0)


def contender(name, output=RIGHT, settings="", log=None) -> Contender:
    def run():
        if log is not None:
            log.append(name)
        return output

    return Contender(name, settings, run, lambda returned: returned)


def measured(name, *seconds) -> Measured:
    return Measured(contender(name), 0.0, 1, tuple(Sample(one, 0.0) for one in seconds))


def test_wrong_output_is_refused_with_its_size():
    with pytest.raises(WrongOutput, match=r"differs from the reference by 0\.5"):
        check(contender("a", RIGHT + torch.tensor([0.0, 0.5])), RIGHT, 1e-4)


@pytest.mark.parametrize("bad", [torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0, 3.0])])
def test_nan_and_other_shapes_are_refused(bad):
    with pytest.raises(WrongOutput):
        check(contender("a", bad), RIGHT, 1e9)


def test_a_right_answer_is_accepted_up_to_the_tolerance():
    assert check(contender("a", RIGHT + 0.25), RIGHT, 0.25) == 0.25
    with pytest.raises(WrongOutput):
        check(contender("a", RIGHT + 0.25), RIGHT, 0.2499)


def test_a_refused_contender_gets_no_time_and_a_reason():
    log: list[str] = []
    contenders = [contender("good"), contender("bad", RIGHT + 1, log=log)]
    done, refused = measure(contenders, RIGHT, 1e-4, rounds=2, window=0.0, read=Clocks())
    assert [one.contender.implementation for one in done] == ["good"]
    assert "differs" in refused["bad"]
    assert log == ["bad"]  # the check, and never again


def test_settings_are_chosen_by_their_median_call_not_by_a_lucky_one():
    settings = {"steady": RIGHT, "lucky once": RIGHT}
    contenders = [contender("peer", output, name) for name, output in settings.items()]
    clocks = Clocks(*[(0.2, 0.0)] * 5, (0.3, 0.0), (0.1, 0.0), (0.3, 0.0))
    done, _ = measure(contenders, RIGHT, 1e-4, rounds=1, window=1.6, read=clocks)
    assert [one.contender.settings for one in done] == ["steady"]


def test_the_fastest_right_settings_of_an_implementation_are_taken():
    """Of three settings the fastest answers wrongly, so the second fastest stands for the implementation."""
    settings = {"slow": RIGHT, "fast": RIGHT, "fastest, wrong": RIGHT + 1}
    contenders = [contender("peer", output, name) for name, output in settings.items()]
    clocks = Clocks((2.0, 0.0), (2.0, 0.0), (1.0, 0.0), (1.5, 0.0))
    done, refused = measure(contenders, RIGHT, 1e-4, rounds=1, window=0.0, read=clocks)
    assert [one.contender.settings for one in done] == ["fast"]
    assert not refused


def test_rounds_take_turns_and_every_sample_is_warmed_up():
    log: list[str] = []
    contenders = [contender(name, log=log) for name in "ABC"]
    interleave(contenders, dict.fromkeys("ABC", 1), rounds=3, retries=0, read=Clocks())
    assert "".join(log) == "AABBCC" + "BBCCAA" + "CCAABB"


def test_fast_contenders_are_called_for_a_whole_window():
    done, _ = measure([contender("a")], RIGHT, 1e-4, rounds=1, window=2.0, read=Clocks((0.3, 0)))
    assert done[0].calls == 7  # 2.0 / 0.3, rounded up


def test_a_window_is_summarised_by_its_median_call(monkeypatch):
    ticks = iter([0, 1, 10, 13, 20, 22])  # calls of 1, 3 and 2 seconds
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    assert take(lambda: None, 3, Clocks((99.0, 4.0))) == Sample(2, 4.0)


def test_a_sample_on_a_busy_machine_is_repeated():
    busy = FOREIGN_LIMIT + 0.1
    clocks = Clocks((9.0, busy), (8.0, busy), (1.0, FOREIGN_LIMIT), (2.0, 0.0))
    taken = interleave([contender("a")], {"a": 1}, rounds=2, retries=3, read=clocks)
    assert taken["a"] == [Sample(1.0, FOREIGN_LIMIT), Sample(2.0, 0.0)]


def test_retries_are_bounded_and_the_quietest_attempt_is_kept_as_not_clean():
    log: list[str] = []
    clocks = Clocks((1.0, 50.0), (2.0, 30.0), (3.0, 40.0), (4.0, 90.0))
    one = contender("a", log=log)
    taken = interleave([one], {"a": 1}, rounds=2, retries=2, read=clocks)
    assert taken["a"] == [Sample(2.0, 30.0), Sample(4.0, 90.0)]
    assert len(log) == 8  # three attempts and one, each warmed up
    kept = Measured(one, 0.0, 1, tuple(taken["a"]))
    assert not kept.clean
    assert kept.foreign == 90.0


def test_factors_compare_samples_of_the_same_round():
    """The machine was six times slower in one round: most rounds say 2, the medians alone do not."""
    ours, peer = measured("ours", 1.0, 6.0, 1.0, 8.0), measured("peer", 2.0, 12.0, 2.0, 4.0)
    assert ours.times_faster_than(peer) == 2.0
    assert ours.median == 3.5


def test_clocks_see_work_of_this_process_as_its_own():
    pytest.importorskip("psutil")
    reading = read_clocks(lambda: torch.randn(400, 400) @ torch.randn(400, 400))
    assert reading.seconds > 0
    assert reading.foreign >= 0


def test_lengths_are_those_of_the_paper():
    lengths = paper_lengths(8192)
    assert (min(lengths), max(lengths)) >= (32, 400)
    assert max(lengths) <= 512
    assert abs(sum(lengths) / 8192 - 256) < 2
    assert lengths == paper_lengths(8192)


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_real_rows_undo_batching_and_sorting(size, by_length):
    sequences = random_ids([3, 1, 7, 7, 2])
    batches = batched(sequences, size, by_length=by_length)
    outputs = [ids[..., None].float() for ids, _, _ in batches]
    expected = [token for ids in sequences for token in ids]
    assert real_rows(outputs, batches)[:, 0].tolist() == expected
    padded = [mask is not None and not bool(mask.all()) for _, mask, _ in batches]
    assert padded == [len({len(sequences[row]) for row in places}) > 1 for _, _, places in batches]


def test_every_way_of_running_a_model_returns_the_same_rows(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    save_seeded(TINY_SHAPE, tmp_path)
    sequences = random_ids([70, 3, 140, 3, 1])
    expected = cpu.alone(tmp_path, sequences)
    assert expected.shape == (217, 32)
    ways = list(contenders.transformers_batchings(tmp_path, sequences, sizes=(2,)))
    assert len(ways) == 3
    for one in [*ways, contenders.ours(tmp_path, sequences)]:
        check(one, expected, cpu.TOLERANCE)


def test_exported_models_return_the_same_rows_and_int8_ones_nearly(tmp_path, monkeypatch):
    """The legacy exporter only, because the other takes half a minute."""
    for package in ("transformers", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    monkeypatch.setattr(exported, "exporters", lambda: ("legacy",))
    save_seeded(replace(TINY_SHAPE, hidden_size=128, intermediate_size=128), tmp_path)
    sequences = random_ids([70, 70, 140])
    expected, batches = cpu.alone(tmp_path, sequences), batched(sequences, 2, by_length=True)
    ways = [*exported.onnx_runtime(tmp_path, batches, "", 1), *exported.openvino(tmp_path, batches, "", 1)]
    padded = [*exported.openvino(tmp_path, batched(sequences, 3), "", 1)]
    # ONNX Runtime spinning or not; several batches: for latency and for throughput; padded: from ONNX.
    assert (len(ways), len(padded)) == (6, 1)
    for one in [*ways, *padded]:
        check(one, expected, cpu.TOLERANCE)
    inexact = [*exported.onnx_runtime(tmp_path, batches, "", 1, int8=True)]
    inexact += exported.openvino(tmp_path, batches[:1], "", 1, int8=True, sources=("onnx",))
    for one in [*inexact, int8.ours(tmp_path, sequences)]:
        assert one.implementation.endswith(", int8")
        output = one.result(one.run())
        cosine = torch.cosine_similarity(output, expected[: len(output)], dim=-1)
        assert 0.98 < cosine.min() < 0.99999, one
        with pytest.raises(WrongOutput):
            check(one, expected[: len(output)], cpu.TOLERANCE)


def test_a_graph_that_compiles_returns_the_same_rows(tmp_path, monkeypatch):
    """Not compiled here: torch.compile is only looked at, and its failure becomes a reason."""
    pytest.importorskip("transformers")
    save_seeded(TINY_SHAPE, tmp_path)
    sequences = random_ids([9])
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not [*contenders.transformers_compiled(tmp_path, batched(sequences, 1))]
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    (one,) = contenders.transformers_compiled(tmp_path, batched(sequences, 1))
    check(one, cpu.alone(tmp_path, sequences), cpu.TOLERANCE)

    def fails(**inputs):
        raise torch._dynamo.exc.TorchDynamoException("no such header")

    monkeypatch.setattr(torch, "compile", lambda model, **options: fails)
    (one,) = contenders.transformers_compiled(tmp_path, batched(sequences, 1))
    with pytest.raises(WrongOutput, match="does not compile: no such header"):
        one.run()


def test_int8_ranks_nobody_who_is_exact_and_exact_ones_keep_their_tolerance(monkeypatch):
    """An int8 row is slower or faster than all; a float32 row only than float32 rows. Errors stand in the rows."""
    near = torch.tensor([[1.0, 2.1]])
    right = torch.tensor([[1.0, 2.0]])
    contenders_ = [
        workloads.exact(contender("modernbert, float32", right), right),
        workloads.exact(contender("another", near), right),
        contender("modernbert, int8", near),
        contender("ONNX Runtime, int8", right * torch.nan),
    ]
    workload = workloads.Workload("in words", contenders_, right, tolerance=None)
    monkeypatch.setattr(cpu, "measure", lambda *given, **settings: measure(*given, **settings, read=Clocks()))
    result = cpu.timed("int8-short-32", workload, quick=True)
    rows_ = {row["implementation"]: row for row in result.rows}
    assert set(rows_) == {"modernbert, float32", "modernbert, int8"}
    assert rows_["modernbert, float32"]["times_better_than"] == {}
    assert rows_["modernbert, float32"]["dtype"] == "float32"
    assert rows_["modernbert, float32"]["tolerance"] == cpu.TOLERANCE
    mine = rows_["modernbert, int8"]
    assert mine["times_better_than"] == {"modernbert, float32": 1.0}
    assert (mine["dtype"], mine["tolerance"], mine["max_error"]) == ("int8", None, 0.1)
    assert mine["cosine"] == mine["worst_cosine"] == pytest.approx(0.9998, abs=1e-4)
    assert "cosine" in mine["settings"]
    assert "0.1" in result.refused["another"]
    assert "nan" in result.refused["ONNX Runtime, int8"]


def test_int8_linears_replace_all_of_an_encoder_and_leave_the_original():
    encoder = Encoder.from_config(EncoderConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)).eval()
    with torch.no_grad():
        encoder.layers[0].mlp.Wi.weight[3] = 0.0  # an output that has died has no scale
    small = int8.with_int8(encoder)
    assert sum(isinstance(module, int8.Int8Linear) for module in small.modules()) == 8
    assert not any(isinstance(module, Linear) for module in small.modules())
    assert sum(isinstance(module, Linear) for module in encoder.modules()) == 8
    with torch.inference_mode():
        batch = pack([[5, 6, 7], [8]])
        assert torch.cosine_similarity(small(batch), encoder(batch), dim=-1).min() > 0.99


def test_the_cost_of_int8_is_measured_on_judged_queries_and_on_the_demo(tmp_path, monkeypatch):
    pytest.importorskip("ir_measures")
    folder = tmp_path / "tiny"
    (folder / "qrels").mkdir(parents=True)
    texts = {f"d{i}": text for i, text in enumerate(["red fox", "blue whale", "green tea", "old oak"] * 4)}
    documents = [{"_id": name, "title": "A", "text": text} for name, text in texts.items()]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)))
    asked = [{"_id": f"q{i}", "text": text} for i, text in enumerate(["fox", "whale", "nobody judged this"])]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td0\t1\nq1\td9\t1\n")
    assert int8_retrieval.folders(tmp_path) == int8_retrieval.folders(folder) == [folder]
    one = int8_retrieval.read(folder)
    assert (one.documents["d1"], [*one.queries]) == ("A blue whale", ["q0", "q1"])
    model = ColBERT.default()
    ways = {workloads.FLOAT32: model, "modernbert, int8": int8_retrieval.with_encoder(model, model.encoder)}
    found = int8_retrieval.measured(one, ways)
    assert [(row["unit"], row["dtype"]) for row in found] == [
        ("nDCG@10", "float32"),
        ("recall@10 of float32's", "float32"),
        ("nDCG@10", "int8"),
        ("recall@10 of float32's", "int8"),
    ]
    ndcg = {row["implementation"]: row["median"] for row in found if row["unit"] == "nDCG@10"}
    # Of four equal documents the first comes first: the one for the fox, and the one for the whale is third.
    assert ndcg == pytest.approx({workloads.FLOAT32: 0.75, "modernbert, int8": 0.75})
    assert all(row["median"] == 1 for row in found if row["unit"] != "nDCG@10")
    halves = [{"a": 1.0, "b": 0.5}, {"c": 1.0, "d": 0.5}]
    assert int8_retrieval.agreement([{"a": 1.0, "x": 0.5}, {"y": 1.0, "z": 0.5}], halves) == [0.5, 0.0]
    with pytest.raises(FileNotFoundError, match="holds no set"):
        int8_retrieval.folders(tmp_path / "tiny" / "qrels")
    assert int8_retrieval.demo(passages=7).qrels is None


def test_nothing_is_begun_after_the_minutes():
    results = [*cpu.run(quick=True, only=["variable", "maxsim-48"], minutes=-1)]
    assert [result.workload for result in results] == ["variable"]
    assert "was not reached within -1 minutes" in results[0].refused["the rest"]


def test_every_workload_of_the_cpu_is_explained():
    assert set(cpu.WORKLOADS) == {*workloads.BUILDERS, cpu.MEMORY, cpu.RETRIEVAL}


def test_every_way_of_scoring_returns_the_same_scores():
    torch.manual_seed(0)
    query = torch.nn.functional.normalize(torch.randn(5, 8), dim=-1)
    documents = torch.nn.functional.normalize(torch.randn(200, 8), dim=-1).split([90, 60, 50])
    expected = torch.stack([(query.double() @ document.double().T).amax(1).sum() for document in documents])
    ways = [
        contenders.ours_maxsim(query, documents),
        *contenders.padded_maxsim(query, documents, chunks=(2,)),
    ]
    assert len(ways) == 4
    for one in ways:
        check(one, expected, cpu.TOLERANCE)


def make_row(implementation, median, *, workload="short-16", date="2025-01-02", clean=True, factors=None, **changes):
    row = rows.row(
        workload=workload,
        what=f"{workload} in words",
        implementation=implementation,
        settings="some",
        unit="ms",
        values=[median * 0.9, median, median * 1.2],
        max_error=1.234e-5,
        tolerance=1e-4,
        foreign_percent=1.0,
        clean=clean,
        times_better_than=factors,
        goals={"transformers, one by one": 1.5} if implementation == contenders.OURS else None,
    )
    machine = {
        "cpu": "Test CPU",
        "threads": 2,
        "system": "Linux x",
        "date": date,
        "commit": "c" * 40,
        "dirty": False,
    }
    return row | machine | changes


FACTORS = {
    "transformers, one by one": 2.0,
    "transformers, as they come": 3.0,
    "ONNX Runtime": 0.5,
    "other": 4.0,
}
RUN = [
    make_row("modernbert", 10.0, factors=FACTORS),
    make_row("transformers, one by one", 20.0),
    make_row("transformers, as they come", 30.0, clean=False),
    make_row("ONNX Runtime", 5.0),
    make_row("other", 40.0),
]


def test_a_row_carries_what_is_needed_to_judge_and_repeat_it():
    row = RUN[0]
    assert (row["median"], row["min"], row["max"], row["samples"]) == (10.0, 9.0, 12.0, 3)
    assert row["kind"] == "measured"
    assert row["max_error"] == 1.2e-5
    assert row["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert {
        "command",
        "commit",
        "dirty",
        "date",
        "cpu",
        "threads",
        "clean",
        "foreign_percent",
        "dtype",
    } <= set(row)


@pytest.mark.parametrize("option", ["--output", "--work"])
@pytest.mark.parametrize("folder", [["{}", "/some/where"], ["{}=/some/where"], []])
def test_the_command_of_a_row_names_no_path(option, folder):
    given = [part.format(option) for part in folder]
    assert rows.without_folders(["cpu", *given, "--only", "variable"]) == ["cpu", "--only", "variable"]


def test_rows_come_back_from_files_in_the_order_of_their_dates(tmp_path):
    rows.append([make_row("modernbert", 1.0, date="2025-02-02")], tmp_path / "a.jsonl")
    rows.append(RUN[:1], tmp_path / "b.jsonl")
    rows.append(RUN[1:2], tmp_path / "b.jsonl")
    assert rows.read(tmp_path) == [*RUN[:2], make_row("modernbert", 1.0, date="2025-02-02")]


def test_the_newest_run_of_a_workload_replaces_the_older_as_a_whole():
    newer = [make_row("modernbert", 11.0, date="2025-03-03", factors={})]
    other_machine = [make_row("modernbert", 12.0, cpu="Another CPU")]
    other_workload = [make_row("modernbert", 13.0, workload="fixed-512")]
    kept = reading.latest([*newer, *RUN, *other_machine, *other_workload])
    assert sorted(row["median"] for row in kept) == [11.0, 12.0, 13.0]


def test_the_readme_line_names_the_fastest_transformers_and_marks_unclean_rows():
    table = readme.readme_table(RUN)
    line = next(line for line in table.splitlines() if "short-16 in words" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == [
        "**10 ms**",
        "20 ms (2.00x)",
        "5 ms (0.50x)",
        "other 40 ms (4.00x)",
        "`python -m benchmarks cpu --only short-16`",
    ]
    slower = [row | {"clean": False} for row in RUN]
    assert "**10 ms †**" in readme.readme_table(slower)


def test_the_full_table_has_every_row_with_factor_and_goal():
    text = tables.markdown(RUN)
    assert "## Test CPU, 2 threads, Linux x" in text
    assert re.search(r"\| transformers, one by one \| 20 ms \| .* \| 2\.00x \(goal 1\.5x\) \|", text)
    assert "| transformers, as they come | 30 ms † |" in text
    assert f"commit {'c' * 10}," in text
    assert all(f"| {row['implementation']} |" in text for row in RUN)


TINY = stores.Sizes(index=12, search=30, scale=(20, 30), synthetic=25, memory=(12, 20), start=12, queries=4, rounds=1)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A bench of tiny stores, which are built and searched in this process."""

    def in_this_process(function, limit_mb=None, **arguments):
        options = {"limit_mb": None} if function is process.build else {}
        return function(**arguments, **options), 123.0

    monkeypatch.setattr(stores, "watched", in_this_process)
    monkeypatch.setattr(stores, "THREADS", 1)
    return stores.Bench(tmp_path, TINY)


def test_passages_and_queries_have_the_length_that_is_promised(tmp_path):
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    synthetic.write_corpus(first, 300, 100)
    synthetic.write_corpus(second, 300, 100)
    assert first.read_bytes() == second.read_bytes()
    records = [json.loads(line) for line in first.read_text("utf-8").splitlines()]
    texts = [f"{record['title']} {record['text']}" for record in records]
    assert len(set(texts)) == len({record["_id"] for record in records}) == 300
    model = synthetic.default()
    assert set(model.tokenize_documents(texts, truncate=False).batch.lengths) == {100}
    queries = synthetic.queries(100, 32)
    assert len(set(queries)) == 100
    assert set(model.encode_queries(queries).offsets.diff().tolist()) == {32}
    sentences, held_out, _ = synthetic.demo()
    held_out = {sentence for text in held_out for sentence in re.split(r"(?<=[.!?])\s+", text)}
    assert not held_out & {sentence for article in sentences.values() for sentence in article}


def test_a_length_that_words_do_not_add_up_to_is_refused(tmp_path, monkeypatch):
    sentences, held_out, cost = synthetic.demo()
    wrong = synthetic.Demo(sentences, held_out, {word: tokens + 1 for word, tokens in cost.items()})
    monkeypatch.setattr(synthetic, "demo", lambda: wrong)
    with pytest.raises(ValueError, match="tokens instead of 100"):
        synthetic.write_corpus(tmp_path / "corpus.jsonl", 3, 100)
    assert not (tmp_path / "corpus.jsonl").exists()


def test_words_are_left_out_where_they_no_longer_fit():
    cost = {"a": 1, "bb": 2, "ccc": 3, ".": 0}
    assert synthetic.fill(["a", ".", "ccc", "bb", "a", "a"], 4, cost) == "a . ccc"
    assert synthetic.fill(["bb", "ccc", "a", "bb"], 3, cost) == "bb a"
    assert synthetic.fill(["ccc"], 2, cost) is None


def test_a_synthetic_has_every_token_and_the_vectors_of_its_model(bench):
    folder = bench.store(30, 48)
    model = synthetic.synthetic(48)
    with Store(folder, model) as store:
        assert (store.dtype, store.dim, len(store)) == ("fp16", 48, 30)
        (numbers, passages, vectors), *more = store.batches()
    assert not more
    assert len(numbers) == 30
    assert set(vectors.offsets.diff().tolist()) == {100}
    for passage, stored in zip(passages[::7], list(vectors)[::7], strict=True):
        alone = model.encode_documents([passage.content]).values
        torch.testing.assert_close(stored, alone, atol=2**-11, rtol=0)


def test_synthetic_vectors_are_as_alike_as_those_of_the_default_model(bench):
    texts = [json.loads(line)["text"] for line in bench.corpus(30).read_text("utf-8").splitlines()]
    means = []
    for model in (synthetic.default(), synthetic.synthetic(48)):
        ids = model.tokenize_documents(texts).batch.input_ids
        vectors = model.encode_documents(texts)
        text = torch.repeat_interleave(torch.arange(30), vectors.offsets.diff())
        same_id, same_text = ids[:, None] == ids, text[:, None] == text
        real = (ids > 2) & (ids < 8192)  # special tokens stand for nothing
        pairs = real[:, None] & real & ~torch.eye(len(ids), dtype=torch.bool)
        cosines = vectors.values @ vectors.values.T
        kinds = [same_id & same_text, same_id & ~same_text, ~same_id & same_text, ~same_id & ~same_text]
        means.append(torch.stack([cosines[kind & pairs].mean() for kind in kinds]))
    torch.testing.assert_close(means[0], means[1], atol=0.06, rtol=0)


def test_percentiles_are_those_of_each_pass():
    passes = [{"seconds": [i / 1000 for i in range(101, 0, -1)]}, {"seconds": [2.0] * 100}]
    assert figures.percentiles(passes, 50) == pytest.approx([51, 2000])
    assert figures.percentiles(passes, 99) == pytest.approx([100, 2000])


def test_recall_and_differences_compare_what_both_searches_found():
    exact = [[(1, 9.0), (2, 8.0)], [(3, 7.0), (4, 6.0)]]
    found = [[(2, 8.5), (9, 1.0)], [(4, 6.0), (3, 7.0)]]
    assert figures.recall(exact, found) == 0.75
    assert figures.score_difference(exact, found) == 0.5
    assert figures.score_difference(exact, exact) == 0


def test_a_search_that_is_wrong_is_refused(bench, monkeypatch):
    pytest.importorskip("psutil")
    found = bench.search(30, 48, prefilter=False)[0]["found"]
    right = figures.float64_difference(bench.store(30, 48), 48, synthetic.queries(4, 32), found)
    assert right < 1e-5
    found[1][3] = (found[1][3][0], found[1][3][1] + 0.01)
    result = search.search_exact(bench, "search-10k")
    assert "differs from the reference by 0.01" in result.refused["30 passages, synthetic vectors of width 48, exact"]
    assert {row["kind"] for row in result.rows} == {"measured"}


def test_the_quietest_pass_is_kept_and_a_quiet_one_ends_the_trying():
    asked = iter([[1.0], [2.0], [3.0], [4.0]])
    busy = [(9.0, FOREIGN_LIMIT + 30), (9.0, FOREIGN_LIMIT + 10), (9.0, FOREIGN_LIMIT + 20)]
    assert process.quiet_pass(lambda: next(asked), 2, Clocks(*busy)) == ([2.0], FOREIGN_LIMIT + 10)
    assert process.quiet_pass(lambda: next(asked), 2, Clocks((9.0, 0.0))) == ([4.0], 0.0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory of a process is looked up in /proc")
def test_memory_is_that_of_the_process_without_its_files(tmp_path):
    size = 64 << 20
    file = tmp_path / "mapped"
    file.write_bytes(bytes(size))
    before = process.anonymous_mb(os.getpid())
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert not any(mapped[::4096])
        assert process.anonymous_mb(os.getpid()) - before < 10
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as private:
        private.write(bytes(size))
        assert 54 < process.anonymous_mb(os.getpid()) - before < 74
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert process.anonymous_mb(ended.pid) == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory of a process is looked up in /proc")
def test_a_store_is_built_in_a_process_that_is_watched_and_bounded(tmp_path):
    synthetic.write_corpus(tmp_path / "corpus.jsonl", 5, 100)
    asked = {"corpus": str(tmp_path / "corpus.jsonl"), "width": 48, "prefilter": True, "threads": 1}
    built, peak = process.watched(process.build, folder=str(tmp_path / "store"), limit_mb=4096, **asked)
    assert built["passages"] == 5
    assert 50 < peak < 1000
    with pytest.raises(subprocess.CalledProcessError):
        process.watched(process.build, folder=str(tmp_path / "other"), limit_mb=64, **asked)


@pytest.mark.parametrize("workload", [name for name in retrieval.WORKLOADS if name != "cold-start"])
def test_every_workload_of_retrieval_gives_complete_rows(bench, workload):
    pytest.importorskip("psutil")
    result = retrieval.BUILDERS[workload](bench, workload)
    assert result.workload == workload
    assert not result.refused
    assert {(row["suite"], row["workload"]) for row in result.rows} == {("retrieval", workload)}
    for row in result.rows:
        assert row["median"] > 0
        assert row["kind"] == ("synthetic vectors" if "synthetic" in row["corpus"] else "measured")
        assert {"figure", "unit", "command", "commit", "versions", "cpu", "threads", "clean"} <= row.keys()
        assert (row["bar"], row["met"]) == (None, None)  # these sizes have to reach nothing
    keys = [(row["corpus"], row["implementation"], row["figure"]) for row in result.rows]
    assert len(set(keys)) == len(keys)
    for corpus, way, figure in keys:
        assert (corpus, way, "p99") in keys or figure != "p50"
    if workload == "search-10k-prefilter":
        real = {figure: row["median"] for row, (corpus, _, figure) in zip(result.rows, keys, strict=True)}
        assert real["recall@10 of exact search"] == 1  # of 30 passages all are candidates
        synthetic = {row["figure"] for row in result.rows if row["kind"] == "synthetic vectors"}
        assert synthetic == {"p50", "p99", "peak memory"}
    if workload == "search-scale":
        assert not bench.folder(TINY.synthetic, 48).exists()


def test_cold_start_subtracts_within_a_round(bench, monkeypatch):
    times = {"import torch": (1.0, 5.0, 1.0), "modernbert search": (2.0, 7.0, 4.0)}
    times["modernbert --help"] = (0.4, 0.5, 0.4)
    samples = {name: [Sample(one, 0.0) for one in seconds] for name, seconds in times.items()}
    monkeypatch.setattr(retrieval, "interleave", lambda contenders, *_: samples)
    found = {(row["implementation"], row["figure"]): row for row in retrieval.cold_start(bench, "cold-start").rows}
    above = found["modernbert search", "above import torch"]
    assert (above["median"], above["min"], above["max"]) == (2.0, 1.0, 3.0)
    assert found["modernbert --help", "time"]["median"] == 0.4


def make_figure(tmp_path, figure="p50", values=(80.0,), sizes=stores.FULL, way="exact", **more):
    bench = stores.Bench(tmp_path, sizes)
    settings = {"workload": "search-10k", "what": "search in words", "corpus": "10 passages", "unit": "ms"}
    machine = {"cpu": "Test CPU", "threads": 2, "system": "Linux x", "commit": "c" * 40, "date": "2025-01-02"}
    return bench.row(figure=figure, values=values, implementation=way, **settings, **more) | machine


@pytest.mark.parametrize(
    ("bar", "value", "expected"),
    [
        ({"at_most": 90}, 90.0, ("<= 90", True)),
        ({"at_most": 90}, 90.1, ("<= 90", False)),
        ({"at_least": 0.99}, 0.99, (">= 0.99", True)),
        ({"at_least": 0.99}, 0.98, (">= 0.99", False)),
        ({}, 1.0, (None, None)),
    ],
)
def test_a_bar_is_met_up_to_its_value(tmp_path, bar, value, expected):
    row = make_figure(tmp_path, values=[value], **bar)
    assert (row["bar"], row["met"]) == expected
    quick = make_figure(tmp_path, values=[value], sizes=stores.QUICK, **bar)
    assert (quick["bar"], quick["met"]) == (None, None)


def test_the_tables_of_retrieval_show_figures_with_their_bars(tmp_path):
    run = [
        make_figure(tmp_path, at_most=90),
        make_figure(tmp_path, "p99", [95.0], clean=False),
        make_figure(tmp_path, values=[31.0], way="pre-filter", at_most=30),
        make_figure(tmp_path, "recall@10 of exact search", [0.9951], way="pre-filter", at_least=0.99),
    ]
    table = readme.retrieval_table(run)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:4]]
    command = "`python -m benchmarks retrieval --only search-10k`"
    assert lines == [
        ["exact: 10 passages", "p50 **80 ms** (bar <= 90, met); p99 **95 ms †**", command],
        [
            "pre-filter: 10 passages",
            "p50 **31 ms** (bar <= 30, missed); recall@10 of exact search **0.995 ms** (bar >= 0.99, met)",
            command,
        ],
    ]
    text = tables.markdown(run)
    assert "| 10 passages | exact | p50 | 80 ms | <= 90: met |" in text
    assert "| 10 passages | pre-filter | p50 | 31 ms | <= 30: missed |" in text
    assert tables.rich_table(run).row_count == 4


@pytest.mark.parametrize("suite", readme.README_TABLES)
def test_only_the_text_between_the_markers_is_replaced(suite):
    start, end = readme.markers(suite)
    text = f"before\n{start}\nold \\1\n{end}\nafter"
    assert readme.replace_between(text, "new \\g<0>", suite) == f"before\n{start}\nnew \\g<0>\n{end}\nafter"
    with pytest.raises(ValueError, match=f"{start} and {end} once each"):
        readme.replace_between("no markers", "new", suite)
