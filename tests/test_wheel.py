"""What is installed is what was tested: a wheel is built, installed into a new environment, and used."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from modernbert.cli.search import QUESTIONS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_both_packages_and_their_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for home, package in ((ROOT, "modernbert"), (ROOT / "kernels", "modernbert_kernels")):
        wanted = {
            path.relative_to(home).as_posix()
            for path in (home / package).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        assert f"{package}/py.typed" in wanted
        assert wanted - names == set()
    assert any(name.startswith("modernbert/assets/default/") for name in names)
    assert any(name.startswith("modernbert/assets/demo/") for name in names)
    assert {name.split("/")[0] for name in names} == {
        "modernbert",
        "modernbert_kernels",
        "modernbert-0.1.0.dist-info",
    }


@pytest.mark.sweep
def test_the_demo_answers_its_questions_from_the_wheel(wheel, tmp_path):
    """In a new environment that borrows the dependencies of this one, but not its modernbert."""
    environment, elsewhere = tmp_path / "environment", tmp_path / "empty"
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
    ]
    subprocess.run(install, check=True)
    # A path in a .pth file is searched, but the .pth files in it (ours, of an editable install) are not read.
    (site_packages,) = environment.glob("lib/python*/site-packages")
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}

    def output(*command: str | Path) -> str:
        run = subprocess.run(command, cwd=elsewhere, env=clean, capture_output=True, text=True)
        assert (run.returncode, run.stderr) == (0, ""), run.stdout + run.stderr
        return run.stdout

    where = "import modernbert, modernbert_kernels as k; print(modernbert.__file__, k.__file__, sep='\\n')"
    for file in output(python, "-c", where).split():
        assert Path(file).is_relative_to(environment)
    shown = output(environment / "bin" / "modernbert", "demo")
    # The built-in model ranks a passage of the right article first for each built-in question.
    assert "of 1,581 documents (Wikipedia), read and encoded in" in shown
    answers = ("Cardiovascular disease", "Precipitation", "Structural engineering")
    for question, article in zip(QUESTIONS, answers, strict=True):
        first = shown.split(question)[1].split("\n1. ")[1].split("\n2. ")[0]
        assert first.splitlines()[1].strip() == article
        assert "why: " in first
