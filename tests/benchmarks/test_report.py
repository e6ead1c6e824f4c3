"""Tables, plots and pages say what the rows say, and the committed ones are those of the committed rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.rows import Row, append

ROW: Row = {
    **{"kind": "measured", "suite": "cpu", "workload": "w", "what": "a text", "implementation": "modernbert"},
    **{"settings": "s", "unit": "ms", "median": 1.0, "min": 0.9, "max": 1.1, "samples": 3, "calls_per_sample": 1},
    **{"clean": True, "foreign_percent": 1.0, "max_error": 1e-7, "tolerance": 1e-4, "dtype": "float32"},
    **{"times_better_than": {"transformers, sdpa": 2.0, "ONNX Runtime": 0.5, "OpenVINO": 1.5}},
    **{"cpu": "AMD EPYC (avx512f)", "threads": 2, "system": "Linux", "versions": {"torch": "2"}},
    **{"commit": "abcdef123456", "dirty": False, "date": "2026-01-01", "command": "python -m benchmarks cpu"},
}


def other(name: str, median: float, **more: object) -> Row:
    return ROW | {"implementation": name, "median": median, "times_better_than": {}} | more


GROUP = [ROW, other("transformers, sdpa", 2.0, clean=False), other("ONNX Runtime", 0.5), other("OpenVINO", 1.5)]


def test_the_committed_pages_are_those_of_the_committed_rows() -> None:
    assert not report.stale(), "python -m benchmarks report"


def test_no_projected_figure_is_committed() -> None:
    rows = [one for folder in report.RESULTS.iterdir() for one in report.read(folder)]
    assert rows
    assert {one["kind"] for one in rows} <= {"measured", "synthetic vectors", "refused"}
    assert not [file for file in report.RESULTS.rglob("*") if "projected" in file.name or "roofline" in file.name]


def test_the_newest_run_of_each_workload_on_each_machine_is_shown_whole() -> None:
    old, new, elsewhere = ({"date": date} for date in ("2026-01-01", "2026-01-02", "2026-01-03"))
    rows = [ROW | old, other("gone", 1.0) | old, ROW | new, ROW | elsewhere | {"cpu": "another"}]
    assert report.latest(rows) == rows[2:]
    empty = {"kind": "refused", "reason": "no time", "date": "2026-01-04"}
    assert report.latest([*rows, ROW | empty]) == rows[2:], "a run without figures replaces none that has some"


def test_a_line_has_ours_and_the_others_the_fastest_first() -> None:
    text = report.summary(GROUP, "cpu")
    others = "ONNX Runtime 0.5 ms (0.50x); OpenVINO 1.5 ms (1.50x); transformers, sdpa 2 ms † (2.00x)"
    assert f"| a text | **1 ms** | {others} | `python -m benchmarks cpu --only w` |" in text
    assert "AMD EPYC (avx512f), 2 threads, Linux. float32, 2026-01-01, commit abcdef1234, torch 2." in text
    assert "amd-epyc-avx512f-cpu-factors.svg" in text


def test_every_machine_has_its_table_the_newest_first() -> None:
    later = [one | {"cpu": "Xeon (avx2)", "date": "2026-02-01"} for one in GROUP]
    text = report.summary([*GROUP, *later], "cpu")
    assert text.index("Xeon (avx2), 2 threads") < text.index("AMD EPYC (avx512f), 2 threads")


def test_a_page_has_every_row_and_why_others_have_none() -> None:
    bad = other("PyLate", 1.0, kind="refused", reason="differs from the reference by 0.5")
    text = report.page([*GROUP, bad], "Results", ["a.svg"])
    assert "![](a.svg)" in text
    assert "| implementation | median | range | samples | ours is | others' CPU | error | settings |" in text
    assert "| ONNX Runtime | 0.5 ms | 0.9 to 1.1 | 3 | 0.50x | 1 % | 1.0e-07 | s |" in text
    assert "- w: PyLate: differs from the reference by 0.5" in text


def test_a_line_has_every_figure_of_an_implementation() -> None:
    known = {"suite": "retrieval", "workload": "search-10k", "corpus": "10 passages"}
    exact = [other("exact", 50.0, figure="p50", **known)]
    exact += [other("exact", 95.0, figure="p99", **known), other("quick", 30.0, figure="p50", **known)]
    text = report.summary(exact, "retrieval")
    assert "| a text: 10 passages | exact **p50 50 ms, p99 95 ms** | quick p50 30 ms |" in text


def test_a_gpu_is_a_machine_of_its_own() -> None:
    gpu = {"gpu": "NVIDIA H200", "driver": "1", "capability": "9.0", "suite": "throughput", "model": "ettin-17m"}
    text = report.summary([*GROUP, *(one | gpu for one in GROUP)], "gpu")
    assert text.count("| a text | **1 ms** |") == 2
    assert "NVIDIA H200, compute capability 9.0, driver 1, Linux. float32" in text


def test_plots_are_drawn_and_are_the_same_twice(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    known = {"suite": "throughput", "figure": "throughput", "pass": "forward"}
    curve = [one | known | {"x": {"name": "fill", "value": x}} for one in GROUP for x in (0.5, 1.0)]
    (tmp_path / "old.svg").write_text("")
    first = report.drawn(report.plots([*GROUP, *curve]), tmp_path)
    texts = [file.read_bytes() for file in first]
    assert [file.name for file in first] == [
        "amd-epyc-avx512f-cpu-factors.svg",
        "amd-epyc-avx512f-throughput-factors.svg",
    ]
    assert sorted(tmp_path.iterdir()) == sorted(first)
    assert b"OpenVINO" in texts[0]
    again = report.drawn(report.plots([*GROUP, *curve]), tmp_path)
    assert [file.read_bytes() for file in again] == texts


def test_kernels_are_drawn_under_the_roof_of_their_run(tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    rates = {"copy_gb_per_s": 4000.0, "matmul_tflop_per_s": 800.0}
    known = ROW | {"suite": "breakdown", "rates": rates}
    norm = known | {"implementation": "layer_norm", "gb_per_s": 3000.0, "tflop_per_s": None}
    wide = known | {"implementation": "Wi, backward", "gb_per_s": 2000.0, "tflop_per_s": 600.0}
    axes = figure.Figure().add_subplot()
    report.draw_roofline([norm, wide], axes)
    drawn = [tuple(one.get_offsets()[0]) for one in axes.collections]
    assert drawn == [(1.0, 3.0), (300.0, pytest.approx(600.0))], "operations a byte, and TFLOP/s"
    assert list(axes.lines[0].get_xdata()) == [0.5, 200.0, 2000.0]
    assert list(axes.lines[0].get_ydata()) == [2.0, 800.0, 800.0]
    assert [file for file, _, _ in report.plots([norm, wide])] == ["amd-epyc-avx512f-breakdown-roofline.svg"]
    assert not list(report.plots([norm | {"cache": "warm caches", "times_better_than": {}}])), (
        "a cache has no such roof"
    )


def test_a_folder_of_all_is_checked_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    append(GROUP, tmp_path / "rows" / "a.jsonl")
    assert report.stale(tmp_path) == [tmp_path / "README.md"]
    plot = tmp_path / "plots" / "amd-epyc-avx512f-cpu-factors.svg"
    assert report.write(tmp_path) == [tmp_path / "README.md", plot]
    assert "![](plots/amd-epyc-avx512f-cpu-factors.svg)" in (tmp_path / "README.md").read_text()
    assert not report.stale(tmp_path)


def test_worse_rows_are_those_of_ours_on_the_same_machine() -> None:
    now = [ROW | {"median": 1.2}, ROW | {"what": "new"}, other("ONNX Runtime", 9.0)]
    compared, lines = report.worse(now, GROUP, 10.0)
    assert (compared, lines) == (1, ["a text: modernbert: 1.2 ms, before 1 ms: 20 % worse"])
    assert report.worse(now, GROUP, 25.0) == (1, [])
    rate = ROW | {"unit": "tokens/s"}
    assert report.worse([rate | {"median": 0.5}], [rate], 25.0)[1] == [
        "a text: modernbert: 0.5 tokens/s, before 1 tokens/s: 100 % worse"
    ]
    assert report.worse([ROW | {"cpu": "another"}], GROUP, 10.0) == (0, [])
