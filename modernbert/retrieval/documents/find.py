"""Which files a corpus is, and the documents in them: what a search encodes, shows and points back to."""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..passages import HTML, MARKDOWN, Document
from .readers import PDF, READERS, read_plain
from .records import JSON_LINES, LARGEST, is_records, json_record, read_lines, read_records
from .text import Note, file_name

TEXT = MARKDOWN | {".txt", ".text", ".rst", ".adoc", ".org", ".pod", ".tex", ""}  # "" is README, LICENSE, Makefile, ...
KINDS_OF_CODE = """
    .asm .awk .bash .bat .bib .c .cc .cfg .clj .cljs .cmake .coffee .conf .cpp .cs .css .cu .cuh .cxx .d .dart .el .elm
    .erl .ex .exs .f .f90 .fs .fsx .glsl .go .gql .gradle .graphql .groovy .h .hh .hpp .hrl .hs .hxx .ini .ipp .java .jl
    .js .jsx .kt .kts .less .lisp .lua .m .make .metal .mjs .mk .ml .mli .mm .mts .nim .nix .pas .php .pl .pm .proto
    .properties .ps1 .pxd .py .pyi .pyx .r .rb .rkt .rs .s .sass .scala .scm .scss .sh .sol .sql .svelte .sv .swift .tcl
    .tf .toml .ts .tsx .v .vb .vhd .vhdl .vim .vue .wgsl .yaml .yml .zig .zsh
"""
CODE = frozenset(KINDS_OF_CODE.split())
GENERATED = (".min.js", ".min.css", "-lock.yaml", "_pb2.py", "_pb2.pyi")  # ends of names of code that nobody wrote
CORPORA = frozenset({"corpus.jsonl", "corpus.jsonl.gz"})  # the only records a folder is searched for: BEIR's

Paths = Iterable[str | os.PathLike[str]]


class Key(NamedTuple):
    """Which document it is, and what it was read from; see `Document`."""

    path: str
    id: str
    digest: str
    line: int | None


def find_files(paths: Paths, *, note: Note = warnings.warn) -> Iterator[Path]:
    """The files to read, as absolute paths in which links are not resolved, each once.

    A path to a file is that file, whatever its name. A folder is all text, source code, HTML and PDF in it and below,
    and BEIR's corpus.jsonl, in sorted order; what is hidden, linked folders, node_modules and everything else are
    passed over, and counted in a note. Raises FileNotFoundError for a path that is not there, before anything else.
    """
    roots: dict[str, bool] = {}
    for path in paths:
        try:
            roots[os.path.abspath(path)] = stat.S_ISDIR(os.stat(path).st_mode)
        except FileNotFoundError:
            raise FileNotFoundError(f"no such file or folder: {file_name(path)}") from None
    for root, is_folder in roots.items():
        yield from _walk(root, roots, note) if is_folder else [Path(root)]


def read_file(
    path: str | os.PathLike[str],
    *,
    known: Callable[[Key], bool] = lambda key: False,
    advance: Callable[[int], None] = lambda size: None,
    note: Note = warnings.warn,
) -> Iterator[Document]:
    """The documents in a file: its records if it is JSON lines or CSV by its name (see `read_records`), else one.

    A file that is one document is held in memory, of a file of records one record is.

    Args:
        known: is asked for each document; those that it knows are left out, and a file not even parsed.
        advance: is told the bytes that were read since the last time, as they are on disk.
        note: is told what was repaired, a sentence each.

    Raises:
        OSError: the file cannot be read.
        ValueError: it cannot be understood: binary, broken, encrypted, too large, no regular file.
    """
    path = Path(os.path.abspath(path))
    name, status = file_name(path), path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{name}: not a regular file")
    if is_records(path):
        for document in read_records(path, advance=advance, note=note):
            if not known(Key(name, document.id, document.digest, document.line)):
                yield document
        return
    if status.st_size > LARGEST:
        raise ValueError(f"{name}: more than {LARGEST >> 20} MiB in one document; cut it, or make records of it")
    raw = path.read_bytes()
    advance(len(raw))
    digest = hashlib.sha256(raw).hexdigest()
    if known(Key(name, name, digest, None)):
        return
    reader = READERS.get(path.suffix.lower(), read_plain)
    try:
        title, text = reader(raw, lambda message: note(f"{name}: {message}")) if raw else ("", "")
    except ModuleNotFoundError as error:
        raise ValueError(f"{name}: {error}; what it takes comes with pip install 'modernbert[retrieval]'") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    del raw
    yield Document(name, name, title, text, digest=digest)


def read_texts(path: str | os.PathLike[str], *, note: Note = warnings.warn) -> Iterator[Document]:
    """The records of a JSON-lines file, and of any other file each line that is not blank, one document each.

    A record is read as by `read_records`, but its `_id` may come twice; other lines have their number as `id`.
    """
    path, name = Path(path), file_name(path)
    for number, line in enumerate(read_lines(path, note=note), start=1):
        if not line.strip():
            continue
        if path.name.lower().endswith(JSON_LINES):
            yield json_record(line, name, number)
        else:
            yield Document(name, str(number), "", line.strip(), number)


def _walk(root: str, roots: Container[str], note: Note) -> Iterator[Path]:
    """The files to read below a folder, those of a folder before those of its subfolders; the rest is noted by kind.

    What is one of the `roots` itself is left to its own turn, so that nothing comes twice.
    """
    skipped: Counter[str] = Counter()
    folders = [root]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            note(f"skipped a folder: {error}")
            continue
        subfolders = []
        for entry in found:
            if entry.path in roots:
                continue
            if entry.name.startswith(".") or entry.name == "node_modules":
                skipped["hidden or node_modules"] += 1
            elif entry.is_dir(follow_symlinks=False):
                subfolders.append(entry.path)
            elif os.path.isdir(entry):
                skipped["linked folder"] += 1
            elif not os.path.isfile(entry):
                skipped["no regular file"] += 1
            elif _is_wanted(entry.name):
                yield Path(entry.path)
            else:
                skipped[os.path.splitext(entry.name)[1].lower()] += 1
        folders += reversed(subfolders)
    if skipped:
        kinds = ", ".join(f"{count} {file_name(kind)}" for kind, count in skipped.most_common(8))
        kinds += ", ..." if len(skipped) > 8 else ""
        note(f"skipped {skipped.total()} files and folders in {file_name(root)} that are not read: {kinds}")


def _is_wanted(name: str) -> bool:
    suffix = os.path.splitext(name)[1].lower()
    is_text = suffix in TEXT or suffix in CODE or suffix in HTML or suffix in PDF
    return name in CORPORA or (is_text and not name.lower().endswith(GENERATED))
