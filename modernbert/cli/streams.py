"""The process around a command: its standard streams, and the signals that end it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from ..files import DISK_FULL


def open_closed_streams() -> None:
    """Open standard streams that were closed (`>&-`): what is printed there is lost, and no file takes their number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115 -- until the process ends
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def flush_stdout() -> None:
    """Write out what was printed. If the reader of a pipe has gone, end without a message."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # Python flushes again at its end, and must find a stream that takes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        raise


def message_of(error: Exception) -> str:
    """The message of an error. That of a full disk without a path is about stdout: files are written by their names."""
    if not isinstance(error, OSError) or error.errno not in DISK_FULL or error.filename:
        return str(error)
    is_bare = error.strerror == os.strerror(error.errno)
    return f"cannot write to stdout: {error.strerror}" if is_bare else str(error)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """End on SIGTERM and SIGHUP as after an error, so that temporary files are deleted. Ignored ones stay ignored."""

    def end(number: int, _: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)  # The files are being deleted.
        sys.exit(128 + number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names if threading.current_thread() is threading.main_thread()]
    numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
