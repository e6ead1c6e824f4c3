"""Stands for a model in a process of `benchmarks.models`: it can be right, and wrong in every way."""

from __future__ import annotations

import os
import sys
import time

import torch
from torch import Tensor

from benchmarks.models import texts
from benchmarks.models.case import Build, Place, Way

LENGTHS = (21, 3, 40, 40, 1)


def pretend(place: Place, how: str = "right") -> Build:
    """A builder whose answer is the ids of the texts of `LENGTHS`."""
    if how == "cannot load":
        raise ImportError("no such kernel")

    def act() -> None:
        if how == "dies":
            print("a kernel has crashed", file=sys.stderr)
            os._exit(3)
        if how == "fails":
            raise ValueError("unknown shape")
        if how == "hangs":
            time.sleep(600)

    def answer() -> Tensor:
        found = torch.cat([texts.ids(at, length) for at, length in enumerate(LENGTHS)]).float()
        return found + 1 if how == "wrong" else found

    return lambda case: iter([Way(how, act, answer)])
