"""Files on disk to documents, and on to passages: what a search encodes, shows and points back to."""

from __future__ import annotations

import gzip
import json
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .passages import MARKDOWN, Document, Passage, passages

TEXT = MARKDOWN | {".txt", ".text", ".rst", ".adoc", ""}  # "" is README, LICENSE, ...
RECORDS = (".jsonl", ".jsonl.gz")
CORPORA = frozenset({"corpus.jsonl", "corpus.jsonl.gz"})  # the only records a folder is searched for

Note = Callable[[str], None]


def read_passages(
    paths: Iterable[str | os.PathLike[str]], *, tokens: int = 140, note: Note = warnings.warn
) -> Iterator[Passage]:
    """The passages of files and folders, in sorted order, with no more than one file in memory.

    Args:
        paths: text and markdown files, JSON-lines corpora, and folders of these.
        tokens: the longest passage, title included, roughly (see `passages`).
        note: is told what is left out or repaired, a sentence each.

    Raises:
        FileNotFoundError: a path that is not there.
        ValueError: a file that is no text, a broken record (with its line), nothing to search at all.
    """
    if tokens < 8:
        raise ValueError(f"tokens is {tokens}; a passage needs room for at least 8")
    roots, empty = [Path(path) for path in paths], True
    for root in roots:
        for file in _files(root, note):
            is_root = file == root
            documents = read_texts(file, note=note) if _is_records(file) else _text_file(file, is_root, note)
            for document in documents:
                for passage in passages(document, tokens=tokens):
                    empty = False
                    yield passage
    if empty:
        names, kinds = ", ".join(map(str, roots)) or "no path at all", " ".join(sorted(TEXT - {""}))
        raise ValueError(f"no text to search in {names}; read are corpus.jsonl[.gz], README and the like, {kinds}")


def read_texts(path: str | os.PathLike[str], *, note: Note = warnings.warn) -> Iterator[Document]:
    """The records of a JSON-lines file, and of any other file each line that is not blank, one document each.

    A record has a `text`, and may have a `title` and an `_id` (else the number of its line).
    Raises ValueError with file and line for a broken one.
    """
    path, replaced = Path(path), 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
            for number, raw in enumerate(lines, start=1):
                line, bad = _decode(raw)
                replaced += bad
                if not line.strip():
                    continue
                if _is_records(path):
                    yield _record(line, path, number)
                else:
                    yield Document(str(path), str(number), "", line.strip(), number)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: broken gzip file ({error}); fetch or compress it again") from error
    if replaced:
        note(_replaced(path, replaced))


def _files(root: Path, note: Note) -> Iterator[Path]:
    """`root` itself if it is a file, else every text file and corpus below it; the rest is noted by kind."""
    if not root.exists():
        raise FileNotFoundError(f"no such file or folder: {root}")
    if not root.is_dir():
        yield root
        return
    skipped: Counter[str] = Counter()
    unreadable: list[str] = []

    def passed_over(name: str) -> bool:
        skipped["hidden or node_modules"] += (found := name.startswith(".") or name == "node_modules")
        return found

    for folder, subfolders, names in os.walk(root, onerror=lambda error: unreadable.append(str(error))):
        skipped["linked folder"] += sum(Path(folder, name).is_symlink() for name in subfolders)
        subfolders[:] = sorted(name for name in subfolders if not passed_over(name))
        for name in sorted(name for name in names if not passed_over(name)):
            file = Path(folder, name)
            if (name in CORPORA or file.suffix.lower() in TEXT) and file.is_file():
                yield file
            else:
                skipped[file.suffix.lower() or "no regular file"] += 1
    for error in unreadable:
        note(f"skipped a folder: {error}")
    if skipped.total():
        kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common(8) if count)
        kinds += ", ..." if len(skipped) > 8 else ""
        note(f"skipped {skipped.total()} files and folders in {root} that are not text or markdown: {kinds}")


def _text_file(path: Path, asked_for: bool, note: Note) -> Iterator[Document]:
    """The document in a text file. One that cannot be read raises if asked for by name, else it is noted."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        if asked_for:
            raise
        note(f"skipped a file: {error}")
        return
    if b"\0" in raw[:8192]:
        if asked_for:
            raise ValueError(f"{path} is a binary file; search takes text, markdown and JSON-lines corpora")
        note(f"skipped a binary file: {path}")
        return
    text, replaced = _decode(raw)
    if replaced:
        note(_replaced(path, replaced))
    yield Document(str(path), str(path), "", text)


def _record(line: str, path: Path, number: int) -> Document:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); a corpus has one JSON object a line") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError(f'{where}: expected an object with a string "text", got {line.strip()[:80]}')
    title, name = record.get("title") or "", record.get("_id", number)
    if not isinstance(title, str) or isinstance(name, bool) or not isinstance(name, (str, int)):
        raise ValueError(f'{where}: "title" and "_id" must be strings, got {title!r} and {name!r}')
    # JSON can spell half a surrogate pair ("\ud800"), which is no character and which no tokenizer takes.
    title, text = (part.encode("utf-8", "replace").decode() for part in (title, record["text"]))
    return Document(str(path), str(name), title, text, number)


def _is_records(path: Path) -> bool:
    return path.name.lower().endswith(RECORDS)


def _decode(raw: bytes) -> tuple[str, int]:
    """Text and how many broken bytes or byte runs in it became U+FFFD."""
    text = raw.decode("utf-8-sig", errors="replace")
    return text, text.count("\ufffd") - raw.count("\ufffd".encode())


def _replaced(path: Path, count: int) -> str:
    return f"{path} is not UTF-8 throughout: {count} broken places were replaced by U+FFFD"
