"""Which tile a kernel takes on which GPU: a look into the table of `tuned.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..launch import newest
from .tuned import TUNED


class Tile(NamedTuple):
    """How a kernel is cut into programs, and compiled.

    Attributes:
        own: rows of a program; of an elementwise kernel its elements.
        visit: rows that it visits at a time; of an elementwise kernel its widest row.
        measured: the GPU on which it was the fastest; empty if it was chosen by registers and occupancy.
    """

    own: int
    visit: int
    num_warps: int
    num_stages: int
    measured: str = ""


def chosen(device: torch.device, *key: str | int) -> Tile:
    """The tile of a kernel on this GPU: that of the newest architecture in the table that is not newer than it."""
    return Tile(*newest(TUNED[key], device))
