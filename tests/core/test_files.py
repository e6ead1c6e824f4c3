"""Replacing one file. Replacing a folder is tested by the saves in test_checkpoint."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from modernbert.files import replacing


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
