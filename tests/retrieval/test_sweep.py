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


@pytest.fixture(scope="module")
def colbert(pytestconfig) -> ColBERT:
    if not pytestconfig.getoption("--sweep"):
        pytest.skip("takes minutes: make check, or pytest --sweep")
    return ColBERT.default()


@pytest.fixture(scope="module")
def files(colbert, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    for name, raw in shapes(1_000_000).items():
        (folder / name).write_bytes(raw)
    return folder


@pytest.fixture(scope="module")
def most(colbert, files) -> Cost:
    """What a shape may cost. Six times the tokens: one for each byte is more than four times those of English."""
    first, plain = (cost(colbert, files / "plain.txt") for _ in range(2))  # only the first time takes new memory
    return Cost(5 * plain.seconds, 5 * first.megabytes, 6 * plain.tokens)


@pytest.mark.parametrize("name", shapes(100))
def test_any_shape_costs_a_few_times_as_much_as_plain_text(colbert, files, most, name):
    found = cost(colbert, files / name)
    if found.seconds > most.seconds:  # Other work on the machine may have slowed it down: measure both once more.
        most = most._replace(seconds=5 * cost(colbert, files / "plain.txt").seconds)
        found = cost(colbert, files / name)
    assert all(one <= other for one, other in zip(found, most, strict=True)), (found, most)
