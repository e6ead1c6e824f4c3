"""The file that holds the tiles of the kernels: written as Python, so that reading it costs nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from benchmarks.kernels.resources import ARCHS, write_beside
from modernbert_kernels.fused.tiles import Tile

FILE = Path(__file__).parents[2] / "kernels" / "modernbert_kernels" / "fused" / "tiles.py"
START = "TILES: dict[tuple[str | int, ...], dict[int, Tile]] = {\n"

Key = tuple[str | int, ...]
Table = Mapping[Key, Mapping[int, Tile]]


def rendered(table: Table) -> str:
    """The text of the file, formatted as ruff formats it: all up to the table as it is now."""
    lines = [FILE.read_text("utf-8").partition(START)[0], START]
    for key, entries in table.items():
        rows = [f"{arch}: Tile({_values(_without_empty(entries[arch]))})" for arch in sorted(entries)]
        name = f"({_values(key)}{',' * (len(key) == 1)})"
        if len(rows) == 1:
            lines.append(f"    {name}: {{{rows[0]}}},\n")
        else:
            lines += [f"    {name}: {{\n", *(f"        {row},\n" for row in rows), "    },\n"]
    return "".join([*lines, "}\n"])


def _values(values: Key) -> str:
    return ", ".join(json.dumps(value) for value in values)


def _without_empty(tile: Tile) -> Key:
    return tile if tile.measured else tile[:-1]


def with_entry(table: Table, key: Key, arch: int, tile: Tile) -> Table:
    """The table with one tile replaced. Newer architectures, which would inherit it, keep the tile that they have."""
    before = table[key]
    taken = {each: before[max(known for known in before if known <= each)] for each in {*ARCHS, *before}} | {arch: tile}
    archs = sorted(taken)
    kept = [archs[0], *(new for old, new in pairwise(archs) if taken[new] != taken[old])]
    return {**table, key: {each: taken[each] for each in kept}}


def write(table: Table) -> None:
    """In one step: an import in another process reads the old file or the new one."""
    write_beside(FILE, rendered(table))
