"""Read JSON files strictly: what two readers could understand differently is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn, TypeVar, overload

T = TypeVar("T")

JSON_BYTES = 1 << 25  # a limit, because parsed objects take up to 20 times the memory of their text


def has_file(path: Path) -> bool:
    """Whether `path` is a file. Raises FileNotFoundError for a broken link, a pipe, a device or a folder."""
    if os.path.lexists(path) and not path.is_file():
        raise FileNotFoundError(f"{path} is not a file, or is a broken link")
    return path.is_file()


def check_size(path: Path, limit: int) -> None:
    """Raise a ValueError if the file is too large to be parsed."""
    if (size := path.stat().st_size) > limit:
        raise ValueError(f"{path} has {size:,} bytes; JSON files of at most {limit:,} bytes are read")


@overload
def read_json(folder: str | os.PathLike[str], name: str) -> dict[str, Any]: ...
@overload
def read_json(folder: str | os.PathLike[str], name: str, kind: type[T]) -> T: ...
def read_json(folder: str | os.PathLike[str], name: str, kind: type = dict) -> object:
    """The content of the JSON file `name` in `folder`: an object, or a `kind` such as list (modules.json).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, a key twice in one object, NaN or Infinity, not a `kind`, or longer than `JSON_BYTES`.
    """
    path = Path(folder) / name
    if not has_file(path):
        there = sorted(os.listdir(path.parent)) if path.parent.is_dir() else "no such folder"
        raise FileNotFoundError(f"{path} is missing; next to it: {there}")
    check_size(path, JSON_BYTES)
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=unique_keys, parse_constant=_constant)
    except (ValueError, RecursionError) as error:  # invalid JSON or UTF-8; nested too deeply
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds {type(content).__name__} {content!r:.80}, but must hold a {kind.__name__}")
    return content


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The `object_pairs_hook` of a JSON reader. Raises a ValueError that names a key that an object has twice."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r:.80} is there twice")
    return content


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")
