"""The parts of an Office file: XML in a zip archive, and which part refers to which.

Python's own parser reads each part in pieces, without building a tree. What all parts may unpack to is limited by the
size of the file. So a hostile file costs no more time and memory than an honest one of its size.
"""

from __future__ import annotations

import io
import lzma
import posixpath
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import NamedTuple, Protocol
from xml.parsers.expat import ExpatError, ParserCreate

from .records import LARGEST

ROOM, RATIO = 8 << 20, 64
"""Bytes that any file may unpack to, and how many more for each of its bytes. Of 124 real files none had over 23."""

PIECE = 1 << 16
"""Bytes of a part that are parsed at a time."""

BROKEN = (
    zipfile.BadZipFile,
    ExpatError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    KeyError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
)
"""What zipfile and expat raise for damaged and encrypted files."""

_ENCRYPTED = b"\xd0\xcf\x11\xe0"
"""How a file of the format before 2007 begins. Encrypted files are in this format too."""


class Handler(Protocol):
    """What is called for the XML of a part. Names have no prefix."""

    def start(self, name: str, attributes: Mapping[str, str]) -> None: ...

    def end(self, name: str) -> None: ...

    def data(self, text: str) -> None: ...


class Reference(NamedTuple):
    """From one part to another: what for, the key of the reference in the part, and the path of the other."""

    kind: str
    key: str
    part: str


class Archive:
    """The parts of an Office file, by path in lower case.

    Raises:
        ValueError: the bytes are not such a file.
    """

    def __init__(self, raw: bytes) -> None:
        if raw.startswith(_ENCRYPTED):
            raise ValueError(
                "an encrypted file, or one of Office before 2007; save it without a password in today's format"
            )
        try:
            self._file = zipfile.ZipFile(io.BytesIO(raw))
        except (*BROKEN, ValueError) as error:
            raise ValueError(f"a broken Office file ({type(error).__name__}: {error}); save it again") from error
        self._names = {_normal(name): name for name in self._file.namelist()}
        self._left = min(LARGEST, ROOM + RATIO * len(raw))

    def __contains__(self, part: str) -> bool:
        return part in self._names

    def count(self, size: int) -> None:
        """Raises ValueError if the bytes and characters that were counted are too many for the file."""
        self._left -= size
        if self._left < 0:
            raise ValueError("its parts unpack to far more than an Office file of this size holds")

    def parse(self, part: str, handler: Handler) -> None:
        """Call `handler` for a part, and for the end of what a broken part begins.

        Raises one of `BROKEN`, or ValueError as `count` does and for entities.
        """
        parser = ParserCreate()
        parser.buffer_text = True
        opened: list[str] = []

        def start(tag: str, attributes: Mapping[str, str]) -> None:
            opened.append(_local(tag))
            handler.start(opened[-1], attributes)

        parser.StartElementHandler = start
        parser.EndElementHandler = lambda tag: handler.end(opened.pop())
        parser.CharacterDataHandler = handler.data
        parser.StartDoctypeDeclHandler = _refuse
        try:
            with self._file.open(self._names[part]) as stream:
                while piece := stream.read(PIECE):
                    self.count(len(piece))
                    parser.Parse(piece)
            parser.Parse(b"", True)
        except BROKEN:
            parser.buffer_text = False  # This hands on the text that is waiting: what was read up to there counts.
            while opened:
                handler.end(opened.pop())
            raise


class References:
    """Collects what a part of this path refers to, from the part of its references."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self.found: list[Reference] = []

    def start(self, name: str, attributes: Mapping[str, str]) -> None:
        if name == "Relationship":
            part = _normal(posixpath.join("/", self._folder, attributes.get("Target", "")))
            self.found.append(Reference(posixpath.basename(attributes.get("Type", "")), attributes.get("Id", ""), part))

    def end(self, name: str) -> None:
        pass

    def data(self, text: str) -> None:
        pass


def attribute(attributes: Mapping[str, str], name: str) -> str:
    """The value of the attribute of this name, whatever its prefix, or ""."""
    return next((value for key, value in attributes.items() if _local(key) == name), "")


def _normal(path: str) -> str:
    """Paths in an archive are the same in upper and lower case; some programs write a backslash."""
    return posixpath.normpath(path.replace("\\", "/")).lstrip("/").lower()


def _local(name: str) -> str:
    return name.rpartition(":")[2]


def _refuse(*_: object) -> None:
    raise ValueError("it declares entities, which Office files never do")
