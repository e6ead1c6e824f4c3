"""Rows of files: JSON lines (plain, gzip, zstd), Parquet, Hugging Face data sets. Each row knows where it is from."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

from ..json_files import unique_keys

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
DATASET, SPLITS = "state.json", "dataset_dict.json"  # what `save_to_disk` of `datasets` writes

T = TypeVar("T")

Source: TypeAlias = str | os.PathLike[str] | Iterable[Mapping[str, object]]
"""A file or a folder of files (`ENDINGS`, in name order), the folder that `Dataset.save_to_disk` has written, or an
iterable of mappings, such as one split of a Hugging Face data set, streamed or not."""


class Row(NamedTuple):
    """Named values, the file that they are from, and the place for a message, such as `pairs/a.jsonl:12`."""

    fields: dict[str, object]
    file: str
    where: str


def parse_rows(
    source: Source,
    parse: Callable[[Row], T],
    names: Mapping[str, str] | None = None,
    *,
    skip: tuple[type[ValueError], ...] = (),
) -> Iterator[T]:
    """What `parse` makes of each row. Its ValueError gets the place of the row; one of `skip` leaves the row out."""
    for row in read_rows(source, names):
        try:
            parsed = parse(row)
        except skip:
            continue
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from error
        yield parsed


def read_rows(source: Source, names: Mapping[str, str] | None = None) -> Iterator[Row]:
    """The rows of a source, one at a time.

    Args:
        names: the name in the source of each field that has another one there: `{"query": "anchor"}`.

    Raises:
        ValueError: no such file in a folder, a damaged file, or a row that is not an object, with its place.
        ModuleNotFoundError: a package is missing that reads such a file.
    """
    for row in _rows(source):
        if not isinstance(row.fields, Mapping):
            raise ValueError(f"{row.where}: a row must be an object with named fields, got {row.fields!r:.60}")
        if names:
            renamed = {name: row.fields[there] for name, there in names.items() if there in row.fields}
            others = {name: value for name, value in row.fields.items() if name not in names.values()}
            row = Row(others | renamed, row.file, row.where)
        yield row


def _rows(source: Source) -> Iterator[Row]:
    if not isinstance(source, (str, os.PathLike)):
        yield from _mappings(source, "the data set", "")
        return
    path = Path(source)
    if (path / SPLITS).is_file():
        splits = sorted(each.name for each in path.iterdir() if (each / DATASET).is_file())
        raise ValueError(f"{path} holds several splits: give one of {', '.join(str(path / name) for name in splits)}")
    if (path / DATASET).is_file():
        yield from _mappings(_data_set(path), str(path), path.name)
        return
    for file in files(source):
        yield from _parquet(file) if file.suffix == ".parquet" else _json_lines(file)


def files(source: str | os.PathLike[str]) -> list[Path]:
    """The file `source`, or the files of the folder `source` in name order; all of what `save_to_disk` has written.

    Raises:
        ValueError: another kind of file, or a folder without such files. FileNotFoundError: there is nothing.
    """
    if not os.fspath(source):
        raise ValueError("the source is the empty string; give '.' for the working directory")
    path = Path(source)
    there = [path] if path.is_file() else sorted(path.iterdir())
    if found := [file for file in there if file.name.endswith(ENDINGS) or (path / DATASET).is_file()]:
        return found
    kinds = ", ".join(f"*{ending}" for ending in ENDINGS)
    raise ValueError(f"{path} is not one of {kinds}" if path.is_file() else f"no {kinds} in {path}")


def versions(source: str | os.PathLike[str]) -> list[tuple[str, int, int]]:
    """The name, size and time of each file: something differs after a file was changed."""
    return [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files(source)]


def digest(paths: Iterable[Path]) -> str:
    """A hash of the names and the content of files."""
    total = hashlib.blake2b(digest_size=16)
    for path in paths:
        total.update(path.name.encode())
        with path.open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                total.update(block)
    return total.hexdigest()


def digest_folder(folder: Path) -> str:
    """As `digest`, of all files of a folder and of the folders in it."""
    return digest(path for path in sorted(folder.rglob("*")) if path.is_file())


def _json_lines(path: Path) -> Iterator[Row]:
    for where, line in lines(path):
        try:
            fields = json.loads(line, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: {error}") from error
        yield Row(fields, _stem(path), where)


def lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines of a file, decompressed by its ending (.gz, .zst), each with its place `path:number`.

    Raises:
        ValueError: a compressed file is damaged or ends too early.
    """
    if path.suffix in (".gz", ".zst") and not path.stat().st_size:
        raise ValueError(f"{path} is damaged: it has no bytes")
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = _split(_zstandard(file)) if path.suffix == ".zst" else file
        try:
            for number, line in enumerate(content, start=1):
                yield f"{path}:{number}", line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def _zstandard(file: io.BufferedIOBase) -> Iterator[bytes]:
    """The content of all frames. The library's own reader takes a file that was cut for a whole one."""
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("to read .zst files: pip install 'modernbert[train]'") from error
    frame = None
    while block := file.read(1 << 14):
        while block:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(block)
            except zstandard.ZstdError as error:
                raise EOFError(error) from error
            block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("it ends in the middle of a frame")


def _split(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []
    for block in blocks:
        first, *others = block.split(b"\n")
        rest.append(first)
        for line in others:
            yield b"".join(rest)
            rest = [line]
    if last := b"".join(rest):
        yield last


def _parquet(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("to read .parquet files: pip install 'modernbert[train]'") from error
    with path.open("rb") as file:
        number = 0
        try:
            for batch in ParquetFile(file).iter_batches(256):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(_present(fields), _stem(path), f"{path}: row {number}")
        except (ArrowException, OSError, ValueError) as error:  # a page that does not decompress, or is not UTF-8
            raise ValueError(f"{path} is damaged: {error}") from error


def _data_set(folder: Path) -> Iterable[Mapping[str, object]]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("to read a folder of save_to_disk: pip install datasets") from error
    try:
        return datasets.Dataset.load_from_disk(str(folder))  # pyright: ignore[reportReturnType]
    except Exception as error:  # a damaged file of the folder raises nearly any exception
        raise ValueError(f"{folder} is damaged, or not a data set that save_to_disk has written: {error}") from error


def _mappings(rows: Iterable[Mapping[str, object]], where: str, file: str) -> Iterator[Row]:
    if isinstance(rows, Mapping):
        raise ValueError(f"{where} holds several splits: give one of {', '.join(map(repr, rows))}")
    for number, fields in enumerate(rows, start=1):
        yield Row(_present(fields), file, f"{where}: row {number}")


def _present(fields: Mapping[str, object]) -> dict[str, object]:
    """A table has a value in every column: null is a field that the row lacks."""
    if not isinstance(fields, Mapping):
        return fields
    return {name: value for name, value in fields.items() if value is not None}


def _stem(path: Path) -> str:
    return path.name.split(".")[0]
