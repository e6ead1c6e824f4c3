"""Chooses the tiles of the Triton kernels for the GPU at hand, by timing those that compile without a spill and fit.

    python -m benchmarks.tune                     what is faster than the present tiles, and by how much
    python -m benchmarks.tune --write             also written to kernels/modernbert_kernels/fused/tiles.py
    python -m benchmarks.tune --only attention    one op
    TRITON_INTERPRET=1 python -m benchmarks.tune --quick    tries the path without a GPU; those figures are no results

The answer of a candidate is checked before it is timed. Candidates take turns, and the fastest meets the present one
once more; it replaces that only where it is faster by more than equal kernels differ. A few minutes an op.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks import gpu
from benchmarks.gpu import Machine, Rates
from benchmarks.kernels import resources, suite, tiles_file
from benchmarks.kernels.calls import Task, Way
from benchmarks.kernels.subjects import SUBJECTS, Subject, interpreted, way_of
from benchmarks.kernels.tiles_file import Key
from modernbert_kernels import launch
from modernbert_kernels.fused.tiles import TILES, Tile, tile_for

MINUTES = 8.5
"""After these no further entry is begun, so that a run fits into a call of ten minutes."""

NOISE = 1.02
"""What is not faster than the present tile by more than this stays out: so much do two equal kernels differ."""

TOKENS, FEW = 16_384, 16
ROUNDS, DUEL = 5, 15


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


def using(key: Key, arch: int, tile: Tile) -> AbstractContextManager[Any]:
    """Inside, the kernel takes this tile on GPUs of this architecture."""
    return mock.patch.dict(TILES[key], {arch: tile})


def fits(subject: Subject, arch: int, tile: Tile) -> bool:
    """Whether the kernel compiles with this tile, spills nothing, and has the shared memory that it needs."""
    found = []

    def see(binary: Any) -> None:
        if binary.metadata.name == subject.kernel:
            found.append(resources.resources(binary, arch))

    # The limits of an architecture that is not in their table are those of the newest that is.
    known = max(each for each in resources.ARCHS if each <= arch)
    try:
        with using(subject.key, arch, tile), resources.compiling(arch, see):
            for case in subject.cases("cpu", resources.TOKENS):
                resources.call(case)
    except Exception:  # whatever the compiler says, it is no candidate
        return False
    return bool(found) and all(
        row["spilled"] == 0 and row["shared"] <= resources.SHARED[known] << 10 and row["programs"] > 0 for row in found
    )


def fits_by_index(index: int, arch: int, tile: Tile) -> bool:
    """The same in another process, which finds the subject in its own list."""
    return fits(SUBJECTS[index], arch, tile)


def compiling_candidates(subject: Subject, arch: int) -> list[Tile]:
    """The candidates that fit, compiled on all cores; Triton keeps the binaries, so that they load at once later."""
    tiles = [Tile(*one) for one in subject.candidates]
    index = SUBJECTS.index(subject)
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), get_context("spawn")) as pool:
        kept = list(pool.map(partial(fits_by_index, index, arch), tiles))
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
    """How many times faster than the present tile each is, the geometric mean over the cases; and who is wrong."""
    arch = launch.arch(machine.device)
    names = {label(tile): tile for tile in (present, *rivals)}
    logarithms: dict[str, list[float]] = {name: [] for name in names}
    refused: dict[str, str] = {}
    for case in subject.cases(str(machine.device), tokens):
        ways = tuple(
            Way(name, way_of(case), around=partial(using, subject.key, arch, tile))
            for name, tile in names.items()
            if name not in refused
        )
        task = Task(case.name, case.args, case.kwargs, case.op.reference, ways)
        result = suite.measure("tune", task, subject.backward, machine, Rates(1.0, 1.0), rounds=rounds)
        refused |= {name.rpartition(": ")[2]: reason for name, reason in result.refused.items()}
        for row in result.rows:
            factor = row["times_better_than"].get(label(present), 1.0)
            logarithms[row["implementation"]].append(math.log(factor))
    # Beside a present tile that is refused, nobody is faster.
    right = [name for name in names if name not in refused]
    return {names[name]: math.exp(sum(logarithms[name]) / len(logarithms[name])) for name in right}, refused


def label(tile: Tile) -> str:
    return f"{tile.block_m} x {tile.block_n}, {tile.num_warps} warps, {tile.num_stages} stages"


def said(outcome: Outcome, tried: int) -> str:
    """A line for people."""
    name = ", ".join(map(str, outcome.key))
    first = next((f", the first one {reason}" for reason in outcome.refused.values()), "")
    wrong = f"; {len(outcome.refused)} refused{first}" if outcome.refused else ""
    if label(outcome.present) in outcome.refused:
        return f"{name}: the present tile {label(outcome.present)} {outcome.refused[label(outcome.present)]}"
    if outcome.best == outcome.present:
        return f"{name}: {label(outcome.present)} stays, none of {tried} is faster by more than noise{wrong}"
    return f"{name}: {label(outcome.best)} is {outcome.factor:.3f} times as fast as {label(outcome.present)}{wrong}"


def run(machine: Machine, only: Sequence[str], *, quick: bool) -> Iterator[tuple[Outcome, int]]:
    """An outcome for each entry and how many tiles were tried, until the time is over."""
    until = time.monotonic() + 60 * MINUTES
    wanted = [subject for subject in SUBJECTS if not only or subject.op in only]
    firsts = {wanted[at].op: wanted[at] for at in reversed(range(len(wanted)))}
    for subject in firsts.values() if quick else wanted:
        if time.monotonic() > until:
            print(f"{', '.join(map(str, subject.key))} and what follows was not reached in {MINUTES:g} minutes")
            return
        if quick:
            tiles = [Tile(*subject.candidates[0])]
            yield tune(subject, tiles, machine, tokens=FEW, rounds=1, duel=1), len(tiles)
        else:
            tiles = compiling_candidates(subject, launch.arch(machine.device))
            yield tune(subject, tiles, machine, tokens=TOKENS, rounds=ROUNDS, duel=DUEL), len(tiles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], choices=sorted({subject.op for subject in SUBJECTS}))
    parser.add_argument("--write", action="store_true", help="write what was found into tiles.py")
    parser.add_argument("--quick", action="store_true", help="few tokens, one candidate: tries the path")
    arguments = parser.parse_args()
    machine = gpu.this_machine()
    if not machine.is_gpu and not (arguments.quick and interpreted()):
        raise SystemExit("there is no GPU here; TRITON_INTERPRET=1 python -m benchmarks.tune --quick tries the path")
    if arguments.write and (arguments.quick or not machine.is_gpu):
        raise SystemExit("--write takes what a GPU measured, and not --quick")
    table: tiles_file.Table = TILES
    for outcome, tried in run(machine, arguments.only, quick=arguments.quick):
        print(said(outcome, tried), flush=True)
        if arguments.write and label(outcome.present) not in outcome.refused:
            table = found(table, outcome, launch.arch(machine.device), torch.cuda.get_device_properties(0).name)
            tiles_file.write(table)
    if arguments.write:
        print(f"wrote {tiles_file.FILE}; now python -m benchmarks.kernels.resources --update")


def found(table: tiles_file.Table, outcome: Outcome, arch: int, gpu_name: str) -> tiles_file.Table:
    """The table with this outcome, the present tile too if it won: it is measured now."""
    return tiles_file.with_entry(table, outcome.key, arch, outcome.best._replace(measured=gpu_name))


if __name__ == "__main__":
    main()
