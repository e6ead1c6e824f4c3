"""What every Triton kernel takes of every GPU, found without one: registers, spills, shared memory, occupancy.

    python -m benchmarks.resources            compile everything, compare with the committed table
    python -m benchmarks.resources --update   write it, and the one in kernels/README.md

Ops are called as on a GPU; in place of a launch the kernel is compiled for an architecture, and its binary is read.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.cases import CASES, Case
from benchmarks.rows import ROOT
from modernbert.files import replacing

TABLE = ROOT / "kernels" / "resources.jsonl"
README = TABLE.with_name("README.md")
ARCHS = (80, 89, 90, 100, 120)
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that one program may have, in KB (CUDA programming guide, table of compute capabilities)."""

SHARED_PER_SM = {80: 164, 89: 100, 90: 228, 100: 228, 120: 100}
WARPS_PER_SM = {80: 64, 89: 48, 90: 64, 100: 64, 120: 48}
TOKENS = 384

Kernel = dict[str, Any]


class CompileOnly:
    """A driver of Triton that knows which GPU there is, and nothing else."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps what it has compiled by this number.

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def get_device_interface(self) -> Any:
        return torch.cuda


@contextmanager
def compiling(arch: int, see: Callable[[Any], None]) -> Iterator[None]:
    """Inside, ops run as on a GPU of this architecture; in place of a launch, `see` gets the compiled kernel."""
    from triton.runtime import driver, jit

    from modernbert_kernels import launch

    run = jit.JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        binary: Any = run(kernel, *args, grid=grid, warmup=True, **kwargs)
        see(binary)
        return binary

    driver.set_active(CompileOnly(arch))  # pyright: ignore  (it has all that is used)
    with mock.patch.object(launch, "arch", return_value=arch), mock.patch.object(jit.JITFunction, "run", compile_only):
        yield


def compiled(arch: int, dtype: torch.dtype, names: Sequence[str]) -> list[Kernel]:
    """Call the cases of these ops, forward and backward, as a GPU of this architecture would; a row for each kernel."""
    found: dict[tuple[str, str], Kernel] = {}
    known: Kernel = {}

    def see(binary: Any) -> None:
        # An op has its rows whether or not another one launches the same kernel.
        if (known["op"], binary.hash) not in found:
            found[known["op"], binary.hash] = known | resources(binary, arch)

    with compiling(arch, see):
        for name in names:
            # Its products run on the CPU, in bfloat16 for minutes; the kernels do not depend on the number of tokens.
            for case in CASES[name](dtype, "cpu", 4 if name == "linear_cross_entropy" else TOKENS):
                known = {"op": name, "case": case.name, "dtype": str(dtype).removeprefix("torch.")}
                call(case)
    rows = list(found.values())
    for index, row in enumerate(rows):  # several variants of a kernel may belong to one case
        row["variant"] = sum(identity(one) == identity(row) for one in rows[:index])
    return rows


def call(case: Case) -> None:
    """Forward and backward of the triton backend."""
    args = [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in case.args]
    outputs = case.op.backends["triton"](*args, **case.kwargs)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, [torch.zeros_like(x) for x in outputs])


def resources(kernel: Any, arch: int) -> Kernel:
    """Registers of a thread, bytes it spills, shared memory of a program, and how many programs an SM holds."""
    from triton.knobs import nvidia

    disassembler: Any = nvidia.cuobjdump  # comes with Triton
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [disassembler.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    registers, warps, shared = usage["REG"], kernel.metadata.num_warps, kernel.metadata.shared
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = (SHARED_PER_SM[arch] << 10) // (shared + 1024)
    return {
        "kernel": kernel.metadata.name,
        "arch": arch,
        "registers": registers,
        "spilled": usage["STACK"] + usage["LOCAL"],
        "shared": shared,
        "warps": warps,
        "stages": kernel.metadata.num_stages,
        "programs": min(by_registers, by_shared, WARPS_PER_SM[arch] // warps),
    }


def compile_all(jobs: int, names: Sequence[str], archs: Sequence[int] = ARCHS) -> list[Kernel]:
    """Rows of all kernels for these architectures, in bfloat16 and float32 (float16 has the tiles of bfloat16)."""
    targets = [(arch, dtype) for dtype in (torch.bfloat16, torch.float32) for arch in archs]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        tasks = [pool.submit(compiled, *target, names) for target in targets]
        return sorted((row for task in tasks for row in task.result()), key=identity)


def faults(rows: Sequence[Kernel], committed: Sequence[Kernel]) -> list[str]:
    """What is wrong with these rows: spills, too much shared memory, or a tenth more than the committed ones."""
    known = {identity(row): row for row in committed}
    found = []
    for row in rows:
        name, before = " ".join(identity(row)), known.get(identity(row))
        if row["spilled"]:
            found.append(f"{name}: {row['spilled']} bytes spilled")
        if row["shared"] > SHARED[row["arch"]] << 10:
            found.append(f"{name}: {row['shared']} bytes of shared memory, a program may have {SHARED[row['arch']]} KB")
        if before is None:
            found += [f"{name}: is not in {TABLE.name}"] if committed else []
            continue
        for figure in ("registers", "shared"):
            if row[figure] > 1.1 * before[figure]:
                found.append(f"{name}: {figure} {row[figure]}, were {before[figure]}")
        if row["programs"] < before["programs"]:
            found.append(f"{name}: {row['programs']} programs fit on an SM, were {before['programs']}")
    return found


def identity(row: Kernel) -> tuple[str, ...]:
    return row["op"], row["kernel"], row["case"], str(row.get("variant", 0)), row["dtype"], str(row["arch"])


def read_table() -> tuple[str, list[Kernel]]:
    """The version of Triton that the committed rows were compiled with, and the rows."""
    header, *rows = map(json.loads, TABLE.read_text().splitlines())
    return header["triton"], rows


def markdown(rows: Sequence[Kernel]) -> str:
    """The table of kernels/README.md: for each kernel its most demanding case in bfloat16."""
    lines = ["| op | kernel | " + " | ".join(f"sm_{arch}" for arch in ARCHS) + " |", "| --- " * (2 + len(ARCHS)) + "|"]
    for op, kernel in dict.fromkeys((row["op"], row["kernel"]) for row in rows):
        cells = []
        for arch in ARCHS:
            cases = [row for row in rows if (row["kernel"], row["arch"], row["dtype"]) == (kernel, arch, "bfloat16")]
            worst = max(cases, key=lambda row: (-row["programs"] * row["warps"], row["registers"]))
            cells.append(
                f"{worst['registers']}, {worst['shared'] / 1024:.3g} KB, {worst['programs']} x {worst['warps']}"
            )
        lines.append(f"| `{op}` | `{kernel.removesuffix('_kernel')}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(readme: str, rows: Sequence[Kernel]) -> str:
    """The text of kernels/README.md with this table between its markers."""
    start, end = "<!-- resources -->", "<!-- /resources -->"
    before, _, rest = readme.partition(start)
    return f"{before}{start}\n{markdown(rows)}\n{end}{rest.partition(end)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the table")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="ops; their rows are printed")
    arguments = parser.parse_args()
    import triton

    names = arguments.only or list(CASES)
    rows = compile_all(arguments.jobs, names)
    if arguments.update:
        others = [row for row in read_table()[1] if row["op"] not in names] if arguments.only else []
        table = sorted([*others, *rows], key=identity)
        lines = "".join(json.dumps(row) + "\n" for row in [{"triton": triton.__version__}, *table])
        for path, text in ((TABLE, lines), (README, with_table(README.read_text("utf-8"), table))):
            with replacing(path) as beside:
                beside.write_text(text, encoding="utf-8")
    for row in rows if arguments.only else ():
        print(json.dumps(row))
    version, committed = ("", []) if arguments.update else read_table()
    found = faults(rows, committed if version == triton.__version__ else [])
    print("\n".join([*found, f"{len(rows)} kernels compiled, {len(found)} faults"]))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
