"""The encoding of a file: what its bytes show, then what it declares, then what the user names, then a guess.

Bytes that are valid UTF-8 are UTF-8, because text in another encoding is that by accident only if it is very short.
"""

from __future__ import annotations

import codecs
import io
import re
from importlib.util import find_spec
from typing import NamedTuple

from .text import OnNote, decode, marked_encoding

UTF8 = "utf-8"
SAMPLE = 1 << 16
"""Bytes from which an encoding is guessed, of lines that are not ASCII."""

BLOCK = 1 << 20
"""Bytes that are checked at a time."""

HEAD = 1 << 13
"""Bytes at the beginning in which a NUL means that a file is UTF-16 without a mark, or not a text."""

FEW = 2
"""Broken places of a page that are damage and do not refute that it is UTF-8, as it declares."""

WESTERN = "cp1252"
_WIDER = {  # the encoding that browsers use in place of a narrower one; keys are Python's names
    "ascii": WESTERN,
    "iso8859-1": WESTERN,
    "iso8859-9": "cp1254",
    "tis-620": "cp874",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "big5": "big5hkscs",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
}
# With all that chardet knows, short texts are often of a rare encoding. So it chooses from all only where letters are
# many, and if it chooses another than these, once more from the usual ones.
_RARE = {"iso8859-6", *(f"cp{number}" for number in (437, 850, 852, 855, 857, 858, 860, 861, 863, 865))}
_RARE |= {f"mac-{script}" for script in ("cyrillic", "greek", "iceland", "latin2", "roman", "turkish")}
_USUAL = [f"cp{number}" for number in (*range(1250, 1258), 866, 874, 932, 949)]
_USUAL += ["koi8-r", "koi8-u", "iso8859-2", "iso8859-5", "euc-jp", "gb18030", "big5"]
LETTERS = 8
"""Letters that are not ASCII from which on an encoding may be a rare one, if they are not all the same."""

_NO_LETTERS = bytes([*range(128), 0x85, *range(0x91, 0x98), 0x99])  # ASCII, and … ‘ ’ “ ” • – — ™ of Windows

UNSURE = 0.03
"""The confidence of chardet below which there are too few letters to tell, so that what browsers assume is likelier."""

_OF_PAGES = re.compile(r"utf-8|cp\d+|iso8859-\d+|koi8-\w|gb\w+|big5\w*|shift_jis\w*|euc_\w+|iso2022_jp|mac-\w+|tis-620")
# No attribute is searched beyond the next "<", so that the time is linear. Comments and scripts declare nothing.
_DECLARED = re.compile(
    rb"""<(?:!--|script\b|meta\b[^<>]*?\bcharset\s*=\s*["']?\s*([\w:.-]+)|\?xml\b[^<>]*?\bencoding\s*=\s*["']([\w:.-]+))""",
    re.IGNORECASE,
)
_ENDS = {b"<!--": re.compile(b"-->"), b"<scr": re.compile(b"</script", re.IGNORECASE)}
_ISO_2022_JP = re.compile(rb"\x1b\$[@B]")  # this encoding consists of ASCII bytes
_REPLACED = "\ufffd".encode()


class Found(NamedTuple):
    """An encoding, by Python's name, and whether the bytes only make it likely."""

    name: str
    is_guess: bool = False


def find_encoding(file: io.BufferedIOBase) -> Found:
    """The encoding of the bytes of a file, which is read from its beginning in blocks."""
    head = file.read(HEAD)
    if marked := marked_encoding(head):
        return Found(marked)
    if wide := utf16_without_mark(head):
        return Found(wide, is_guess=True)
    file.seek(0)
    decoder, is_japanese = codecs.getincrementaldecoder(UTF8)(), False
    try:
        while block := file.read(BLOCK):
            decoder.decode(block)
            is_japanese = is_japanese or bool(_ISO_2022_JP.search(block))
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return Found(_likely(_sample(file)), is_guess=True)
    return Found("iso2022_jp", is_guess=True) if is_japanese else Found(UTF8)


def utf16_without_mark(head: bytes) -> str | None:
    """UTF-16 in the order of bytes in which the beginning of a file is text, or None. Most such text has a NUL.

    Text with NULs, such as a list of names that end in one, is UTF-16 by accident. So most characters are Latin, or the
    bytes are not text without their NULs.
    """
    head = head[: len(head) // 2 * 2]
    count, name = max((head[1::2].count(0), "utf-16-le"), (head[::2].count(0), "utf-16-be"))
    is_other = count <= len(head) // 4 and _is_text(head.replace(b"\0", b""), UTF8)
    return name if count and not is_other and _is_text(head, name) else None


def _is_text(head: bytes, encoding: str) -> bool:
    """Whether the bytes, of which the last character may be cut, are printable characters and white space."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)


def text_encoding(file: io.BufferedIOBase, named: str | None, on_note: OnNote) -> str:
    """The encoding of a text: by its byte order mark, else `named`, else as found. A guess is noted."""
    if named and not marked_encoding(file.read(4)):
        return named
    file.seek(0)
    found = find_encoding(file)
    if found.is_guess and found.name != UTF8:
        extra = "" if find_spec("chardet") else "; for better guesses: pip install 'modernbert[retrieval]'"
        on_note(
            f"not UTF-8, read as {found.name.upper()} by the look of it; if that is wrong, name the encoding "
            f"(--encoding){extra}"
        )
    return found.name


def page_encoding(raw: bytes, named: str | None, on_note: OnNote) -> str:
    """The encoding of a web page: as its bytes show, else as it declares, else as of a text."""
    found = find_encoding(io.BytesIO(raw))
    if not found.is_guess:
        return found.name
    declared = _declared(raw)
    if declared and (declared != UTF8 or decode(raw)[1] <= FEW):
        return declared
    if named is None and found.name == WESTERN:
        return WESTERN  # This is what browsers read such a page as, and there is nothing to say.
    return text_encoding(io.BytesIO(raw), named, on_note)


def named_encoding(name: str) -> str:
    """Python's name of the encoding that a user names. Raises ValueError if it is not one of text."""
    try:
        found = codecs.lookup(name).name
        "x".encode(found)
    except (LookupError, ValueError) as error:
        raise ValueError(f"encoding is {name!r}, which is not an encoding of text; for example cp1252") from error
    return _WIDER.get(found, found)


def _declared(raw: bytes) -> str | None:
    """The first encoding that a page declares, of those that a page can have in which this can be read."""
    at = 0
    while found := _DECLARED.search(raw, at):
        at = found.end()
        if name := found[1] or found[2]:
            with_name = _of_page(name)
            if with_name:
                return with_name
        else:
            end = _ENDS[found[0][:4].lower()].search(raw, at)
            if not end:
                return None
            at = end.end()
    return None


def _of_page(name: bytes) -> str | None:
    try:
        found = codecs.lookup(name.decode("ascii", "replace")).name
    except LookupError:
        return None
    found = _WIDER.get(found, found)
    return found if _OF_PAGES.fullmatch(found) else None


def _sample(file: io.BufferedIOBase) -> bytes:
    file.seek(0)
    sample = bytearray()
    while len(sample) < SAMPLE and (line := file.readline(SAMPLE)):
        if not line.isascii():
            sample += line
    return bytes(sample)


def _likely(sample: bytes) -> str:
    """UTF-8 if most of what is not ASCII is that, or if a program has put U+FFFD there; else another encoding."""
    text, broken = decode(sample, UTF8)
    whole = len(text) - len(text.encode("ascii", "ignore")) - broken
    if broken <= whole or _REPLACED in sample:
        return UTF8
    return _guess(sample)


def _guess(sample: bytes) -> str:
    """By the letters of languages, with chardet if it is installed; else the encoding that browsers assume."""
    if not find_spec("chardet"):
        return WESTERN
    import chardet

    letters = sample.translate(None, _NO_LETTERS)
    may_be_rare = len(letters) >= LETTERS and len(set(letters)) > 1
    found = chardet.detect(sample, compat_names=False) if may_be_rare else None
    if not found or found["encoding"] not in _RARE:
        found = chardet.detect(sample, include_encodings=_USUAL, compat_names=False)
    name = codecs.lookup(found["encoding"] or WESTERN).name
    name = _WIDER.get(name, name)
    is_same = sample.decode(name, "replace") == sample.decode(WESTERN, "replace")
    return WESTERN if is_same or found["confidence"] < UNSURE else name
