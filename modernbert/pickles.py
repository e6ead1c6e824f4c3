"""Read a pickled state dict (pytorch_model.bin) without running code from it.

A pickle is a program: loading one can call any function. `torch.load(weights_only=True)` allows a short list of calls,
but some of them can still take all memory, such as an array of any length. So the opcodes are read first, without
executing them, and a file that names any function beyond the few that build tensors is refused.
"""

from __future__ import annotations

import contextlib
import pickle
import pickletools
import re
import zipfile
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor

# All that a pickled state dict of torch calls, parameters included.
CALLED = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch(\.cuda)? (?!Unt|T)\w+Storage"
)
MOST_OPCODES = 500_000  # a tensor takes about 30
MOST_NESTED_OPCODES = 20_000_000  # of a training checkpoint, with the vocabulary and the merges of a tokenizer

View: TypeAlias = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of the file by name, on the CPU, as views of the mapped file if its format allows mapping.

    Raises:
        ValueError: a damaged file, or one that holds anything but a dict of names to tensors, or tensors that overlap.
    """
    try:
        zipped = zipfile.is_zipfile(path)  # the format of torch before 1.6 is not, and cannot be mapped
        if strange := sorted(name for name in _called(path, zipped) if not CALLED.fullmatch(name)):
            raise ValueError(f"it calls {strange}")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # the readers of zip and pickle raise nearly any exception on a damaged file
        raise ValueError(
            f"{path} is damaged, or holds more than tensors, which could run any code; "
            f"if you trust it, convert it to model.safetensors: {error}"
        ) from error
    return state_dict(path, content)


def read_nested(path: Path) -> Any:
    """The content of a training checkpoint: containers, texts, numbers, and tensors on the CPU, mapped from the file.

    Objects of classes and results of functions, beyond the few that build tensors, are `Unread`: nothing is called.
    `state_dict` checks a part of the content.

    Raises:
        ValueError: a damaged file, or one in the format of torch before 1.6.
    """
    try:
        _called(path, True, MOST_NESTED_OPCODES)
        module: Any = SimpleNamespace(Unpickler=_Unpickler, load=None, __name__="pickle")
        return torch.load(path, map_location="cpu", weights_only=False, mmap=True, pickle_module=module)
    except Exception as error:  # as in `read`
        raise ValueError(f"{path} is damaged, or is not a checkpoint that torch.save has written: {error}") from error


def state_dict(path: Path, content: object) -> dict[str, Tensor]:
    """The content of the file `path`, or a part of it, if it is a state dict. Raises a ValueError if it is not."""
    if not isinstance(content, dict) or not all(
        # A tensor can be a view that repeats a small storage, so that it is far larger than the file.
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.nbytes <= tensor.untyped_storage().nbytes()
        for name, tensor in content.items()
    ):
        raise ValueError(f"{path} is not a state dict, which is a dict of names to tensors and nothing else")
    # Names of one tensor, such as tied ones, count once.
    views = {view(tensor): tensor.nbytes for tensor in content.values()}
    if (total := sum(views.values())) > (size := path.stat().st_size):
        raise ValueError(
            f"{path} has {size:,} bytes, but its tensors take {total:,}, because they overlap; save a copy of each"
        )
    return content


class Unread:
    """In the place of an object that is not read. It takes whatever a pickle does with one, and does nothing."""

    def __new__(cls, *_: object, **__: object) -> Unread:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...
    def __call__(self, *_: object, **__: object) -> Unread:
        return self

    def __setstate__(self, _: object) -> None: ...
    def __setitem__(self, _: object, __: object) -> None: ...
    def append(self, _: object) -> None: ...
    def extend(self, _: object) -> None: ...
    def add(self, _: object) -> None: ...


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if CALLED.fullmatch(f"{module} {name}") else Unread


def view(tensor: Tensor) -> View:
    """Equal for two tensors that are the same part of the same memory."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _called(path: Path, zipped: bool, most: int = MOST_OPCODES) -> set[str]:
    """The names of the functions and classes in a pickle of torch, which is not executed."""
    with contextlib.ExitStack() as stack:
        if not zipped:  # five pickles: magic number, version, byte order, the dict, names of storages
            file, pickles = stack.enter_context(path.open("rb")), 5
        else:
            archive = stack.enter_context(zipfile.ZipFile(path))
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, so that it cannot be mapped into memory")
            (name,) = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
            file, pickles = stack.enter_context(archive.open(name)), 1
        opcodes = chain.from_iterable(pickletools.genops(file) for _ in range(pickles))
        called = set()
        for count, (opcode, argument, _) in enumerate(opcodes):
            if count == most:
                raise ValueError(f"it has more than {most:,} opcodes")
            if (
                opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > count
            ):  # takes memory up to this place
                raise ValueError(f"it stores at place {argument:,}, but has not so many objects")
            if opcode.name == "GLOBAL":
                called.add(str(argument))
        return called
