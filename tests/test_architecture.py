"""The floors of the house: a module imports from its own floor or below, in no circle, and shadows no package."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [  # index = floor; the package `modernbert` itself only hands names on and is the roof
    "modernbert_kernels",
    "modernbert.config modernbert.packed modernbert.masks modernbert.packing modernbert.padded "
    "modernbert.late_interaction modernbert.tokenizer "
    "modernbert.checkpoint modernbert.loading modernbert.saving modernbert.weights modernbert.pickles "
    "modernbert.json_files modernbert.files modernbert.hub modernbert.progress modernbert.settings "
    "modernbert.arguments modernbert.outputs modernbert.pytrees modernbert.texts modernbert.truncation",
    "modernbert.encoder modernbert.modules modernbert.pretrained modernbert.inference",
    "modernbert.heads",
    "modernbert.train modernbert.retrieval modernbert.integrations modernbert.serving",
    "modernbert.recipes modernbert.cli modernbert.__main__",
]
ROOF = len(FLOORS)
KERNELS_MAY_IMPORT = {"torch", "triton", *sys.stdlib_module_names}


def modules(root: Path) -> dict[str, Path]:
    """Every module of the two packages, by dotted name."""
    found = {}
    for home, package in ((root, "modernbert"), (root / "kernels", "modernbert_kernels")):
        for path in sorted((home / package).rglob("*.py")):
            parts = path.relative_to(home).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path) -> Iterator[tuple[str, int, list[str]]]:
    """`(module, relative level, imported names)` of each import in a file, relative ones resolved."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *filter(None, [node.module])]), node.level, [a.name for a in node.names]


def edges(name: str, known: dict[str, Path]) -> set[str]:
    """The modules of ours that a module imports; `from package import module` counts as the module."""
    found = set()
    for base, _, names in imports(name, known[name]):
        inner = {f"{base}.{each}" for each in names} & known.keys()
        found |= inner
        if len(inner) < len(names) or not names:
            found.add(base)
    return {each for each in found if each in known and each != name}


def floor(name: str) -> int:
    if name == "modernbert":
        return ROOF
    homes = [i for i, row in enumerate(FLOORS) for home in row.split() if f"{name}.".startswith(f"{home}.")]
    assert homes, f"{name} is on no floor: give it one in FLOORS"
    return homes[0]


def violations(root: Path) -> list[str]:
    """What breaks the rules in the tree under `root`, one sentence each."""
    known = modules(root)
    graph = {name: edges(name, known) for name in known}
    wrong = []
    for name, path in known.items():
        for other in graph[name]:
            if floor(other) > floor(name):
                wrong.append(f"{name} (floor {floor(name)}) imports {other} (floor {floor(other)})")
            if name.startswith("modernbert.recipes.") and other.startswith("modernbert.recipes."):
                wrong.append(f"recipe {name} imports recipe {other}")
        for base, level, _ in imports(name, path):
            top = base.split(".")[0]
            if top in {"tests", "benchmarks", "conftest", "kernels"}:
                wrong.append(f"{name} imports {base}")
            if name.startswith("modernbert_kernels") and not level and top not in KERNELS_MAY_IMPORT:
                wrong.append(f"{name} imports {base}: the kernels import torch, triton and themselves, relatively")
    for folder in ("kernels", "tests", "benchmarks"):
        wrong += [
            f"{path.relative_to(root)} would make a package that shadows another"
            for path in (root / folder).rglob("__init__.py")
            if "modernbert_kernels" not in path.parts
        ]
    return wrong


def test_the_floors_hold():
    assert modules(ROOT).keys() > {"modernbert", "modernbert.encoder", "modernbert_kernels.reference"}
    assert violations(ROOT) == []


def test_no_circle():
    """Imports that only name types count too."""
    known = modules(ROOT)
    TopologicalSorter({name: edges(name, known) for name in known}).prepare()


@pytest.mark.parametrize(
    ("path", "line", "sentence"),
    [
        (
            "modernbert/packing.py",
            "from modernbert.encoder import Encoder",
            "modernbert.packing (floor 1) imports",
        ),
        (
            "modernbert/packing.py",
            "from . import encoder",
            "modernbert.packing (floor 1) imports modernbert.encoder",
        ),
        ("modernbert/packing.py", "from modernbert import Encoder", "imports modernbert (floor 6)"),
        ("modernbert/packing.py", "import tests.helpers", "modernbert.packing imports tests.helpers"),
        (
            "modernbert/recipes/a.py",
            "def f():\n    from .b import g",
            "recipe modernbert.recipes.a imports recipe",
        ),
        ("kernels/modernbert_kernels/cpu/x.py", "import numpy", "modernbert_kernels.cpu.x imports numpy"),
        (
            "kernels/modernbert_kernels/x.py",
            "from modernbert_kernels import Op",
            "imports modernbert_kernels",
        ),
        ("kernels/__init__.py", "", "kernels/__init__.py would make a package"),
        ("tests/kernels/__init__.py", "", "tests/kernels/__init__.py would make a package"),
    ],
)
def test_each_rule_can_fail(tmp_path, path, line, sentence):
    for name in ("modernbert/__init__.py", "modernbert/encoder.py", "modernbert/recipes/b.py", path):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(line if name == path else "")
    assert any(sentence in wrong for wrong in violations(tmp_path)), violations(tmp_path)


@pytest.mark.parametrize("module", ["modernbert", "modernbert.cli"])
def test_starts_without_torch(module):
    """`modernbert --help` must not wait for torch."""
    code = f"import {module}, sys; print(sorted({{'torch', 'transformers', 'numpy'}} & sys.modules.keys()))"
    path = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    run = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True)
    assert (run.stdout.strip(), run.stderr) == ("[]", "")
