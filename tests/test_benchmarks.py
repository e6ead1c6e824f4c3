"""The harness refuses what it must and compares what belongs together; its tables say what the rows say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from benchmarks import backends, cpu, report, rows
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

RIGHT = torch.tensor([1.0, 2.0])


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
    monkeypatch.setitem(backends.SHAPES, "tiny", (32, 3, 2, 48, 160_000.0))
    backends.save_seeded("tiny", tmp_path)
    sequences = random_ids([70, 3, 140, 3, 1])
    expected = cpu.alone(tmp_path, sequences)
    assert expected.shape == (217, 32)
    contenders = list(backends.transformers_batchings(tmp_path, sequences, sizes=(2,)))
    assert len(contenders) == 3
    for one in [*contenders, backends.ours(tmp_path, sequences)]:
        check(one, expected, cpu.TOLERANCE)


def test_every_way_of_scoring_returns_the_same_scores():
    torch.manual_seed(0)
    query = torch.nn.functional.normalize(torch.randn(5, 8), dim=-1)
    documents = torch.nn.functional.normalize(torch.randn(200, 8), dim=-1).split([90, 60, 50])
    expected = torch.stack([(query.double() @ document.double().T).amax(1).sum() for document in documents])
    contenders = [
        backends.ours_maxsim(query, documents),
        *backends.padded_maxsim(query, documents, chunks=(2,)),
    ]
    assert len(contenders) == 4
    for one in contenders:
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
        goals={"transformers, one by one": 1.5} if implementation == backends.OURS else None,
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
    kept = report.latest([*newer, *RUN, *other_machine, *other_workload])
    assert sorted(row["median"] for row in kept) == [11.0, 12.0, 13.0]


def test_the_readme_line_names_the_fastest_transformers_and_marks_unclean_rows():
    table = report.readme_table(RUN)
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
    assert "**10 ms †**" in report.readme_table(slower)


def test_the_full_table_has_every_row_with_factor_and_goal():
    text = report.markdown(RUN)
    assert "## Test CPU, 2 threads, Linux x" in text
    assert re.search(r"\| transformers, one by one \| 20 ms \| .* \| 2\.00x \(goal 1\.5x\) \|", text)
    assert "| transformers, as they come | 30 ms † |" in text
    assert f"commit {'c' * 10}," in text
    assert all(f"| {row['implementation']} |" in text for row in RUN)


@pytest.mark.parametrize("suite", report.README_TABLES)
def test_only_the_text_between_the_markers_is_replaced(suite):
    start, end = report.markers(suite)
    text = f"before\n{start}\nold \\1\n{end}\nafter"
    assert report.replace_between(text, "new \\g<0>", suite) == f"before\n{start}\nnew \\g<0>\n{end}\nafter"
    with pytest.raises(ValueError, match=f"{start} and {end} once each"):
        report.replace_between("no markers", "new", suite)


@pytest.mark.parametrize("suite", report.README_TABLES)
def test_the_committed_tables_are_those_of_the_committed_rows(suite):
    """Whoever adds rows runs `python -m benchmarks report`, and nobody edits a figure by hand."""
    committed = report.latest(rows.read(report.RESULTS / suite))
    readme = report.README.read_text("utf-8")
    if not committed:
        start, end = report.markers(suite)
        table = readme.partition(start)[2].partition(end)[0]
        assert not table.strip(), "README.md shows figures, but no row is committed"
        return
    assert readme == report.replace_between(readme, report.README_TABLES[suite](committed), suite)
    assert Path(report.RESULTS / suite / "README.md").read_text("utf-8") == report.markdown(committed)
