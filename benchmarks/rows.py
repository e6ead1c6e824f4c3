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
GPU_PACKAGES = (
    "triton",
    "liger-kernel",
    "quack-kernels",
    "late-interaction-kernels",
    "flash-maxsim",
    "packed-encoders",
    "flash-attn",
)
DRIVER = Path("/sys/module/nvidia/version")


def row(
    values: Sequence[float],
    *,
    device: str = "cpu",
    max_error: float | None = None,
    tolerance: float | None = None,
    **more: Any,
) -> Row:
    """One measured row.

    Args:
        values: one per sample, in the row's `unit`. device: "cpu" or "cuda".
        max_error: the largest difference from the reference; None if there is nothing to compare.
        more: suite, workload, what, implementation, unit, and what else is known of it.
    """
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    usual = {"kind": "measured", "settings": "", "dtype": "float32", "clean": True, "foreign_percent": None}
    usual |= {"calls_per_sample": 1, "times_better_than": {}, "samples": len(values)}
    errors = {"max_error": rounded(max_error, digits=2), "tolerance": rounded(tolerance, digits=2)}
    return usual | more | {name: rounded(x) for name, x in figures.items()} | errors | circumstances(device)


def rounded(value: float | None, scale: float = 1.0, *, digits: int = 4) -> Any:
    return None if value is None else float(f"{value * scale:.{digits}g}")


@cache
def circumstances(device: str) -> Row:
    """The machine, the versions, the commit, the date and the command of this run."""
    packages: tuple[str, ...] = PACKAGES
    gpu: Row = {"gpu": None, "driver": None, "capability": None}
    if device == "cuda":
        properties, packages = torch.cuda.get_device_properties(0), PACKAGES + GPU_PACKAGES
        gpu["gpu"], gpu["capability"] = properties.name, f"{properties.major}.{properties.minor}"
        gpu["driver"] = DRIVER.read_text().strip() if DRIVER.exists() else None
    return (
        gpu
        | {
            "cpu": _cpu(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),  # such as AVX512
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
            "versions": {"python": platform.python_version()} | {name: installed(name) for name in packages},
            "commit": git("rev-parse", "HEAD"),
            # Results and the pages made from them do not change what was measured.
            "dirty": bool(git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs", ":!README.md")),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            # Paths of this machine do not decide what is measured.
            "command": shlex.join(["python", "-m", "benchmarks", *(one for one in sys.argv[1:] if os.sep not in one)]),
        }
    )


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    """Model name and the vector instructions that decide its speed."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in info.read_text().splitlines())
    fields = {name.strip(): text.strip() for name, _, text in lines}
    flags, name = fields.get("flags", "").split(), fields.get("model name", platform.machine())
    widest = next((flag for flag in ("amx_tile", "avx512f", "avx2") if flag in flags), None)
    return f"{name} ({widest})" if widest else name


def git(*arguments: str, cwd: Path = ROOT) -> str:
    if not shutil.which("git"):
        return "unknown"
    return subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=False).stdout.strip()


def append(rows: Sequence[Row], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(one) + "\n" for one in rows)


def read(folder: Path) -> list[Row]:
    """All rows of the `*.jsonl` files in `folder`, or in `rows/` in a folder of `all`, oldest first."""
    files = [*sorted(folder.glob("*.jsonl")), *sorted(folder.glob("rows/*.jsonl"))]
    lines = [line for file in files for line in file.read_text("utf-8").splitlines()]
    return sorted((json.loads(line) for line in lines if line), key=lambda one: one["date"])
