"""Bytes to text that models, terminals and UTF-8 databases accept."""

from __future__ import annotations

import codecs
import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

OnNote = Callable[[str], None]
"""Called with one sentence for everything that is skipped or repaired."""

BOMS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


MOST = 64
"""Characters of the longest run of broken places that is kept, because megabytes of NULs mean nothing."""

_BROKEN = re.compile(f"(\ufffd{{{MOST}}})\ufffd+")


def marked_encoding(raw: bytes) -> str | None:
    """The encoding given by a byte order mark at the beginning, or None."""
    return next((encoding for mark, encoding in BOMS.items() if raw.startswith(mark)), None)


def decode(raw: bytes, encoding: str = "utf-8-sig") -> tuple[str, int]:
    """Text, and how many U+FFFD replace broken bytes, runs of bytes, or NULs. No more than `MOST` are kept in a row."""
    text = raw.decode(encoding, errors="replace").replace("\0", "\ufffd")
    meant = raw.count("\ufffd".encode()) if encoding.startswith("utf-8") else 0
    count = text.count("\ufffd") - meant
    return _BROKEN.sub(r"\1", text) if count > MOST else text, count


def replaced(count: int, encoding: str = "utf-8") -> str:
    """The note for `count` replacements by `decode`."""
    return f"not {encoding.upper().removesuffix('-SIG')} throughout, {count} broken places were replaced by U+FFFD"


def storable(text: str) -> str:
    """`text` in a form that a UTF-8 database accepts: half a surrogate pair becomes "?", NUL becomes U+FFFD."""
    return (text if text.isascii() else text.encode("utf-8", "replace").decode()).replace("\0", "\ufffd")


def file_name(path: str | os.PathLike[str]) -> str:
    r"""The name of a file as storable text: bytes that are not UTF-8 are written as `\xff`.

    Two files never have the same name: where a name itself contains four characters like `\xff`, its backslash is
    written as `\x5c`.
    """
    raw = os.fsencode(path)
    return re.sub(rb"\\(?=x5c|x[89a-f][0-9a-f])", rb"\\x5c", raw).decode("utf-8", "backslashreplace")


def file_path(name: str) -> str:
    """The path whose `file_name` is `name`."""
    raw = re.sub(rb"\\x(5c|[89a-f][0-9a-f])", lambda found: bytes.fromhex(found[1].decode()), name.encode())
    return os.fsdecode(raw)


@contextmanager
def gzip_errors(name: str) -> Iterator[None]:
    """Raise ValueError with the file's `name` if reading finds a broken gzip file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{name}: broken gzip file ({error}); fetch or compress it again") from error
