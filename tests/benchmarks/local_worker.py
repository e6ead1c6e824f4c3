"""A `Worker` that answers in this process, so that a whole suite runs in seconds; and builders that pretend."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import inputs
from benchmarks.clock import Refused
from benchmarks.worker import Build, Job, Peer, Setup, State, Variant, attempt


class LocalWorker:
    """As `benchmarks.worker.Worker`, without a process."""

    pid = "self"

    def __init__(self, setup: Setup, peer: Peer, scratch: Path) -> None:
        self.process, self.is_alive = self, True
        self.worked, self.state = attempt(lambda: State(setup, peer.builder(setup, **peer.options)))

    def ask(self, request: Any, *, timeout: float, **arguments: Any) -> Any:
        worked, answer = attempt(lambda: request(self.state, **arguments)) if self.worked else (False, self.state)
        if not worked:
            raise Refused(answer)
        return answer

    def close(self) -> None:
        self.is_alive = False


def pretend(setup: Setup, *, how: str = "right") -> Build:
    """A builder whose answer is the ids of the texts, at any speed, and wrong in every way."""
    if how == "cannot load":
        raise ImportError("no such kernel")

    def act(seconds: float) -> None:
        if how == "dies":
            print("a kernel has crashed", file=sys.stderr)
            os._exit(3)
        if how == "fails":
            raise ValueError("unknown shape")
        time.sleep(600 if how == "hangs" else seconds)

    def variants(job: Job) -> Iterator[Variant]:
        ids = torch.cat([inputs.ids(index, length) for index, length in enumerate(job.lengths)]).float()
        answer = {"wrong": ids + 1, "short": ids[1:], "nan": ids * float("nan")}.get(how, ids)
        for name, seconds in (("slow", 0.02), ("fast", 0.001)):
            yield Variant(name, lambda seconds=seconds: act(seconds), lambda: answer)

    return variants


def where_from(setup: Setup) -> Build:
    """The answer is the length of the path that `modernbert` was imported from."""
    import modernbert

    length = float(len(str(Path(modernbert.__file__).parents[1])))
    return lambda job: [Variant("", lambda: None, lambda: torch.tensor([length]))]
