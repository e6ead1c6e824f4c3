"""The suites: where each one is, against whom it measures, what it needs, and its part of the time of `all`."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import NamedTuple


class Suite(NamedTuple):
    """A suite, known without importing it.

    Attributes:
        module: has a docstring that says what is measured, `WORKLOADS` and `run`.
        against: who takes part beside ours.
        gpu: one of `GPU`.
        minutes: what it takes by itself, in words.
        weight: its part of the time of `all`, beside the others'; 0: it is left out there.
    """

    module: str
    against: str
    gpu: str
    minutes: str
    weight: int


NO, BETTER, MUST = "no", "better", "must"
GPU = {
    NO: "needs no GPU",
    BETTER: "made for a GPU; on a CPU it measures a small model",
    MUST: "needs a GPU, only --quick tries it without one",
}
TRANSFORMERS = "transformers (eager, sdpa, FlashAttention)"
UNTIMED = "until all is done, or as long as --minutes allows"
COMPILED = f"{TRANSFORMERS}, the latter two under torch.compile too"

SUITES = {
    "kernels": Suite(
        "benchmarks.kernels.suite",
        "every backend of an op, its reference under torch.compile, FlashAttention, Liger-Kernel, "
        "late-interaction-kernels, flash-maxsim",
        MUST,
        "about nine minutes",
        20,
    ),
    "throughput": Suite(
        "benchmarks.models.throughput",
        f"{COMPILED}, sentence-transformers, packed-encoders",
        BETTER,
        UNTIMED,
        20,
    ),
    "latency": Suite(
        "benchmarks.models.latency",
        "transformers (sdpa, and under torch.compile), packed-encoders",
        BETTER,
        UNTIMED,
        10,
    ),
    "training": Suite("benchmarks.models.training", COMPILED, BETTER, UNTIMED, 12),
    "memory": Suite("benchmarks.models.memory", TRANSFORMERS, BETTER, UNTIMED, 6),
    "padding": Suite(
        "benchmarks.models.padding",
        "transformers (sdpa, FlashAttention), sentence-transformers",
        BETTER,
        UNTIMED,
        8,
    ),
    "paper-table": Suite("benchmarks.models.paper_table", COMPILED, BETTER, UNTIMED, 14),
    "colbert": Suite(
        "benchmarks.models.colbert",
        "transformers (sdpa, FlashAttention), sentence-transformers, PyLate, padded einsum as PyLate has it",
        BETTER,
        UNTIMED,
        8,
    ),
    "cpu": Suite(
        "benchmarks.cpu.suite",
        "transformers (and under torch.compile), sentence-transformers, ONNX Runtime, OpenVINO, maxsim-cpu",
        NO,
        "about ten minutes",
        10,
    ),
    "accuracy": Suite("benchmarks.models.accuracy", TRANSFORMERS, BETTER, UNTIMED, 6),
    "retrieval": Suite(
        "benchmarks.retrieval.suite",
        "the bare encoder, exact search, bars that were set beforehand",
        NO,
        "about an hour, and 14 GB of disk",
        0,
    ),
}


def load(name: str) -> ModuleType:
    """The module of a suite: importing one takes seconds, so it is done where it is needed."""
    return import_module(SUITES[name].module)


def described(name: str) -> str:
    """What a suite measures, against whom, what it needs and takes, and its workloads with a line each."""
    suite, module = SUITES[name], load(name)
    what = (module.__doc__ or "").strip().splitlines()[0]
    width = max(map(len, module.WORKLOADS))
    lines = [f"  {workload:{width}}  {line}" for workload, line in module.WORKLOADS.items()]
    return "\n".join(
        [name, f"  {what}", f"  against {suite.against}", f"  {GPU[suite.gpu]}; {suite.minutes}", "", *lines]
    )
