"""Jupyter notebooks as markdown: text as it is, code between fences, without the results of running it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from .text import OnNote, decode, marked_encoding, replaced, storable

_EMBEDDED = re.compile(r"\(data:[\w/+.-]+;base64,[\w+/=\s]*\)")
"""The data of an image inside a cell: thousands of characters that are not words."""


def read_notebook(raw: bytes, on_note: OnNote) -> tuple[str, str]:
    """No title, and its cells as markdown. Reads the formats 3, which has worksheets, and 4."""
    encoding = marked_encoding(raw) or "utf-8"
    text, count = decode(raw, encoding)
    if count:
        on_note(replaced(count, encoding))
    try:
        notebook = json.loads(text, strict=False)
        cells = [cell for sheet in [notebook, *notebook.get("worksheets", [])] for cell in sheet.get("cells", [])]
        metadata = notebook.get("metadata") or {}
        kernel = (metadata.get("kernelspec") or {}).get("language", "")
        language = (metadata.get("language_info") or {}).get("name", kernel)
        parts = [storable(part) for cell in cells for part in _markdown(cell, str(language))]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"a broken notebook ({type(error).__name__}: {error}); save it again in Jupyter") from error
    return "", "\n\n".join(parts)


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
        yield f"{'#' * cell.get('level', 1)} {text}"
    else:
        yield _EMBEDDED.sub("()", text)
