"""`python -m benchmarks all`: every suite in a process of its own, within a time, and a report of what came out."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Timer
from typing import Any

import torch

from benchmarks.report import folder as report
from benchmarks.report.svg import HAS_MATPLOTLIB, WITHOUT
from benchmarks.rows import ROOT, append, circumstances
from benchmarks.suites import MUST, SUITES, Suite

RESERVE = 15.0
"""Seconds that are kept for the report."""

START, LAST = 10.0, 0.1
"""Seconds of a suite's share in which it is imported, and the part of it for what it has begun at the end."""

OVERSTAY, OVER = 20.0, 0.5
"""Seconds beyond its share, or the part of it if that is more, after which a suite is ended. What it wrote stays."""

LEAST = 15.0
"""With less than this left nothing is begun."""


def run(
    folder: Path,
    minutes: float,
    *,
    quick: bool = False,
    suites: Mapping[str, Suite] = SUITES,
    has_gpu: bool | None = None,
    command: Callable[..., list[str]] | None = None,
) -> None:
    """Run the suites in their order and write `folder`: rows/, logs/, suites.jsonl, and the report.

    Args:
        minutes: for all of it, the report included.
        has_gpu: whether suites that need a GPU are run; None: if there is one.
        command: what is run for a suite, given its name, minutes, folder of rows and `quick` (a test hands in its own).
    """
    until = time.monotonic() + 60 * minutes - RESERVE
    has_gpu = torch.cuda.is_available() if has_gpu is None else has_gpu

    def runs_here(suite: Suite) -> bool:
        return has_gpu or quick or suite.gpu != MUST

    folder = folder.resolve()
    waiting = {name: suite for name, suite in suites.items() if suite.weight}
    for name in suites.keys() - waiting.keys():
        _note(folder, name, f"left out: it takes {suites[name].minutes}", 0.0, "")
    while waiting:
        name, suite = next(iter(waiting.items()))
        if not runs_here(suite):
            _note(folder, name, "skipped: it needs a GPU, and there is none here", 0.0, "")
        else:
            weights = [other.weight for other in waiting.values() if runs_here(other)]
            seconds = share(until - time.monotonic(), weights)
            if until - time.monotonic() < LEAST:
                _note(folder, name, "left out: no time was left", 0.0, "")
            else:
                told = max(0.5 * seconds, (1 - LAST) * seconds - START) / 60
                asked = (command or process)(name, told, folder / "rows", quick)
                limit = max(1.0, min(seconds + max(OVERSTAY, OVER * seconds), until - time.monotonic()))
                outcome, took = watched(asked, folder / "logs" / f"{name}.txt", limit)
                _note(folder, name, outcome, took, shlex.join(_public(asked)))
        del waiting[name]
    if not HAS_MATPLOTLIB:
        print(f"{WITHOUT}; then, here or where you take the folder: python -m benchmarks report {folder}")
        return
    for file in report.write(folder):
        print(f"wrote {file}")


def share(left: float, weights: Sequence[int]) -> float:
    """The seconds of the first of these: what others before it did not use is in `left`."""
    return max(0.0, left) * weights[0] / sum(weights)


def process(name: str, minutes: float, rows: Path, quick: bool) -> list[str]:
    options = ["--quick"] if quick else []
    return [sys.executable, "-m", "benchmarks", name, "--minutes", f"{minutes:.2f}", *options, "--output", str(rows)]


def watched(command: Sequence[str], log: Path, limit: float) -> tuple[str, float]:
    """Run a command, show and keep what it prints, and end it and all its children after `limit` seconds.

    Returns:
        What became of it, and its seconds.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    ended: list[float] = []
    with log.open("w", encoding="utf-8") as kept:
        started = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )

        def end() -> None:
            ended.append(time.monotonic() - start)
            _kill(started)

        timer = Timer(limit, end)
        timer.start()
        try:
            assert started.stdout is not None
            for line in started.stdout:
                print(line, end="", flush=True)
                kept.write(line)
            status = started.wait()
        finally:
            timer.cancel()
            _kill(started)  # children that outlive it hold the GPU
    took = time.monotonic() - start
    if ended:
        return "ended because it overstayed; its rows until then are kept", took
    return ("done" if status == 0 else f"failed with status {status}, see logs/{log.name}"), took


def _kill(started: subprocess.Popen[Any]) -> None:
    try:
        os.killpg(started.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _public(command: Sequence[str]) -> list[str]:
    """The command without the paths of this machine."""
    kept = list(command)
    if "--output" in kept:
        del kept[kept.index("--output") :]
    return ["python", *kept[1:]]


def _note(folder: Path, name: str, outcome: str, seconds: float, command: str) -> None:
    print(f"{name}: {outcome}{f' ({seconds:.0f} s)' if seconds else ''}", flush=True)
    known = circumstances()
    entry = {"suite": name, "outcome": outcome, "seconds": round(seconds, 1), "command": command}
    append(
        [entry | {key: known[key] for key in ("date", "commit")} | {"run": known["command"]}], folder / "suites.jsonl"
    )
