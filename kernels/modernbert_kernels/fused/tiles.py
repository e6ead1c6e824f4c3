"""The tiles of the Triton kernels, by kernel and compute capability."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..launch import for_arch


class Tile(NamedTuple):
    """How a kernel is cut into programs, and compiled.

    Attributes:
        block_m: rows of a program; for an elementwise kernel, its elements.
        block_n: rows that it loads at a time; for an elementwise kernel, its widest row.
        measured: the GPU on which it was the fastest; empty if it was chosen by registers and occupancy.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    measured: str = ""


def tile_for(device: torch.device, *key: str | int) -> Tile:
    """The tile of a kernel on this device: that of the newest architecture in its row that is not newer."""
    return for_arch(TILES[key], device)


# `python -m benchmarks.tune --write` enters rows that are faster on a GPU. A key is the kernel; for attention also the
# head width and the bytes of a number, for maxsim the query rows. An architecture has an entry only where its tile
# differs from the one before it. Entries without a GPU were chosen by registers and occupancy (offline compile), never
# timed.
TILES: dict[tuple[str | int, ...], dict[int, Tile]] = {
    ("attention forward", 32, 2): {80: Tile(64, 64, 4, 2)},
    ("attention forward", 32, 4): {80: Tile(32, 16, 4, 1)},
    ("attention forward", 64, 2): {
        80: Tile(64, 32, 4, 2),
        90: Tile(64, 64, 4, 2),
        120: Tile(64, 32, 4, 2),
    },
    ("attention forward", 64, 4): {80: Tile(16, 32, 4, 1)},
    ("attention forward", 128, 2): {
        80: Tile(64, 32, 8, 2),
        89: Tile(64, 16, 8, 2),
        90: Tile(64, 32, 8, 2),
    },
    ("attention forward", 128, 4): {80: Tile(32, 16, 4, 1)},
    ("attention dq", 32, 2): {
        80: Tile(64, 32, 4, 2),
        90: Tile(64, 64, 4, 2),
        120: Tile(64, 32, 4, 2),
    },
    ("attention dq", 32, 4): {80: Tile(32, 32, 4, 1)},
    ("attention dq", 64, 2): {80: Tile(64, 32, 4, 2)},
    ("attention dq", 64, 4): {80: Tile(32, 32, 8, 1)},
    ("attention dq", 128, 2): {80: Tile(32, 32, 4, 2)},
    ("attention dq", 128, 4): {80: Tile(16, 16, 8, 1)},
    ("attention dkv", 32, 2): {
        80: Tile(64, 32, 4, 2),
        90: Tile(64, 64, 4, 2),
        120: Tile(64, 32, 4, 2),
    },
    ("attention dkv", 32, 4): {80: Tile(32, 32, 4, 1)},
    ("attention dkv", 64, 2): {
        80: Tile(32, 32, 4, 2),
        90: Tile(64, 32, 4, 2),
        120: Tile(32, 32, 4, 2),
    },
    ("attention dkv", 64, 4): {80: Tile(32, 16, 8, 1)},
    ("attention dkv", 128, 2): {80: Tile(32, 32, 8, 1)},
    ("attention dkv", 128, 4): {80: Tile(16, 16, 8, 1)},
    ("maxsim", 32): {80: Tile(32, 64, 4, 2)},
    ("maxsim", 64): {80: Tile(64, 64, 4, 2)},
    ("maxsim", 128): {
        80: Tile(128, 64, 8, 2),
        89: Tile(128, 32, 8, 2),
        90: Tile(128, 64, 8, 2),
        100: Tile(128, 32, 8, 2),
    },
    ("geglu forward",): {80: Tile(2048, 512, 4, 3)},
    ("geglu backward",): {80: Tile(2048, 512, 4, 3)},
}
