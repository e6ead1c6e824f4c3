"""Bytes to text that every part downstream takes: models, terminals, databases that speak UTF-8."""

from __future__ import annotations

import codecs
import os
from collections.abc import Callable

Note = Callable[[str], None]

BOMS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def marked_encoding(raw: bytes) -> str | None:
    """The encoding that a byte order mark at the beginning gives away."""
    return next((encoding for mark, encoding in BOMS.items() if raw.startswith(mark)), None)


def decode(raw: bytes, encoding: str = "utf-8-sig") -> tuple[str, int]:
    """Text, and in how many places of it broken bytes, byte runs and NULs became U+FFFD."""
    text = raw.decode(encoding, errors="replace").replace("\0", "\ufffd")
    meant = raw.count("\ufffd".encode()) if encoding.startswith("utf-8") else 0
    return text, text.count("\ufffd") - meant


def replaced(count: int, encoding: str = "utf-8") -> str:
    """What to note when `decode` had to replace something."""
    return f"not {encoding.upper().removesuffix('-SIG')} throughout, {count} broken places were replaced by U+FFFD"


def storable(text: str) -> str:
    """`text` without what no UTF-8 database holds: half a surrogate pair becomes "?", NUL becomes U+FFFD."""
    return (text if text.isascii() else text.encode("utf-8", "replace").decode()).replace("\0", "\ufffd")


def file_name(path: str | os.PathLike[str]) -> str:
    r"""The name of a file as storable text: bytes that are not UTF-8 are spelled out, as `\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
