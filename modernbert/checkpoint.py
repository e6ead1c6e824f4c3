"""Checkpoint folders: from a path or a hub id to tensors in a module, and back to a folder.

Handles files and dicts, no class of ours. Loading is strict both ways and never holds two copies of the
weights: files are memory-mapped, and the module, built on the meta device, takes the tensors without copying them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar, overload

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import pickles
from .files import replacing_folder

T = TypeVar("T")

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"  # in order of preference
WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
HEADS = ("head.", "decoder.", "classifier.", "linear.")  # linear: of Stanford's ColBERT
SHARD_BYTES = 5_000_000_000  # Hugging Face's default
LARGEST_WEIGHT = 65504  # of float16, in which models are run; a flipped bit of an exponent easily exceeds it
JSON_BYTES = 1 << 25  # a limit, because parsed objects take up to 20 times the memory of their text


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


def has_file(path: Path) -> bool:
    """Whether `path` is a file. Raises FileNotFoundError for a broken link, a pipe, a device or a folder."""
    if os.path.lexists(path) and not path.is_file():
        raise FileNotFoundError(f"{path} is not a file, or is a broken link")
    return path.is_file()


@overload
def read_json(folder: str | os.PathLike[str], name: str) -> dict[str, Any]: ...
@overload
def read_json(folder: str | os.PathLike[str], name: str, kind: type[T]) -> T: ...
def read_json(folder: str | os.PathLike[str], name: str, kind: type = dict) -> object:
    """The content of the JSON file `name` in `folder`: an object, or a `kind` such as list (modules.json).

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, not a `kind`, or longer than `JSON_BYTES`.
    """
    path = Path(folder) / name
    if not has_file(path):
        there = sorted(os.listdir(path.parent)) if path.parent.is_dir() else "no such folder"
        raise FileNotFoundError(f"{path} is missing; next to it: {there}")
    if (size := path.stat().st_size) > JSON_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; JSON files of at most {JSON_BYTES:,} bytes are read")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # invalid JSON or UTF-8; nested too deeply
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds {type(content).__name__} {content!r:.80}, but must hold a {kind.__name__}")
    return content


def read_state_dict(
    folder: str | os.PathLike[str], *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """All tensors of `folder`: from model.safetensors, else from its shards, else from pytorch_model.bin.

    A tensor that already has the requested device and dtype stays a view of the mapped file. Writing to it does not
    change the file, but overwriting the file in place (instead of replacing it) changes the tensor. Other tensors are
    converted one at a time. `dtype` applies to floating-point tensors.

    Raises:
        FileNotFoundError: no weights, or a shard is missing.
        ValueError: a damaged or unsafe file, an index that does not match its shards, or NaN, infinite or huge weights.
    """
    state: dict[str, Tensor] = {}
    for path, promised in _weight_files(Path(folder)).items():
        read = _read_safetensors if path.suffix == ".safetensors" else _read_pickle
        part = dict(read(path, torch.device(device), dtype))
        for name, tensor in part.items():
            if not _holds_weights(tensor):
                numbers = f"NaN, infinity or numbers beyond {LARGEST_WEIGHT:,}"
                raise ValueError(f"{path}: {name}, read as {_kind(tensor)}, has {numbers}; the file is damaged")
        if promised is not None and part.keys() != promised:
            lost, extra = sorted(promised - part.keys()), sorted(part.keys() - promised)
            raise ValueError(f"{path} and its index differ: only the index has {lost}, only the file {extra}")
        state |= part
    return state


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


def _read_safetensors(path: Path, device: torch.device, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 -- not a dict, it cannot be iterated
                tensor = file.get_tensor(name)
                if device.type == "cpu" and tensor.dtype == _dtype(tensor, dtype):
                    yield name, tensor
                    continue
                # Through a map that is closed right away: pages that were read count as memory until then.
                with safe_open(path, framework="pt") as once:
                    yield name, once.get_tensor(name).to(device, _dtype(tensor, dtype))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not in safetensors format: {error}") from error


def _read_pickle(path: Path, device: torch.device, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    content = pickles.read(path)
    for name in list(content):
        tensor = content.pop(name).detach()
        yield name, tensor.to(device, _dtype(tensor, dtype))


def _holds_weights(tensor: Tensor) -> bool:
    """Whether all values are plausible weights. One pass without a copy, at the speed of memory."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor if tensor.itemsize > 1 else tensor.float())  # aminmax lacks float8
    return bool(low >= -LARGEST_WEIGHT) and bool(high <= LARGEST_WEIGHT)  # NaN is neither


def _dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


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
    own: dict[str, Tensor] = module.state_dict(keep_vars=True)  # keep_vars: tied parameters stay one object
    headed = bool(prefix) and any(name.startswith(prefix) for name in state)
    given: dict[str, Tensor] = {}
    problems: dict[str, list[str]] = {"missing": [], "unexpected": [], "unfit": []}
    for name, tensor in state.items():
        inner = name[len(prefix) :] if headed and name.startswith(prefix) else name
        if inner in own and headed == (inner != name):
            given[inner] = tensor
        elif not name.startswith(ignore):
            problems["unexpected"].append(name)

    tied: dict[int, list[str]] = {}
    for name, tensor in own.items():
        tied.setdefault(id(tensor), []).append(name)
    ready: dict[str, Tensor] = {}
    for names in tied.values():
        want, found = own[names[0]], [name for name in names if name in given]
        if not found:
            problems["missing"].append(names[0])
            continue
        value, unfit = given[found[0]], []
        for name in found:
            if (given[name].shape, given[name].is_floating_point()) != (want.shape, want.is_floating_point()):
                unfit.append(f"{name} ({_kind(given[name])} instead of {_kind(want)})")
            elif name != found[0] and not torch.equal(given[name], value):
                unfit.append(f"{name} (tied to {found[0]} in the module, different from it in the file)")
        problems["unfit"] += unfit
        if isinstance(want, nn.Parameter) and not unfit:
            value = nn.Parameter(value, requires_grad=want.requires_grad)
        ready.update(dict.fromkeys(names, value))

    if any(problems.values()):
        lists = [f"{what} ({len(names)}): {', '.join(names)}" for what, names in problems.items() if names]
        raise ValueError("\n  ".join([f"the weights do not fit this {type(module).__name__}", *lists]))
    module.load_state_dict(ready, strict=True, assign=True)
    if left := [name for name, buffer in module.named_buffers() if buffer.is_meta]:
        raise ValueError(f"{left} are still on the meta device: build non-persistent buffers outside it")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def save(
    folder: str | os.PathLike[str],
    *,
    config: dict[str, Any],
    state: Mapping[str, Tensor],
    files: Mapping[str, bytes | dict[str, Any] | list[Any]] | None = None,
) -> None:
    """Write config.json, the weights of `state` and `files` (name to bytes, or to JSON content) in one step.

    A crash leaves the old folder or the new one. Other files of the old folder (README.md) are kept, its weights are
    not. Where folders cannot be swapped (see `replacing_folder`), config.json is removed first and written last: a
    folder that is caught in between is refused, not misread. For tied tensors, only the first is written.
    """
    with replacing_folder(Path(folder), last="config.json", stale=WEIGHTS) as new:
        for name, content in {**(files or {}), "config.json": config}.items():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"files: {name!r} is outside the folder to save")
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(content if isinstance(content, bytes) else _json(content))
        _write_weights(new, state)


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


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
        (folder / f"{SAFETENSORS}.index.json").write_bytes(_json(index))
