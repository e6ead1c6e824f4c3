"""The folder of an export: a new one, an empty one, or one that the engine knows as its own. Any other is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...files import half_written
from ..store.folder import check_name
from ..store.request import write_json

_HALF_MARK = half_written(r"(modernbert|meta)\.json")


def claim(address: str, is_ours: Callable[[Path], bool], mark: str, content: Mapping[str, Any]) -> Path:
    """Make sure that a folder may be exported to, and exists. Returns its absolute path.

    Args:
        is_ours: whether the engine knows a folder as its own.
        mark, content: a JSON file by which it does. It is the first file in a folder that was empty.

    Raises:
        ValueError: the folder holds something else, or its name is not UTF-8.
        NotADirectoryError: it is not a folder.
    """
    check_name(Path(address))
    folder = Path(os.path.abspath(address))
    if os.path.lexists(folder) and not folder.is_dir():
        raise NotADirectoryError(f"{address} is a file or a broken link, not a folder: give another one")
    folder.mkdir(parents=True, exist_ok=True)
    if not is_ours(folder):
        if any(not _HALF_MARK.fullmatch(name) for name in os.listdir(folder)):
            raise ValueError(f"{address} is not an export, and not empty: give the folder of an export, or a new one")
        write_json(folder / mark, content)
    return folder


def read_mark(file: Path) -> dict[str, Any]:
    """The content of a mark; an empty dict if there is none, or if it is not a JSON object."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
