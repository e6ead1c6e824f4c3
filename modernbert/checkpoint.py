"""Checkpoint folders: from a path or a hub id to a folder, and from a model back to one.

Handles files and dicts, no class of ours. Loading (`loading.py`) is strict both ways and never holds two copies of the
weights: files are memory-mapped, and the module, built on the meta device, takes the tensors without copying them.
Saving (`saving.py` has its tensors) loads what it wrote before it replaces anything.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from . import weights
from .files import output_folder, replacing_folder
from .json_files import has_file as has_file
from .json_files import read_json as read_json
from .loading import load_state_dict as load_state_dict
from .loading import load_weights as load_weights
from .loading import read_state_dict as read_state_dict
from .saving import check_same as check_same
from .saving import is_sharded as is_sharded
from .saving import on_first_rank as on_first_rank
from .saving import plain_names as plain_names
from .saving import state_of as state_of
from .saving import unwrapped as unwrapped

WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
MODULES = "modules.json"  # of sentence-transformers and PyLate: a backbone in the folder, its head in others
SHARD_BYTES = 5_000_000_000  # Hugging Face's default
DTYPE = ("dtype", "torch_dtype")  # keys of config.json in transformers 5 and 4
# What the names of tensors tell about a model that would not load again, and what to do about it.
UNDO = {
    r"\.(base_layer|lora_|modules_to_save|original_module)": "merge the adapter first, with merge_and_unload() of peft",
    r"\.parametrizations\.": "call torch.nn.utils.parametrize.remove_parametrizations first",
    r"\.weight_u$": "call torch.nn.utils.remove_spectral_norm first",
    r"_(orig|mask)$": "call torch.nn.utils.prune.remove first",
    r"\.weight_[gv]$": "call torch.nn.utils.remove_weight_norm first",
    r"_flat_param": "gather the tensors, with get_model_state_dict of torch.distributed, and pass state_dict",
}


def locate(
    name_or_path: str | os.PathLike[str],
    *,
    only: Sequence[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    subfolder: str = "",
) -> Path:
    """The folder of a checkpoint: an existing folder, or a hub id, downloaded to the hub's cache.

    `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE` and a stored login work as in `huggingface_hub`. Downloaded files are
    checked against the sizes and checksums that the hub lists. If the hub cannot be reached, a complete copy in the
    cache is used. Pickled weights are downloaded only for folders without safetensors.

    Args:
        only: names of the files to download, the required one last; None: all files that loading can need.
        subfolder: the folder in it that holds the checkpoint.

    Raises:
        FileNotFoundError: no such folder, repository or revision; or offline and not complete in the cache.
        PermissionError: a gated repository.
        OSError: the download failed after retries, or does not match what the hub lists.
    """
    if not os.fspath(name_or_path):
        raise FileNotFoundError("the folder or hub id is the empty string; give '.' for the working directory")
    if PurePosixPath(subfolder).is_absolute() or ".." in PurePosixPath(subfolder).parts:
        raise ValueError(f"subfolder {subfolder!r} is outside the checkpoint")
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        if not (folder / subfolder).is_dir():
            raise FileNotFoundError(f"{folder} has no folder {subfolder!r}")
        return folder / subfolder
    if folder.exists():
        todo = "give the folder it is in, or, of a checkpoint of Composer, one that `modernbert convert` wrote"
        raise NotADirectoryError(f"{folder} is a file; {todo}")
    # Imported here because a local folder does not need the hub client, whose import takes longer than a small load.
    from . import hub

    return hub.download(
        str(name_or_path),
        only=only,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        subfolder=subfolder,
    )


class Content(NamedTuple):
    """What a model writes: config.json, the tensors of the weight files, and other files by name, bytes or JSON."""

    config: dict[str, Any]
    state: Mapping[str, Tensor]
    files: Mapping[str, bytes | dict[str, Any] | list[Any]] = MappingProxyType({})


def save(
    folder: str | os.PathLike[str],
    *,
    config: dict[str, Any],
    state: Mapping[str, Tensor],
    files: Mapping[str, bytes | dict[str, Any] | list[Any]] | None = None,
    check: Callable[[Path], None] | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Write config.json, the weights of `state` and `files` (name to bytes, or to JSON content) in one step.

    A crash leaves the old folder or the new one. Other files of the old folder (README.md) are kept, its weights are
    not. Where folders cannot be swapped (see `replacing_folder`), config.json is removed first and written last: a
    folder that is caught in between is refused, not misread. For tied tensors, only the first is written. The config
    gets the dtype of the tensors, if they have one.

    Args:
        check: called with the new folder before it replaces the old one. It loads the folder, and raises a ValueError
            if that fails or gives another model. See `check_same` and `state_of`.
        max_shard_size: of a weight file, in bytes or such as "20GB"; None: SHARD_BYTES. Larger weights become several.

    Raises:
        NotADirectoryError: `folder` is a file, or a link that leads nowhere.
        ValueError: `folder` is the empty string, or holds other modules of a model that has some, such as a head on an
            encoder, or what `check` raises. The old folder is left as it was.
    """
    if MODULES not in (files or {}) and has_file(output_folder(folder) / MODULES):
        raise ValueError(
            f"{folder} holds a model of several modules (see its {MODULES}), which would not fit to the weights of "
            "this one: save to another folder, or save the whole model"
        )
    config = {name: value for name, value in config.items() if name not in DTYPE} | _dtype(state)
    with replacing_folder(folder, last="config.json", stale=WEIGHTS) as new:
        for name, content in {**(files or {}), "config.json": config}.items():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"files: {name!r} is outside the folder to save")
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(content if isinstance(content, bytes) else _json(content))
        try:
            _write_weights(new, state, max_shard_size)
        except SafetensorError as error:  # of a full disk, for example
            raise OSError(f"{folder}: the weights cannot be written: {error}") from error
        if check is not None:
            try:
                check(new)
            except ValueError as error:
                words = str(error).replace(str(new), str(folder))
                undo = [f"; {text}" for kind, text in UNDO.items() if any(re.search(kind, name) for name in state)]
                raise ValueError(
                    f"{folder} is left as it was, because the model would not load again: {words}{''.join(undo)}"
                ) from error


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _dtype(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The keys of config.json that name the dtype of the weights; none if they have several."""
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values() if tensor.is_floating_point()}
    return dict.fromkeys(DTYPE, *dtypes) if len(dtypes) == 1 else {}


def _write_weights(folder: Path, state: Mapping[str, Tensor], max_shard_size: int | str | None) -> None:
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
        max_shard_size=SHARD_BYTES if max_shard_size is None else max_shard_size,
    )
    for shard, names in split.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / shard, metadata={"format": "pt"})
        # safetensors 0.8 makes its files readable by their owner only.
        shutil.copymode(folder / "config.json", folder / shard)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{weights.SAFETENSORS}.index.json").write_bytes(_json(index))
