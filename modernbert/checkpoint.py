"""Checkpoint folders: from a path or a hub id to tensors in a module, and back to a folder.

Handles files and dicts, no class of ours. Loading is strict both ways and never holds two copies of the
weights: files are memory-mapped, and the module, built on the meta device, takes the tensors without copying them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from . import weights
from .files import replacing_folder
from .json_files import has_file as has_file
from .json_files import read_json as read_json

WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
HEADS = ("head.", "decoder.", "classifier.", "linear.")  # linear: of Stanford's ColBERT
SHARD_BYTES = 5_000_000_000  # Hugging Face's default
MOST_LISTED = 100  # names in one list of an error


def locate(
    name_or_path: str | os.PathLike[str],
    *,
    only: Sequence[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a checkpoint: an existing folder, or a hub id, downloaded to the hub's cache.

    `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE` and a stored login work as in `huggingface_hub`. Downloaded files are
    checked against the sizes and checksums that the hub lists. If the hub cannot be reached, a complete copy in the
    cache is used. Pickled weights are downloaded only for folders without safetensors.

    Args:
        only: names of the files to download, the required one last; None: all files that loading can need.

    Raises:
        FileNotFoundError: no such folder, repository or revision; or offline and not complete in the cache.
        PermissionError: a gated repository.
        OSError: the download failed after retries, or does not match what the hub lists.
    """
    if not os.fspath(name_or_path):
        raise FileNotFoundError("the folder or hub id is the empty string; give '.' for the working directory")
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{folder} is a file; give the folder it is in")
    # Imported here because a local folder does not need the hub client, whose import takes longer than a small load.
    from . import hub

    return hub.download(
        str(name_or_path),
        only=only,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )


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
    names = [name for name in found if only is None or name in only]
    return {name: weights.read(name, found.pop(name), torch.device(device), dtype) for name in names}


def load_weights(
    module: nn.Module,
    folder: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    prefix: str = "model.",
    ignore: tuple[str, ...] = HEADS,
) -> None:
    """`load_state_dict(module, read_state_dict(folder))`, but files that do not fit are refused before they are read.

    Raises:
        FileNotFoundError, ValueError: as these two.
    """
    found = weights.find(Path(folder))
    names = _fitting(module, {name: stored.like for name, stored in found.items()}, prefix, ignore)
    where = torch.device(device)
    _assign(module, {own: weights.read(name, found.pop(name), where, dtype) for own, name in names.items()})


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
    lists = [
        f"{what} ({len(names)}): {', '.join(names[:MOST_LISTED])}" + ", ..." * (len(names) > MOST_LISTED)
        for what, names in problems.items()
        if names
    ]
    if lists:
        raise ValueError("\n  ".join([f"the weights do not fit this {type(module).__name__}", *lists]))


def save(
    folder: str | os.PathLike[str],
    *,
    config: dict[str, Any],
    state: Mapping[str, Tensor],
    files: Mapping[str, bytes | dict[str, Any] | list[Any]] | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write config.json, the weights of `state` and `files` (name to bytes, or to JSON content) in one step.

    A crash leaves the old folder or the new one. Other files of the old folder (README.md) are kept, its weights are
    not. Where folders cannot be swapped (see `replacing_folder`), config.json is removed first and written last: a
    folder that is caught in between is refused, not misread. For tied tensors, only the first is written.

    Args:
        check: called with the new folder before it replaces the old one. It loads the folder, and raises a ValueError
            if that fails or gives another model. See `check_same` and `state_of`.

    Raises:
        NotADirectoryError: `folder` is a file, or a link that leads nowhere.
        ValueError: `folder` is the empty string, or what `check` raises. The old folder is left as it was.
    """
    with replacing_folder(folder, last="config.json", stale=WEIGHTS) as new:
        for name, content in {**(files or {}), "config.json": config}.items():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"files: {name!r} is outside the folder to save")
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(content if isinstance(content, bytes) else _json(content))
        _write_weights(new, state)
        if check is not None:
            try:
                check(new)
            except ValueError as error:
                words = str(error).replace(str(new), str(folder))
                raise ValueError(
                    f"{folder} is left as it was, because the model would not load again: {words}"
                ) from error


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """The tensors to write for a `module` in whose architecture nothing is tied.

    Layers that share a parameter are written one by one, and names lose what `torch.compile` adds to them.

    Raises:
        ValueError: a tensor without values of its own, or with values that loading refuses.
    """
    state: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in module.state_dict().items():
        where = f"{type(module).__name__} cannot be saved: {name}"
        if type(tensor) is not Tensor or tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            what = f"a {type(tensor).__name__}, {tensor.layout}, on {tensor.device}"
            raise ValueError(f"{where} is {what}; a plain tensor with values is wanted")
        if problem := weights.what_is_wrong(tensor):
            raise ValueError(f"{where} has {problem}")
        storage = tensor.untyped_storage().data_ptr()
        state[_uncompiled(name)] = tensor.clone() if storage in memory else tensor
        memory.add(storage)
    return state


def check_same(model: nn.Module, loaded: nn.Module) -> None:
    """Raise a ValueError that names the first module of `model` that is another one in `loaded`.

    State dicts do not show an adapter whose parameters have the names of a plain layer, or a layer without parameters.
    """
    ours, theirs = ({_uncompiled(name): m for name, m in _modules(root)} for root in (model, loaded))
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        got, want = ours.get(name), theirs.get(name)
        if got is None or want is None or not _computes_as(got, want):
            raise ValueError(
                f"{name} is {got}, which would be loaded as {want}; merge adapters into plain layers first"
            )


def _modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules below `root` by name, without the wrappers of `torch.compile`."""
    every = root.named_modules(remove_duplicate=False)
    return ((name, module) for name, module in every if name and "_orig_mod" not in module._modules)


def _uncompiled(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _computes_as(module: nn.Module, plain: nn.Module) -> bool:
    """Whether it has the forward pass of `plain`, or of a class that `plain` inherits from, and the same settings."""
    forwards = [vars(each).get("forward") for each in type(plain).__mro__]
    return type(module).forward in forwards and module.extra_repr() == plain.extra_repr()


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _write_weights(folder: Path, state: Mapping[str, Tensor]) -> None:
    from huggingface_hub import split_state_dict_into_shards_factory

    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        memory = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        first.setdefault(memory if tensor.numel() else (name,), name)
    tensors = {name: state[name].detach().contiguous() for name in first.values()}
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_BYTES,
    )
    for shard, names in split.filename_to_tensors.items():
        try:
            save_file({name: tensors[name] for name in names}, folder / shard, metadata={"format": "pt"})
        except SafetensorError as error:  # of a full disk, for example
            raise OSError(f"{folder / shard} cannot be written: {error}") from error
        # safetensors 0.8 makes its files readable by their owner only.
        shutil.copymode(folder / "config.json", folder / shard)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{weights.SAFETENSORS}.index.json").write_bytes(_json(index))
