"""The bytes of a file to its title and text, by the kind of file.

Each reader calls `on_note` with what it repaired. It raises ValueError if the bytes do not have its format, and
ModuleNotFoundError if a library that it needs is not installed.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping

from ..headings import SHEETS, SLIDES, WORD
from ..passages import HTML, NOTEBOOK, OFFICE, PAGE_BREAK, PDF
from .encodings import HEAD, text_encoding, utf16_without_mark
from .html import read_html
from .notebook import read_notebook
from .office import read_opendocument, read_sheets, read_slides, read_word
from .pdf_pages import MinusSigns, filled_in, name_glyphs, without_running_heads
from .text import OnNote, decode, marked_encoding, replaced, storable


def read_plain(raw: bytes, on_note: OnNote, named: str | None = None) -> tuple[str, str]:
    """A text in any encoding, of which `text_encoding` chooses one: `named` if it is given.

    A NUL near the beginning means that this is not a text file, unless it is one in UTF-16 or the encoding `named`.
    """
    head = raw[:HEAD]
    if named is None and b"\0" in head and not (marked_encoding(head) or utf16_without_mark(head)):
        raise ValueError(
            "a binary file; supported are text, markdown, notebooks, HTML, PDF, Office files of today's formats, "
            "source code, JSON lines and CSV"
        )
    encoding = text_encoding(io.BytesIO(raw), named, on_note)
    text, count = decode(raw, encoding)
    if count:
        on_note(replaced(count, encoding))
    return "", text if "\n" in text else text.replace("\r", "\n")  # Macs of before 2001 ended lines so.


def read_pdf(raw: bytes, on_note: OnNote) -> tuple[str, str]:
    """Its title and its text, with `PAGE_BREAK` before every page but the first.

    The title only if the first page contains it: many PDFs have a wrong one. Comments and the values of form fields are
    lines at the end of their pages. Running heads are left out after their first page, and so are the pages that unpack
    to far more than a file of this size holds.
    """
    from pypdf import Configuration, PdfReader, apply_configuration
    from pypdf.errors import DependencyError, FileNotDecryptedError

    repairs: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: repairs.append(record.getMessage()) if not repairs else None
    logger = logging.getLogger("pypdf")
    logger.addHandler(listener)
    title, pages, lost = "", [], []
    # A PDF of text unpacks to about its own size, and has one operator for every twenty bytes.
    unpacked, work = (1 << 18) + 16 * len(raw), _Work(10_000 + len(raw))
    limits = Configuration(
        zlib_maximum_output_length=unpacked,
        lzw_maximum_output_length=unpacked,
        run_length_maximum_output_length=unpacked,
        array_based_stream_maximum_output_length=unpacked,
        stream_parsing_work_maximum_count=50_000 + 2 * len(raw),
    )
    try:
        with apply_configuration(limits):
            reader = PdfReader(io.BytesIO(raw))
            for number in range(len(reader.pages)):
                pages.append("")
                try:
                    page = reader.pages[number]
                    content = page.get_contents()
                    work.count(100 + len(content.get_data() if content else b"") // 16)
                    name_glyphs(page, work.count)
                    minus = MinusSigns()
                    text = page.extract_text(visitor_operand_before=work.visit, visitor_text=minus.visit)
                    pages[-1] = storable(minus.put(text)).replace(PAGE_BREAK, " ").strip()
                    values = map(storable, dict.fromkeys(filled_in(page, work.count)))
                    pages[-1] = "\n".join([pages[-1], *values]).strip()
                # pypdf may raise any exception on a broken file; its documentation does not list them.
                except Exception as error:
                    lost.append(f"{number + 1} ({type(error).__name__}: {error})")
            if reader.metadata and reader.metadata.title:
                title = " ".join(storable(reader.metadata.title).split())
    except FileNotDecryptedError as error:
        raise ValueError("an encrypted PDF; save it without its password first") from error
    except DependencyError as error:
        raise ValueError(f"an encrypted PDF; to read it: pip install 'modernbert[retrieval]' ({error})") from error
    except NotImplementedError as error:
        raise ValueError(f"a PDF of a kind that pypdf does not read ({error}); print it into a new PDF") from error
    except Exception as error:
        raise ValueError(f"a broken PDF ({type(error).__name__}: {error}); fetch or save it again") from error
    finally:
        logger.removeHandler(listener)
    if lost and not any(pages):
        raise ValueError(f"a broken PDF: no page could be read, beginning with {lost[0]}; fetch or save it again")
    if lost:
        on_note(f"{len(lost)} of {len(pages)} pages could not be read: {', '.join(lost[:3])}")
    elif not any(pages):
        on_note("a PDF without text; if its pages are scanned, add text by OCR, for example with ocrmypdf")
    elif repairs:
        on_note(f"a PDF with errors, read as far as possible: {repairs[0]}")
    is_on_first_page = any(pages) and title.casefold() in " ".join(next(filter(None, pages)).split()).casefold()
    return title if is_on_first_page else "", f"\n{PAGE_BREAK}".join(without_running_heads(pages)).rstrip()


class _Work:
    """What reading a PDF may still cost, in operators of its pages."""

    def __init__(self, left: int) -> None:
        self._left = left

    def visit(self, operator: bytes, *_: object) -> None:
        """Count an operator, as pypdf calls it. `Do` reads a whole form."""
        self.count(200 if operator == b"Do" else 1)

    def count(self, operators: int) -> None:
        """Raises ValueError if nothing is left, so that pages that share or repeat their content cost no more."""
        self._left -= operators
        if self._left < 0:
            raise ValueError("the pages unpack to far more than such a small file holds")


READERS: Mapping[str, Callable[[bytes, OnNote], tuple[str, str]]] = {
    **dict.fromkeys(HTML, read_html),
    **dict.fromkeys(NOTEBOOK, read_notebook),
    **dict.fromkeys(PDF, read_pdf),
    **dict.fromkeys(OFFICE, read_opendocument),
    **dict.fromkeys(WORD, read_word),
    **dict.fromkeys(SLIDES - {".odp"}, read_slides),
    **dict.fromkeys(SHEETS - {".ods"}, read_sheets),
}
"""Readers by suffix. Any other file is plain text."""
