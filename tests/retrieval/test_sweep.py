"""A megabyte of any shape takes a few times the time and memory of plain text. `make check` runs this: `--sweep`."""

from __future__ import annotations

import gc
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from shapes import shapes

from modernbert import ColBERT
from modernbert.retrieval.documents.find import read_file
from modernbert.retrieval.windows import windows

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")

pytestmark = pytest.mark.skipif(not RESET.exists(), reason="the peak of a process's memory is read as Linux gives it")


class Cost(NamedTuple):
    seconds: float
    megabytes: float
    tokens: int


def peak(kind: str) -> float:
    """Megabytes that this process holds (VmRSS), or has held at most (VmHWM)."""
    return int(STATUS.read_text().split(f"{kind}:")[1].split()[0]) / 1024


def cost(colbert: ColBERT, path: Path) -> Cost:
    """Of all that is done with a file but the model's forward passes. Nothing is refused but with a ValueError."""
    gc.collect()
    RESET.write_text("5")
    before, started, tokens = peak("VmRSS"), time.process_time(), 0
    with suppress(ValueError):
        for window in windows(colbert, read_file(path, on_note=lambda _: None)):
            tokens += len(window.ids)
    return Cost(time.process_time() - started, peak("VmHWM") - before, tokens)


def test_any_shape_costs_a_few_times_as_much_as_plain_text(pytestconfig, tmp_path):
    if not pytestconfig.getoption("--sweep"):
        pytest.skip("takes minutes: make check, or pytest --sweep")
    colbert = ColBERT.default()
    files = shapes(1_000_000)
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    first, plain = (cost(colbert, tmp_path / "plain.txt") for _ in range(2))  # the first time also warms up
    too_much = {}
    for name in files:
        found = cost(colbert, tmp_path / name)
        # One token for each byte, and one more for each character, is the most that a tokenizer of bytes gives.
        most = Cost(5 * plain.seconds + 0.5, 5 * first.megabytes, 6 * plain.tokens)
        if any(one > other for one, other in zip(found, most, strict=True)):
            too_much[name] = found
    assert not too_much, f"plain text: {first}, {plain}"
