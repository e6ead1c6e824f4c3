"""The weight files of a folder: first names, shapes and dtypes, so that files that do not fit are refused unread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import pickles
from .json_files import has_file, read_json

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"  # in order of preference
LARGEST_WEIGHT = 65504  # of float16, in which models are run; a flipped bit of an exponent easily exceeds it
MOST_TENSORS = 100_000  # ten times the tensors of the deepest config
# The dtypes of safetensors from which PyTorch converts. Others hold numbers that need a scale from somewhere else.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

Read: TypeAlias = Callable[[torch.device, torch.dtype], Tensor]


class Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
        like: on the meta device, with the shape and the dtype in the file. Names of one pickled tensor have one `like`.
    """

    path: Path
    like: Tensor
    read: Read


def find(folder: Path) -> dict[str, Stored]:
    """All tensors of `folder`, unread: of model.safetensors, else of its shards, else of pytorch_model.bin.

    Raises:
        FileNotFoundError: no weights, or a shard is missing.
        ValueError: a damaged or unsafe file, an unknown dtype, or an index that does not match its shards.
    """
    found: dict[str, Stored] = {}
    for path, promised in _weight_files(folder).items():
        part = dict((_safetensors if path.suffix == ".safetensors" else _pickled)(path))
        if promised is not None and part.keys() != promised:
            lost, extra = sorted(promised - part.keys()), sorted(part.keys() - promised)
            raise ValueError(f"{path} and its index differ: only the index has {lost}, only the file {extra}")
        found |= part
    return found


def read(name: str, stored: Stored, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """The tensor, converted to `dtype` if it is a floating-point one.

    If it already has the requested device and dtype, it stays a view of the mapped file.

    Raises:
        ValueError: NaN, infinite or huge numbers.
    """
    there = stored.like.dtype
    tensor = stored.read(device, there if dtype is None or not there.is_floating_point else dtype)
    if problem := what_is_wrong(tensor):
        raise ValueError(f"{stored.path}: {name}, read as {kind(tensor)}, has {problem}; the file is damaged")
    return tensor


def what_is_wrong(tensor: Tensor) -> str | None:
    """What makes the numbers no weights, or None. One pass without a copy, at the speed of memory."""
    if not tensor.is_floating_point() or not tensor.numel():
        return None
    low, high = torch.aminmax(tensor if tensor.itemsize > 1 else tensor.float())  # aminmax lacks float8
    if bool(low >= -LARGEST_WEIGHT) and bool(high <= LARGEST_WEIGHT):  # NaN is neither
        return None
    return f"NaN, infinity or numbers beyond {LARGEST_WEIGHT:,}"


def kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _weight_files(folder: Path) -> Mapping[Path, set[str] | None]:
    """The weight files, each with the tensor names that the index lists for it, or None without an index."""
    for name in (SAFETENSORS, PICKLE):
        if has_file(folder / name):
            return {folder / name: None}
        path = folder / f"{name}.index.json"
        if not has_file(path):
            continue
        index = read_json(folder, path.name, object)
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            raise ValueError(f"{path} has no weight_map of tensor names to files")
        shards: dict[Path, set[str]] = {}
        for key, shard in index["weight_map"].items():
            # `PureWindowsPath` understands both separators and drive letters, so this rejects all but plain file names.
            if not isinstance(shard, str) or shard in ("", "..") or PureWindowsPath(shard).name != shard:
                raise ValueError(f"{path} points to {shard!r:.200}, which is not a file next to it")
            shards.setdefault(folder / shard, set()).add(key)
        if missing := [shard.name for shard in shards if not has_file(shard)]:
            raise FileNotFoundError(f"{path} points to {missing}, which are missing")
        return shards
    raise FileNotFoundError(f"{folder} holds neither {SAFETENSORS} nor {PICKLE} nor an index of either")


def _safetensors(path: Path) -> Iterator[tuple[str, Stored]]:
    try:
        file = safe_open(path, framework="pt")
        names = list(file.keys())
        if len(names) > MOST_TENSORS:
            raise ValueError(f"{path} has {len(names):,} tensors; at most {MOST_TENSORS:,} are read")
        for name in names:
            header = file.get_slice(name)
            dtype = DTYPES.get(header.get_dtype())
            if dtype is None:
                raise ValueError(f"{path}: {name} has dtype {header.get_dtype()}; known: {', '.join(DTYPES)}")
            like = torch.empty(header.get_shape(), dtype=dtype, device="meta")
            yield name, Stored(path, like, partial(_read_safetensors, path, file, name, like))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not in safetensors format: {error}") from error


def _read_safetensors(
    path: Path, file: safe_open, name: str, like: Tensor, device: torch.device, dtype: torch.dtype
) -> Tensor:
    if device.type == "cpu" and like.dtype == dtype:
        return file.get_tensor(name)
    # Through a map that is closed right away: pages that were read count as memory until then.
    with safe_open(path, framework="pt") as once:
        return once.get_tensor(name).to(device, dtype)


def _pickled(path: Path) -> Iterator[tuple[str, Stored]]:
    content = pickles.read(path)
    likes: dict[pickles.View, Tensor] = {}
    for name in list(content):
        tensor = content.pop(name).detach()
        like = likes.setdefault(pickles.view(tensor), tensor.to("meta"))
        yield name, Stored(path, like, tensor.to)
