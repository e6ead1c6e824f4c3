"""Checkpoint folders: from a path or a hub id to a folder, and from a model back to one.

Handles files and dicts, no class of ours. Loading (`loading.py`) is strict both ways and never holds two copies of the
weights: files are memory-mapped, and the module, built on the meta device, takes the tensors without copying them.
Saving loads what it wrote before it replaces anything.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from .loading import load_state_dict as load_state_dict
from .loading import load_weights as load_weights
from .loading import read_state_dict as read_state_dict

WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
SHARD_BYTES = 5_000_000_000  # Hugging Face's default


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
        try:
            _write_weights(new, state)
        except SafetensorError as error:  # of a full disk, for example
            raise OSError(f"{folder}: the weights cannot be written: {error}") from error
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
    ours, theirs = ({_uncompiled(name): part for name, part in _parts(root)} for root in (model, loaded))
    for name in [*theirs, *(name for name in ours if name not in theirs)]:
        got, want = ours.get(name), theirs.get(name)
        if got is None or want is None or not _computes_as(got, want):
            raise ValueError(
                f"{name} is {got}, which would be loaded as {want}; merge adapters into plain layers first"
            )


def _parts(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules below `root` by name, without the wrappers of `torch.compile`."""
    every = root.named_modules(remove_duplicate=False)
    return ((name, part) for name, part in every if name and "_orig_mod" not in dict(part.named_children()))


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
        save_file({name: tensors[name] for name in names}, folder / shard, metadata={"format": "pt"})
        # safetensors 0.8 makes its files readable by their owner only.
        shutil.copymode(folder / "config.json", folder / shard)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{weights.SAFETENSORS}.index.json").write_bytes(_json(index))
