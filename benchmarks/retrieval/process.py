"""Building and searching a store in a process of its own, whose memory is watched from outside. Linux only.

What counts is anonymous memory: of a store that is mapped, the pages are the kernel's to drop.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import FOREIGN_LIMIT, Reading, read_clocks

ROOT = Path(__file__).parents[2]
EVERY = 0.01  # seconds between two looks at the memory


def build(
    corpus: str, folder: str, width: int | None, *, prefilter: bool, threads: int, limit_mb: int | None
) -> dict[str, Any]:
    """Index a corpus with the default model, or with a synthetic one of this width, and say how long it took.

    `limit_mb` is the most memory that the process may ask for: RLIMIT_DATA, to which stores that are read count as
    well, because they are mapped in a way in which they could be written to.
    """
    from benchmarks.retrieval.synthetic import model
    from modernbert.retrieval import index

    if limit_mb:
        resource.setrlimit(resource.RLIMIT_DATA, (limit_mb << 20, limit_mb << 20))
    torch.set_num_threads(threads)
    colbert = model(width)
    started = time.perf_counter()
    summary = index([corpus], folder, colbert, prefilter=prefilter, progress=False)
    return {"seconds": time.perf_counter() - started, "passages": summary.passages}


def search(
    folder: str,
    width: int | None,
    queries: list[str],
    *,
    top_k: int,
    prefilter: bool,
    rounds: int,
    retries: int,
    threads: int,
) -> dict[str, Any]:
    """Ask one query after another, in `rounds` passes over all of them, after one exact search that reads everything.

    Returns:
        Seconds until the first answer; for each pass the seconds of each query, and the foreign CPU; what every query
        found, as `[key, score]`.
    """
    from benchmarks.retrieval.synthetic import model
    from modernbert.retrieval import Store

    torch.set_num_threads(threads)
    found: dict[str, list[tuple[int, float]]] = {}

    def ask(query: str) -> float:
        started = time.perf_counter()
        (hits,) = store.search([query], top_k=top_k, prefilter=prefilter)
        seconds = time.perf_counter() - started
        found[query] = [(hit.number, hit.score) for hit in hits]
        return seconds

    colbert, started = model(width), time.perf_counter()
    with Store(folder, colbert) as store:
        store.search(queries[:1], top_k=top_k)
        load_seconds = time.perf_counter() - started
        ask(queries[0])
        passes = [quiet_pass(lambda: [ask(query) for query in queries], retries) for _ in range(rounds)]
    return {
        "load_seconds": load_seconds,
        "passes": [{"seconds": seconds, "foreign": foreign} for seconds, foreign in passes],
        "found": [found[query] for query in queries],
    }


def quiet_pass(
    ask_all: Callable[[], list[float]],
    retries: int,
    read: Callable[[Callable[[], Any]], Reading] = read_clocks,
) -> tuple[list[float], float]:
    """The seconds of each query in the quietest of some passes, and its foreign CPU; one quiet pass is enough."""
    attempts: list[tuple[list[float], float]] = []
    for _ in range(1 + retries):
        seconds: list[float] = []
        foreign = read(lambda seconds=seconds: seconds.extend(ask_all())).foreign
        attempts.append((seconds, foreign))
        if foreign <= FOREIGN_LIMIT:
            break
    return min(attempts, key=lambda attempt: attempt[1])


def watched(function: Callable[..., Any], **arguments: Any) -> tuple[Any, float]:
    """What a function of this file returns in a fresh process, and the peak of its anonymous memory in MB."""
    command = [sys.executable, "-m", "benchmarks.retrieval.process", function.__name__, json.dumps(arguments)]
    peak = 0.0
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output)
        try:
            while process.poll() is None:
                peak = max(peak, anonymous_mb(process.pid))
                time.sleep(EVERY)
        finally:
            process.kill()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        output.seek(0)
        return json.loads(output.read().splitlines()[-1]), peak


def anonymous_mb(pid: int) -> float:
    """Anonymous memory of a process; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def environment() -> dict[str, str]:
    """That of a process which finds this checkout first, installed or not."""
    path = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


if __name__ == "__main__":
    print(json.dumps({"build": build, "search": search}[sys.argv[1]](**json.loads(sys.argv[2]))))
