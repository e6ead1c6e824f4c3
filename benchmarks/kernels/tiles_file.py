"""The file that holds the tiles of the kernels: written as Python, so that reading it costs nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from benchmarks.kernels.resources import write_beside

FILE = Path(__file__).parents[2] / "kernels" / "modernbert_kernels" / "fused" / "tuned.py"

Key = tuple[str | int, ...]
Entry = tuple[int, int, int, int, str]
Table = Mapping[Key, Mapping[int, Entry]]

HEADER = '''"""The tiles of the kernels by architecture: what `tiles.Tile` holds, in its order.

Written by `python -m benchmarks.tune --write`, which measures on the GPU at hand; not by hand. The first of a key is
the kernel; then come, of attention, the width of a head and the bytes of a number, and of maxsim the rows of queries.
Below stands, by compute capability: what a program owns, what it visits at a time, warps, stages, and the GPU on which
that was measured. Where none is named, it was chosen by registers and occupancy (offline compile) and never timed.
"""

TUNED: dict[tuple[str | int, ...], dict[int, tuple[int, int, int, int, str]]] = {
'''


def rendered(table: Table) -> str:
    """The text of the file, formatted as ruff formats it."""
    lines = [HEADER]
    for key, entries in table.items():
        lines.append(f"    {_tuple(key)}: {{\n")
        lines += [f"        {arch}: {_tuple(entries[arch])},\n" for arch in sorted(entries)]
        lines.append("    },\n")
    return "".join([*lines, "}\n"])


def _tuple(values: Key) -> str:
    inside = ", ".join(json.dumps(value) for value in values)
    return f"({inside},)" if len(values) == 1 else f"({inside})"


def with_entry(table: Table, key: Key, arch: int, entry: Entry) -> Table:
    """The table with one entry in place of what stood there; other architectures keep theirs."""
    return {**table, key: {**table[key], arch: entry}}


def write(table: Table) -> None:
    """In one step: whoever imports it meanwhile reads the old file or the new one."""
    write_beside(FILE, rendered(table))
