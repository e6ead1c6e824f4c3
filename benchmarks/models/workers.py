"""The other side of `worker.py`: a process is asked, and waited for, and ended."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.harness import Failed
from benchmarks.models.case import Order
from benchmarks.models.worker import serve


class Worker:
    """A process that starts at once and loads its model with the first question.

    `ask` is `send` and `receive`; between the two other processes can be asked.
    """

    def __init__(self, order: Order, scratch: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.log = Path(tempfile.mkstemp(dir=scratch, suffix=".log")[1])
        self.process = context.Process(target=serve, args=(theirs, order, str(self.log)))
        self.process.start()
        theirs.close()  # so that its end is noticed here

    def ask(self, command: str, *, timeout: float, **arguments: Any) -> Any:
        """The answer to a command of `worker.COMMANDS`.

        Raises:
            Failed: it failed, its process died, or nothing came within `timeout` seconds: then it is ended.
        """
        self.send(command, **arguments)
        return self.receive(timeout)

    def send(self, command: str, **arguments: Any) -> None:
        # A process that is gone is noticed when its answer is waited for.
        with suppress(OSError):
            self.connection.send((command, arguments))

    def receive(self, timeout: float) -> Any:
        try:
            if not self.connection.poll(max(0.0, timeout)):
                self.close()
                raise Failed(f"did not answer within {timeout:.0f} s")
            worked, answer = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(5)
            code = self.process.exitcode
            last = self.last_words()
            raise Failed(f"its process ended with exit code {code}" + (f": {last}" if last else "")) from error
        if not worked:
            raise Failed(answer)
        return answer

    def last_words(self) -> str:
        lines = self.log.read_text("utf-8", "replace").strip().splitlines() if self.log.exists() else []
        return lines[-1][:200] if lines else ""

    def close(self) -> None:
        """End the process, politely for two seconds."""
        self.connection.close()
        until = time.monotonic() + 2
        while self.process.is_alive() and time.monotonic() < until:
            self.process.join(0.05)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
