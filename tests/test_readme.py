"""The READMEs say what is true: their code runs, their commands exist, the tree is the tree."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import modernbert_kernels
from modernbert_kernels import Op

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
KERNELS = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = FENCE.findall(README)
PYTHON = [code for language, code in [*BLOCKS, *FENCE.findall(KERNELS)] if language == "python"]
SHELL = [
    line
    for language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
    if line.strip() and not line.startswith("#")
]
OURS = [line for line in SHELL if line.startswith("modernbert ")]
(TREE,) = (code for language, code in BLOCKS if language == "text" and code.startswith("pyproject.toml"))


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder in which the repository seems to be, so that what commands write is not written into it."""
    folder = tmp_path_factory.mktemp("checkout")
    for child in ROOT.iterdir():
        if not child.name.startswith("."):
            (folder / child.name).symlink_to(child)
    return folder


def run(here: Path, *command: str) -> str:
    path = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=here, env=path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("code", PYTHON)
def test_python_blocks_run(code, here):
    run(here, sys.executable, "-W", "error::FutureWarning", "-c", code)


@pytest.mark.parametrize("line", OURS)
def test_our_commands_run(line, here):
    _, *arguments = shlex.split(line, comments=True)
    run(here, sys.executable, "-c", "from modernbert.cli import main; main()", *arguments)


def test_there_is_something_to_run():
    assert len(PYTHON) >= 4
    assert len(OURS) >= 2


def test_other_commands_exist():
    """Installing and measuring is too long for a test; here the names are checked."""
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in sorted(set(SHELL) - set(OURS)):
        program, *arguments = shlex.split(line, comments=True)
        if program == "make":
            assert set(arguments) <= targets, line
        elif arguments[:2] == ["-m", "benchmarks"]:
            assert (ROOT / "benchmarks" / "__main__.py").exists(), line
        else:
            assert line.startswith("pip install "), f"{line}: nothing checks this command"


def test_the_table_of_ops_is_complete():
    rows = re.findall(r"^\| `(\w+)` \|.* \| ([^|]+) \|$", KERNELS.partition("<!-- resources -->")[0], re.MULTILINE)
    ops = {value.name: value for value in vars(modernbert_kernels).values() if isinstance(value, Op)}
    assert sorted(name for name, _ in rows) == sorted(ops)
    for name, faster in rows:
        assert set(ops[name].backends) <= {"reference", *re.findall(r"`(\w+)`", faster)}, name


def listed(tree: str) -> dict[str, set[str]]:
    """Children of each folder that the tree opens: `{"": {...}, "kernels/": {...}}`. Two spaces a level."""
    folders, stack = {"": set()}, [""]
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for name in line.split("  #")[0].split():
            parent = stack[depth]
            folders.setdefault(parent, set()).add(name)
            stack = [*stack[: depth + 1], parent + name]
    return folders


def test_the_tree_is_the_tree():
    """Every folder that the tree opens holds exactly what the tree says."""
    made = {"__pycache__", "build", "dist"}
    for folder, names in listed(TREE).items():
        there = {
            child.name + "/" * child.is_dir()
            for child in (ROOT / folder).iterdir()
            if child.name not in made
            and child.suffix != ".egg-info"
            and (not child.name.startswith(".") or child.name == ".ci")
        }
        assert names == there - {"__init__.py", "py.typed"}, folder or "the root"


def test_the_table_of_evaluations_is_the_file():
    rows = [json.loads(line) for line in (ROOT / "docs" / "evaluation.jsonl").read_text().splitlines()]
    assert len(rows) >= 4
    for row in rows:
        figures = [row[name] for name in ("nDCG@10", "MRR@10", "recall@100")]
        cells = [f"{figure['mean']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})" for figure in figures]
        assert f"| {row['dataset']} | {row['queries']:,} | {' | '.join(cells)} |\n" in README
