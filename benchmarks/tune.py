"""Chooses the tiles of the Triton kernels for the GPU at hand, by timing those that compile without a spill and fit.

    python -m benchmarks.tune                     what is faster than the present tiles, and the rows to enter
    python -m benchmarks.tune --only attention    one op
    python -m benchmarks.tune --write             enters them into the table of the tiles, after each op
    TRITON_INTERPRET=1 python -m benchmarks.tune --quick    tries the path without a GPU; those figures are no results

The answer of a candidate is checked before it is timed. Candidates take turns, and the fastest meets the present one
once more; it replaces that only where it is faster by more than equal kernels differ. A few minutes an op.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks import clock
from benchmarks.clock import Machine, Rates
from benchmarks.ops import BOTH, FORWARD, Task, Way, call_of, copied, timed
from benchmarks.rows import ROOT
from benchmarks.tasks import attention_task, geglu_task, maxsim_task
from modernbert.files import replacing
from modernbert_kernels import launch
from modernbert_kernels.fused.tiles import TILES, Tile, tile_for

MINUTES, NOISE = 8.5, 1.02
"""When no further entry is begun. How much faster a candidate must be: two equal kernels differ by less."""

WINDOW = 0.004
"""Least seconds of a sample: of many candidates, and the winner has to win again."""

TOKENS, COMPILED, FEW = 16_384, 384, 16
"""Of a call that is timed, that is compiled (the kernels do not depend on it), and in a try-out."""

TILES_FILE = ROOT / "kernels" / "modernbert_kernels" / "fused" / "tiles.py"

ROUNDS, DUEL = 5, 15
ARCHS = (80, 89, 90, 100, 120)

Key = tuple[str | int, ...]
Table = Mapping[Key, Mapping[int, Tile]]


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def dtype_of(itemsize: int) -> torch.dtype:
    # The interpreter multiplies the bit patterns of bfloat16.
    return torch.float32 if itemsize == 4 else torch.float16 if interpreted() else torch.bfloat16


class Subject(NamedTuple):
    """An entry of the table.

    Attributes:
        kernel: takes the tile. backward: it belongs to the backward pass, so both passes are timed.
        candidates: block_m, block_n, warps, stages.
        tasks: calls that take the entry, on a device with so many tokens; all count alike.
    """

    key: Key
    kernel: str
    backward: bool
    candidates: tuple[tuple[int, int, int, int], ...]
    tasks: Callable[[str, int], Iterator[Task]]

    @property
    def op(self) -> str:
        return str(self.key[0]).split()[0]


def attention(part: str, width: int, itemsize: int) -> Subject:
    """Local and global layers of 768 numbers, in texts of 512 tokens."""

    def tasks(device: str, tokens: int) -> Iterator[Task]:
        length, heads = min(512, tokens), max(1, min(768, tokens) // width)
        for window in (64, None):
            known: dict[str, Any] = {"dtype": dtype_of(itemsize), "device": device}
            yield attention_task((length,) * (tokens // length), heads, width, window, **known)

    blocks = (32, 64, 128) if itemsize == 2 else (16, 32, 64)
    candidates = tuple(product(blocks, blocks, (4, 8), (1, 2, 3)))
    kernel = f"attention_{part}_kernel"
    return Subject((f"attention {part}", width, itemsize), kernel, part != "forward", candidates, tasks)


def maxsim(rows: int) -> Subject:
    """Many queries as in training, or one of so many tokens as in reranking, with documents of 300 tokens."""

    def tasks(device: str, tokens: int) -> Iterator[Task]:
        queries, documents = (
            (max(1, tokens // 128), max(2, tokens // 128)) if rows == 128 else (1, max(2, tokens // 16))
        )
        for width in (128, 48):
            yield maxsim_task(queries, documents, width, tokens=rows, dtype=dtype_of(2), device=device)

    candidates = tuple(product((rows,), (32, 64, 128), (4, 8), (2, 3, 4)))
    return Subject(("maxsim", rows), "maxsim_kernel", False, candidates, tasks)


def geglu(part: str) -> Subject:
    """In the MLPs of Ettin-17m and of ModernBERT-base."""

    def tasks(device: str, tokens: int) -> Iterator[Task]:
        yield from (geglu_task(tokens, width, dtype=dtype_of(2), device=device) for width in (1152, 384))

    # No loop of it could overlap stages.
    candidates = tuple(product((1024, 2048, 4096, 8192), (128, 512), (4, 8), (3,)))
    return Subject((f"geglu {part}",), f"geglu_{part}_kernel", part == "backward", candidates, tasks)


PARTS = ("forward", "dq", "dkv")
SUBJECTS: tuple[Subject, ...] = (
    *(attention(part, 64, 2) for part in PARTS),
    *(maxsim(32), maxsim(128), geglu("forward"), geglu("backward"), attention("forward", 64, 4), maxsim(64)),
    *(attention(part, 64, 4) for part in PARTS[1:]),
    *(attention(part, width, size) for size in (2, 4) for width in (128, 32) for part in PARTS),
)
"""The most used first: the time may end before the last."""


class Outcome(NamedTuple):
    """What was found for an entry.

    Attributes:
        factor: how many times faster `best` is than `present`; 1 where it is the present one.
        refused: candidates that were not timed, with the reason.
    """

    key: Key
    present: Tile
    best: Tile
    factor: float
    refused: dict[str, str]


def fits(index: int, device: str, tile: Tile) -> bool:
    """Whether the kernel of a subject, by its index, runs on this GPU with this tile, and spills nothing."""
    from triton.runtime import jit

    subject, found, run = SUBJECTS[index], [], jit.JITFunction.run

    def seen(*args: Any, **kwargs: Any) -> Any:
        found.append(run(*args, **kwargs))
        return found[-1]

    try:
        with (
            mock.patch.dict(TILES[subject.key], {launch.arch(torch.device(device)): tile}),
            mock.patch.object(jit.JITFunction, "run", seen),
        ):
            for task in subject.tasks(device, COMPILED):
                way = Way("", task.op.backends["triton"])
                call_of(task, way, copied(task, subject.backward), BOTH if subject.backward else FORWARD)()
    except Exception:  # whatever the compiler and the driver say, it is not a candidate
        return False
    return not any(binary.n_spills for binary in found if binary.metadata.name == subject.kernel)


def fitting(subject: Subject, device: str) -> list[Tile]:
    """The candidates that fit, compiled on all cores; Triton keeps the binaries, so that they load at once later."""
    tiles = [Tile(*one) for one in subject.candidates]
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), get_context("spawn")) as pool:
        kept = list(pool.map(partial(fits, SUBJECTS.index(subject), device), tiles))
    return [tile for tile, keep in zip(tiles, kept, strict=True) if keep]


def tune(subject: Subject, tiles: Sequence[Tile], machine: Machine, *, tokens: int, rounds: int, duel: int) -> Outcome:
    """The fastest of these tiles and the present one, if it is faster than that by more than `NOISE`."""
    present = tile_for(machine.device, *subject.key)
    rivals = [tile for tile in tiles if tile[:4] != present[:4]]
    factors, refused = compared(subject, present, rivals, machine, tokens, rounds)
    if not factors:
        return Outcome(subject.key, present, present, 1.0, refused)
    best = max(factors, key=factors.__getitem__)
    # Of many equal ones the luckiest looks faster: it has to win again.
    again, _ = compared(subject, present, [best], machine, tokens, duel) if best != present else ({}, {})
    factor = again.get(best, 1.0)
    return Outcome(subject.key, present, *((best, factor) if factor > NOISE else (present, 1.0)), refused)


def compared(
    subject: Subject, present: Tile, rivals: Sequence[Tile], machine: Machine, tokens: int, rounds: int
) -> tuple[dict[Tile, float], dict[str, str]]:
    """How many times faster than the present tile each is, the geometric mean over the cases; and which are wrong."""
    arch = launch.arch(machine.device)
    names = {label(tile): tile for tile in (present, *rivals)}
    logarithms: dict[str, list[float]] = {name: [] for name in names}
    refused: dict[str, str] = {}
    for task in subject.tasks(str(machine.device), tokens):
        ways = [
            Way(name, task.op.backends["triton"], around=partial(mock.patch.dict, TILES[subject.key], {arch: tile}))
            for name, tile in names.items()
            if name not in refused
        ]
        which = BOTH if subject.backward else FORWARD
        result = timed("tune", task, ways, which, machine, Rates(1.0, 1.0), rounds=rounds)
        refused |= {name.rpartition(": ")[2]: reason for name, reason in result.refused.items()}
        for row in result.rows:
            factor = row["times_better_than"].get(label(present), 1.0)
            logarithms[row["implementation"]].append(math.log(factor))
    # If the present tile is refused, there is nothing to compare with.
    right = [name for name in names if name not in refused]
    return {names[name]: math.exp(sum(logarithms[name]) / len(logarithms[name])) for name in right}, refused


def label(tile: Tile) -> str:
    return f"{tile.block_m} x {tile.block_n}, {tile.num_warps} warps, {tile.num_stages} stages"


def summary(outcome: Outcome, tried: int) -> str:
    name, present = ", ".join(map(str, outcome.key)), label(outcome.present)
    wrong = "".join(f"; {tile} is refused: {reason}" for tile, reason in outcome.refused.items())
    if outcome.best == outcome.present:
        return f"{name}: {present} stays, none of {tried} is faster by more than noise{wrong}"
    return f"{name}: {label(outcome.best)} is {outcome.factor:.3f} times as fast as {present}{wrong}"


def run(machine: Machine, only: Sequence[str], *, quick: bool) -> Iterator[tuple[Outcome, int]]:
    """An outcome for each entry and how many tiles were tried, until the time is over."""
    until = time.monotonic() + 60 * MINUTES
    wanted = [subject for subject in SUBJECTS if not only or subject.op in only]
    firsts = {subject.op: subject for subject in reversed(wanted)}
    for subject in firsts.values() if quick else wanted:
        if time.monotonic() > until:
            print(f"{', '.join(map(str, subject.key))} and what follows was not reached in {MINUTES:g} minutes")
            return
        tiles = [Tile(*subject.candidates[0])] if quick else fitting(subject, str(machine.device))
        tokens, rounds, duel = (FEW, 1, 1) if quick else (TOKENS, ROUNDS, DUEL)
        yield tune(subject, tiles, machine, tokens=tokens, rounds=rounds, duel=duel), len(tiles)


def with_outcome(table: Table, outcome: Outcome, arch: int, gpu: str) -> Table:
    """The table with this outcome, the present tile too if it won: it is measured now.

    An entry also serves newer architectures without one of their own, so the next one keeps its tile by name.
    """
    before = table[outcome.key]
    newer = min((each for each in {*ARCHS, *before} if each > arch), default=None)
    kept = {} if newer is None else {newer: before[max(each for each in before if each <= newer)]}
    return {**table, outcome.key: {**before, **kept, arch: outcome.best._replace(measured=gpu)}}


def entry(key: Key, entries: Mapping[int, Tile]) -> str:
    """A row of `TILES` as Python reads it."""
    cells = (f"{arch}: Tile({', '.join(json.dumps(x) for x in tile if x != '')})" for arch, tile in entries.items())
    return f"    ({', '.join(map(json.dumps, key))},): {{{', '.join(cells)}}},"


def write(table: Table, file: Path) -> None:
    """Replace the rows of `TILES` in its file; `ruff format` gives them their lines."""
    text = file.read_text("utf-8")
    begin = text.index("{\n", text.index("\nTILES: ")) + 2
    rows = "\n".join(entry(key, entries) for key, entries in table.items())
    with replacing(file) as beside:
        beside.write_text(text[:begin] + rows + text[text.index("\n}\n", begin) :], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="ops: attention, maxsim, geglu")
    parser.add_argument("--quick", action="store_true", help="few tokens, one candidate: tries the path")
    parser.add_argument("--write", action="store_true", help="enter what is faster into the table")
    arguments = parser.parse_args()
    machine = clock.this_machine()._replace(window=WINDOW)
    if not machine.is_gpu and not (arguments.quick and interpreted()):
        raise SystemExit("there is no GPU here; TRITON_INTERPRET=1 python -m benchmarks.tune --quick tries the path")
    table, changed = TILES, []
    for outcome, tried in run(machine, arguments.only, quick=arguments.quick):
        print(summary(outcome, tried), flush=True)
        if machine.is_gpu and not arguments.quick and label(outcome.present) not in outcome.refused:
            gpu = torch.cuda.get_device_properties(0).name
            table = with_outcome(table, outcome, launch.arch(machine.device), gpu)
            changed.append(entry(outcome.key, table[outcome.key]))
            if arguments.write:
                write(table, TILES_FILE)
    if changed:
        print(f"The rows of TILES in {TILES_FILE.relative_to(ROOT)}:", *changed, sep="\n")


if __name__ == "__main__":
    main()
