"""Documents whose files are gone from where they were: deleted, moved, or on a disk that is not there now."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .documents.text import file_path
from .store.request import resume_command

PLACES = 5
"""Places that a note names."""


def vanished_note(files: Iterable[tuple[str, int]], store: Path | str) -> str | None:
    """The note about files that are gone, with the command that forgets them; None if there are all.

    Args:
        files: names, as the store holds them, each with the number of its documents.
    """
    places: dict[str, int] = {}
    exists: dict[str, bool] = {}
    for name, documents in files:
        place = None if "://" in name else _gone_from(file_path(name), exists)
        if place is not None:
            places[place] = places.get(place, 0) + documents
    if not places:
        return None
    command = resume_command({"forget": list(places)[:PLACES]}, store)
    more = f" (the first {PLACES} of {len(places)} places)" if len(places) > PLACES else ""
    return (
        f"{sum(places.values()):,} documents of other paths are kept, but their files are not there now: moved or "
        f"deleted? If they are meant to go, remove them with: {command}{more}"
    )


def _gone_from(path: str, exists: dict[str, bool]) -> str | None:
    """The outermost folder of `path` that is missing, or `path`; None unless the file is known to be missing.

    `exists` remembers what was found out about folders.
    """
    if not _is_missing(path):
        return None
    parent = os.path.dirname(path)
    while parent != os.path.dirname(parent):
        if parent not in exists:
            exists[parent] = not _is_missing(parent)
        if exists[parent]:
            break
        path, parent = parent, os.path.dirname(parent)
    return path


def _is_missing(path: str) -> bool:
    """False also if it cannot be found out."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        return False
    return False
