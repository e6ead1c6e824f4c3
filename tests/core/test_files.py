"""Replacing one file. Replacing a folder is tested by the saves in test_checkpoint."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modernbert.files import replacing, replacing_folder


@pytest.mark.parametrize("exists", [False, True])
def test_the_new_content_takes_the_place_of_the_old(tmp_path: Path, exists: bool) -> None:
    path = tmp_path / "file"
    if exists:
        path.write_text("old")
    with replacing(path) as beside:
        assert beside.parent == tmp_path
        assert beside.name.startswith(".")
        beside.write_text("new")
        assert path.exists() == exists
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_after_an_error_the_old_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def interrupted() -> None:
        with replacing(path) as beside:
            beside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(FileNotFoundError), replacing(path):
        pass  # nothing was written
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_at_a_time_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_crash_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    """The process ends before its first, second, ... operation on the file system, until it gets through."""
    seen = []
    for step in range(1, 50):
        path = tmp_path / str(step)
        path.write_text("old")
        child = os.fork()
        if child == 0:
            left = step

            def count(event: str, _: object) -> None:
                nonlocal left
                left -= event.split(".")[0] in ("open", "os")
                if left == 0:
                    os._exit(9)

            sys.addaudithook(count)
            with replacing(path) as beside:
                beside.write_text("new")
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seen.append(path.read_text())
        if code == 0:
            break
    assert seen[-1] == "new"
    assert seen == sorted(seen, reverse=True)  # first old, then new
    assert len(seen) > 4


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    """Not the hidden one: a folder that is not there, and a folder in the place of the file."""
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "nothing" / "file", tmp_path / "folder"):
        with pytest.raises(OSError, match=re.escape(f"'{path}'")), replacing(path) as beside:
            beside.write_text("new")


# What a killed process leaves

SAVE = """
import os, re, sys, pathlib
from modernbert.files import replacing_folder

with replacing_folder(sys.argv[1], last="config.json", stale=re.compile("x")) as new:
    (new / "config.json").write_text("half")
    print("begun", flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), 9)
    sys.stdin.read()
    (new / "config.json").write_text("whole")
"""


def saved(folder: Path) -> None:
    with replacing_folder(folder, last="config.json", stale=re.compile("x")) as new:
        (new / "config.json").write_text("new")


def saving(folder: Path, how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SAVE, str(folder), how]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.skipif(os.name == "nt", reason="locks of folders")
@pytest.mark.parametrize("exists", [False, True])
def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path: Path, exists: bool) -> None:
    """Each killed save left a whole model in a hidden folder. What others have with such a name stays."""
    folder = tmp_path / "model"
    others = [tmp_path / name for name in (".model.12345678x", ".model.backup", ".other.12345678", "model.12345678")]
    for other in others:
        other.mkdir()
        (other / "file").write_text("of another")
    if exists:
        saved(folder)
    for _ in range(2):
        with saving(folder, "killed") as process:
            assert process.wait(30) == -9
    assert len(list(tmp_path.iterdir())) > len(others) + exists
    saved(folder)
    assert sorted(tmp_path.iterdir()) == sorted([*others, folder])
    assert (folder / "config.json").read_text() == "new"


@pytest.mark.skipif(os.name == "nt", reason="locks of folders")
def test_what_another_process_is_writing_is_not_removed(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with saving(folder, "slowly") as process:
        saved(folder)
        assert len(list(tmp_path.iterdir())) == 2
        process.communicate("")
        assert process.returncode == 0
    assert (folder / "config.json").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [folder]
