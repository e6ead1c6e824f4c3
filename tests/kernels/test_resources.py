"""Every kernel compiles, spills nothing, and takes no more of a GPU than in the committed table.

For one architecture by default; `pytest --all-architectures`, which `make check` runs, compiles for all of them.
With `--update-resources` as well, this file writes kernels/resources.jsonl and the table of kernels/README.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_calls import INTERPRETED
from kernel_cases import CASES
from offline import ARCHS, SHARED, TOKENS, call, compiling, resources

pytestmark = [
    pytest.mark.skipif(not find_spec("triton"), reason="needs Triton, which has no wheel for this platform"),
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
]

TABLE = Path(__file__).parents[2] / "kernels" / "resources.jsonl"
README = TABLE.with_name("README.md")
BEFORE = TABLE.with_name("before.jsonl")
"""Rows of kernels as they were before a change that was argued by its resources, in bfloat16."""

Kernel = dict[str, Any]

ROW = {
    "op": "o",
    "kernel": "k",
    "case": "c",
    "dtype": "float32",
    "arch": 89,
    "registers": 100,
    "spilled": 0,
    "shared": 1000,
    "programs": 4,
    "instructions": 500,
}


def compiled(arch: int, dtype: torch.dtype) -> list[Kernel]:
    """Call the cases of all ops, forward and backward, as a GPU of this architecture would; a row for each kernel."""
    found: dict[tuple[str, str], Kernel] = {}
    known: Kernel = {}

    def see(binary: Any) -> None:
        # An op has its rows whether or not another one launches the same kernel.
        if (known["op"], binary.hash) not in found:
            found[known["op"], binary.hash] = known | resources(binary, arch)

    with compiling(arch, see):
        for name, make in CASES.items():
            # Its products run on the CPU, in bfloat16 for minutes.
            for case in make(dtype, 4 if name == "linear_cross_entropy" else TOKENS):
                known = {"op": name, "case": case.name, "dtype": str(dtype).removeprefix("torch.")}
                call(case)
    rows = list(found.values())
    for index, row in enumerate(rows):  # several variants of a kernel may belong to one case
        row["variant"] = sum(identity(one) == identity(row) for one in rows[:index])
    return rows


def compile_all(archs: Sequence[int]) -> list[Kernel]:
    """Rows of all kernels for these architectures, in bfloat16 and float32 (float16 has the tiles of bfloat16)."""
    targets = [(arch, dtype) for dtype in (torch.bfloat16, torch.float32) for arch in archs]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        tasks = [pool.submit(compiled, *target) for target in targets]
        return sorted((row for task in tasks for row in task.result()), key=identity)


def identity(row: Kernel) -> tuple[str, ...]:
    return row["op"], row["kernel"], row["case"], str(row.get("variant", 0)), row["dtype"], str(row["arch"])


def faults(rows: Sequence[Kernel], committed: Sequence[Kernel]) -> Iterator[str]:
    """What is wrong with these rows: spills, too much shared memory, or a tenth more than the committed ones."""
    known = {identity(row): row for row in committed}
    for row in rows:
        name, before = " ".join(identity(row)), known.get(identity(row))
        if row["spilled"]:
            yield f"{name}: {row['spilled']} bytes spilled"
        if row["shared"] > SHARED[row["arch"]] << 10:
            limit = SHARED[row["arch"]]
            yield f"{name}: {row['shared']} bytes of shared memory, a program may have {limit} KB"
        if before is None:
            if committed:
                yield f"{name}: is not in {TABLE.name}"
            continue
        for figure in ("registers", "shared", "instructions"):
            if row[figure] > 1.1 * before[figure]:
                yield f"{name}: {figure} {row[figure]}, were {before[figure]}"
        if row["programs"] < before["programs"]:
            yield f"{name}: {row['programs']} programs fit on an SM, were {before['programs']}"


def read_table(file: Path = TABLE) -> tuple[str, list[Kernel]]:
    """The version of Triton that the committed rows were compiled with, and the rows."""
    header, *rows = map(json.loads, file.read_text().splitlines())
    return header["triton"], rows


def markdown(rows: Sequence[Kernel]) -> str:
    """The table of kernels/README.md: for each kernel its most demanding case in bfloat16."""
    lines = ["| op | kernel | " + " | ".join(f"sm_{arch}" for arch in ARCHS) + " |", "| --- " * (2 + len(ARCHS)) + "|"]
    for op, kernel in dict.fromkeys((row["op"], row["kernel"]) for row in rows):
        cells = []
        for arch in ARCHS:
            cases = [row for row in rows if (row["kernel"], row["arch"], row["dtype"]) == (kernel, arch, "bfloat16")]
            worst = max(cases, key=lambda row: (-row["programs"] * row["warps"], row["registers"]))
            shared = f"{worst['shared'] / 1024:.3g} KB"
            code = f"{worst['instructions']} / {worst['barriers']}"
            cells.append(f"{worst['registers']}, {shared}, {worst['programs']} x {worst['warps']}; {code}")
        lines.append(f"| `{op}` | `{kernel.removesuffix('_kernel')}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def changes(rows: Sequence[Kernel], before: Sequence[Kernel]) -> str:
    """The table of what each kernel of `before` took, and takes now, where it is still called so."""
    now = {identity(row): row for row in rows}
    lines = [
        "| kernel | case | " + " | ".join(f"sm_{arch}" for arch in ARCHS) + " |",
        "| --- " * (2 + len(ARCHS)) + "|",
    ]
    for kernel, case in dict.fromkeys((row["kernel"], row["case"]) for row in before):
        pairs = {
            row["arch"]: (taken(row), taken(now[identity(row)]))
            for row in before
            if (row["kernel"], row["case"]) == (kernel, case)
        }
        cells = [" → ".join(pairs[arch]) for arch in ARCHS]
        lines.append(f"| `{kernel.removesuffix('_kernel')}` | {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def taken(row: Kernel) -> str:
    """Registers, occupancy, and where they were counted instructions and barriers."""
    code = f"; {row['instructions']} / {row['barriers']}" if "instructions" in row else ""
    return f"{row['registers']}, {row['programs']} x {row['warps']}{code}"


def with_table(readme: str, rows: Sequence[Kernel]) -> str:
    """The text of kernels/README.md with both tables between their markers."""
    tables = {"resources": markdown(rows), "changes": changes(rows, read_table(BEFORE)[1])}
    for name, table in tables.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = readme.partition(start)
        readme = f"{before}{start}\n{table}\n{end}{rest.partition(end)[2]}"
    return readme


def test_every_kernel_compiles(pytestconfig: pytest.Config) -> None:
    import triton

    archs = ARCHS if pytestconfig.getoption("--all-architectures") else (90,)
    rows = compile_all(archs)
    if pytestconfig.getoption("--update-resources"):
        assert archs == ARCHS, "--update-resources needs --all-architectures"
        TABLE.write_text("".join(json.dumps(row) + "\n" for row in [{"triton": triton.__version__}, *rows]))
        README.write_text(with_table(README.read_text("utf-8"), rows), encoding="utf-8")
    version, committed = read_table()
    # Another Triton allocates other registers; what no kernel may do holds for all of them.
    assert not list(faults(rows, committed if version == triton.__version__ else []))
    assert {row["arch"] for row in rows} == set(archs)
    assert {row["op"] for row in rows} == set(CASES)


def test_every_kernel_has_a_case() -> None:
    """The table has every function that is decorated with triton.jit and launched."""
    from modernbert_kernels import fused

    _, committed = read_table()
    modules = [module for name, module in sys.modules.items() if name.startswith(fused.__name__ + ".")]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert kernels == {row["kernel"] for row in committed}


def test_the_readme_shows_the_committed_table() -> None:
    text = README.read_text("utf-8")
    assert with_table(text, read_table()[1]) == text


@pytest.mark.parametrize("op", [op for op in CASES if op not in ("linear_cross_entropy", "maxsim")])
def test_cases_have_different_names(op: str) -> None:
    names = [case.name for case in CASES[op](torch.float32, 16)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spilled": 8}, "8 bytes spilled"),
        ({"shared": 102_400}, "a program may have 99 KB"),
        ({"registers": 111}, "registers 111, were 100"),
        ({"programs": 3}, "3 programs fit on an SM, were 4"),
        ({"instructions": 551}, "instructions 551, were 500"),
        ({"kernel": "new"}, "is not in resources.jsonl"),
    ],
)
def test_faults_are_found(change: dict[str, object], fault: str) -> None:
    assert not list(faults([ROW], [ROW]))
    assert any(fault in found for found in faults([ROW | change], [ROW]))
