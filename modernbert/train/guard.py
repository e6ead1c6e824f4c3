"""What is kept of a step whose loss or gradients are not finite: its batches, in a file of plain tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .batch_loss import BatchLoss
from .distributed import Ranks


def save_bad_batches(
    folder: Path, step: int, batches: Sequence[object], parts: Sequence[BatchLoss], ranks: Ranks
) -> str:
    """Write the batches of a step to a new file, and say where they are. All ranks call it.

    The file is a list that `torch.load(file, weights_only=True)` reads: for each batch its rank, its place in the
    step, its loss and its content. If the loss of some batches is not finite, only these are written.
    """
    rows = [
        {"rank": ranks.rank, "place": place, "loss": part.loss.item(), "batch": plain(batch)}
        for place, (batch, part) in enumerate(zip(batches, parts, strict=True))
    ]
    every = [row for found in ranks.gather(rows) for row in found]
    bad = [row for row in every if not np.isfinite(row["loss"])] or every

    def write() -> str:
        names = chain([f"bad-step-{step}.pt"], (f"bad-step-{step}-{again}.pt" for again in count(1)))
        file = next(path for name in names if not (path := folder / name).exists())
        try:
            with file.open("xb") as opened:
                torch.save(bad, opened)
        except (OSError, RuntimeError) as error:  # the error of the step is the one to tell
            file.unlink(missing_ok=True)
            return f"Its batches could not be saved ({error})"
        return f"{file} has its batches"

    return ranks.on_first(write)


def plain(value: Any) -> Any:
    """Any batch as tensors, numbers, texts, lists and dicts: dataclasses and named tuples become dicts of their fields.

    What is none of these becomes its `repr`.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, np.ndarray | np.generic):
        numbers = value.dtype.kind in "biuf"
        return torch.from_numpy(np.array(value)) if numbers else plain(value.tolist())
    if type(value) in (type(None), bool, int, float, str, bytes):  # not their subclasses, such as enums
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and (names := getattr(value, "_fields", None)):
        return {name: plain(each) for name, each in zip(names, value, strict=True)}
    if isinstance(value, Mapping):
        return {key if isinstance(key, int) else str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    return repr(value)
