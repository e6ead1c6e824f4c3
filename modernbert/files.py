"""Replace a file or a folder in one step, so that a crash leaves the old one or the new one.

The new content is written to a hidden path in the same parent folder, flushed to the disk and renamed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to. It replaces the file `path` at the end; after an error it is removed."""
    beside = path.with_name(_hidden(path.name))
    try:
        yield beside
        flush(beside)
        beside.replace(path)
        flush(path.parent)
    except OSError as error:
        _name(error, path, beside)
        raise
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: str | os.PathLike[str], *, last: str, stale: re.Pattern[str]) -> Iterator[Path]:
    """Yield an empty folder to write to. It replaces `folder` at the end; after an error it is removed.

    Files that only the old folder has are kept, except those at its top whose names match `stale`. What a process that
    was killed left beside `folder` is removed. Where folders cannot be swapped (not Linux, some network file systems,
    a mount point, the working directory), the files are moved one by one. `last` is then removed first and moved last:
    a folder without it must count as incomplete.

    Raises:
        NotADirectoryError, ValueError: as `output_folder`.
    """
    target = output_folder(folder).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    fixed = os.path.ismount(target) or Path.cwd().is_relative_to(target)
    inside = target.exists() and (fixed or not os.access(target.parent, os.W_OK))
    parent = target if inside else target.parent
    _remove_left(parent, target.name)
    new = parent / _hidden(target.name)
    new.mkdir()
    try:
        # Both, because swapping them exchanges their names.
        with _in_use(new), _in_use(target) if target.exists() else nullcontext():
            yield new
            flush(*(path for path in new.rglob("*") if path.is_file()))
            if not target.exists():
                flush(*_folders(new))
                new.rename(target)
            elif inside or not _swap(new, target, stale):
                _move_into(new, target, last, stale)
            flush(target.parent)
    except OSError as error:
        _name(error, target, new)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def output_folder(folder: str | os.PathLike[str]) -> Path:
    """The path of a folder to write to, which need not exist. `~` is the home directory.

    Raises:
        NotADirectoryError: a file, or a link that leads nowhere; its target may be on a disk that is not mounted.
        ValueError: the empty string. As a path it would be the working directory.
    """
    if not os.fspath(folder):
        raise ValueError("the folder to write to is the empty string; give '.' for the working directory")
    path = Path(folder).expanduser()
    if os.path.lexists(path) and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, or a link that leads nowhere; give a folder to write to")
    return path


def flush(*paths: Path) -> None:
    """Write the content of these files, and the entries of these folders, to the disk."""
    for path in paths:
        if os.name == "nt" and path.is_dir():
            continue  # Windows cannot flush a folder
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _name(error: OSError, path: Path, beside: Path) -> None:
    """Give an error without a path, as that of a full disk, or with the hidden one, the path that was to be written."""
    if error.errno is None and "requested and" in str(error):  # numpy, of a full disk
        error.errno, error.strerror = errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({error})"
    if error.errno is not None and error.filename in (None, str(beside)):
        error.filename = str(path)


def half_written(names: str) -> re.Pattern[str]:
    """What `replacing` and `replacing_folder` write to in place of paths whose names match the expression `names`.

    A process that was killed leaves it.
    """
    return re.compile(rf"\.({names})\.[0-9a-f]{{8}}")


def _hidden(name: str) -> str:
    return f".{_beginning(name)}.{uuid.uuid4().hex[:8]}"


def _beginning(name: str) -> str:
    return os.fsencode(name)[:240].decode("utf-8", "ignore")  # A file system allows 255 bytes.


def _remove_left(parent: Path, name: str) -> None:
    """Remove the folders of `_hidden(name)` in which a process that is gone has written."""
    pattern = half_written(re.escape(_beginning(name)))
    for left in [parent / entry for entry in os.listdir(parent) if pattern.fullmatch(entry)]:
        # A process that has just made its folder has not written to it yet.
        if left.is_dir() and not left.is_symlink() and any(left.iterdir()) and not _is_in_use(left):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _in_use(folder: Path) -> Iterator[None]:
    """Show other processes that this folder, whatever its name will be, is in use as long as this process lives."""
    if os.name == "nt":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks, where nothing is removed
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _is_in_use(folder: Path) -> bool:
    """Whether a process has the folder in use, as far as can be seen."""
    if os.name == "nt":
        return True
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _folders(folder: Path) -> Iterator[Path]:
    return (Path(path) for path, _, _ in os.walk(folder))


def _swap(new: Path, target: Path, stale: re.Pattern[str]) -> bool:
    """Exchange two folders in one step, after `new` got what only `target` had. False if that is not possible."""
    if sys.platform != "linux":
        return False
    try:
        _carry_over(target, new, stale)
    except shutil.Error:  # the file system has no hard links, or a file belongs to another user
        return False
    flush(*_folders(new))
    at_fdcwd, rename_exchange = -100, 2  # of <fcntl.h> and <linux/fs.h>
    rename = ctypes.CDLL(None, use_errno=True).renameat2
    if rename(at_fdcwd, os.fsencode(new), at_fdcwd, os.fsencode(target), rename_exchange) == 0:
        _carry_over(new, target, stale)  # files that other processes wrote into the old folder in the meantime
        return True
    if (code := ctypes.get_errno()) in (errno.EINVAL, errno.ENOSYS, errno.EXDEV, errno.EBUSY):
        return False
    raise OSError(code, os.strerror(code), str(target))


def _carry_over(old: Path, new: Path, stale: re.Pattern[str]) -> None:
    """Link into `new` the files that only `old` has, except stale ones."""

    def ignored(folder: str, names: list[str]) -> list[str]:
        here, there = new / Path(folder).relative_to(old), Path(folder)
        folders = [n for n in names if (there / n).is_dir() and not (there / n).is_symlink()]
        present = [n for n in names if os.path.lexists(here / n) and n not in folders]
        return present + [n for n in names if here == new and stale.fullmatch(n)]

    shutil.copytree(old, new, symlinks=True, ignore=ignored, copy_function=os.link, dirs_exist_ok=True)


def _move_into(new: Path, target: Path, last: str, stale: re.Pattern[str]) -> None:
    (target / last).unlink(missing_ok=True)
    for path in target.iterdir():
        if stale.fullmatch(path.name):
            path.unlink()
    for path in sorted(new.rglob("*"), key=lambda path: path == new / last):
        if path.is_file():
            there = target / path.relative_to(new)
            there.parent.mkdir(parents=True, exist_ok=True)
            path.replace(there)
    flush(*_folders(target))
