"""Documents to a store on disk: built, brought up to date, and continued after an interruption.

A run reads everything, encodes what is new, and publishes the result in one step. It leaves every full shard as it
goes, named by what went into it: a run after an interruption finds those, makes the rest, and ends in the same store.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..heads.colbert import ColBERT
from .documents.find import Note, find_files, read_file
from .documents.records import is_records
from .documents.text import file_name
from .passages import Document
from .store import format as files
from .store.identity import Model, absolute
from .store.writer import Summary, Update, updating
from .windows import windows

Paths = Sequence[str | os.PathLike[str]]


def index(
    paths: Paths,
    output: str | os.PathLike[str],
    model: Model | None = None,
    *,
    dtype: str | None = None,
    prefilter: bool = False,
    progress: bool | None = None,
    note: Note = warnings.warn,
) -> Summary:
    """Bring the store in the folder `output` up to date with files and folders; make it if there is none.

    Of what lies under `paths` the store then holds what is there now: new and changed documents are encoded,
    vanished ones dropped. What it holds from elsewhere stays. Memory does not grow with the corpus, and the store
    can be searched meanwhile, in its old state.

    Args:
        paths: as of `find_files`; `read_file` says which kinds of file are read, and how.
        model: folder or hub id of a ColBERT, or a loaded one; None: the store's own, for a new store the built-in.
        dtype: of the vectors: "fp16" (None for a new store), "fp32", or "int8" with a scale for each.
        prefilter: also keep lists for `Store.search(..., prefilter=True)`, from now on.
        progress: show a bar on stderr; None: on a terminal.
        note: is told what is skipped or repaired, a sentence each.

    Raises:
        FileNotFoundError: a path that is not there.
        ValueError: no text at all, a broken record, a store of another model or dtype.
        OSError: somebody else is writing to the store, or the disk is full. The store is as it was before.
    """
    total = sum(file.stat().st_size for file in find_files(paths, note=lambda _: None))
    roots = [file_name(os.path.abspath(path)) for path in paths]
    name = None if isinstance(model, ColBERT) or model is None else str(model)
    asked = {"paths": roots, "model": name and absolute(name), "dtype": dtype, "prefilter": prefilter}
    with updating(Path(output), asked) as update, _bar(total, progress) as update.advance:
        update.use(model, dtype, prefilter)
        for window in windows(update.colbert, _changed(update, paths, note)):
            update.put(window)
        update.flush()
        update.remove_unseen(roots)
        update.merge()
        return update.publish()


def forget(paths: Paths, output: str | os.PathLike[str]) -> Summary:
    """Drop every document that was read from under `paths`, which need not exist; raises OSError as `index` does."""
    files.read_manifest(Path(output))
    roots = [file_name(os.path.abspath(path)) for path in paths]
    with updating(Path(output), {"forget": roots}) as update:
        update.remove_unseen(roots)
        update.merge()
        return update.publish()


def _changed(update: Update, paths: Paths, note: Note) -> Iterator[Document]:
    """The documents under `paths` that the store does not hold as they are, each added to the update."""
    asked_for = {os.path.abspath(path) for path in paths}
    for file in find_files(paths, note=note):
        try:
            for document in read_file(file, known=update.known, advance=update.read, note=note):
                update.add(document)
                yield document
        except (OSError, ValueError) as error:
            if str(file) in asked_for or is_records(file):
                raise
            note(f"skipped a file: {error}")
            update.unread.add(file_name(file))


@contextmanager
def _bar(total: int, progress: bool | None) -> Iterator[Callable[[float], None]]:
    """A progress bar over bytes of input, on stderr."""
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield lambda size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("indexing"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("indexing", total=total)
        yield lambda size: bar.advance(task, size)
