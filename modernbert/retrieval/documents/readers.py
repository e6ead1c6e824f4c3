"""The bytes of a file to its title and text, by the kind of file.

Each reader is told where to note what it repaired. It raises ValueError for bytes that hold no text of its kind, and
ModuleNotFoundError where the library that it takes is not installed.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping

from ..passages import HTML
from .html import read_html
from .text import Note, decode, marked_encoding, replaced, storable

PDF = frozenset({".pdf"})


def read_plain(raw: bytes, note: Note) -> tuple[str, str]:
    """UTF-8, or what its byte order mark says. A NUL near the beginning says that it is no text."""
    encoding = marked_encoding(raw)
    if encoding is None and b"\0" in raw[:8192]:
        raise ValueError("a binary file; read are text, markdown, HTML, PDF, source code, JSON lines and CSV")
    text, count = decode(raw, encoding or "utf-8")
    if count:
        note(replaced(count, encoding or "utf-8"))
    return "", text


def read_pdf(raw: bytes, note: Note) -> tuple[str, str]:
    """Its text, with an empty line between pages. Its title only if the first page has it, too: many are made up."""
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, FileNotDecryptedError

    repairs: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: repairs.append(record.getMessage()) if not repairs else None
    logger = logging.getLogger("pypdf")
    logger.addHandler(listener)
    title, pages, lost = "", [], []
    try:
        reader = PdfReader(io.BytesIO(raw))
        for number in range(len(reader.pages)):
            try:
                pages.append(storable(reader.pages[number].extract_text()).strip())
            # pypdf documents that broken files raise other exceptions than its own, and which is not said.
            except Exception as error:
                lost.append(f"{number + 1} ({type(error).__name__}: {error})")
        if reader.metadata and reader.metadata.title:
            title = " ".join(storable(reader.metadata.title).split())
    except FileNotDecryptedError as error:
        raise ValueError("an encrypted PDF; save it without its password first") from error
    except DependencyError as error:
        raise ValueError(f"an encrypted PDF; to read it, pip install cryptography ({error})") from error
    except Exception as error:
        raise ValueError(f"a broken PDF ({type(error).__name__}: {error}); fetch or save it again") from error
    finally:
        logger.removeHandler(listener)
    if lost and not any(pages):
        raise ValueError(f"a broken PDF: no page could be read, beginning with {lost[0]}; fetch or save it again")
    if lost:
        note(f"{len(lost)} of {len(lost) + len(pages)} pages could not be read: {', '.join(lost[:3])}")
    elif not any(pages):
        note("a PDF without text; if its pages are scanned, OCR (as ocrmypdf does) gives them some")
    elif repairs:
        note(f"a PDF with errors, read as well as they allow: {repairs[0]}")
    stands_there = pages and title.casefold() in " ".join(pages[0].split()).casefold()
    return title if stands_there else "", "\n\n".join(filter(None, pages))


READERS: Mapping[str, Callable[[bytes, Note], tuple[str, str]]] = {
    **dict.fromkeys(HTML, read_html),
    **dict.fromkeys(PDF, read_pdf),
}
"""By suffix. Any other file is plain text."""
