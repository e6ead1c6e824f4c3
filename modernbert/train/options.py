"""A frozen dataclass of settings as a command line, and as what a resumed run must have in common with its past."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

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
    """A command line to a config: one option for each field, as its type says.

    A tuple takes several words, a `Literal` one of its values, and a bool none: `--name` turns it on and `--no-name`
    off. A field that may be None is None if the option is left out. Names are given in full, and once.
    """
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=layout, allow_abbrev=False)
    hints = get_type_hints(config)
    for each in fields(config):
        text, default, name = each.metadata["help"].replace("%", "%%"), each.default, each.name.replace("_", "-")
        kind = _words(hints[each.name])
        if default is MISSING:
            kind["required"] = True
        elif default not in ("", (), None):
            text += f" (default: {default!r})"
        # Not given to argparse at once: until Python 3.12 it adds the default of a flag to its help text.
        parser.add_argument("--" + name, default=argparse.SUPPRESS, help=text, **kind)
        parser.set_defaults(**{each.name: default})
    words = [word.split("=")[0] for word in (sys.argv[1:] if arguments is None else arguments)]
    if twice := [word for word in words if word.startswith("--") and words.count(word) > 1]:
        parser.error(f"{twice[0]} is given twice, and one of them would be ignored")
    values = vars(parser.parse_args(arguments))
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _words(hint: Any) -> dict[str, Any]:
    """How argparse reads the words of a field of this type."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is tuple:
        return {"nargs": "*", "type": get_args(hint)[0]}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]  # of `float | None`
    return {"type": kinds[0] if kinds else hint}


def run(main: Callable[[C], object], config: C) -> None:
    """`main(config)` as a program: what it refuses is one sentence on stderr, with exit status 1."""
    try:
        main(config)
    except (ValueError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


def check_values(config: DataclassInstance) -> None:
    """Raise a ValueError that names the first option with a value that is not of its kind, nor a default of None."""
    for each in fields(config):
        kind, value = each.metadata["kind"], getattr(config, each.name)
        if kind and not (value is None and each.default is None):
            kind.check("--" + each.name.replace("_", "-"), value)


def fixed(config: DataclassInstance) -> dict[str, object]:
    """The settings that a resumed run must share, ready for `check_same`."""
    return {each.name: getattr(config, each.name) for each in fields(config) if not each.metadata["free"]}


def as_json(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings as a file gives them back: tuples are lists. Raises a TypeError for what JSON does not have."""
    try:
        return json.loads(json.dumps(dict(settings)))
    except TypeError as error:
        raise TypeError(f"settings must be numbers, texts, lists and dicts: {error}") from error


def check_same(file: Path, there: Mapping[str, object], asked: Mapping[str, object]) -> None:
    """Raise a ValueError that names the settings in which those of `file` (`there`) and those of this run differ."""
    there, asked = as_json(there), as_json(asked)
    names = sorted(name for name in {*there, *asked} if there.get(name) != asked.get(name))
    if names:
        differs = "; ".join(f"{name} is {there.get(name)!r}, now {asked.get(name)!r}" for name in names)
        raise ValueError(
            f"{file} belongs to another run: {differs}. Choose another --output, or the settings of that run"
        )
