"""How much memory a call takes beyond what its process has already. Linux only: no other system resets the peak."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

CLEAR = Path("/proc/self/clear_refs")
"""Resets the high-water mark of a process, where there is such a file."""


def peak_beyond(run: Callable[[], T]) -> tuple[int, T]:
    """Bytes at the peak of a call beyond what was there before it, and what it returned."""
    before = _memory("VmRSS")
    CLEAR.write_text("5")
    returned = run()
    return _memory("VmHWM") - before, returned


def _memory(field: str) -> int:
    """A line of /proc/self/status in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024
