"""Parquet files as records: the form of data sets on Hugging Face's hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .text import file_name

PARQUET = ".parquet"

ROWS = 256
"""Rows that are unpacked together. Documents can be long."""


def read_rows(path: Path, *, on_bytes: Callable[[int], None] = lambda size: None) -> Iterator[dict[str, Any]]:
    """The rows of a file, one at a time.

    `on_bytes` is called with the share of the file's bytes that was read since the last call.

    Raises:
        ValueError: the file is broken. OSError: it cannot be read.
        ModuleNotFoundError: pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("to read parquet files: pip install pyarrow") from error
    size, done, told = path.stat().st_size, 0, 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS):
                yield from batch.to_pylist()
                done += len(batch)
                share = size * done // file.metadata.num_rows
                on_bytes(share - told)
                told = share
    except ArrowException as error:
        raise ValueError(f"{file_name(path)}: broken parquet file ({error}); fetch it again") from error
    on_bytes(size - told)
