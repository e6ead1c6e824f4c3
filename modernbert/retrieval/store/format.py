"""The files of a store.

    store.json                  the manifest: replacing it changes the store, in one step and as a whole
    passages-<hash>.sqlite      documents, passages and the list of shards; never changed after the manifest names it
    shards/<hash>.safetensors   token vectors of up to `PASSAGES` passages; never changed
    shards/codec-*              how the vectors are coded, if in 4 or 2 bits; never changed
    shards/centroids-*, lists-* the pre-filter, if the store has one; never changed
    unfinished.json             the request of a run that has not finished; the first file of a new store
    lock                        held by the process that writes

Every file is replaced in one step. The manifest holds the checksum of itself and of the table, and the table holds
those of the shards, so a corrupted byte is found when its file is first read. What others put into the folder is
neither read nor removed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ...files import replacing
from ...late_interaction import Ragged
from .codec import BITS, Codec
from .request import read_unfinished, resume_command, write_json

VERSION, CODED = 1, 2
"""Of the format. A store with codes or pooled tokens has the second, which older programs refuse."""

MANIFEST, SHARDS = "store.json", "shards"
FLOATS = {"fp16": torch.float16, "fp32": torch.float32}
DTYPES = (*FLOATS, "int8", *BITS)
"""How the vectors of a store can be written."""

PASSAGES = 4096
"""Passages of a full shard. They are encoded and written together, so an interruption loses at most this much work."""

REPAIR = "restore it from a copy, or index again into a new folder"


class Part(NamedTuple):
    """A file in the folder `shards`: its name and its SHA-256."""

    file: str
    sha256: str


@dataclass(frozen=True)
class CentroidsEntry:
    """The manifest's entry about the pre-filter: the file of the centroids, and how many there are."""

    file: str
    sha256: str
    count: int


class ModelIdentity(NamedTuple):
    """What a store or an export remembers about its model.

    Attributes:
        name: folder or hub id; None for the built-in model, "" for one that was given as an object.
        fingerprint: see `identity.fingerprint`.
    """

    name: str | None
    fingerprint: str


@dataclass(frozen=True)
class Manifest:
    """The content of store.json.

    Attributes:
        version: of the format. model, fingerprint: see `ModelIdentity`.
        dtype: one of `DTYPES`. width: E of the vectors.
        documents, passages: how many there are. table, sha256: the file of the table and its checksum.
        prefilter: None if the store has no pre-filter. codec: None if the vectors are not codes.
        pool: tokens that become one, see `pool_tokens`.
    """

    version: int
    model: str | None
    fingerprint: str
    dtype: str
    width: int
    documents: int = 0
    passages: int = 0
    table: str = ""
    sha256: str = ""
    prefilter: CentroidsEntry | None = None
    codec: Part | None = None
    pool: int = 1

    @property
    def identity(self) -> ModelIdentity:
        """The model's."""
        return ModelIdentity(self.model, self.fingerprint)


class Shard:
    """Token vectors of consecutive passages, memory-mapped.

    Attributes:
        offsets: `[N + 1]` int64; passage i owns the rows `offsets[i]` to `offsets[i + 1]`.
        spans: `[n, 2]` int16 or int32, the characters of the passage's content that each row stands for; 0, 0 for none.
        codec: of the vectors; None if they are not codes.
    """

    def __init__(self, path: Path, sha256: str, codec: Codec | None = None) -> None:
        self.path, self._sha256, self._verified = path, sha256, False
        self.tensors = _open(path)
        self.codec = codec if "codes" in self.tensors else None
        self.offsets, self.spans = self.tensors["offsets"], self.tensors["spans"]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def vectors(self, first: int, last: int) -> Ragged:
        """Passages `first` to `last - 1`: in the dtype of the file if it is a float, else in float32.

        The first call reads the whole file to verify it.
        """
        self.verify()
        start, stop = int(self.offsets[first]), int(self.offsets[last])
        values = self._vectors({name: tensor[start:stop] for name, tensor in self.rows().items()})
        return Ragged(values, self.offsets[first : last + 1] - self.offsets[first])

    def take(self, rows: Tensor) -> Tensor:
        """Single rows as of `vectors`. Reads nothing else, and verifies nothing."""
        return self._vectors({name: tensor.index_select(0, rows) for name, tensor in self.rows().items()})

    def verify(self) -> None:
        """Compare the checksum, once. Errors as for the function `verify`."""
        if not self._verified:
            verify(self.path, self._sha256)
        self._verified = True

    def rows(self) -> dict[str, Tensor]:
        """The tensors that vectors are made of, with a row for each token. Not verified."""
        return {name: tensor for name, tensor in self.tensors.items() if name not in ("offsets", "spans")}

    def _vectors(self, rows: Mapping[str, Tensor]) -> Tensor:
        if self.codec:
            return self.codec.decode(rows)
        return rows["values"] * rows["scales"][:, None] if "scales" in rows else rows["values"]


def quantize(values_NE: Tensor, dtype: str) -> dict[str, Tensor]:
    """Float32 rows in the form a new shard stores. `int8` has a float32 scale per row: x is about scale * int8.

    Vectors that will be codes are in float16 until `StoreWriter.compress`.
    """
    if dtype != "int8":
        return {"values": values_NE.to(FLOATS.get(dtype, torch.float16))}
    scales_N = values_NE.abs().amax(dim=1) / 127
    values = (values_NE / scales_N.clamp_min(1e-30)[:, None]).round().to(torch.int8)
    return {"values": values, "scales": scales_N}


def narrow(spans_N2: Tensor) -> Tensor:
    """Spans as int16 if they fit, else as int32."""
    return spans_N2.to(torch.int16 if not len(spans_N2) or int(spans_N2.max()) < 1 << 15 else torch.int32)


def write_part(folder: Path, name: str, tensors: Mapping[str, Tensor]) -> Part:
    """Write tensors to a file of the store. Its name starts with `name`."""
    content = save({key: tensor.contiguous() for key, tensor in tensors.items()})
    sha256 = hashlib.sha256(content).hexdigest()
    path = folder / SHARDS / f"{name}-{sha256[:16]}.safetensors"
    with replacing(path) as beside:
        beside.write_bytes(content)
    return Part(path.name, sha256)


def finished_part(folder: Path, name: str) -> Part | None:
    """The part `name` if an interrupted run has written it completely, else None."""
    for path in sorted((folder / SHARDS).glob(f"{name}-*.safetensors")):
        if path.is_file() and path.stem == f"{name}-{(sha256 := file_sha256(path))[:16]}":
            return Part(path.name, sha256)
    return None


def read_part(folder: Path, file: str, sha256: str) -> dict[str, Tensor]:
    """The tensors of a part, verified."""
    verify(folder / SHARDS / file, sha256)
    return _open(folder / SHARDS / file)


def read_codec(folder: Path, manifest: Manifest) -> Codec | None:
    """The codec of a store, verified; None if its vectors are not codes."""
    return Codec(BITS[manifest.dtype], **read_part(folder, *manifest.codec)) if manifest.codec else None


def is_intact(path: Path, sha256: str) -> bool:
    """Whether a file has the content that was written."""
    return path.is_file() and file_sha256(path) == sha256


def verify(path: Path, sha256: str) -> None:
    """Raise FileNotFoundError if the file is missing, ValueError if its content is not the content that was written."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing. If the store was updated meanwhile, open it again; else {REPAIR}")
    if not is_intact(path, sha256):
        raise ValueError(f"{path} is damaged: its checksum does not match; {REPAIR}")


def _open(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, memory-mapped."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: {REPAIR}") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): {REPAIR}") from error


def read_manifest(folder: Path) -> Manifest:
    """Read and verify store.json.

    Raises:
        FileNotFoundError: there is no store, or an unfinished one; the message has the command that finishes it.
        ValueError: the manifest is damaged or has another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        with suppress(ValueError):  # Without a manifest, the folder of such an unfinished.json is not a store's.
            if request := read_unfinished(folder):
                resume = resume_command(request, folder)
                raise FileNotFoundError(f"the store {folder} is unfinished; resume with: {resume}")
        what = "holds no store" if folder.is_dir() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}; make one with: modernbert index PATH... --output {folder}")
    try:
        fields = json.loads(path.read_bytes())
        checksum, version = fields.pop("checksum"), fields["version"]
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} is damaged, or is not the manifest of a store ({error!r}): {REPAIR}") from error
    if version not in (VERSION, CODED):
        raise ValueError(
            f"{path} is of version {version}, and this modernbert reads {VERSION} and {CODED}: "
            "install the one that wrote it, or index again into a new folder"
        )
    if checksum != _checksum(fields):
        raise ValueError(f"{path} is damaged: its checksum does not match; {REPAIR}")
    prefilter, codec = fields.pop("prefilter", None), fields.pop("codec", None)
    return Manifest(**fields, prefilter=prefilter and CentroidsEntry(**prefilter), codec=codec and Part(*codec))


def find_manifest(folder: Path) -> Manifest | None:
    """The manifest of the store in `folder`, or None if there is no store yet. ValueError as for `read_manifest`."""
    return read_manifest(folder) if (folder / MANIFEST).is_file() else None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace store.json: from then on, the store is what `manifest` describes."""
    fields = asdict(manifest)
    for name, usual in (("prefilter", None), ("codec", None), ("pool", 1)):  # Version 1 may not have the last two.
        if fields[name] == usual:
            del fields[name]
    write_json(folder / MANIFEST, {**fields, "checksum": _checksum(fields)})


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _checksum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
