"""`index` and `forget`: documents to a store on disk, updated in place and resumed after an interruption.

A run reads all its input, encodes what is new, and commits the result in one step. On the way it writes every full
shard under a name that is a hash of the input. After an interruption, the next run finds these shards, encodes the
rest, and ends in the same store.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from ..inference.session import Session
from ..late_interaction import Ragged
from ..progress import progress_bar
from ..train.distributed import ALONE, Ranks
from .destination import manifest_and_model
from .documents.find import find_files, path_list, read_file
from .documents.reading import Reading
from .documents.records import is_records
from .documents.text import OnNote, file_name
from .engines import is_target
from .passages import Document
from .queries import query_vectors
from .remote import is_remote
from .spread import absolute_paths, forget_in_engine, index_units, roots_of
from .store.draft import open_draft
from .store.format import MANIFEST, PASSAGES, read_manifest
from .store.identity import LoadedModel, ModelSource, absolute
from .store.request import IndexRequest, resume_command
from .store.writer import StoreWriter, Summary
from .vanished import vanished_note
from .windows import BLOCK, Window, batch, windows

Paths = Sequence[str | os.PathLike[str]]


def index(
    paths: Paths,
    output: str | os.PathLike[str],
    model: ModelSource | LoadedModel | None = None,
    *,
    dtype: str | None = None,
    pool: int | None = None,
    prefilter: bool = False,
    exclude: Sequence[str] = (),
    gitignore: bool = True,
    engine: str | None = None,
    ranks: Ranks = ALONE,
    ray: str | None = None,
    encoding: str | None = None,
    text_column: str | None = None,
    id_column: str | None = None,
    delimiter: str | None = None,
    skip_bad_rows: bool = False,
    progress: bool | None = None,
    note: OnNote = warnings.warn,
) -> Summary:
    """Update the store in the folder `output` from files and folders, or make a new store; or update an engine.

    `output` may be `lancedb:ADDRESS` or `qdrant:ADDRESS`. What is written there can be searched at once, and after an
    interruption the rest is written by the same call. `paths` may be URLs of object stores, such as `s3://bucket/docs`,
    which fsspec reads.

    Afterwards, the store holds what is now under `paths`: new and changed documents are encoded, and documents that no
    longer exist or are left out now are removed. Documents from other paths stay: if their files are gone, a note has
    the command that forgets them. Documents of files and folders that cannot be read now stay too, and
    `Summary.unread` counts them. Memory does not grow with the corpus, and the old state of the store can be
    searched in the meantime.

    Args:
        paths: see `find_files`; `read_file` describes the kinds of files and how they are read.
        model: folder or hub id of a ColBERT, or a loaded one. None: the model of the store, or for a new store the
            built-in one.
        dtype: of the vectors: "fp16" (None for a new store), "fp32", "int8" with one scale for each, or the codes
            "4bit" and "2bit", see `store/codec.py`. Codes are learned from the first corpus of a store, and `note` is
            called with what they keep of its rankings.
        pool: tokens that become one (1, or None for a new store: none do), see `pool_tokens`. Needs scipy.
        prefilter: also keep the lists that `Store.search(..., prefilter=True)` needs, from now on.
        exclude, gitignore: which files to leave out, see `find_files`.
        engine: of the `Session` that encodes.
        ranks: of `modernbert.train.distributed.ranks`: each encodes its share. All call this with the same arguments,
            and see the same folders.
        ray: the address of a Ray cluster that encodes, as of `ray.init`; its nodes see the same folders (extra `ray`).
        encoding, text_column, id_column, delimiter, skip_bad_rows: how files are read: see `Reading`.
        progress: whether to show a bar on stderr. None: only on a terminal.
        note: called with one sentence for everything that is skipped or repaired.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: nothing has text, a record is broken, an argument has no meaning, a path that held documents has
            none now, the store has another model, dtype or pool, or codes keep too little of the vectors.
        ModuleNotFoundError: `pool` without scipy.
        OSError: another process is writing to the store, or the disk is full. The store is unchanged.
    """
    if not os.fspath(output):
        raise ValueError("the name of the store is empty: give the name of a folder")
    if ray is not None and not ranks.is_alone:
        raise ValueError("Ray places the work itself: leave out torchrun, or --ray")
    paths = path_list(paths)
    reading = Reading(encoding, text_column, id_column, delimiter, skip_bad_rows)
    roots, named = roots_of(paths), absolute_paths(paths)
    request: IndexRequest = {"paths": named, "model": _name(model), "dtype": dtype, "prefilter": prefilter}
    if pool is not None:
        request["pool"] = pool
    if exclude:
        request["exclude"] = list(exclude)
    if not gitignore:
        request["gitignore"] = False
    if options := reading.options():
        request["reading"] = options
    if is_target(os.fspath(output)) or ray is not None or not ranks.is_alone or any(map(is_remote, paths)):
        return index_units(
            paths,
            os.fspath(output),
            model,
            request,
            reading,
            engine=engine,
            ranks=ranks,
            ray=ray,
            progress=progress,
            note=note,
        )
    total = _total_size(paths, Path(output), exclude, gitignore)
    with (
        open_draft(Path(output), request) as draft,
        progress_bar("indexing", total, progress, unit="bytes") as on_bytes,
    ):
        manifest, loaded = manifest_and_model(output, draft.manifest, model, dtype, pool, engine)
        session = loaded.session
        writer = StoreWriter(draft, manifest, prefilter=prefilter)
        encoder = DocumentEncoder(writer, session, on_bytes)

        def update(file: Path) -> None:
            for document in _changed_documents(file, reading, paths, writer, encoder.count_bytes, note):
                writer.add_document(document)
                encoder.add_document(document)

        def keep(path: str) -> None:
            if writer.keep(file_name(path)):
                note(f"{file_name(path)} cannot be read now: the store keeps what it holds of it")

        for damaged in writer.find_damage():
            note(f"{damaged} is damaged or missing: its documents are read and encoded again")
        for file in find_files(paths, exclude=exclude, gitignore=gitignore, on_unread=keep, on_note=note):
            update(file)
        encoder.flush()
        for root in roots:
            if count := writer.is_emptied(root):
                raise ValueError(
                    f"{root} held {count:,} documents and has none now: is its disk or network folder there? If they "
                    f"are meant to go, remove them with: {_forget_command(root, draft.folder)}"
                )
        writer.remove_unseen(roots)
        if gone := vanished_note(writer.unseen_files(), draft.folder):
            note(gone)
        for lost in filter(os.path.isfile, writer.lost_files()):
            update(Path(lost))
        encoder.flush()
        if lost := writer.lost_files():
            raise ValueError(
                f"{output} is damaged, and {lost[0]}, one of {len(lost)} files to rebuild it from, cannot be read: "
                "restore the store from a copy, or remove these documents with --forget"
            )
        writer.compress(partial(query_vectors, session), note)
        writer.merge_shards()
        return writer.commit()


def forget(paths: Paths, output: str | os.PathLike[str]) -> Summary:
    """Remove every document that was read from under `paths`, which need not exist. Raises as `index` does."""
    paths = path_list(paths)
    if is_target(os.fspath(output)):
        return forget_in_engine(paths, os.fspath(output))
    folder, roots = Path(output), roots_of(paths)
    read_manifest(folder)  # Raises if there is no store, before `open_draft` makes one.
    with open_draft(folder, {"forget": absolute_paths(paths)}) as draft:
        writer = StoreWriter(draft, read_manifest(folder))
        writer.remove_unseen(roots)
        writer.merge_shards()
        return writer.commit()


class DocumentEncoder:
    """Cuts added documents into windows, and encodes the windows a shard at a time.

    Args:
        on_bytes: called with the bytes of input that are finished: read, and the passages in them encoded.
    """

    def __init__(self, writer: StoreWriter, session: Session, on_bytes: Callable[[float], None]) -> None:
        self._writer, self._session, self._on_bytes = writer, session, on_bytes
        self._documents: list[Document] = []
        self._characters = 0
        self._windows: list[Window] = []
        self._bytes = 0.0

    def count_bytes(self, size: int) -> None:
        """Count bytes of input that have been read."""
        self._bytes += size
        if not self._documents and not self._windows:
            self._finish(self._bytes)

    def add_document(self, document: Document) -> None:
        """Take a document that has been added to the store."""
        self._documents.append(document)
        self._characters += len(document.title) + len(document.text)
        # Enough for one call of the tokenizer, or many documents with little text.
        if self._characters >= BLOCK or len(self._documents) >= PASSAGES:
            self._cut()

    def flush(self) -> None:
        """Encode all that is left."""
        self._cut()
        self._encode()

    def _cut(self) -> None:
        documents, self._documents, self._characters = self._documents, [], 0
        for window in windows(self._session.model, documents):
            self._windows.append(window)
            if len(self._windows) == PASSAGES:
                self._encode()

    def _encode(self) -> None:
        found, self._windows = self._windows, []
        if found:
            share = self._bytes / len(found)

            def encode() -> Ragged:
                return self._session.encode_tokens(batch(found), advance=lambda count: self._finish(count * share))

            self._writer.add_windows(found, encode)
        self._finish(self._bytes)

    def _finish(self, size: float) -> None:
        self._bytes -= size
        self._on_bytes(size)


def _changed_documents(
    file: Path,
    reading: Reading,
    paths: Paths,
    writer: StoreWriter,
    on_bytes: Callable[[int], None],
    on_note: OnNote,
) -> Iterator[Document]:
    """The documents of a file that the store does not hold as they are.

    A file that cannot be read is noted and its documents are kept, unless it was named in `paths` or holds records.
    """
    try:
        yield from read_file(
            file,
            reading,
            is_current=writer.is_current,
            on_current=writer.mark_seen,
            on_bytes=on_bytes,
            on_note=on_note,
        )
    except (OSError, ValueError) as error:
        if is_records(file) or str(file) in [os.path.abspath(path) for path in paths]:
            raise
        on_note(f"skipped a file: {error}")
        writer.keep(file_name(file))


def _total_size(paths: Paths, output: Path, exclude: Sequence[str], gitignore: bool) -> int:
    """The bytes of all files, for the progress bar. Raises FileNotFoundError for a path that does not exist."""
    total = 0
    try:
        for file in find_files(paths, exclude=exclude, gitignore=gitignore, on_note=lambda message: None):
            with suppress(OSError):  # It has just been deleted, or reading it will raise the same error.
                total += file.stat().st_size
    except FileNotFoundError as error:
        if not (output / MANIFEST).is_file():
            raise
        (root, *_) = (root for root in paths if not os.path.exists(root))
        command = _forget_command(file_name(os.path.abspath(root)), output)
        raise FileNotFoundError(f"{error}; remove what the store holds of it with: {command}") from None
    return total


def _forget_command(root: str, output: Path) -> str:
    return resume_command({"forget": [root]}, output)


def _name(model: ModelSource | LoadedModel | None) -> str | None:
    """The model as the command line would name it."""
    if isinstance(model, LoadedModel):
        return model.identity.name or None
    return absolute(str(model)) if isinstance(model, (str, os.PathLike)) else None
