"""The report shows what the rows say: plots and tables of rows that are fabricated here, and of the committed ones."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from strict_html import parse

import benchmarks.__main__ as main
from benchmarks import everything, rows
from benchmarks.gpu_state import installed
from benchmarks.harness import Result
from benchmarks.report import folder as report_folder
from benchmarks.report import model_plots, reading, readme, tables
from benchmarks.report import plots as report_plots
from benchmarks.report.circumstances import QUICK
from benchmarks.report.curves import spread
from benchmarks.report.frame import ACCENT, short
from benchmarks.report.lines import MODEL_SUITES, REPORTED
from benchmarks.report.plot import Plot
from benchmarks.report.plots import plots
from benchmarks.report.reading import latest, measured, rows_of
from benchmarks.report.svg import HAS_MATPLOTLIB, WITHOUT, drawn_by, svg
from benchmarks.suites import BETTER, GPU, MUST, SUITES, Suite, described, load

SVG = "{http://www.w3.org/2000/svg}"
needs_matplotlib = pytest.mark.skipif(not HAS_MATPLOTLIB, reason=WITHOUT)

LENGTHS = {"fixed 512": 512, "variable short": 250, "fixed 8192": 8192, "variable long": 4000}
WHO = {
    "modernbert": 1.0,
    "transformers, sdpa": 2.1,
    "transformers, eager": 3.3,
    "transformers, flash": 1.9,
    "transformers, sdpa, compiled": 1.5,
    "sentence-transformers": 2.4,
    "packed-encoders": 1.15,
}
PEERS = {name: factor for name, factor in WHO.items() if name != "modernbert"}


def fabricated(suite: str, implementation: str, median: float, **changes: Any) -> rows.Row:
    """A row of a model suite as it would be on a GPU that does not exist: no figure in it was measured."""
    one = rows.row(
        workload=changes.pop("workload", "some-workload"),
        what=changes.pop("what", f"{suite}, some workload"),
        implementation=implementation,
        settings="some settings",
        unit=changes.pop("unit", "tokens/s"),
        values=[0.97 * median, median, 1.02 * median],
        max_error=1.2e-3,
        tolerance=2e-3,
        times_better_than=changes.pop("factors", None),
    )
    known = {
        "suite": suite,
        "dtype": "bfloat16",
        "gpu": "NVIDIA Fabricated 9000",
        "driver": "1.2.3",
        "capability": "9.0",
        "system": "Linux x",
        "state": {"sm_mhz": 1980.0, "memory_mhz": None, "watts": 612.5, "celsius": 55.0},
        "pass": "forward",
        "model": "modernbert-base",
        "figure": "throughput",
        "lengths": {"name": "fixed 512", "sequences": 16, "tokens": 8192, "longest": 512},
        "x": None,
        "tflop_per_s": None,
        "percent_of_matmul": None,
        "percent_of_datasheet": None,
        "percent_of_roofline": None,
        "percent_of_datasheet_roofline": None,
        "gb_per_s": None,
        "percent_of_copy": None,
        "commit": "c" * 40,
        "dirty": False,
        "date": "2031-01-02T03:04:05+00:00",
        "command": f"python -m benchmarks {suite}",
    }
    return one | known | changes


def fabricated_bars(suite: str, figure: str, unit: str, best: float, **changes: Any) -> list[rows.Row]:
    """Everybody, on two lengths; what is named in WHO is so many times worse."""
    found = []
    for name, length in LENGTHS.items():
        for who, factor in WHO.items():
            found.append(
                fabricated(
                    suite,
                    who,
                    best / factor * (1 if length < 1000 else 0.6),
                    **{
                        "figure": figure,
                        "unit": unit,
                        "workload": name.replace(" ", "-"),
                        "what": f"{suite} of {name} tokens",
                        "lengths": {"name": name, "sequences": 16, "tokens": 16 * length, "longest": length},
                        "factors": PEERS if who == "modernbert" else {"modernbert": 1 / factor},
                        "percent_of_roofline": 71.0 / factor,
                        "percent_of_matmul": 45.0 / factor,
                        "tflop_per_s": 400.0 / factor,
                    }
                    | changes,
                )
            )
    return found


def fabricated_curve(suite: str, figure: str, unit: str, x: str, values: list[float], best: float) -> list[rows.Row]:
    return [
        fabricated(
            suite,
            who,
            best * factor * (value**0.8 if x != "fill" else 1 / factor / factor * (value if factor > 1.2 else 1)),
            figure=figure,
            unit=unit,
            x={"name": x, "value": value},
            workload=f"by-{x}",
            what=f"{suite} by {x}",
            factors=PEERS if who == "modernbert" else None,
        )
        for value in values
        for who, factor in [*WHO.items(), ("modernbert, graphs", 0.4)]
    ]


def fabricated_kernels() -> list[rows.Row]:
    found = []
    for op, bound in (("geglu 1152 gelu", "copy"), ("attention 12 x 64, window 64, 32 times 512 tokens", "matmul")):
        for step in ("forward", "forward + backward"):
            for who, share in (("triton", 88.0), ("reference", 21.5), ("torch.compile", 70.0), ("liger", None)):
                workload = "elementwise" if bound == "copy" else "attention"
                what = f"{op}, {step}"
                share = None if who == "liger" and bound == "matmul" else share
                shares = {f"percent_of_{bound}": share, "workload": workload, "what": what, "unit": "us"}
                found.append(fabricated("kernels", who, 10.0, **shares, settings="what the op chooses"))
    return found


UNMEASURED = {"kind": "projected", "gpu": "NVIDIA Unmeasured 1", "driver": None, "state": {}, "samples": 0}


def fabricated_everything() -> list[rows.Row]:
    batches = [1, 2, 4, 8, 16, 32, 64]
    return [
        *fabricated_bars("throughput", "throughput", "tokens/s", 2.1e6),
        *fabricated_bars("throughput", "throughput", "tokens/s", 20.1e6, model="ettin-17m"),
        *fabricated_curve("latency", "p50", "us", "batch", batches, 450.0),
        *fabricated_curve("latency", "p99", "us", "batch", batches, 700.0),
        *fabricated_curve("latency", "device", "us", "batch", batches, 400.0),
        *fabricated_curve("memory", "peak memory", "MB", "tokens", [2048, 8192, 32768, 131072], 0.5),
        *fabricated_curve("padding", "throughput", "tokens/s", "fill", [0.25, 0.5, 0.75, 1.0], 2e6),
        *fabricated_bars("training", "throughput", "tokens/s", 0.7e6, **{"pass": "forward + backward + AdamW"}),
        *fabricated_bars("colbert", "documents", "documents/s", 9000.0),
        *fabricated_bars("paper-table", "throughput", "tokens/s", 1.1e6),
        *fabricated_bars("paper-table", "throughput", "tokens/s", 0.2e6, dtype="float32"),
        *fabricated_bars("paper-table", "largest batch", "sequences", 1604.0, percent_of_roofline=None),
        *fabricated_bars("accuracy", "rms error", "", 0.004, percent_of_roofline=None),
        *fabricated_kernels(),
        *fabricated_bars("roofline", "throughput", "tokens/s", 0.5e6, **UNMEASURED),
    ]


def texts(drawn: str) -> list[str]:
    """What can be read in an SVG."""
    return [
        text for element in ElementTree.fromstring(drawn).iter(f"{SVG}text") if (text := "".join(element.itertext()))
    ]


def captured(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[tuple[Any, ...]]:
    """What a function that draws is called with; it draws nothing."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(module, name, lambda frame, *arguments, **options: calls.append(arguments))
    return calls


# Plots.


@needs_matplotlib
@pytest.mark.parametrize("one", plots(fabricated_everything()), ids=lambda one: one.name)
def test_every_plot_names_everybody_in_it_and_where_it_comes_from(one: Plot) -> None:
    drawn = svg(one)
    said = texts(drawn)
    everything = " ".join(said)
    assert {row["implementation"] for row in one.rows} <= set(said)
    place = "NVIDIA Unmeasured 1" if one.rows[0]["kind"] == "projected" else "NVIDIA Fabricated 9000"
    for known in (place, one.rows[0]["dtype"], "2031-01-02", f"commit {'c' * 10}"):
        assert known in everything
    assert ("PROJECTED" in said) == ("projected" in one.name) == (one.rows[0]["kind"] == "projected")
    assert "better)" in everything, "a title says the unit and its direction"


@needs_matplotlib
def test_the_same_rows_give_the_same_bytes_which_refer_to_nothing() -> None:
    made = fabricated_curve("memory", "peak memory", "MB", "tokens", [2048, 8192], 0.5)
    first, again = (svg(plots(made)[0]) for _ in range(2))
    assert first == again
    root = ElementTree.fromstring(first)
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(set(ids)) == len(ids)
    links = [value for element in root.iter() for name, value in element.items() if name.endswith("href")]
    assert links
    assert set(links) <= {f"#{one}" for one in ids}
    assert not re.search(r"<metadata|<!DOCTYPE|<image|url\((?!#)", first)
    assert len(first) < 100_000


def test_there_is_a_plot_for_every_figure_and_suite() -> None:
    found = plots(fabricated_everything())
    assert {one.rows[0]["suite"] for one in found} == {*MODEL_SUITES, "roofline", "kernels"}
    shown = [row for one in found for row in one.rows]
    assert all(row in shown for row in fabricated_everything()), "nobody's row is left out"
    assert [one.opens for one in found if one.rows[0]["suite"] == "throughput"] == [True, False]
    assert not plots([])


@needs_matplotlib
def test_bars_say_value_factor_roofline_and_who_has_none() -> None:
    made = fabricated_bars("throughput", "throughput", "tokens/s", 2.1e6)
    del made[-1]  # packed-encoders, on the last length
    made[1]["clean"] = False
    said = texts(svg(plots(made)[0]))
    assert {"2.10 M", "3.30x", "no figure", *LENGTHS} <= set(said)
    assert f"{2.1 / 2.1:.2f} M †" in said or "1 M †" in said
    assert said.count("roofline") == len(LENGTHS)
    (without,) = plots([row | {"percent_of_roofline": None} for row in made])
    assert "roofline" not in texts(svg(without))


def test_a_roofline_is_what_the_share_of_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = captured(monkeypatch, model_plots, "bars")
    plots(fabricated_bars("throughput", "throughput", "tokens/s", 2e6))[0].draw()
    (panels,) = calls[0]
    assert [panel.title for panel in panels] == list(LENGTHS)
    assert panels[0].roofline == pytest.approx(2e6 / 0.71)
    assert [(bar.label, bar.value, bar.beside) for bar in panels[0].bars[:2]] == [
        ("modernbert", 2e6, ""),
        ("transformers, sdpa", pytest.approx(2e6 / 2.1, rel=1e-3), "2.10x"),
    ]
    twice = [
        row | {"lengths": {**row["lengths"], "name": "documents"}} for row in fabricated_bars("a", "pairs", "", 1.0)
    ]
    plots([row | {"suite": "colbert"} for row in twice])[0].draw()
    assert [panel.title for panel in calls.pop()[0]] == [name.replace(" ", "-") for name in LENGTHS]
    slower = fabricated_bars("latency", "p50", "us", 450.0)
    plots(slower)[0].draw()
    assert {panel.roofline for panel in calls[1][0]} == {None}, "the least time is no bar's end"


def test_curves_have_a_point_for_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = captured(monkeypatch, model_plots, "curves")
    batches = [4.0, 1.0, 2.0]
    made = fabricated_curve("latency", "p50", "us", "batch", batches, 450.0)
    made += fabricated_curve("latency", "p99", "us", "batch", batches, 700.0)
    (one,) = plots(made)
    one.draw()
    lines, x_label, y_label = calls[0]
    assert (x_label, y_label) == ("sequences in a call", "µs")
    for line in lines:
        for figure, points in (("p50", line.points), ("p99", line.upper)):
            of_line = [row for row in made if (row["implementation"], row["figure"]) == (line.label, figure)]
            assert points == sorted((row["x"]["value"], row["median"]) for row in of_line)
    assert {line.label for line in lines if line.colour == ACCENT} == {"modernbert", "modernbert, graphs"}


def test_two_workloads_at_the_same_places_are_two_plots() -> None:
    made = fabricated_curve("latency", "p50", "us", "batch", [1.0, 2.0], 450.0)
    assert len(plots([*made, *(row | {"workload": "another"} for row in made)])) == 2
    longest = {"name": "fixed 8192", "sequences": 1, "tokens": 8192, "longest": 8192}
    found = plots([*made, *(row | {"lengths": longest} for row in made)])
    assert [one.rows[0]["lengths"]["longest"] for one in found] == [512, 8192]
    longer = [row | {"workload": "another", "x": {"name": "batch", "value": 4.0}} for row in made[:8]]
    assert len(plots([*made, *longer])) == 1


def test_the_heat_map_holds_the_shares_of_what_limits_an_op(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = captured(monkeypatch, report_plots, "heat_map")
    for one in plots(fabricated_kernels()):
        one.draw()
    (rows_, columns, cells), (other_rows, _, _) = calls
    assert rows_ == ["forward (copy)", "forward + backward (copy)"], "what all have in common stands above them"
    assert other_rows[1] == "forward + backward (matmul)"
    assert columns == ["triton", "reference", "torch.compile", "liger"]
    assert cells[0] == [88.0, 21.5, 70.0, None]
    both = [fabricated("kernels", "a", 1.0, percent_of_copy=20.0, percent_of_matmul=60.0, workload="w")]
    both += [fabricated("kernels", "b", 1.0, percent_of_copy=50.0, percent_of_matmul=30.0, workload="w")]
    plots(both)[0].draw()
    assert calls[2] == (["kernels, some workload (matmul)"], ["a", "b"], [[60.0, 30.0]])


def test_factors_are_those_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = captured(monkeypatch, report_plots, "factors")
    committed = measured(latest(rows_of("cpu")))
    plots(committed)[0].draw()
    # Where ours is int8, float32 ranks among the others; errors and retrieval cost have no factors.
    named = [row for row in committed if row["implementation"] in ("modernbert", "modernbert, int8")]
    ours = [row for row in named if row["times_better_than"]]
    assert calls[0][0], "no workload is shown"
    assert {what: {one.peer: one.factor for one in found} for what, found in calls[0][0]} == {
        row["what"]: row["times_better_than"] for row in ours
    }
    for _, found in calls[0][0]:
        assert all((one.colour == ACCENT) == (one.factor >= 1) for one in found)


def test_latency_by_size_is_that_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = captured(monkeypatch, report_plots, "curves")
    committed = measured(latest(rows_of("retrieval")))
    (one,) = plots(committed)
    one.draw()
    known = {(row["implementation"], row["corpus"], row["figure"], row["median"]) for row in committed}
    for line in calls[0][0]:
        way, vectors = line.label.split(", ")
        vectors = "synthetic vectors of width 48" if vectors == "synthetic" else vectors
        assert line.points
        for figure, points in (("p50", line.points), ("p99", line.upper)):
            for size, median in points:
                assert (way, f"{size:,.0f} passages, {vectors}", figure, median) in known


def test_labels_are_moved_apart_and_keep_their_order() -> None:
    moved = spread([0.5, 0.1, 0.5, 0.51], 0.05)
    assert moved[1] == 0.1
    order = [moved[at] for at in (0, 2, 3)]
    assert order == sorted(order)
    assert all(b - a > 0.0499 for a, b in pairwise(order))


@pytest.mark.parametrize(
    ("value", "said"),
    [(2.05e6, "2.05 M"), (1e6, "1 M"), (1.1e6, "1.10 M"), (18_460, "18.5 k"), (9861, "9,861"), (450.4, "450")],
)
def test_numbers_are_short(value: float, said: str) -> None:
    assert short(value) == said


# Tables.


def test_the_table_of_a_model_has_what_its_rows_say_and_no_empty_column() -> None:
    made = fabricated_bars("throughput", "throughput", "tokens/s", 2.1e6)
    text = tables.markdown(made)
    assert "## NVIDIA Fabricated 9000, compute capability 9.0, driver 1.2.3, Linux x" in text
    assert text.count("### throughput of ") == len(LENGTHS)
    head, line = text.split("### throughput of fixed 512 tokens\n\n")[1].splitlines()[0:3:2]
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    assert "of matmul" in columns
    assert "of datasheet" not in columns
    cells = dict(zip(columns, [cell.strip() for cell in line.strip("|").split("|")], strict=True))
    assert cells["median"] == "2,100,000 tokens/s"
    assert (cells["of matmul"], cells["of roofline"], cells["clocks and power"]) == (
        "45 %",
        "71 %",
        "1980 MHz, 612.5 W, 55 °C",
    )
    assert "| transformers, sdpa | throughput | 1,000,000 tokens/s |" in text
    assert "| 2.10x |" in text


def test_a_projection_is_called_one_in_every_table() -> None:
    made = fabricated_bars("roofline", "throughput", "tokens/s", 2.1e6, **UNMEASURED)
    text = tables.markdown(made)
    assert "2,100,000 tokens/s (projected) |" in text
    assert "tokens/s |" not in text
    assert "## NVIDIA Unmeasured 1, compute capability 9.0, projected, not measured\n" in text
    made = [row | {"suite": "throughput"} for row in made]
    assert readme.gpu_table(made) == readme.NO_GPU


def test_the_readme_table_of_a_gpu_has_a_line_for_every_workload() -> None:
    assert readme.gpu_table(measured(latest(rows_of("cpu")))) == readme.NO_GPU
    made = fabricated_bars("throughput", "throughput", "tokens/s", 2.1e6)
    text = readme.gpu_table(made)
    lines = [line for line in text.splitlines() if line.startswith("| throughput of ")]
    assert len(lines) == len(LENGTHS)
    assert lines[0].startswith(
        "| throughput of fixed 512 tokens, forward: throughput | **2,100,000 tokens/s** | 45 % | packed-enc"
    )
    assert "`python -m benchmarks throughput --only fixed-512`" in lines[0]
    assert (readme.PLOTS / plots(made)[0].file).relative_to(rows.ROOT).as_posix() in text


def refused(date: str, **changes: Any) -> rows.Row:
    one = fabricated("throughput", "packed-encoders", 1.0, date=date, reason="differs from the reference by 0.5")
    return one | {"kind": reading.REFUSED} | changes


def test_what_was_refused_stays_with_its_run() -> None:
    old, new = "2030-01-01", "2031-01-01"
    row = fabricated("throughput", "modernbert", 1.0, date=old)
    assert latest([refused(old), row]) == [refused(old), row]
    assert latest([refused(old), row, refused(new)]) == [refused(old), row], "nothing measured replaces nothing"
    newer = row | {"date": new}
    assert latest([refused(old), row, refused(new), newer]) == [refused(new), newer]
    assert latest([refused(old), refused(new)]) == [refused(new)]
    text = tables.markdown([refused(old), row])
    assert "* throughput, some-workload: packed-encoders: differs from the reference by 0.5" in text


def test_a_run_writes_who_was_refused_beside_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = fabricated("throughput", "modernbert", 1.0)
    result = Result("some-workload", [row], {"packed-encoders": "fails: no such card"})
    suite = SimpleNamespace(WORKLOADS={"some-workload": "a line"}, run=lambda **options: [result])
    monkeypatch.setattr(main, "load", lambda name: suite)
    monkeypatch.setattr("sys.argv", ["benchmarks", "throughput", "--minutes", "2", "--output", str(tmp_path)])
    main.main()
    first, second = rows.read(tmp_path) if rows.read(tmp_path)[0] == row else reversed(rows.read(tmp_path))
    assert first == row
    assert (second["kind"], second["reason"], second["gpu"]) == ("refused", "fails: no such card", row["gpu"])
    monkeypatch.setattr("sys.argv", ["benchmarks", "throughput", "--only", "nonsense"])
    with pytest.raises(SystemExit):
        main.main()


# Reports.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as a run leaves it that was cut off."""
    made = [*fabricated_everything(), refused("2031-01-02T03:04:05+00:00", suite="latency", implementation="a <peer>")]
    rows.append(made[:-1], tmp_path / "rows" / "a.jsonl")
    rows.append(made[-1:], tmp_path / "rows" / "b.jsonl")
    return tmp_path


@needs_matplotlib
def test_a_report_opens_with_plots_and_needs_nothing_else(folder: Path) -> None:
    rows.append(
        [{"suite": "cpu", "outcome": "failed with status 3", "seconds": 2, "command": ""}], folder / "suites.jsonl"
    )
    written = report_folder.write(folder)
    shown = plots(fabricated_everything())
    assert set(written) == {folder / "report.html", folder / "README.md"} | {
        folder / "plots" / one.file for one in shown
    }
    page = (folder / "report.html").read_text("utf-8")
    tree = parse(page)
    assert len(tree.all("figure")) == len(tree.all("svg")) == len(shown)
    opening = page[: page.index("<h2")]
    assert opening.count("<svg") == sum(one.opens for one in shown)
    assert "<table" not in opening
    ids = [node.attributes["id"] for node in tree.all("*") if "id" in node.attributes]
    assert len(set(ids)) == len(ids)
    for node in tree.all("*"):
        for name in ("src", "href", "xlink:href"):
            assert (node.attributes.get(name) or "#").startswith("#")
    assert not re.search(r"@import|<script|url\((?!#)", page)
    for row in fabricated_everything():
        assert f"<h4>{row['what']}</h4>" in page
    assert "latency, some-workload: a &lt;peer&gt;: differs from the reference by 0.5" in page
    circumstances = page.split('id="circumstances"')[-1]
    for said in ("driver 1.2.3", "1980 to 1980 MHz, 612.5 to 612.5 W", "cpu: failed with status 3", "ccc", "torch 2."):
        assert said in circumstances
    assert QUICK not in page
    text = (folder / "README.md").read_text("utf-8")
    assert [one for one in shown if f"](plots/{one.file})" not in text] == []
    assert "a <peer>" in text


@needs_matplotlib
def test_a_report_of_other_rows_replaces_the_plots_and_says_what_was_a_try_out(folder: Path) -> None:
    (folder / "plots").mkdir()
    (folder / "plots" / "of-rows-that-are-gone.svg").touch()
    (folder / "rows" / "a.jsonl").unlink()
    quick = [row | {"command": "python -m benchmarks kernels --quick"} for row in fabricated_kernels()]
    rows.append(quick, folder / "rows" / "a.jsonl")
    report_folder.write(folder)
    assert len(list((folder / "plots").iterdir())) == 2
    assert QUICK in (folder / "report.html").read_text("utf-8")
    assert "try-out" in " ".join(texts(svg(plots(quick)[0])))
    with pytest.raises(SystemExit, match="no rows in"):
        report_folder.write(folder / "elsewhere")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.report.svg.HAS_MATPLOTLIB", False)
    with pytest.raises(SystemExit, match=r"\[bench\]"):
        svg(plots(fabricated_kernels())[0])


def test_the_committed_tables_are_those_of_the_committed_rows() -> None:
    """Whoever adds rows runs `python -m benchmarks report`, and nobody edits a figure by hand."""
    found = {suite: kept for suite in REPORTED if measured(kept := latest(rows_of(suite)))}
    text = readme.README.read_text("utf-8")
    assert text == readme.with_tables(text, found)
    for suite, kept in found.items():
        assert (reading.RESULTS / suite / "README.md").read_text("utf-8") == tables.markdown(kept)


def test_the_committed_plots_are_those_of_the_committed_rows() -> None:
    shown = readme.committed_plots()
    assert {file.name for file in readme.PLOTS.iterdir()} == {one.file for one in shown}
    for one in shown:
        committed = (readme.PLOTS / one.file).read_text("utf-8")
        if drawn_by(committed) == installed("matplotlib"):  # other versions draw other bytes
            assert committed == svg(one)
        for row in one.rows:
            assert row["commit"][:10] in committed


# The suites, and all of them.


@pytest.mark.parametrize("name", SUITES)
def test_the_list_explains_every_suite(name: str) -> None:
    text = described(name)
    suite = load(name)
    assert text.splitlines()[0] == name
    for workload, line in suite.WORKLOADS.items():
        assert re.search(rf"^  {re.escape(workload)} +{re.escape(line)}$", text, re.MULTILINE)
        assert len(line) > 10
    assert SUITES[name].against in text
    assert GPU[SUITES[name].gpu] in text
    assert {"quick", "only", "minutes"} <= inspect.signature(suite.run).parameters.keys()


def test_arguments_are_read_before_any_suite_is_imported() -> None:
    code = "import sys, benchmarks.__main__; print([name for name in sys.modules if name in ('torch', 'rich')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=rows.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_time_that_is_not_used_flows_on_to_the_later_suites() -> None:
    assert everything.share(100.0, [1, 3]) == 25.0
    assert everything.share(90.0, [3]) == 90.0
    assert everything.share(-1.0, [3]) == 0.0


STAND_INS = {
    "ends at once": "print('at once')",
    # Its child lives on, and would keep a GPU.
    "crashes": "import subprocess as s; one = s.Popen(['sleep', '60'], stdout=s.DEVNULL, stderr=s.DEVNULL); "
    "print(one.pid, flush=True); raise SystemExit('a crash')",
    # The grandchild keeps the pipe open after its parent has been ended.
    "overstays": "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])",
    "is last": "pass",
}


def runs(pid: int) -> bool:
    """Whether a process is still at work, a few moments after it was told to end."""
    for _ in range(50):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX":
            return False
        time.sleep(0.1)
    return True


def stand_in(gpu: str = BETTER, weight: int = 1) -> Suite:
    return Suite("none", "nobody", gpu, "an hour", weight)


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    reported: list[Path] = []
    monkeypatch.setattr(everything.report, "write", lambda folder: reported.append(folder) or [])
    monkeypatch.setattr(everything, "HAS_MATPLOTLIB", True)
    return reported


def outcomes(folder: Path) -> dict[str, str]:
    lines = (folder / "suites.jsonl").read_text("utf-8").splitlines()
    return {one["suite"]: one["outcome"] for one in map(json.loads, lines)}


def test_a_crash_and_an_overstay_cost_one_suite(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_report: list[Path]
) -> None:
    monkeypatch.setattr(everything, "OVERSTAY", 1.0)
    suites = {name: stand_in(weight=1 if name != "is last" else 1_000_000) for name in STAND_INS}
    suites |= {"needs a card": stand_in(gpu=MUST, weight=1_000_000_000), "takes an hour": stand_in(weight=0)}
    told: dict[str, float] = {}

    def command(name: str, minutes: float, folder: Path, quick: bool) -> list[str]:
        told[name] = minutes
        assert (folder, quick) == (tmp_path / "rows", False)
        return [sys.executable, "-c", STAND_INS[name]]

    everything.run(tmp_path, 60.0, suites=suites, has_gpu=False, command=command)
    found = outcomes(tmp_path)
    assert list(told) == list(STAND_INS), "in their order, and only those that can run here"
    assert found["ends at once"] == found["is last"] == "done"
    assert found["crashes"] == "failed with status 1, see logs/crashes.txt"
    assert "overstayed" in found["overstays"]
    assert found["needs a card"] == "skipped: it needs a GPU, and there is none here"
    assert found["takes an hour"] == "left out: it takes an hour"
    child, said = (tmp_path / "logs" / "crashes.txt").read_text("utf-8").splitlines()
    assert said == "a crash"
    assert not runs(int(child))
    assert (tmp_path / "logs" / "overstays.txt").read_text("utf-8") in ("begun\n", "")
    assert no_report == [tmp_path]
    # Who needs a card gets no share where there is none; the last has all that is left, but what it ends with.
    assert told["ends at once"] < 0.1
    assert 45 < told["is last"] < 55


def test_a_try_out_needs_no_gpu(tmp_path: Path, no_report: list[Path]) -> None:
    suites = {"needs a card": stand_in(gpu=MUST)}
    everything.run(
        tmp_path, 1.0, quick=True, suites=suites, has_gpu=False, command=lambda *_: [sys.executable, "-c", "pass"]
    )
    assert outcomes(tmp_path) == {"needs a card": "done"}


def test_nothing_is_begun_when_the_time_is_over(tmp_path: Path, no_report: list[Path]) -> None:
    everything.run(tmp_path, 0.1, suites={"late": stand_in()}, has_gpu=False)
    assert outcomes(tmp_path) == {"late": "left out: no time was left"}
    assert no_report == [tmp_path], "the report is written all the same"


def test_rows_are_kept_where_no_plot_can_be_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_report: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(everything, "HAS_MATPLOTLIB", False)
    everything.run(tmp_path, 0.1, suites={"late": stand_in()}, has_gpu=False)
    assert not no_report
    assert f"python -m benchmarks report {tmp_path}" in capsys.readouterr().out


def test_a_suite_is_started_with_its_time_and_its_folder() -> None:
    command = everything.process("latency", 1.234, Path("rows"), True)
    assert command[1:] == ["-m", "benchmarks", "latency", "--minutes", "1.23", "--quick", "--output", "rows"]
