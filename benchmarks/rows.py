"""A row: one figure with everything needed to judge it and to measure it again."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "onnxruntime", "openvino", "sentence-transformers", "maxsim-cpu", "numpy")


def row(
    *,
    workload: str,
    what: str,
    implementation: str,
    settings: str,
    unit: str,
    values: Sequence[float],
    max_error: float | None,
    tolerance: float | None,
    foreign_percent: float | None = None,
    clean: bool = True,
    calls: int = 1,
    times_better_than: dict[str, float] | None = None,
    goals: dict[str, float] | None = None,
) -> Row:
    """One measured row.

    Args:
        values: one per sample, in `unit`.
        max_error: the largest difference from the reference; None if there is nothing to compare.
        foreign_percent: CPU use by others in the busiest kept sample, in percent of one core; None if not a
            time.
        calls: in one sample, which is then their median.
        times_better_than: factor over each peer, the median of the factors within each round.
        goals: the factors that we mean to reach.
    """
    return {
        "kind": "measured",
        "suite": "cpu",
        "workload": workload,
        "what": what,
        "implementation": implementation,
        "settings": settings,
        "unit": unit,
        "median": _round(statistics.median(values)),
        "min": _round(min(values)),
        "max": _round(max(values)),
        "samples": len(values),
        "calls_per_sample": calls,
        "clean": clean,
        "foreign_percent": None if foreign_percent is None else round(foreign_percent, 1),
        "max_error": None if max_error is None else float(f"{max_error:.2g}"),
        "tolerance": tolerance,
        "times_better_than": {name: _round(factor) for name, factor in (times_better_than or {}).items()},
        "goals": goals or {},
        "dtype": "float32",
        **circumstances(),
    }


def _round(value: float) -> float:
    return float(f"{value:.4g}")


@cache
def circumstances() -> dict[str, Any]:
    """The machine, the versions, the commit, the date and the command of this run."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "commit": _git("rev-parse", "HEAD"),
        # Results and the tables made from them do not change what was measured.
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m benchmarks " + shlex.join(without_folders(sys.argv[1:])),
    }


def without_folders(arguments: list[str]) -> list[str]:
    """The arguments that decide what is measured; where rows and stores went are paths of somebody's machine."""
    kept, folders = [], ("--output", "--work", "--data")
    following = iter(arguments)
    for one in following:
        if one in folders:
            next(following, None)
        elif not one.startswith(tuple(f"{folder}=" for folder in folders)):
            kept.append(one)
    return kept


def _cpu() -> str:
    """Model name and the vector instructions that decide its speed."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in info.read_text().splitlines())
    fields = {name.strip(): text.strip() for name, _, text in lines}
    flags = fields.get("flags", "").split()
    widest = next((name for name in ("amx_tile", "avx512f", "avx2") if name in flags), None)
    name = fields.get("model name", platform.machine())
    return f"{name} ({widest})" if widest else name


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    if not shutil.which("git"):
        return "unknown"
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def append(rows: Sequence[Row], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(one) + "\n" for one in rows)


def read(folder: Path) -> list[Row]:
    """All rows of the `*.jsonl` files in `folder`, oldest first."""
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text("utf-8").splitlines()]
    return sorted((json.loads(line) for line in lines if line), key=lambda one: one["date"])
