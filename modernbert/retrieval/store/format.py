"""The files of a store, and how they are written so that a reader finds the old store or the new one.

    store.json                  the manifest: whoever replaces it changes the store, at once and as a whole
    passages-<hash>.sqlite      documents, passages and the list of shards; never written to again
    shards/<hash>.safetensors   token vectors of up to `PASSAGES` passages; never written to again
    shards/centroids-*, lists-* of the pre-filter, where there is one; likewise
    unfinished.json             what an `index` was asked for that has not come to its end
    lock                        held by the one process that writes

A file is written beside its place, flushed to the disk and renamed. The manifest carries the checksum of itself and
of the table, the table those of the shards: a byte that flips is found when its file is first read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...late_interaction import Ragged

VERSION = 1
MANIFEST, UNFINISHED, SHARDS, LOCK = "store.json", "unfinished.json", "shards", "lock"
DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8}

PASSAGES = 4096
"""Passages of a full shard: they are encoded and flushed together, and are what an interruption costs at most."""

REPAIR = "restore it from a copy, or index again into a new folder"


class Shard:
    """Token vectors of consecutive passages, mapped from their file.

    Attributes:
        offsets: `[N + 1]` int64, passage i owns the rows from offset i to offset i + 1.
        spans: `[n, 2]` int32, the characters of the passage's content that a row stands for; 0, 0: none.
    """

    def __init__(self, path: Path, sha256: str) -> None:
        self.path, self._sha256, self._verified = path, sha256, False
        self.tensors = _open(path)
        self.offsets, self.spans = self.tensors["offsets"], self.tensors["spans"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def vectors(self, first: int, last: int) -> Ragged:
        """Passages `first` up to `last` as floating point: as they are stored, int8 in float32.

        The first call reads all of the file to verify it.
        """
        self.verify()
        rows = slice(int(self.offsets[first]), int(self.offsets[last]))
        values = self.tensors["values"][rows]
        if "scales" in self.tensors:
            values = values * self.tensors["scales"][rows, None]
        return Ragged(values, self.offsets[first : last + 1] - self.offsets[first])

    def verify(self) -> None:
        """Read all of the file once, see `verify`."""
        if not self._verified:
            verify(self.path, self._sha256)
        self._verified = True

    def raw(self, name: str = "values") -> Ragged:
        """The rows of all passages as they are stored, unverified; `scales` are what int8 is to be multiplied with."""
        return Ragged(self.tensors[name].view(len(self.tensors[name]), -1), self.offsets)


def quantize(values_NE: Tensor, dtype: str) -> dict[str, Tensor]:
    """Float32 rows as a shard holds them. `int8` has a float32 scale per row: x is about scale * int8."""
    if dtype != "int8":
        return {"values": values_NE.to(DTYPES[dtype])}
    scales_N = values_NE.abs().amax(dim=1) / 127
    values = (values_NE / scales_N.clamp_min(1e-30)[:, None]).round().to(torch.int8)
    return {"values": values, "scales": scales_N}


def write_part(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """Write tensors to a file of the store and return its name, which begins with `name`, and its checksum."""
    content = save({key: tensor.contiguous() for key, tensor in tensors.items()})
    sha256 = hashlib.sha256(content).hexdigest()
    path = folder / SHARDS / f"{name}-{sha256[:16]}.safetensors"
    with replacing(path) as beside:
        beside.write_bytes(content)
    return path.name, sha256


def finished_part(folder: Path, name: str) -> tuple[str, str] | None:
    """The file and checksum of the part `name` if an interrupted run has left it whole."""
    for path in sorted((folder / SHARDS).glob(f"{name}-*.safetensors")):
        sha256 = file_sha256(path)
        if path.stem.endswith(sha256[:16]):
            return path.name, sha256
    return None


def read_part(folder: Path, file: str, sha256: str) -> dict[str, Tensor]:
    """The tensors of a part, verified."""
    verify(folder / SHARDS / file, sha256)
    return _open(folder / SHARDS / file)


def verify(path: Path, sha256: str) -> None:
    """Raise FileNotFoundError or ValueError unless this is, byte for byte, the file that was written."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. If the store was updated meanwhile, open it again; else {REPAIR}")
    if file_sha256(path) != sha256:
        raise ValueError(f"{path} is damaged, its checksum is another: {REPAIR}")


def _open(path: Path) -> dict[str, Tensor]:
    """The tensors of a file as views of its map."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: {REPAIR}") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): {REPAIR}") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """What store.json says.

    Raises:
        FileNotFoundError: no store, or an unfinished one, with the command that finishes it.
        ValueError: a damaged manifest, or one of another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if asked := read_unfinished(folder):
            raise FileNotFoundError(f"the store {folder} is unfinished; go on with: {command(asked, folder)}")
        what = "holds no store" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}; make one with: modernbert index PATH... --output {folder}")
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["version"] != VERSION:
            raise ValueError(
                f"{path} is of version {manifest['version']}, and this modernbert reads version {VERSION}: "
                "install the one that wrote it, or index again into a new folder"
            )
        checksum = manifest.pop("checksum")
    except (KeyError, TypeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): {REPAIR}") from error
    if checksum != _checksum(manifest):
        raise ValueError(f"{path} is damaged, its checksum is another: {REPAIR}")
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Make this the store."""
    write_json(folder / MANIFEST, {**manifest, "checksum": _checksum(manifest)})


def write_json(path: Path, content: Any) -> None:
    with replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def command(asked: Mapping[str, Any], folder: Path) -> str:
    """The command line that asks for the same: what unfinished.json says."""
    if "forget" in asked:
        return shlex.join(["modernbert", "index", "--forget", *asked["forget"], "--output", str(folder)])
    options = [part for name in ("model", "dtype") if asked.get(name) for part in (f"--{name}", asked[name])]
    options += ["--prefilter"] if asked.get("prefilter") else []
    return shlex.join(["modernbert", "index", *asked["paths"], "--output", str(folder), *options])


def read_unfinished(folder: Path) -> dict[str, Any] | None:
    """What an `index` was asked for that has not come to its end; None if there is none."""
    path = folder / UNFINISHED
    return json.loads(path.read_bytes()) if path.is_file() else None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, which then takes its place on the disk; after an error it is gone."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        flush(beside)
        beside.replace(path)
        flush(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the disk hold this file, or what this folder lists."""
    if os.name == "nt" and path.is_dir():
        return  # which has no such call for folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _checksum(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
