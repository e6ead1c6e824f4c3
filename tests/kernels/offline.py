"""What a Triton kernel takes of a GPU, found without one: registers, spills, shared memory, occupancy.

Ops are called as on a GPU; in place of a launch the kernel is compiled for an architecture, and its binary is read.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from kernel_cases import Case
from torch import Tensor

ARCHS = (80, 89, 90, 100, 120)
SHARED = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that one program may have, in KB (CUDA programming guide, table of compute capabilities)."""

SHARED_PER_SM = {80: 164, 89: 100, 90: 228, 100: 228, 120: 100}
WARPS_PER_SM = {80: 64, 89: 48, 90: 64, 100: 64, 120: 48}
PROGRAM, EXECUTABLE = 1, 4
"""Of a section of an ELF file: a program, and the flag of instructions."""

NOP, BARRIER = 0x918, 0xB1D
"""Opcodes, the same since sm_70: what fills the end of a kernel, and BAR.SYNC."""

TOKENS = 384
"""Enough for every kernel, and the kernels do not depend on the number."""


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


def call(case: Case) -> None:
    """Forward and backward of the triton backend."""
    args = [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in case.args]
    outputs = case.op.backends["triton"](*args, **case.kwargs)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, [torch.zeros_like(x) for x in outputs])


def opcodes(cubin: bytes) -> list[int]:
    """The opcode of each instruction of a binary with one kernel, read from its ELF sections in microseconds."""
    (table,), (size, count) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HH", cubin, 58)
    # Kind, flags, address, offset and length of each section, without its name.
    sections = [struct.unpack_from("<IQQQQ", cubin, table + at * size + 4) for at in range(count)]
    code = [(offset, length) for kind, flags, _, offset, length in sections if kind == PROGRAM and flags & EXECUTABLE]
    # An instruction has 16 bytes, and its opcode the lowest 12 bits of the first 8.
    return [word & 0xFFF for offset, length in code for word, _ in struct.iter_unpack("<QQ", cubin[offset:][:length])]


def resources(kernel: Any, arch: int) -> dict[str, Any]:
    """Registers of a thread, bytes it spills, shared memory of a program, how many programs an SM holds, instructions.

    `instructions` and `barriers` (of all threads of a program) count the code, not what a loop runs.
    """
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
    code = opcodes(kernel.asm["cubin"])
    return {
        "kernel": kernel.metadata.name,
        "arch": arch,
        "registers": registers,
        "spilled": usage["STACK"] + usage["LOCAL"],
        "shared": shared,
        "warps": warps,
        "stages": kernel.metadata.num_stages,
        "programs": min(by_registers, by_shared, WARPS_PER_SM[arch] // warps),
        "instructions": len(code) - code.count(NOP),
        "barriers": code.count(BARRIER),
    }
