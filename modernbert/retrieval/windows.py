"""Windows: passages with their context, as a model reads them. Every token of a document belongs to one passage.

A section that fits into the model is one passage, encoded as by `ColBERT.encode_documents`. A longer section is cut at
paragraphs, list items and sentences. The model then reads a window: the title, the passage, and up to `OVERLAP`
tokens of text on either side, whose rows are dropped. MaxSim scores each passage alone, so nothing is merged later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..heads.colbert import ColBERT
from ..packing import Tokens, pack
from . import spelling
from .passages import CONVERTED, PAGE_BREAK, PAGES, SECTION, TITLE, Document, Passage, border, cut, merged_sections

Tokenize = Callable[[Sequence[str]], Tokens]
"""All of each text to its tokens, with their spans."""

OVERLAP = 16
"""Tokens of context on either side of a passage. 0, 16 and 32 gave the same nDCG@10 within 0.006 (cranfield, cacm)."""

FEWEST = 12
"""Words of a section that is not merged with its neighbours, if the model reads 16 times as many tokens."""

BLOCK = 1 << 18
"""Bytes tokenised at a time. A longer section is first cut into blocks, at white space and without overlap."""

BLOCK_ENDS = ("\n\n", ".\n", ". ", "。", "\n", " ")
"""Where a block may end, best first."""

NOWHERE = (0, 0)
"""The span of a row without text of the passage: [CLS], the prefix, [SEP], context."""


class Window(NamedTuple):
    """A passage and the tokens that the model reads.

    Attributes:
        ids: `[n]` int64. keep: `[n]` bool, the rows that are scored.
        spans: `[n, 2]` int64, the characters of `passage.content` that a row stands for, or `NOWHERE`.
    """

    passage: Passage
    ids: np.ndarray
    keep: np.ndarray
    spans: np.ndarray


def windows(colbert: ColBERT, documents: Iterable[Document]) -> Iterator[Window]:
    """The windows of documents, in order. An empty document has none; one that fits into the model has one."""
    whole = partial(spelling.tokenize, partial(colbert.tokenize_documents, truncate=False))
    return cut_documents(documents, whole, colbert.config.document_length)


def cut_documents(documents: Iterable[Document], tokenize: Tokenize, limit: int) -> Iterator[Window]:
    """The windows of documents for any model that reads `limit` tokens, special tokens and all."""
    fewest = min(FEWEST, limit // 16)
    parts = chain.from_iterable(_parts(document, fewest) for document in documents)
    while group := _group(parts):
        for whole in _tokenize(tokenize, group):
            yield from _cut(whole, limit)


def batch(windows: Sequence[Window]) -> Tokens:
    """The tokens of windows, to be encoded. Their spans are left out."""
    keep = torch.from_numpy(np.concatenate([window.keep for window in windows]))
    return Tokens(pack([window.ids.tolist() for window in windows]), keep, [])


def _parts(document: Document, fewest: int) -> Iterator[Passage]:
    """The sections of a document as passages. Sections longer than `BLOCK` are cut, and titles longer than `TITLE`."""
    text, here = document.text, _beginning(document)
    for title, start, end in merged_sections(document, fewest):
        here = _moved(here, text[here.start : start])
        if len(title) > TITLE:  # It becomes a part of the text, once and not in each block.
            for first, last in _blocks(title, 0, len(title)):
                yield replace(here, text=title[first:last])
            title = ""
        for first, last in _blocks(text, start, end):
            here = _moved(here, text[here.start : first])
            if title or first < last:
                yield replace(here, title=title, text=text[first:last], end=last)


def _beginning(document: Document) -> Passage:
    """A passage without text at the beginning of a document: in a line of its file, on a page, or in neither."""
    suffix = Path(document.path).suffix.lower()
    is_record = document.line is not None
    line = document.line if is_record or suffix in CONVERTED else 1
    page = 1 if suffix in PAGES and not is_record else None
    return Passage(document.path, document.id, "", "", 0, 0, line, document.metadata, page)


def _moved(passage: Passage, over: str) -> Passage:
    """The place of a passage that begins after the text `over`. A record is in one line of its file."""
    line, page, start = passage.line, passage.page, passage.start + len(over)
    if line and passage.id == passage.path:
        line += over.count("\n")
    if page:
        page += over.count(PAGE_BREAK)
    return replace(passage, line=line, page=page, start=start, end=start)


def _blocks(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Characters `start` to `end` in runs of at most `BLOCK` bytes, cut after paragraphs or sentences if possible."""
    most = BLOCK if text.isascii() else BLOCK // 4  # A character has up to four bytes, and each may be a token.
    while end - start > most:
        half = start + most // 2
        stops = (text.rfind(mark, half, start + most) + len(mark) for mark in BLOCK_ENDS)
        stop = next((stop for stop in stops if stop > half), start + most)
        yield start, stop
        start = stop
    yield start, end


def _group(parts: Iterator[Passage]) -> list[Passage]:
    """The next parts, about `BLOCK` bytes together, so that one call tokenises many short ones."""
    group, size = [], 0
    for part in parts:
        group.append(part)
        size += SECTION + len(part.content.encode())
        if size >= BLOCK:
            break
    return group


def _tokenize(tokenize: Tokenize, passages: Sequence[Passage]) -> Iterator[Window]:
    """Each passage as one window of any length."""
    tokens = tokenize([passage.content for passage in passages])
    ids, keeps = [rows.split(tokens.batch.lengths) for rows in (tokens.batch.input_ids, tokens.keep)]
    spans = [np.array([span or NOWHERE for span in row]) for row in tokens.spans]
    del tokens  # As Python objects, the spans take many times as much memory.
    for passage, row_ids, keep, row in zip(passages, ids, keeps, spans, strict=True):
        yield Window(passage, row_ids.numpy(), keep.numpy(), row)


def _cut(whole: Window, limit: int) -> Iterator[Window]:
    """Cut a passage of any length into windows of at most `limit` tokens."""
    passage, ids, keep, spans = whole
    if len(ids) <= limit:
        yield whole
        return
    content, title = passage.content, passage.title
    shift = len(content) - len(passage.text)  # where the text begins in the content
    worded = np.flatnonzero(spans[:, 1])
    first, last = int(np.argmax(spans[:, 1] > shift)), int(worded[-1]) + 1  # the rows of the text
    if first > limit // 2:  # A title that leaves little room becomes part of the text.
        first, title = int(worded[0]), ""
    header = len(title) + 1 if title else 0
    room = limit - first - (len(ids) - last)
    overlap = min(OVERLAP, room // 8)
    ends = np.maximum.accumulate(
        spans[first:last, 1]
    )  # a row without characters is empty, at the end of the row before
    starts = np.where(spans[first:last, 1] > 0, spans[first:last, 0], ends)
    limit = room - 2 * overlap
    end = 0 if title != passage.title else shift
    for start, stop in cut(content, list(zip(starts.tolist(), ends.tolist(), strict=True)), limit):
        begin, end = end, len(content)
        if first + stop < last:
            end = max(begin, border(content, int(ends[stop - 1]), int(starts[stop])).at)
        text = content[begin:end]
        begin += len(text) - len(text.lstrip())
        text = text.strip()
        before, after = max(first, first + start - overlap), min(last, first + stop + overlap)
        rows = np.r_[0:first, before:after, last : len(ids)]
        context = (rows >= before) & (rows < after) & ~((rows >= first + start) & (rows < first + stop))
        inside = (rows >= first + start) & (rows < first + stop) & (spans[rows, 1] > 0)
        piece_spans = np.where(inside[:, None], (spans[rows] - begin).clip(0, len(text)) + header, spans[rows])
        piece_spans[context | (piece_spans[:, 0] == piece_spans[:, 1])] = NOWHERE
        from_text, to_text = (max(0, character - shift) for character in (begin, begin + len(text)))
        place = _moved(passage, passage.text[:from_text])
        piece = replace(place, title=title, text=text, end=passage.start + to_text)
        yield Window(piece, ids[rows], keep[rows] & ~context, piece_spans)
