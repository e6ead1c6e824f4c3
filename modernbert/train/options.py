"""A frozen dataclass of settings as a command line, and as what a resumed run must have in common with its past."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..config import Kind

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C", bound="DataclassInstance")

COUNT = Kind("a whole number, 0 or more", lambda v: type(v) is int and 0 <= v < 2**63, int)
AMOUNT = Kind("a finite number, 0 or more", lambda v: type(v) in (int, float) and 0 <= v < math.inf, float)
SHARE = Kind("a number from 0 to 1", lambda v: type(v) in (int, float) and 0 <= v <= 1, float)


def option(text: str, default: Any = MISSING, *, kind: Kind[Any] | None = None, free: bool = False) -> Any:
    """A field of a config: its help text, its default if it has one, and whether a resumed run may change it.

    Args:
        kind: what it may be, for `check_values`.
    """
    return field(default=default, metadata={"help": text, "kind": kind, "free": free})


def parse(config: type[C], description: str | None, arguments: Sequence[str] | None = None) -> C:
    """A command line to a config, with one option for each field.

    It takes several words where the default is a tuple, and none where it is True or False.
    """
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=layout)
    for each in fields(config):
        text, default = each.metadata["help"].replace("%", "%%"), each.default
        kind: dict[str, Any] = {"nargs": "*"} if isinstance(default, tuple) else {"type": type(default)}
        if default is MISSING:
            kind = {"required": True}
        elif isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        elif default not in ("", ()):
            text += f" (default: {default!r})"
        parser.add_argument("--" + each.name.replace("_", "-"), default=default, help=text, **kind)
    values = vars(parser.parse_args(arguments))
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def run(main: Callable[[C], object], config: C) -> None:
    """`main(config)` as a program: what it refuses is one sentence on stderr, with exit status 1."""
    try:
        main(config)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


def check_values(config: DataclassInstance) -> None:
    """Raise a ValueError that names the first option with a value that is not of its kind."""
    for each in fields(config):
        if kind := each.metadata["kind"]:
            kind.check("--" + each.name.replace("_", "-"), getattr(config, each.name))


def fixed(config: DataclassInstance) -> dict[str, object]:
    """The settings that a resumed run must share, ready for `check_same`."""
    return {each.name: getattr(config, each.name) for each in fields(config) if not each.metadata["free"]}


def check_same(file: Path, there: Mapping[str, object], asked: Mapping[str, object]) -> None:
    """Raise a ValueError that names the settings in which those of `file` (`there`) and those of this run differ."""
    there, asked = (json.loads(json.dumps(settings)) for settings in (there, asked))  # tuples and lists are one
    names = sorted(name for name in {*there, *asked} if there.get(name) != asked.get(name))
    if names:
        differs = "; ".join(f"{name} is {there.get(name)!r}, now {asked.get(name)!r}" for name in names)
        raise ValueError(
            f"{file} belongs to another run: {differs}. Choose another --output, or the settings of that run"
        )
