"""Where a command writes a file: checked before the work that the file is the result of."""

from __future__ import annotations

import os
from pathlib import Path


def output_file(path: Path, option: str) -> Path:
    """The file that an option names. Links are followed, so that a link stays a link.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a folder, a device, or a link to itself has this name.
    """
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and not target.is_file():
        raise ValueError(f"{option} is {path}, which is not a regular file: give the name of a file")
    if not target.parent.is_dir():
        missing = target.parent if path.is_symlink() else path.parent
        raise FileNotFoundError(f"{option} is {path}, but there is no folder {missing}")
    return target
