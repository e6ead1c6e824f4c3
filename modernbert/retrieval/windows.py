"""Windows: passages with their context, as a model reads them. Every token of a document belongs to one passage.

A section that fits into the model is one passage, encoded as by `ColBERT.encode_documents`. A longer section is cut at
paragraphs, list items and sentences. The model then reads a window: the title, the passage, and up to `OVERLAP`
tokens of text on either side, whose rows are dropped. MaxSim scores each passage alone, so nothing is merged later.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from ..heads.colbert import ColBERT
from ..packing import Tokens, pack
from .passages import SECTION, TITLE, Document, Passage, cut, sections
from .spelling import tokenize

OVERLAP = 16
"""Tokens of context on either side of a passage. 0, 16 and 32 gave the same nDCG@10 within 0.006 (cranfield, cacm)."""

BLOCK = 1 << 18
"""Bytes tokenised at a time. A longer section is first cut into blocks, at white space and without overlap."""

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
    parts = chain.from_iterable(map(_parts, documents))
    while group := _group(parts):
        for whole in _tokenize(colbert, group):
            yield from _cut(whole, colbert.config.document_length)


def batch(windows: Sequence[Window]) -> Tokens:
    """The tokens of windows, to be encoded. Their spans are left out."""
    keep = torch.from_numpy(np.concatenate([window.keep for window in windows]))
    return Tokens(pack([window.ids.tolist() for window in windows]), keep, [])


def _parts(document: Document) -> Iterator[Passage]:
    """The sections of a document as passages. Sections longer than `BLOCK` are cut, and titles longer than `TITLE`."""
    path, name, text, line, counted = document.path, document.id, document.text, document.line or 1, 0
    for title, start, end in sections(document):
        if document.line is None:
            line, counted = line + text.count("\n", counted, start), start
        if len(title) > TITLE:  # It becomes a part of the text, once and not in each block.
            for first, last in _blocks(title, 0, len(title)):
                yield Passage(path, name, "", title[first:last], start, start, line, document.metadata)
            title = ""
        for first, last in _blocks(text, start, end):
            if document.line is None:
                line, counted = line + text.count("\n", counted, first), first
            if title or first < last:
                yield Passage(path, name, title, text[first:last], first, last, line, document.metadata)


def _blocks(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Characters `start` to `end` in runs of at most `BLOCK` bytes, cut at white space."""
    most = BLOCK if text.isascii() else BLOCK // 4  # A character has up to four bytes, and each may be a token.
    while end - start > most:
        space = max(text.rfind(blank, start + 1, start + most) for blank in " \n")
        stop = start + most if space < 0 else space
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


def _tokenize(colbert: ColBERT, passages: Sequence[Passage]) -> Iterator[Window]:
    """Each passage as one window of any length."""
    whole = partial(colbert.tokenize_documents, truncate=False)
    tokens = tokenize(whole, [passage.content for passage in passages])
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
    is_record = passage.id != passage.path  # a record is one line of its file
    header = len(title) + 1 if title else 0
    room = limit - first - (len(ids) - last)
    overlap = min(OVERLAP, room // 8)
    ends = np.maximum.accumulate(
        spans[first:last, 1]
    )  # a row without characters is empty, at the end of the row before
    starts = np.where(spans[first:last, 1] > 0, spans[first:last, 0], ends)
    for start, stop in cut(content, list(zip(starts.tolist(), ends.tolist(), strict=True)), room - 2 * overlap):
        text = content[starts[start] : ends[stop - 1]]
        begin = int(starts[start]) + len(text) - len(text.lstrip())
        text = text.strip()
        before, after = max(first, first + start - overlap), min(last, first + stop + overlap)
        rows = np.r_[0:first, before:after, last : len(ids)]
        context = (rows >= before) & (rows < after) & ~((rows >= first + start) & (rows < first + stop))
        inside = (rows >= first + start) & (rows < first + stop) & (spans[rows, 1] > 0)
        piece_spans = np.where(inside[:, None], (spans[rows] - begin).clip(0, len(text)) + header, spans[rows])
        piece_spans[context] = NOWHERE
        from_text, to_text = (max(0, character - shift) for character in (begin, begin + len(text)))
        piece = replace(
            passage,
            title=title,
            text=text,
            start=passage.start + from_text,
            end=passage.start + to_text,
            line=passage.line + (0 if is_record else passage.text.count("\n", 0, from_text)),
        )
        yield Window(piece, ids[rows], keep[rows] & ~context, piece_spans)
