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
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import installed

Row = dict[str, Any]

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "onnxruntime", "openvino", "sentence-transformers", "maxsim-cpu", "numpy")


def row(
    *,
    suite: str,
    workload: str,
    what: str,
    implementation: str,
    unit: str,
    values: Sequence[float],
    settings: str = "",
    dtype: str = "float32",
    max_error: float | None = None,
    tolerance: float | None = None,
    foreign_percent: float | None = None,
    clean: bool = True,
    calls: int = 1,
    times_better_than: Mapping[str, float] | None = None,
    goals: Mapping[str, float] | None = None,
) -> Row:
    """One measured row.

    Args:
        values: one per sample, in `unit`.
        max_error: the largest difference from the reference; None if there is nothing to compare.
        foreign_percent: CPU use by others during the busiest kept sample, in percent of one core; None where it does
            not matter.
        calls: in one sample, which is then their median.
        times_better_than: factor over each peer, the median of the factors within each round.
        goals: the factors that we want to reach.
    """
    return {
        "kind": "measured",
        "suite": suite,
        "workload": workload,
        "what": what,
        "implementation": implementation,
        "settings": settings,
        "unit": unit,
        "median": rounded(statistics.median(values)),
        "min": rounded(min(values)),
        "max": rounded(max(values)),
        "samples": len(values),
        "calls_per_sample": calls,
        "clean": clean,
        "foreign_percent": None if foreign_percent is None else round(foreign_percent, 1),
        "max_error": None if max_error is None else float(f"{max_error:.2g}"),
        "tolerance": None if tolerance is None else float(f"{tolerance:.2g}"),
        "times_better_than": {name: rounded(factor) for name, factor in (times_better_than or {}).items()},
        "goals": dict(goals or {}),
        "dtype": dtype,
        **circumstances(),
    }


def rounded(value: float | None, scale: float = 1.0) -> Any:
    """To four digits; None stays."""
    return None if value is None else float(f"{value * scale:.4g}")


@cache
def circumstances() -> dict[str, Any]:
    """The machine, the versions, the commit, the date and the command of this run."""
    return {
        "cpu": _cpu(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),  # such as AVX512
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | {name: installed(name) for name in PACKAGES},
        "commit": commit_of(ROOT),
        # Results and the pages made from them do not change what was measured.
        "dirty": bool(_git(ROOT, "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs", ":!README.md")),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": "python -m benchmarks " + shlex.join(without_folders(sys.argv[1:])),
    }


def without_folders(arguments: Sequence[str]) -> list[str]:
    """The arguments that decide what is measured, without the paths of this machine."""
    kept, folders = [], ("--output", "--work", "--data", "--against")
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


def commit_of(checkout: Path) -> str:
    return _git(checkout, "rev-parse", "HEAD")


def _git(checkout: Path, *arguments: str) -> str:
    if not shutil.which("git"):
        return "unknown"
    done = subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def append(rows: Sequence[Row], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(one) + "\n" for one in rows)


def read(folder: Path) -> list[Row]:
    """All rows of the `*.jsonl` files in `folder`, oldest first."""
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text("utf-8").splitlines()]
    return sorted((json.loads(line) for line in lines if line), key=lambda one: one["date"])
