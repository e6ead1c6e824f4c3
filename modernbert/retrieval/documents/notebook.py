"""Jupyter notebooks as markdown: text as it is, code between fences, without the results of running it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from .text import OnNote, decode, marked_encoding, replaced, storable

_DATA = r"data:[\w/+.-]+;base64,"
_EMBEDDED = re.compile(rf"(?<=\(){_DATA}[\w+/=\s]*(?=\))|{_DATA}[\w+/=%]*(?:\s+[\w+/=]{{40,}})*")
"""The data of an image inside a cell: thousands of characters that are not words."""

_LANGUAGE = re.compile(r"[\w.+#-]{1,30}")


def read_notebook(raw: bytes, on_note: OnNote) -> tuple[str, str]:
    """No title, and its cells as markdown. Reads the formats 3, which has worksheets, and 4."""
    encoding = marked_encoding(raw) or "utf-8"
    text, count = decode(raw, encoding)
    if count:
        on_note(replaced(count, encoding))
    try:
        notebook = json.loads(text, strict=False)
        sheets = [notebook, *(notebook.get("worksheets") or [])]
        cells = [cell for sheet in sheets for cell in sheet.get("cells") or []]
        language = _language(notebook.get("metadata"))
        parts = [storable(part) for cell in cells for part in _markdown(cell, language)]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"a broken notebook ({type(error).__name__}: {error}); save it again in Jupyter") from error
    return "", "\n\n".join(parts)


def _language(metadata: object) -> str:
    """The language of the code, or "". It is in the text for every cell, and so only a short word counts."""
    for part, name in (("language_info", "name"), ("kernelspec", "language")):
        found = metadata.get(part) if isinstance(metadata, dict) else None
        language = found.get(name) if isinstance(found, dict) else None
        if isinstance(language, str) and _LANGUAGE.fullmatch(language):
            return language
    return ""


def _markdown(cell: dict[str, Any], language: str) -> Iterator[str]:
    """The markdown of a cell, unless it is empty. Raises TypeError for a source that is not text."""
    source = cell.get("source", cell.get("input", ""))
    text = (source if isinstance(source, str) else "".join(source)).strip("\n")
    kind = cell.get("cell_type")
    if not text.strip():
        return
    if kind == "code":
        # A fence must be longer than any in the code.
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        yield f"{fence}{language}\n{text}\n{fence}"
    elif kind == "heading":
        yield f"{'#' * min(max(1, cell.get('level', 1)), 6)} {text}"
    else:
        yield _EMBEDDED.sub("", text)
