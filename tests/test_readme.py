"""README, docs, kernels/README.md and recipes/README.md are true: their blocks run and print what is shown."""

from __future__ import annotations

import doctest
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

import modernbert_kernels
from modernbert_kernels import Op

ROOT = Path(__file__).parents[1]
HOMES = ("", "kernels", "modernbert/recipes")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [*(ROOT / home / "README.md" for home in HOMES), *sorted((ROOT / "docs").glob("*.md"))]
}
FENCE = re.compile(r"^```(\w+)\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.MULTILINE | re.DOTALL)
OURS, SERVE, CURL, END = "modernbert ", "modernbert serve ", "curl ", "\f"
PATHS = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(PATHS)}


class Block(NamedTuple):
    """A block of code; `output` is the block of text directly after it, or "" if none is shown."""

    line: int
    language: str
    code: str
    output: str

    @property
    def commands(self) -> list[str]:
        return [line for line in self.code.splitlines() if line.strip()] if self.language == "bash" else []


def blocks(page: str) -> Iterator[Block]:
    for match in FENCE.finditer(PAGES[page]):
        line = PAGES[page].count("\n", 0, match.start(2))
        yield Block(line, match[1], match[2], match[3] or "")


def play(page: str) -> None:
    """Run the Python blocks of a page in one namespace, its `modernbert` commands and its requests, in its order."""
    from modernbert.cli import main

    names = {"__name__": page}
    with ExitStack() as servers:
        for block in blocks(page):
            if block.language == "python":
                exec(compile("\n" * block.line + block.code, page, "exec"), names)
            for command in block.commands:
                if command.startswith(SERVE):
                    servers.enter_context(serving(shlex.split(command)[1:]))
                elif command.startswith(OURS):
                    try:
                        main(shlex.split(command, comments=True)[1:])
                    except SystemExit as end:
                        if end.code:
                            raise
                elif command.startswith(CURL):
                    print(subprocess.run(shlex.split(command), check=True, capture_output=True, text=True).stdout)
            print(END, end="")


@contextmanager
def serving(arguments: list[str]) -> Iterator[None]:
    """A server, from when it shows its address until the end of the page."""
    with subprocess.Popen(
        [sys.executable, "-m", "modernbert", *arguments], stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr
            assert any("http://" in line for line in process.stderr), arguments
            yield
        finally:
            process.terminate()


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A folder in which the repository seems to be, so that what the pages write is not written into it."""
    for child in ROOT.iterdir():
        if not child.name.startswith("."):
            (tmp_path / child.name).symlink_to(child)
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run_and_print_what_is_shown(page, checkout):
    if page == "docs/serve.md":
        for package in ("fastapi", "prometheus_client", "uvicorn"):
            pytest.importorskip(package)
        if shutil.which("curl") is None:
            pytest.skip("needs curl")
    command = [sys.executable, "-W", "error::FutureWarning", "-c", f"import test_readme; test_readme.play({page!r})"]
    environment = ENVIRONMENT | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    same = doctest.OutputChecker().check_output
    for block, printed in zip(blocks(page), run.stdout.split(END)[:-1], strict=True):
        if block.output:
            assert same(block.output, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE), (
                f"{page}:{block.line} prints\n{printed}"
            )


def test_there_is_something_to_run():
    all_blocks = [block for page in PAGES for block in blocks(page)]
    assert sum(block.language == "python" for block in all_blocks) >= 10
    assert sum(command.startswith(OURS) for block in all_blocks for command in block.commands) >= 8
    assert sum(bool(block.output) for block in all_blocks) >= 6


def test_other_commands_exist():
    """Installing, testing and training take too long here; their names and options are checked."""
    commands = [command for page in PAGES for block in blocks(page) for command in block.commands]
    for command in sorted(set(commands)):
        program, *arguments = shlex.split(command, comments=True)
        if program == "make":
            assert set(arguments) <= make_targets(), command
        elif arguments[:1] == ["-m"]:
            assert {name for name in arguments if name.startswith("--")} <= options_of(arguments[1]), command
        else:
            assert command.startswith((OURS, CURL, "pip install ")), f"{command}: nothing checks this command"


@functools.cache
def options_of(module: str) -> set[str]:
    run = [sys.executable, "-m", module, "--help"]
    text = subprocess.run(run, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"--[\w-]+", text))


def test_continuous_integration_calls_targets_that_exist():
    for path in (".ci/run", ".github/workflows/check.yml"):
        targets = set(re.findall(r"\bmake (\w+)", (ROOT / path).read_text(encoding="utf-8")))
        assert targets, path
        assert targets <= make_targets(), path


def make_targets() -> set[str]:
    return set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("page", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, link


def test_the_readme_is_short():
    assert len(PAGES["README.md"].encode()) <= 8 * 1024


def section(title: str) -> str:
    return PAGES["README.md"].partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_figures_of_the_readme_are_those_of_the_page():
    rows = [re.sub("<!--.*?-->", "", line) for line in section("Speed").splitlines() if "**" in line]
    assert len(rows) == 4
    for row in rows:
        _, _, *cells = row.split("|")
        for figure in re.findall(r"\d[\d,]*\.?\d+", " ".join(cells)):
            assert figure in PAGES["docs/speed.md"], row


def test_the_readme_says_where_to_read():
    """Each file of the reading list defines the names next to it."""
    named = 0
    for item in re.split(r"\n(?=\d\. )|\n\n", section("Where to read the code")):
        files = re.findall(r"\]\(([^)]+\.py)\)", item)
        source = "\n".join((ROOT / file).read_text(encoding="utf-8") for file in files)
        for name in re.findall(r"`(\w+)`", item) if files else ():
            assert re.search(rf"^ *(?:def|class) {name}\b", source, re.MULTILINE), f"{name} is not in {files}"
            named += 1
    assert named >= 7


def test_the_table_of_ops_is_complete():
    text = PAGES["kernels/README.md"].partition("<!-- resources -->")[0]
    rows = re.findall(r"^\| `(\w+)` \|.* \| ([^|]+) \|$", text, re.MULTILINE)
    ops = {value.name: value for value in vars(modernbert_kernels).values() if isinstance(value, Op)}
    assert sorted(name for name, _ in rows) == sorted(ops)
    for name, faster in rows:
        assert set(ops[name].backends) <= {"reference", *re.findall(r"`(\w+)`", faster)}, name


def test_the_table_of_evaluations_is_the_file():
    rows = [json.loads(line) for line in (ROOT / "docs" / "evaluation.jsonl").read_text().splitlines()]
    assert len(rows) >= 4
    for row in rows:
        figures = [row[name] for name in ("nDCG@10", "MRR@10", "recall@100")]
        cells = [f"{figure['mean']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})" for figure in figures]
        assert f"| {row['dataset']} | {row['queries']:,} | {' | '.join(cells)} |\n" in PAGES["docs/search.md"]
