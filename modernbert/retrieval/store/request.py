"""The request of a run: it is kept until the commit, so that an interrupted run can be finished.

Until its first commit, a store has no manifest. Its folder is then recognised by the request in it.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from typing_extensions import NotRequired

from ...files import replacing

UNFINISHED = "unfinished.json"


class IndexRequest(TypedDict):
    """The arguments of `index` that decide what the store will hold; some only if they are not the default.

    `reading`: what is given of `Reading`.
    """

    paths: list[str]
    model: str | None
    dtype: str | None
    prefilter: bool
    pool: NotRequired[int]
    exclude: NotRequired[list[str]]
    gitignore: NotRequired[bool]
    reading: NotRequired[dict[str, str | bool]]


class ForgetRequest(TypedDict):
    """The paths whose documents `forget` removes."""

    forget: list[str]


Request = IndexRequest | ForgetRequest
"""The content of unfinished.json."""

NOTHING: ForgetRequest = {"forget": []}
"""Takes the place of a first request that was impossible: nothing can be resumed, but the folder is still a store's."""


def read_request(folder: Path) -> Request | None:
    """The request in unfinished.json, or None if there is no such file. ValueError if its content is not a request."""
    path = folder / UNFINISHED
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        content = None
    if not _is_request(content):
        raise ValueError(f"{path} is damaged: delete it, and run the command that was interrupted again")
    return content


def read_unfinished(folder: Path) -> Request | None:
    """The request of a run that has not finished, or None. ValueError as for `read_request`."""
    request = read_request(folder)
    return None if request == NOTHING else request


def write_request(folder: Path, request: Request) -> None:
    """Replace unfinished.json in one step."""
    write_json(folder / UNFINISHED, request)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def resume_command(request: Request, folder: Path | str) -> str:
    """The command line that makes the same request again."""
    if "forget" in request:
        return _command("--forget", *request["forget"], "--output", str(folder))
    options: list[str] = []
    for name, value in (("--model", request["model"]), ("--dtype", request["dtype"])):
        options += [name, value] if value else []
    options += ["--prefilter"] if request["prefilter"] else []
    options += ["--pool", str(request["pool"])] if "pool" in request else []
    for pattern in request.get("exclude", ()):
        options += ["--exclude", pattern]
    options += [] if request.get("gitignore", True) else ["--no-gitignore"]
    for name, value in request.get("reading", {}).items():
        options.append(f"--{name.replace('_', '-')}" + (f"={value}" if isinstance(value, str) else ""))
    return _command(*request["paths"], "--output", str(folder), *options)


def _is_request(content: object) -> bool:
    """Whether the content of a JSON file is a request: exactly the fields of one, with values of their types."""
    if not isinstance(content, dict):
        return False
    if content.keys() == ForgetRequest.__annotations__.keys():
        return _are_texts(content["forget"])
    return (
        {"paths", "model", "dtype", "prefilter"} <= content.keys() <= IndexRequest.__annotations__.keys()
        and _are_texts(content["paths"])
        and all(content[name] is None or isinstance(content[name], str) for name in ("model", "dtype"))
        and all(isinstance(content.get(name, True), bool) for name in ("prefilter", "gitignore"))
        and isinstance(content.get("pool", 1), int)
        and _are_texts(content.get("exclude", []))
        and isinstance(reading := content.get("reading", {}), dict)
        and all(isinstance(value, (str, bool)) for value in reading.values())
    )


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _command(*arguments: str) -> str:
    return " ".join(map(_quoted, ["modernbert", "index", *arguments]))


def _quoted(argument: str) -> str:
    r"""An argument for a shell. One with line ends, or with bytes that are not UTF-8, is written as `$'a\xff'`."""
    if argument.isprintable():
        return shlex.quote(argument)
    characters = (
        chr(byte) if 32 <= byte < 127 and byte not in b"'\\" else f"\\x{byte:02x}" for byte in os.fsencode(argument)
    )
    return f"$'{''.join(characters)}'"
