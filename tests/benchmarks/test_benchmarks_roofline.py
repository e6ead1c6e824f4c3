"""A projection says that it is one, lies below its bound, and changes with what it assumes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton, which has no wheel for this platform")

from benchmarks import roofline
from benchmarks.model_work import DATASHEETS, least_seconds
from benchmarks.model_work import kernels as kernels_of
from benchmarks.models.texts import LENGTHS
from modernbert.config import PRESETS

GPU = "NVIDIA GeForce RTX 4090"
BASE = PRESETS["modernbert-base"]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return roofline.rows_of(GPU)


def test_every_row_says_that_it_is_projected_and_has_no_sample(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 2 * len(PRESETS) * len(LENGTHS)
    for row in rows:
        assert (row["kind"], row["samples"], row["suite"], row["gpu"]) == ("projected", 0, "roofline", GPU)
        assert row["what"].startswith("Projected, not measured")
        assert row["workload"].startswith("projected")
        assert row["percent_of_matmul"] is row["percent_of_roofline"] is None
        assert row["lengths"]["tokens"] == pytest.approx(roofline.TOKENS, rel=0.1)
    assert roofline.table(rows).title == f"Projected, not measured: {GPU}, bfloat16, forward, thousand tokens/s"


def test_a_projection_lies_below_its_bound_and_not_far(rows: list[dict[str, Any]]) -> None:
    shares = [row["percent_of_datasheet_roofline"] for row in rows]
    assert shares[::2] == [100.0] * (len(rows) // 2)
    assert all(30 < share < 90 for share in shares[1::2])
    for bound, projected in zip(rows[::2], rows[1::2], strict=True):
        assert bound["median"] > projected["median"] > 0


def test_the_projection_of_a_layer_is_counted_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """With shares of one and without gaps it is the bound, but for the tiles of local attention."""
    lengths = [512] * 16
    shares = roofline.assumed(GPU, BASE.window)
    ideal = shares._replace(bytes=dict.fromkeys(shares.bytes, 1.0), products=1.0, attention=1.0, flash=1.0, wasted=1.0)
    monkeypatch.setattr(roofline, "assumed", lambda gpu, window: ideal)
    monkeypatch.setattr(roofline, "COPY", 1.0)
    monkeypatch.setattr(roofline, "GAP", 0.0)
    sheet = DATASHEETS[GPU]
    least = least_seconds(BASE, lengths, 2, sheet.bfloat16, sheet.bytes)
    assert roofline.projected_seconds(BASE, lengths, GPU) == pytest.approx(least)
    # Local layers that compute a hundred times what is seen are bound by operations.
    monkeypatch.setattr(roofline, "assumed", lambda gpu, window: ideal._replace(wasted=100.0))
    (local,) = {kernel for kernel in kernels_of(BASE, lengths, 2) if kernel.name == "local attention"}
    more = 14 * (100 * local.flops / sheet.bfloat16 - local.bytes / sheet.bytes)
    assert roofline.projected_seconds(BASE, lengths, GPU) == pytest.approx(least + more)
    monkeypatch.setattr(roofline, "assumed", lambda gpu, window: ideal)
    monkeypatch.setattr(roofline, "GAP", 1e-3)
    kernels = 7 * 22 + 22 - 1 + 1 + 1 + 2
    assert roofline.projected_seconds(BASE, lengths, GPU) == pytest.approx(least + kernels * 1e-3)
    # Beyond LONG each of the eight global layers has one kernel more, of six rows a token.
    rotations = 8 * (1e-3 + 6 * 8192 * 768 * 2 / sheet.bytes)
    long = least_seconds(BASE, [8192], 2, sheet.bfloat16, sheet.bytes)
    assert roofline.projected_seconds(BASE, [8192], GPU) == pytest.approx(long + kernels * 1e-3 + rotations)


def test_occupancy_decides_where_it_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    full = roofline.assumed("NVIDIA H200", 64)
    assert full.attention == roofline.ATTENTION
    few = dict.fromkeys(roofline.warps_on_a_processor(90), 4)
    monkeypatch.setattr(roofline, "warps_on_a_processor", lambda arch: few)
    halved = roofline.assumed("NVIDIA H200", 64)
    assert halved.attention == roofline.ATTENTION / 2
    # 4.8 TB/s for 800 ns are 29 KB on each of 132 processors; 4 warps have 4 KB on their way.
    assert halved.bytes["geglu"] == pytest.approx(0.90 * 4 * 32 * 32 / (4.8e12 * 800e-9 / 132))
    assert full.bytes["geglu"] == 0.90


def test_warps_are_those_of_the_committed_binaries() -> None:
    from benchmarks.kernels.resources import read_table

    warps = roofline.warps_on_a_processor(89)
    kernels = {"attention", "geglu", "add_layer_norm", "embed_layer_norm", "rotary", "rotary_table", "layer_norm"}
    assert warps.keys() == kernels
    mine = [one for one in read_table()[1] if one["kernel"] == "attention_forward_kernel" and one["arch"] == 89]
    of_64 = [one for one in mine if "x 64," in one["case"] and one["dtype"] == "bfloat16"]
    assert warps["attention"] == min(one["programs"] * one["warps"] for one in of_64)


def test_every_card_has_a_datasheet_and_is_compiled_for() -> None:
    from benchmarks.kernels.resources import ARCHS

    assert roofline.CARDS.keys() == DATASHEETS.keys()
    assert {card.arch for card in roofline.CARDS.values()} <= set(ARCHS)


def test_assumptions_are_all_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["roofline", "--gpu", GPU, "--output", str(tmp_path)])
    roofline.main()
    printed = capsys.readouterr().out
    said = [line for line in printed.splitlines() if line.strip()]
    assert "Projected, not measured" in said[0]
    # Every line but those of the frame of the table says it.
    assert all("rojected" in line for line in said if any(letter.isalpha() for letter in line) and "fixed" not in line)
    assert f"{roofline.PRODUCTS:.0%} of the tensor cores' rate" in printed
    assert "1 us between two kernels" in printed
    for op in roofline.assumed(GPU, 64).bytes:
        assert f"{op}: 90% of the memory's rate" in printed
    (file,) = tmp_path.iterdir()
    written = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert {row["kind"] for row in written} == {"projected"}
    assert all("programs" not in row["settings"] and row["settings"] for row in written)
