"""From weight files to the tensors of a module, strictly: every name, every shape, nothing left over."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from . import weights

HEADS = ("head.", "decoder.", "classifier.", "linear.")  # linear: of Stanford's ColBERT
MOST_LISTED = 100  # names in one list of an error


def read_state_dict(
    folder: str | os.PathLike[str],
    *,
    only: Collection[str] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """All tensors of `folder`: from model.safetensors, else from its shards, else from pytorch_model.bin.

    A tensor that already has the requested device and dtype stays a view of the mapped file. Writing to it does not
    change the file, but overwriting the file in place (instead of replacing it) changes the tensor. Other tensors are
    converted one at a time. `dtype` applies to floating-point tensors.

    Args:
        only: the names to read; None: all.

    Raises:
        FileNotFoundError: no weights, or a shard is missing.
        ValueError: a damaged or unsafe file, an index that does not match its shards, or NaN, infinite or huge weights.
    """
    found = weights.find(Path(folder))
    return _read({name: name for name in found if only is None or name in only}, found, torch.device(device), dtype)


def load_weights(
    module: nn.Module,
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    prefix: str = "model.",
    ignore: tuple[str, ...] = HEADS,
    elsewhere: tuple[str, ...] = (),
) -> None:
    """`load_state_dict(module, read_state_dict(folder))`, but files that do not fit are refused before they are read.

    A warning names the tensors that are skipped, except those that start with one of `elsewhere`: these are read too.

    Raises:
        FileNotFoundError, ValueError: as these two.
    """
    found = weights.find(Path(folder))
    names = _fitting(module, {name: stored.like for name, stored in found.items()}, prefix, ignore)
    taken = set(names.values())
    if left := [name for name in found if name not in taken and not name.startswith(elsewhere)]:
        kind = type(module).__name__
        warnings.warn(
            f"{folder}: tensors of a head are left out, and saving this {kind} will not keep them: {_listed(left)}",
            stacklevel=5,  # the caller of `from_pretrained`
        )
    _assign(module, _read(names, found, torch.device(device), dtype))


def load_state_dict(
    module: nn.Module, state: Mapping[str, Tensor], *, prefix: str = "model.", ignore: tuple[str, ...] = HEADS
) -> None:
    """Assign the tensors of `state` to `module`, which was built on the meta device, without copying them.

    If any name starts with `prefix`, the file belongs to a model with a head: only names with the prefix are the
    module's, and the prefix is removed. Names that start with one of `ignore` and are not the module's are skipped.
    Parameters that are tied in the module stay tied, and one of their names is enough.

    Raises:
        ValueError: lists every missing and unexpected name and every tensor that does not fit.
    """
    names = _fitting(module, state, prefix, ignore)
    _assign(module, {own: state[name] for own, name in names.items()})


def _read(
    names: Mapping[str, str], found: dict[str, weights.Stored], device: torch.device, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """The tensors under the keys of `names`, taken from `found` under its values.

    They are read in a thread of their own. Checking and converting them takes OpenMP's threads, which belong to the
    thread that calls and do not survive a fork: a server that loads a model and forks its workers would hang in them.
    """

    def read() -> dict[str, Tensor]:
        return {own: weights.read(name, found.pop(name), device, dtype) for own, name in names.items()}

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(read).result()


def _fitting(module: nn.Module, state: Mapping[str, Tensor], prefix: str, ignore: tuple[str, ...]) -> dict[str, str]:
    """The names of `state` by their names in `module`. Only the shapes and dtypes of the tensors are read."""
    own: dict[str, Tensor] = module.state_dict(keep_vars=True)
    headed = bool(prefix) and any(name.startswith(prefix) for name in state)
    given: dict[str, str] = {}
    problems: dict[str, list[str]] = {"missing": [], "unexpected": [], "unfit": []}
    for name in state:
        inner = name[len(prefix) :] if headed and name.startswith(prefix) else name
        if inner in own and headed == (inner != name):
            given[inner] = name
        elif not name.startswith(ignore):
            problems["unexpected"].append(name)
    taken: dict[int, str] = {}
    for names in _tied(own):
        found = [name for name in names if name in given]
        if not found:
            problems["missing"].append(names[0])
        for name in found:
            want, tensor = own[name], state[given[name]]
            first = taken.setdefault(id(tensor), name)
            if (tensor.shape, tensor.is_floating_point()) != (want.shape, want.is_floating_point()):
                problems["unfit"].append(f"{name} ({weights.kind(tensor)} instead of {weights.kind(want)})")
            elif first not in names:
                problems["unfit"].append(f"{name} (one tensor with {first} in the file, but not in the module)")
    _refuse(module, problems)
    return given


def _assign(module: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Give the module tensors that fit it."""
    own: dict[str, Tensor] = module.state_dict(keep_vars=True)
    ready: dict[str, Tensor] = {}
    unfit: list[str] = []
    for names in _tied(own):
        first, *others = [name for name in names if name in given]
        value = given[first]
        unfit += [
            f"{name} (tied to {first} in the module, different from it in the file)"
            for name in others
            if not torch.equal(given[name], value)
        ]
        if isinstance(own[first], nn.Parameter):
            value = nn.Parameter(value, requires_grad=own[first].requires_grad)
        ready.update(dict.fromkeys(names, value))
    _refuse(module, {"unfit": unfit})
    module.load_state_dict(ready, strict=True, assign=True)
    if left := [name for name, buffer in module.named_buffers() if buffer.is_meta]:
        raise ValueError(f"{left} are still on the meta device: build non-persistent buffers outside it")


def _tied(state: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of each tensor of a state dict with `keep_vars`, in which tied parameters are one object."""
    tied: dict[int, list[str]] = {}
    for name, tensor in state.items():
        tied.setdefault(id(tensor), []).append(name)
    return list(tied.values())


def _refuse(module: nn.Module, problems: Mapping[str, Sequence[str]]) -> None:
    """Raise a ValueError that lists the problems, if there are any."""
    lists = [f"{what} ({len(names)}): {_listed(names)}" for what, names in problems.items() if names]
    if lists:
        raise ValueError("\n  ".join([f"the weights do not fit this {type(module).__name__}", *lists]))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_LISTED]) + ", ..." * (len(names) > MOST_LISTED)
