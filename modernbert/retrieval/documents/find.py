"""The files of a corpus, and the documents in them."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..passages import HTML, MARKDOWN, NOTEBOOK, OFFICE, Document
from ..store.folder import is_store
from ..store.format import MANIFEST
from ..store.request import UNFINISHED
from .html import read_html
from .ignore import Excluded, Rules, is_ignored, rules_above, rules_in
from .readers import PDF, READERS, read_plain
from .reading import DEFAULT, Reading
from .records import JSON_LINES, LARGEST, is_records, json_record, read_lines, read_records
from .text import OnNote, file_name

TEXT = MARKDOWN | {".txt", ".text", ".rst", ".adoc", ".org", ".pod", ".tex", ""}  # "" is README, LICENSE, Makefile, ...
KINDS_OF_CODE = """
    .asm .awk .bash .bat .bib .c .cc .cfg .clj .cljs .cmake .coffee .conf .cpp .cs .css .cu .cuh .cxx .d .dart .el .elm
    .erl .ex .exs .f .f90 .fs .fsx .glsl .go .gql .gradle .graphql .groovy .h .hh .hpp .hrl .hs .hxx .ini .ipp .java .jl
    .js .jsx .kt .kts .less .lisp .lua .m .make .metal .mjs .mk .ml .mli .mm .mts .nim .nix .pas .php .pl .pm .proto
    .properties .ps1 .pxd .py .pyi .pyx .r .rb .rkt .rs .s .sass .scala .scm .scss .sh .sol .sql .svelte .sv .swift .tcl
    .tf .toml .ts .tsx .v .vb .vhd .vhdl .vim .vue .wgsl .yaml .yml .zig .zsh
"""
CODE = frozenset(KINDS_OF_CODE.split())
GENERATED = (".min.js", ".min.css", "-lock.yaml", "_pb2.py", "_pb2.pyi")  # name endings of generated code
CORPORA = frozenset({"corpus.jsonl", "corpus.jsonl.gz"})  # the only files of records that are found in a folder
LOCK = "~$"  # how the files begin that Office keeps beside a document while it is open

UNREADABLE = "broken link or special file"

Paths = Iterable[str | os.PathLike[str]]

OnUnread = Callable[[str], None]
"""Called with the path of each file or folder that cannot be examined now, which says nothing about what is in it."""


class Key(NamedTuple):
    """The identity of a document, and the digest of its content; see `Document`."""

    path: str
    id: str
    digest: str
    line: int | None


def path_list(paths: Paths) -> list[str | os.PathLike[str]]:
    """The paths as a list. Raises ValueError for one path, whose letters would be paths, and for what is not one."""
    if isinstance(paths, (str, bytes, os.PathLike)):
        raise ValueError(f"paths must be a list, got {paths!r:.80}; write [path]")
    if isinstance(paths, Mapping) or not isinstance(paths, Iterable):
        raise ValueError(f"paths must be a list, got one {type(paths).__name__}")
    found = list(paths)
    for number, path in enumerate(found):
        if not isinstance(path, (str, os.PathLike)):
            raise ValueError(f"paths[{number}] is {path!r:.80}; give a path as a text")
    return found


def find_files(
    paths: Paths,
    *,
    exclude: Sequence[str] = (),
    gitignore: bool = True,
    on_unread: OnUnread = lambda path: None,
    on_note: OnNote = warnings.warn,
) -> Iterator[Path]:
    """The files to read, each once, as absolute paths with unresolved links.

    A file that is named in `paths` is read whatever its name. Of a folder, all text, source code, notebooks, HTML, PDF
    and Office files in it and its subfolders are read, and BEIR's corpus.jsonl, in sorted order. Hidden files, linked
    folders, node_modules, stores, what git ignores and all other files are skipped, and counted in a note.

    Args:
        exclude: patterns of files and folders to leave out, as in a .gitignore in each folder of `paths`. They also
            hold for the names of the `paths`, and a pattern that begins with "!" takes back what a .gitignore says.
        gitignore: whether to leave out what git ignores, by the .gitignore files in a folder and, inside a repository,
            by all its other rules. A path that is named is read in spite of them.
        on_unread, on_note: called while the files are found.

    Raises:
        FileNotFoundError: a path does not exist.
        OSError: a path cannot be examined.
        ValueError: `exclude` has what is not a pattern, or `paths` are not a list. All are raised before anything else.
    """
    excluded = Excluded(exclude)
    roots: dict[str, bool] = {}
    for path in path_list(paths):
        try:
            roots[os.path.abspath(path)] = stat.S_ISDIR(os.stat(path).st_mode)
        except FileNotFoundError:
            raise FileNotFoundError(f"no such file or folder: {file_name(path)}") from None
    for root, is_folder in roots.items():
        if excluded.decide(os.path.dirname(root), root, is_folder):
            continue
        yield from _walk(root, roots, excluded, gitignore, on_unread, on_note) if is_folder else [Path(root)]
    for pattern in excluded.unused():
        on_note(f"no file or folder was left out by the pattern {pattern!r}, which is relative to each folder named")


def read_file(
    path: str | os.PathLike[str],
    reading: Reading = DEFAULT,
    *,
    name: str | None = None,
    first: int = 1,
    is_current: Callable[[Key], bool] = lambda key: False,
    on_current: Callable[[Key], None] = lambda key: None,
    on_bytes: Callable[[int], None] = lambda size: None,
    on_note: OnNote = warnings.warn,
) -> Iterator[Document]:
    """The documents in a file: its records if its name is that of JSON lines or CSV (see `read_records`), else one.

    A file that is one document is held in memory; of a file of records, one record is.

    Args:
        reading: what is known about files that do not show it.
        name, first: of a copy of a file or of some of its lines, see `read_records`.
        is_current: whether the caller has a document already. Such a document is left out, and its file not parsed.
        on_current: called for each document that is left out.
        on_bytes: called with the number of bytes, as on disk, that were read since the last call.
        on_note: called with one sentence for each repair.

    Raises:
        OSError: the file cannot be read.
        ValueError: its content cannot be used: binary, broken, encrypted, too large, not a regular file.
    """
    path = Path(os.path.abspath(path))
    name, status = name or file_name(path), path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{name}: not a regular file")
    if is_records(path):
        for document in read_records(path, reading, name=name, first=first, on_bytes=on_bytes, on_note=on_note):
            key = Key(name, document.id, document.digest, document.line)
            if is_current(key):
                on_current(key)
            else:
                yield document
        return
    if status.st_size > LARGEST:
        raise ValueError(f"{name}: more than {LARGEST >> 20} MiB in one document; split it, or make records of it")
    raw = path.read_bytes()
    on_bytes(len(raw))
    digest = hashlib.sha256(raw)
    if reading.codec:  # The same bytes are another text in another encoding.
        digest.update(f"\0{reading.codec}".encode())
    key = Key(name, name, digest.hexdigest(), None)
    if is_current(key):
        on_current(key)
        return
    reader = READERS.get(path.suffix.lower()) or partial(read_plain, named=reading.codec)
    if reader is read_html:
        reader = partial(read_html, named=reading.codec)
    try:
        title, text = reader(raw, lambda message: on_note(f"{name}: {message}")) if raw else ("", "")
    except ModuleNotFoundError as error:
        raise ValueError(f"{name}: {error}; to read such files: pip install 'modernbert[retrieval]'") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    del raw
    yield Document(name, name, title, text, digest=key.digest)


def read_texts(path: str | os.PathLike[str], *, on_note: OnNote = warnings.warn) -> Iterator[Document]:
    """One document for each record of a JSON-lines file, or for each line of any other file that is not blank.

    Records are read as by `read_records`, but an `_id` may come twice. The `id` of other lines is their number.
    """
    path, name = Path(path), file_name(path)
    for number, line in enumerate(read_lines(path, on_note=on_note), start=1):
        if not line.strip():
            continue
        if path.name.lower().endswith(JSON_LINES):
            yield json_record(line, name, number)
        else:
            yield Document(name, str(number), "", line.strip(), number)


def _walk(
    root: str, roots: Container[str], excluded: Excluded, gitignore: bool, on_unread: OnUnread, on_note: OnNote
) -> Iterator[Path]:
    """The files to read in a folder, before those in its subfolders. Skipped files are counted by kind in a note.

    Other `roots` are left out, so that nothing comes twice.
    """
    skipped: Counter[str] = Counter()
    folders = [(root, rules_above(root, on_note) if gitignore else [])]
    while folders:
        folder, rules = folders.pop()
        try:
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            on_note(f"skipped a folder: {error}")
            on_unread(folder)
            continue
        names = {entry.name for entry in found}
        if names & {MANIFEST, UNFINISHED} and is_store(Path(folder)):
            skipped["store"] += 1
            continue
        if gitignore:
            rules = rules_in(folder, names, rules, on_note)
        subfolders = []
        for entry in found:
            if entry.path in roots:
                continue
            if entry.name.startswith(".") or entry.name == "node_modules":
                skipped["hidden or node_modules"] += 1
                continue
            try:
                kind = _kind(entry)
            except OSError as error:
                on_note(f"skipped a file: {error}")
                on_unread(entry.path)
                continue
            if kind == "folder" or (kind == "file" and is_wanted(entry.name)):
                if why := _left_out(entry.path, kind == "folder", root, excluded, rules):
                    skipped[why] += 1
                elif kind == "folder":
                    subfolders.append((entry.path, rules))
                else:
                    yield Path(entry.path)
            else:
                skipped[kind if kind != "file" else os.path.splitext(entry.name)[1].lower()] += 1
                if kind == UNREADABLE:
                    on_unread(entry.path)
        folders += reversed(subfolders)
    if skipped:
        kinds = ", ".join(f"{count} {file_name(kind)}" for kind, count in skipped.most_common(8))
        kinds += ", ..." if len(skipped) > 8 else ""
        on_note(f"skipped {skipped.total()} files and folders in {file_name(root)} that are not read: {kinds}")


def _left_out(path: str, is_folder: bool, root: str, excluded: Excluded, rules: Sequence[Rules]) -> str:
    """Why a file or folder below `root` is not read; "" if it is read."""
    decided = excluded.decide(root, path, is_folder)
    if decided is None:
        return "ignored by git" if is_ignored(rules, path, is_folder) else ""
    return "excluded" if decided else ""


def _kind(entry: os.DirEntry[str]) -> str:
    """Raises OSError if it cannot be found out now. A file that has just been deleted is like a broken link."""
    try:
        mode = os.stat(entry.path).st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return UNREADABLE
        raise
    if stat.S_ISDIR(mode):
        return "linked folder" if entry.is_symlink() else "folder"
    return "file" if stat.S_ISREG(mode) else UNREADABLE


def is_wanted(name: str) -> bool:
    suffix = os.path.splitext(name)[1].lower()
    is_text = suffix in TEXT or suffix in CODE or suffix in HTML | PDF | NOTEBOOK | OFFICE
    return name in CORPORA or (is_text and not name.lower().endswith(GENERATED) and not name.startswith(LOCK))
