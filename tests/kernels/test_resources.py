"""Every kernel compiles, spills nothing, and takes no more of a GPU than in the committed table.

For one architecture by default; `pytest --all-architectures`, which `make check` runs, compiles for all of them.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
from kernel_calls import INTERPRETED

from benchmarks import resources

pytestmark = [
    pytest.mark.skipif(not find_spec("triton"), reason="needs Triton, which has no wheel for this platform"),
    pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing"),
]

ROW = {
    "op": "o",
    "kernel": "k",
    "case": "c",
    "dtype": "float32",
    "arch": 89,
    "registers": 100,
    "spilled": 0,
    "shared": 1000,
}
ROW |= {"programs": 4}


def test_every_kernel_compiles(pytestconfig: pytest.Config) -> None:
    import triton

    from benchmarks.cases import CASES

    archs = resources.ARCHS if pytestconfig.getoption("--all-architectures") else (90,)
    rows = resources.compile_all(2, list(CASES), archs)
    version, committed = resources.read_table()
    # Another Triton allocates other registers; what no kernel may do holds for all of them.
    assert not resources.faults(rows, committed if version == triton.__version__ else [])
    assert {row["arch"] for row in rows} == set(archs)
    assert {row["op"] for row in rows} == set(CASES)


def test_every_kernel_has_a_case() -> None:
    """The table has every function that is decorated with triton.jit and launched."""
    from modernbert_kernels import fused

    _, committed = resources.read_table()
    modules = [module for name, module in sys.modules.items() if name.startswith(fused.__name__ + ".")]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert kernels == {row["kernel"] for row in committed}


def test_the_readme_shows_the_committed_table() -> None:
    text = resources.README.read_text("utf-8")
    assert resources.with_table(text, resources.read_table()[1]) == text


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spilled": 8}, "8 bytes spilled"),
        ({"shared": 102_400}, "a program may have 99 KB"),
        ({"registers": 111}, "registers 111, were 100"),
        ({"programs": 3}, "3 programs fit on an SM, were 4"),
        ({"kernel": "new"}, "is not in resources.jsonl"),
    ],
)
def test_faults_are_found(change: dict[str, object], fault: str) -> None:
    assert not resources.faults([ROW], [ROW])
    assert any(fault in found for found in resources.faults([ROW | change], [ROW]))
