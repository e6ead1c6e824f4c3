"""Peak memory beyond the loaded model and its inputs, forward and forward + backward, by tokens of a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.harness import Result, WrongOutput
from benchmarks.models.case import Case, some_places
from benchmarks.models.comparison import Taken
from benchmarks.models.implementations import EAGER, FLASH, IMPLEMENTATIONS, OURS, SDPA
from benchmarks.models.measure import Bench, Table, bench
from benchmarks.models.workers import Failed
from benchmarks.process_memory import CLEAR

WORKLOADS = {
    "forward": "of inference: 4,096 to 65,536 tokens in texts of 512, and 1 and 4 texts of 8192",
    "backward": "of a forward and a backward pass over the same",
}
NAMES = (OURS, SDPA, FLASH, EAGER)
ON_GPU = ((32, 512), (8, 512), (128, 512), (1, 8192), (4, 8192))
ON_CPU = ((8, 512), (2, 512), (1, 4096))
QUICK = ((1, 64), (2, 64))


def run(*, quick: bool, only: Sequence[str], minutes: float | None = None) -> Iterator[Result]:
    """ModernBERT-base in bfloat16 on a GPU; Ettin-17m in float32 on a CPU, a fresh process for each sample."""
    workloads = [name for name in WORKLOADS if not only or name in only]
    with bench("memory", quick=quick, minutes=minutes) as here:
        if not here.is_gpu and not CLEAR.exists():
            reason = "cannot be measured: only Linux resets the high-water mark of a process"
            yield Result(workloads[0], [], {"every implementation": reason})
            return
        model = "modernbert-base" if here.is_gpu else "ettin-17m"
        for count, length in QUICK if here.tries else ON_GPU if here.is_gpu else ON_CPU:
            for workload in workloads:
                if here.late():
                    yield here.rest(workload)
                    return
                yield measured(here, model, table(here, model, workload, count, length))


def table(here: Bench, model: str, workload: str, count: int, length: int) -> Table:
    lengths = (length,) * count
    backward = workload == "backward"
    passes = "forward + backward" if backward else "forward"
    return Table(
        workload,
        f"{model}, {count} texts of {length} tokens in one batch: peak memory of {passes}",
        f"fixed {length}",
        Case(lengths, some_places(lengths, here.checked), batch=count, backward=backward),
        "peak memory",
        "MB",
        lambda nbytes: nbytes / 1e6,
        model_pass=False,
        passes=passes,
        x=("tokens", count * length),
        goals={OURS: {SDPA: 2.0}} if backward else {},
    )


def measured(here: Bench, model: str, made: Table) -> Result:
    """On a CPU an allocator keeps what it once had, so that a process has one sample in it."""
    dtype = "bfloat16" if here.is_gpu else "float32"
    names = {name: IMPLEMENTATIONS[name] for name in (NAMES[:3] if here.quick else NAMES)}
    warm = Case((16, 8), (0,), batch=2, backward=made.case.backward)
    taken: dict[str, Taken] = {}
    refused: dict[str, str] = {}
    for _ in range(1 if here.is_gpu or here.quick else 3):
        with here.team(model, dtype, names) as team:
            refused |= team.start()
            try:
                exact, plain = team.expected(made.case)
            except Failed as reason:
                refused["every implementation"] = f"cannot be judged: the reference {reason}"
                break
            team.dismiss_judges()
            rounds = 3 if here.is_gpu else 1
            peaks, failed = team.turns(list(team.names), "peak", rounds, case=made.case, warm=warm)
            refused |= failed
            for name, told in peaks.items():
                try:
                    got = team.asked(team.workers[name], "answer", timeout=600)
                    judged = team.judged(got, exact, plain, made.case)
                except (Failed, WrongOutput) as reason:
                    refused[name] = str(reason)
                    continue
                one = taken.setdefault(name, Taken(name, told[0]["settings"], judged))
                one.costs += [one_peak["bytes"] for one_peak in told]
    done = [one for name, one in taken.items() if name not in refused]
    return Result(made.workload, team.rows(made, done), team.reasons(made, refused))
