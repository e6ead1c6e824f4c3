"""One implementation in a process of its own: what it is started with, what it is asked, and the `Worker` that asks."""

from __future__ import annotations

import gc
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import clock
from benchmarks.clock import Call, Reading, Refused, Sample
from benchmarks.rows import ROOT

HERE = Path(__file__).parent
SLOW = 2.0
"""Seconds of a call on a CPU above which it is not repeated before its sample."""


@dataclass(frozen=True)
class Setup:
    """The checkpoint, for transformers and for us; the dtype ("bfloat16"), device ("cuda") and threads of torch."""

    folder: str
    dtype: str
    device: str
    threads: int
    quick: bool

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def is_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def pad(self) -> int:
        """The token of padding, by which a model knows it from tokens of query expansion."""
        return json.loads(Path(self.folder, "config.json").read_text("utf-8"))["pad_token_id"] or 0


@dataclass(frozen=True)
class Job:
    """One call that all implementations of a table make.

    Attributes:
        lengths: of its texts, in tokens; their ids are those of `inputs.ids`.
        checked: indices of the texts whose hidden states are compared with the reference.
        batch: texts of a batch where a protocol fixes it; None leaves the choice to the implementation.
        from_host: the ids are on the host, and their copy to the device is timed.
        head_flops: operations beside those of the encoder.
        options: further arguments for particular builders.
    """

    lengths: tuple[int, ...]
    checked: tuple[int, ...] = ()
    batch: int | None = None
    from_host: bool = False
    backward: bool = False
    head_flops: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


class Variant(NamedTuple):
    """A job that is ready to run, with one choice of settings.

    Attributes:
        run: the timed call. It may return before a GPU is done.
        answer: the output to compare, computed as `run` computes it: float32 on the CPU.
        warm: what runs before a sample, untimed; by default `run`.
    """

    settings: str
    run: Call
    answer: Callable[[], Tensor]
    warm: Call | None = None


Build = Callable[[Job], Iterable[Variant]]
"""The variants of a job, made one after another, so that the memory of one is free before the next is made."""


OURS, SESSION, BEFORE = "modernbert", "modernbert, Session", "modernbert, the other checkout"
"""Our plain modules, a `Session`, and the plain modules of another checkout."""

ENGINES = {
    f"modernbert, {engine}": {"session": True, "engine": engine}
    for engine in ("onnxruntime", "openvino", "onnxruntime-int8")
}
"""A `Session` with an engine: the options of its builder."""


class Peer(NamedTuple):
    """An implementation: how its process builds it, and when it takes part.

    Attributes:
        builder: takes a `Setup` and the options, loads the model and returns a `Build`.
        applies: whether it runs in such a setup at all. package: must be installed.
        slow: compiles for minutes, and is left out where time is short.
        exact: is refused where it differs from the reference; others are not, and their rows have the error.
        paths: folders from which modules are imported first: another checkout, or packages that are not here.
    """

    builder: Callable[..., Build]
    options: Mapping[str, Any] = {}
    applies: Callable[[Setup], bool] = lambda setup: True
    package: str | None = None
    slow: bool = False
    exact: bool = True
    paths: tuple[str, ...] = ()


class Worker:
    """A process that loads its model when it starts, and answers requests, which are functions of this module."""

    def __init__(self, setup: Setup, peer: Peer, scratch: Path) -> None:
        self.connection, theirs = Pipe()
        self.log = Path(tempfile.mkstemp(dir=scratch, suffix=".log")[1])
        # `benchmarks` is always that of this checkout; `modernbert` may be another's.
        paths = [*peer.paths, str(ROOT), str(ROOT / "kernels"), *(path for path in sys.path if path)]
        code = f"import sys; sys.path[:] = {paths!r}; import benchmarks; benchmarks.__path__ = [{str(HERE)!r}]; "
        code += f"from benchmarks.worker import serve; serve({theirs.fileno()})"
        # What another process compiled is not found again. Thread pools of tokenizers read RAYON_NUM_THREADS.
        known = {"TORCHINDUCTOR_CACHE_DIR": tempfile.mkdtemp(dir=scratch), "RAYON_NUM_THREADS": str(setup.threads)}
        with self.log.open("w") as log:
            pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            command = [sys.executable, "-c", code]
            self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=os.environ | known, **pipes)
        theirs.close()  # so that its end is noticed here
        with suppress(OSError):  # a process that has died is noticed when its answer is awaited
            self.connection.send_bytes(pickle.dumps((setup, peer.builder, peer.options)))

    def ask(self, request: Callable[..., Any], *, timeout: float, **arguments: Any) -> Any:
        """The answer to a request; `Refused` if it failed, its process died, or it took longer and was ended."""
        try:
            self.connection.send_bytes(pickle.dumps((request, arguments)))
            if not self.connection.poll(max(0.0, timeout)):
                self.close()
                raise Refused(f"did not answer within {timeout:.0f} s")
            worked, answer = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError) as error:
            lines = self.log.read_text("utf-8", "replace").strip().splitlines()
            reason = [f"its process ended with exit code {self.process.wait(5)}", *lines[-1:]]
            raise Refused(": ".join(reason)[:300]) from error
        if not worked:
            raise Refused(answer)
        return answer

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        """End the process, which has two seconds to end on its own."""
        self.connection.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(2)
        self.process.kill()
        self.process.wait()


@dataclass
class State:
    """What a process holds: the prepared variant, the calls of a sample, and the seconds of a call."""

    setup: Setup
    build: Build
    variant: Variant | None = None
    calls: int = 1
    seconds: float = 0.0

    @property
    def ready(self) -> Variant:
        if self.variant is None:
            raise RuntimeError("no job is prepared")
        return self.variant

    def read(self, work: Call) -> Reading:
        return clock.read_wall(work) if self.setup.is_gpu else clock.read_clocks(work)


def serve(fd: int) -> None:
    """Answer requests until the other side closes the connection: (True, value) or (False, reason)."""
    connection = Connection(fd)
    setup, builder, options = pickle.loads(connection.recv_bytes())
    torch.set_num_threads(setup.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    worked, state = attempt(lambda: State(setup, builder(setup, **options)))
    with suppress(EOFError):
        while True:
            request, arguments = pickle.loads(connection.recv_bytes())
            answer = attempt(partial(request, state, **arguments)) if worked else (False, state)
            connection.send_bytes(pickle.dumps(answer))


def attempt(work: Call) -> tuple[bool, Any]:
    """Whether it works, and what it returns or why not: whatever other packages raise, and too little memory."""
    try:
        return True, work()
    except Exception as error:
        release()
        return False, f"fails: {type(error).__name__}: {str(error)[:300]}"


def prepare(state: State, job: Job, window: float, seconds: float) -> dict[str, Any]:
    """Try the variants of a job for so many seconds and keep the fastest, whose samples last `window` seconds."""
    state.variant = None
    release()
    until, best, quickest, failed = time.monotonic() + seconds, None, float("inf"), ""
    for variant in state.build(job):
        try:
            took = state.read(variant.warm or variant.run).seconds
            if took < SLOW or variant.warm or state.setup.is_gpu:  # a first call compiles and allocates
                took = state.read(variant.run).seconds
            for _ in range(0 if took > 1.0 else min(20, int(window / max(took, 1e-3)) + 1)):
                took = min(took, state.read(variant.run).seconds)
        except torch.OutOfMemoryError as error:
            failed, took = f"too little memory for {variant.settings}: {str(error)[:100]}", float("inf")
            release()
        if took < quickest:
            best, quickest = variant, took
        # Where a protocol fixes the batch, the first that fits is taken, whatever is faster.
        if best and (job.batch is not None or time.monotonic() > until):
            break
    if best is None:
        raise RuntimeError(failed or "there is no variant of this job")
    state.variant, state.seconds, state.calls = best, quickest, clock.repeats_for(window, quickest)
    told = {"settings": best.settings, "calls": state.calls, "answer": best.answer()}
    release()
    return told


def sample(state: State, count: int | None = None) -> Sample:
    """With `count` so many calls, each waited for. Else those of a window, which a GPU makes without waiting between
    them: then there is one figure, their mean.

    An untimed call comes first: it outlasts the threads of other processes that spin for a while after their last call.
    """
    variant, each, is_gpu = state.ready, [], state.setup.is_gpu
    if state.seconds < SLOW or is_gpu:
        (variant.warm or variant.run)()

    def window() -> None:
        for _ in range(count or state.calls):
            start = time.perf_counter()
            variant.run()
            if count and is_gpu:
                torch.cuda.synchronize()
            each.append(time.perf_counter() - start)

    seconds, foreign = state.read(window)
    release(few=True)
    return Sample([seconds / state.calls] if is_gpu and not count else each, foreign)


def sensors(state: State) -> dict[str, Any]:
    """What a GPU says of itself under the load of a sample."""
    return clock.sensors(state.ready.run)


def peak(state: State, job: Job, warm: Job) -> dict[str, Any]:
    """Bytes at the peak of a call beyond the loaded model and its inputs; its settings and its answer.

    `warm` brings thread pools, workspaces and lazy imports. On a CPU only the first call of a process counts, because
    an allocator keeps what it once had.
    """
    next(iter(state.build(warm))).run()
    release()
    state.variant = variant = next(iter(state.build(job)))
    found = clock.peak_bytes(variant.run) if state.setup.is_gpu else host_peak(variant.run)
    return {"bytes": found, "settings": variant.settings, "answer": variant.answer()}


CLEAR = Path("/proc/self/clear_refs")
"""Resets the high-water mark of the memory of a process. Linux only."""


def host_peak(run: Call) -> int:
    before = memory("VmRSS")
    CLEAR.write_text("5")
    run()
    return memory("VmHWM") - before


def memory(field: str, pid: str | int = "self") -> int:
    """A line of /proc/PID/status in bytes; 0 once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def answer(state: State, job: Job) -> Tensor:
    """The answer of a job that is not timed."""
    return next(iter(state.build(job))).answer()


def release(*, few: bool = False) -> None:
    """Give back what the allocator of a GPU keeps, because others need it; with `few`, only if it is much."""
    gc.collect()
    if torch.cuda.is_initialized() and (not few or torch.cuda.memory_reserved() > torch.cuda.mem_get_info()[1] / 40):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
