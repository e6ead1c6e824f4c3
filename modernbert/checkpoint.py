"""Checkpoint folders: from a path or a hub id to tensors in a module, and back to a folder.

Knows files and dicts, no class of ours. A load is strict both ways and never holds two copies of the weights:
files are memory-mapped, and the module, built on the meta device, takes the tensors as they are.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickletools
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .files import replacing_folder

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"  # in the order they are looked for
WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
HEADS = ("head.", "decoder.", "classifier.", "linear.")  # linear: of Stanford's ColBERT
SHARD_BYTES = 5_000_000_000  # Hugging Face's default
LARGEST_WEIGHT = 65504  # of float16, in which models are run; a flipped bit of an exponent soon gives more
JSON_BYTES = 1 << 25  # the most that is read: objects take up to 20 times the memory of their text
# All that a pickled state dict of torch calls, parameters included. torch allows more, as an array of any length.
CALLED = re.compile(r"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch[.a-z]* \w+Storage")


def locate(
    name_or_path: str | os.PathLike[str],
    *,
    only: Sequence[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a checkpoint: an existing one as it is, else a hub id, downloaded to the hub's cache.

    `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE` and a stored login act as everywhere with `huggingface_hub`.
    What is downloaded has the sizes and checksums that the hub lists. Where the hub cannot be reached, a complete
    copy in the cache will do. Pickled weights are downloaded only for folders without safetensors.

    Args:
        only: the names of the files that are needed, the one that must be there last; None: all that a load can need.

    Raises:
        FileNotFoundError: no such folder, repository or revision; or offline, and not complete in the cache.
        PermissionError: a gated repository.
        OSError: the hub or the line failed for good, or what came is not what the hub lists.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{folder} is a file; give the folder it is in")
    # Not imported above: a local folder does without the hub client, whose import outlasts a small load.
    from . import hub

    options = {"only": only, "revision": revision, "token": token, "cache_dir": cache_dir}
    return hub.download(str(name_or_path), local_files_only=local_files_only, **options)


def has_file(path: Path) -> bool:
    """Whether the file is there. What only looks so (a link to nowhere, a pipe, a device, a folder) raises OSError."""
    if os.path.lexists(path) and not path.is_file():
        raise FileNotFoundError(f"{path} is no file, or a link that leads to none")
    return path.is_file()


def read_json(folder: str | os.PathLike[str], name: str, kind: type = dict) -> Any:
    """What the JSON file `name` of `folder` holds: an object, or, where that is the `kind`, a list (modules.json)."""
    path = Path(folder) / name
    if not has_file(path):
        there = sorted(os.listdir(path.parent)) if path.parent.is_dir() else "no such folder"
        raise FileNotFoundError(f"{path} is missing; beside it: {there}")
    if (size := path.stat().st_size) > JSON_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; of JSON no more than {JSON_BYTES:,} are read")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON or of UTF-8; nested too deeply
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds {type(content).__name__} {content!r:.80}, but must hold a {kind.__name__}")
    return content


def read_state_dict(
    folder: str | os.PathLike[str], *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """All tensors of `folder`: of model.safetensors, else of its shards, else of pytorch_model.bin.

    A tensor that has the device and dtype asked for stays a view of the mapped file: writing to it leaves the
    file as it is, but overwriting the file in place (and not replacing it) changes the tensor. Others are
    converted one at a time; `dtype` is for floating-point ones. Pickles are read with `weights_only=True`.

    Raises:
        FileNotFoundError: no weights, or a shard is missing.
        ValueError: a damaged or unsafe file, an index that does not fit its shards, numbers that are no weights.
    """
    state: dict[str, Tensor] = {}
    for path, promised in _weight_files(Path(folder)).items():
        read = _read_safetensors if path.suffix == ".safetensors" else _read_pickle
        part = dict(read(path, torch.device(device), dtype))
        for name, tensor in part.items():
            if not _holds_weights(tensor):
                numbers = f"NaN, infinity or numbers beyond {LARGEST_WEIGHT:,}"
                raise ValueError(f"{path}: {name}, as {_kind(tensor)}, has {numbers}; the file is damaged")
        if promised is not None and part.keys() != promised:
            lost, extra = sorted(promised - part.keys()), sorted(part.keys() - promised)
            raise ValueError(f"{path} and its index differ: only the index has {lost}, only the file {extra}")
        state |= part
    return state


def _weight_files(folder: Path) -> Mapping[Path, set[str] | None]:
    """The weight files, each with the tensor names that an index promises in it, or None without an index."""
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
            # Of the two kinds of path, Windows' knows both separators and drive letters.
            if not isinstance(shard, str) or shard in ("", "..") or PureWindowsPath(shard).name != shard:
                raise ValueError(f"{path} points to {shard!r:.200}, which is no file beside it")
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
                # Through a map of its own: pages once read count as memory until their map is closed.
                with safe_open(path, framework="pt") as once:
                    yield name, once.get_tensor(name).to(device, _dtype(tensor, dtype))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not in safetensors format: {error}") from error


def _read_pickle(path: Path, device: torch.device, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    try:
        zipped = zipfile.is_zipfile(path)  # the format of torch before 1.6 is not, and cannot be mapped
        if strange := sorted(name for name in _called(path, zipped) if not CALLED.fullmatch(name)):
            raise ValueError(f"it calls {strange}")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # on a damaged file the readers of zip and pickle raise nearly anything
        raise ValueError(
            f"{path} is damaged, or holds more than tensors, and reading that could run any code; "
            f"where you trust it, convert it to {SAFETENSORS}: {error}"
        ) from error
    if not isinstance(content, dict) or not all(
        # A tensor can be a view that repeats a small storage, so that it is far larger than the file.
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.nbytes <= tensor.untyped_storage().nbytes()
        for name, tensor in content.items()
    ):
        raise ValueError(f"{path} is no state dict: a dict of names to tensors, and nothing else, is read")
    for name in list(content):
        tensor = content.pop(name).detach()
        yield name, tensor.to(device, _dtype(tensor, dtype))


def _called(path: Path, zipped: bool) -> set[str]:
    """The names of the functions and classes in a pickle of torch, which is not executed."""
    with contextlib.ExitStack() as stack:
        if not zipped:  # magic number, version, byte order, the dict, names of storages
            file, pickles = stack.enter_context(path.open("rb")), 5
        else:
            archive = stack.enter_context(zipfile.ZipFile(path))
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, so that it cannot be mapped into memory")
            (name,) = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
            file, pickles = stack.enter_context(archive.open(name)), 1
        opcodes = chain.from_iterable(pickletools.genops(file) for _ in range(pickles))
        return {str(argument) for opcode, argument, _ in opcodes if opcode.name == "GLOBAL"}


def _holds_weights(tensor: Tensor) -> bool:
    """Whether all numbers can be those of a model. One pass without a copy, at the speed of memory."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor if tensor.itemsize > 1 else tensor.float())  # it has no float8
    return bool(low >= -LARGEST_WEIGHT) and bool(high <= LARGEST_WEIGHT)  # NaN is neither


def _dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def load_state_dict(
    module: nn.Module, state: Mapping[str, Tensor], *, prefix: str = "model.", ignore: tuple[str, ...] = HEADS
) -> None:
    """Give the tensors of `state` to `module`, built on the meta device, which takes them uncopied.

    Where any name starts with `prefix`, the file is of a model with a head: only such names are the module's,
    less the prefix. Names that start with one of `ignore` and are not the module's are left out. Parameters
    that are tied in the module stay so, and one of their names is enough.

    Raises:
        ValueError: lists every missing and unexpected name and every tensor that does not fit.
    """
    own: dict[str, Tensor] = module.state_dict(keep_vars=True)  # kept as they are, tied ones are one object
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
        raise ValueError(f"{left} are still on the meta device: build non-persistent buffers outside of it")


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

    All goes to a hidden folder beside `folder`, which takes its place once it is on the disk: a crash leaves
    the old folder or the new one. Other files of the old one (README.md) stay, its weights do not. Where
    folders cannot be swapped (not Linux, some network file systems, a mount point, the working directory),
    files are moved one by one, config.json last: a folder caught in between is refused, and not misread.
    Of tied tensors the first is written.
    """
    with replacing_folder(Path(folder), last="config.json", stale=WEIGHTS) as new:
        for name, content in {**(files or {}), "config.json": config}.items():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"files: {name!r} lies outside of the folder to save")
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
        shutil.copymode(folder / "config.json", folder / shard)  # safetensors 0.8 lets only the owner read
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / f"{SAFETENSORS}.index.json").write_bytes(_json(index))
