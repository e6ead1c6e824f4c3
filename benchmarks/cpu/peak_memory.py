"""How much memory one call takes beyond the loaded model.

Every figure comes from a process of its own, because an allocator keeps what it once had.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cpu import contenders
from benchmarks.harness import Contender
from benchmarks.inputs import Ids, batched, random_ids
from benchmarks.process_memory import peak_beyond


def in_fresh_process(implementation: str, folder: Path, length: int, threads: int) -> tuple[float, Tensor]:
    """Extra peak in MB of encoding one text of `length` tokens, and its hidden states `[T, D]`."""
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "output.pt"
        command = [sys.executable, "-m", "benchmarks.cpu.peak_memory", implementation, str(folder), str(length)]
        command += [str(threads), str(output)]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1]), torch.load(output)


def contender(implementation: str, folder: Path, sequences: Ids) -> Contender:
    if implementation == contenders.OURS:
        return contenders.ours(folder, sequences)
    return contenders.transformers_sdpa(folder, batched(sequences, 1), "sdpa")


def main(implementation: str, folder: str, length: str, threads: str, output: str) -> None:
    torch.set_num_threads(int(threads))
    contender(implementation, Path(folder), random_ids([16])).run()  # thread pools, lazy imports
    one_text = contender(implementation, Path(folder), random_ids([int(length)]))
    gc.collect()
    peak, returned = peak_beyond(one_text.run)
    torch.save(one_text.result(returned).clone(), output)
    print(json.dumps(peak / 2**20))


if __name__ == "__main__":
    main(*sys.argv[1:])
