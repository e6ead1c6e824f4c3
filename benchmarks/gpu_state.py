"""What a GPU is, what drives it, and at which clocks and power it ran."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PEERS = (
    "triton",
    "liger-kernel",
    "late-interaction-kernels",
    "flash-maxsim",
    "packed-encoders",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
)
SENSORS = {"clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "power.draw": "watts", "temperature.gpu": "celsius"}


@lru_cache
def identity(device: torch.device) -> dict[str, Any]:
    """What a row says about the GPU and what drives it; on a CPU nothing but the versions."""
    found = {package: installed(package) for package in PEERS}
    known: dict[str, Any] = {"gpu": None, "driver": None, "capability": None, "versions": found}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known["gpu"] = properties.name
        known["capability"] = f"{properties.major}.{properties.minor}"
        known["driver"] = (query(device, ("driver_version",)) or [None])[0]
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return known


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def sensors(device: torch.device, run: Callable[[], Any]) -> dict[str, float | None]:
    """Clocks, power and temperature while `run` is repeated: those of an idle GPU say nothing about it."""
    if device.type != "cuda":
        return dict.fromkeys(SENSORS.values())
    values = query(device, tuple(SENSORS), run)
    return dict(zip(SENSORS.values(), map(number, values or [""] * len(SENSORS)), strict=True))


def query(device: torch.device, fields: Sequence[str], run: Callable[[], Any] = lambda: None) -> list[str] | None:
    """What nvidia-smi says about this GPU; None where it is missing or says nothing."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    chosen = [f"--id=GPU-{uuid}"] if uuid else []
    command = ["nvidia-smi", *chosen, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except FileNotFoundError:
        return None
    until = time.monotonic() + 10
    while asked.poll() is None and time.monotonic() < until:
        run()
        torch.cuda.synchronize(device)
    if asked.poll() is None:
        asked.kill()
    answer = asked.communicate()[0].strip()
    values = [value.strip() for value in answer.split(",")]
    return values if asked.returncode == 0 and len(values) == len(fields) else None


def number(text: str) -> float | None:
    """A figure of nvidia-smi; None for `[N/A]`."""
    try:
        return float(text)
    except ValueError:
        return None
