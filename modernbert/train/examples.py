"""Typed rows that a model learns from, each checked; an error names the row by file and line.

Pairs and triples, documents with a teacher's scores, labelled texts and pairs of texts, tagged words, plain texts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np

from ..texts import Text
from .reading import Row, Source, lines, parse_rows

# Fields from which other trainers learn. All others (a title, an id) may be there and are not read.
SIGNAL = re.compile(
    r"(?i)(.*[_-]|hard)?(neg|negative|pos|positives|documents|passages|score|label|logit|margin|weight|similarity|relevance|"
    r"rating|instruction|prompt)s?([_-]?\d+)?([_-].*)?"
)
NEGATIVE = re.compile(r"negatives?|negative_\d+")
LARGEST = float(np.finfo(np.float32).max)
"""A label or a score beyond it is an infinity where it is used."""


class EmptyText(ValueError):
    """A text is empty, or white space."""


EMPTY = {False: (), True: (EmptyText,)}  # `skip_empty` as what `parse_rows` skips

Label: TypeAlias = int | float | tuple[int, ...]
"""A class, a number to regress, or the classes of a text that may have several."""


class Pair(NamedTuple):
    """A query, a document that answers it, and what else is known: documents that do not, and a teacher's scores.

    Attributes:
        source: what the row is from. group: positives of one group never serve as each other's negatives.
        negatives: documents; with `scores`, all but the first of a row.
        scores: the teacher's, of the positive and of each negative; empty without a teacher.
    """

    query: str
    positive: str
    source: str
    group: str | int
    negatives: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()


class Labelled(NamedTuple):
    """A text or a pair of texts, as `Tokenizer` takes it, and its label."""

    text: Text
    label: Label


class Tagged(NamedTuple):
    """The words of a sentence, each with its tag."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


def read_pairs(
    source: Source,
    *,
    exclude_sources: Collection[str] = (),
    names: Mapping[str, str] | None = None,
    skip_empty: bool = False,
) -> Iterator[Pair]:
    """Rows with "query" and "positive" and, optionally, "source" (default: the file's name) and "group" (default: the
    positive itself). Other fields are ignored, but not those that would change the training, such as "negatives".

    Args:
        exclude_sources: sources whose rows are left out.
        names: as in `read_rows`.
        skip_empty: leave out rows with an empty text. They are errors otherwise.

    Raises:
        ValueError: as `read_rows`; a row that is not a pair, with its place.
    """
    why = "because the positives of other pairs are the negatives here, and all pairs count alike"
    return _from_others(exclude_sources, parse_rows(source, lambda row: _pair(row, why), names, skip=EMPTY[skip_empty]))


def read_triples(
    source: Source,
    *,
    exclude_sources: Collection[str] = (),
    names: Mapping[str, str] | None = None,
    skip_empty: bool = False,
) -> Iterator[Pair]:
    """Pairs with negatives: a list "negatives", or the fields "negative", "negative_1", "negative_2" and so on.

    Raises:
        ValueError: as `read_pairs`; a row without a negative.
    """
    return _from_others(exclude_sources, parse_rows(source, _triple, names, skip=EMPTY[skip_empty]))


def read_scored(
    source: Source,
    *,
    exclude_sources: Collection[str] = (),
    names: Mapping[str, str] | None = None,
    skip_empty: bool = False,
) -> Iterator[Pair]:
    """Rows with "query", "documents" (two or more) and a teacher's "scores" of these documents.

    The first document becomes the `positive` of the pair, the others its `negatives`.

    Raises:
        ValueError: as `read_pairs`; as many scores as documents are wanted, and each a finite number.
    """
    return _from_others(exclude_sources, parse_rows(source, _scored, names, skip=EMPTY[skip_empty]))


def read_texts(source: Source, *, names: Mapping[str, str] | None = None, skip_empty: bool = False) -> Iterator[str]:
    """The "text" of each row, such as a document for masked-language modelling.

    Args:
        skip_empty: leave out rows with an empty text. They are errors otherwise.
    """
    return parse_rows(source, lambda row: _text(row.fields, "text"), names, skip=EMPTY[skip_empty])


def read_all_texts(source: Source) -> Iterator[str]:
    """Every text of each row that is not empty: its "text"; the texts of pairs, triples, and documents with scores."""
    for texts in parse_rows(source, lambda row: _all_texts(row.fields)):
        yield from (text for text in texts if text.strip())


def read_labelled(
    source: Source, *, labels: Sequence[str] = (), names: Mapping[str, str] | None = None
) -> Iterator[Labelled]:
    """Rows with "text", optionally "text_pair", and "label": the number of a class, or its name in `labels`; a list of
    them, where a text may have several or none; or a float to regress.

    Raises:
        ValueError: as `read_rows`; a row without one of these, or with a label that is not in `labels`, with its place.
    """
    return parse_rows(source, lambda row: _labelled(row, labels), names)


def read_conll(file: str | os.PathLike[str]) -> Iterator[Tagged]:
    """The sentences of a CoNLL file: a word and its tag in the first and last column of a line, divided by tabs or
    spaces, and an empty line after each sentence.

    Raises:
        ValueError: a line without a word or a tag, or not in UTF-8, with its number.
    """
    words: list[str] = []
    tags: list[str] = []
    for where, line in lines(Path(file)):
        text = decoded(where, line)
        if text.strip() and not text.startswith("-DOCSTART-"):
            columns = text.split("\t") if "\t" in text else text.split()
            if len(columns) < 2 or not columns[0] or not columns[-1].strip():
                raise ValueError(f"{where}: wanted a word and its tag, got {text!r:.60}")
            words.append(columns[0])
            tags.append(columns[-1].strip())
        elif words:
            yield Tagged(tuple(words), tuple(tags))
            words, tags = [], []
    if words:
        yield Tagged(tuple(words), tuple(tags))


def decoded(where: str, line: bytes) -> str:
    """A line of a table as text, without its end and without a byte-order mark."""
    try:
        return line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: {error}") from error


def _from_others(excluded: Collection[str], pairs: Iterator[Pair]) -> Iterator[Pair]:
    return (pair for pair in pairs if pair.source not in excluded)


def _pair(row: Row, why: str, negatives: tuple[str, ...] = ()) -> Pair:
    fields = row.fields
    if not {"query", "positive"} <= fields.keys():
        raise ValueError(f'a pair needs "query" and "positive", got keys {sorted(fields)}')
    _refuse_unread(fields, {"query", "positive"}, why)
    return _with_source(row, _text(fields, "query"), _text(fields, "positive"), negatives)


def _refuse_unread(fields: Mapping[str, object], read: set[str], why: str) -> None:
    if ignored := [name for name in fields.keys() - read if SIGNAL.fullmatch(name)]:
        raise ValueError(f'"{min(ignored)}" would be ignored, {why}: remove the field')


def _triple(row: Row) -> Pair:
    negatives: list[str] = []
    for name in sorted(filter(NEGATIVE.fullmatch, row.fields), key=lambda name: (len(name), name)):
        negatives += _texts(row.fields, name) if isinstance(row.fields[name], list) else [_text(row.fields, name)]
    if not negatives:
        raise ValueError(f'a triple needs "negatives" or "negative", got keys {sorted(row.fields)}')
    rest = {name: value for name, value in row.fields.items() if not NEGATIVE.fullmatch(name)}
    return _pair(Row(rest, row.file, row.where), "because all pairs count alike here", tuple(negatives))


def _scored(row: Row) -> Pair:
    documents, scores = _texts(row.fields, "documents"), row.fields.get("scores")
    if len(documents) < 2:
        raise ValueError(f'"documents" has {len(documents)} texts, but a teacher compares two or more')
    if not isinstance(scores, list) or len(scores) != len(documents):
        got = f"{len(scores)} of them" if isinstance(scores, list) else f"{scores!r:.60}"
        raise ValueError(f'"scores" must be a list of {len(documents)} numbers, one for each document, got {got}')
    numbers = tuple(_number(f"scores[{place}]", score) for place, score in enumerate(scores))
    _refuse_unread(
        row.fields, {"query", "documents", "scores"}, "because only the documents and their scores count here"
    )
    return _with_source(row, _text(row.fields, "query"), documents[0], tuple(documents[1:]), numbers)


def _with_source(
    row: Row, query: str, positive: str, negatives: tuple[str, ...], scores: tuple[float, ...] = ()
) -> Pair:
    source, group = row.fields.get("source", row.file), row.fields.get("group", positive)
    if not isinstance(source, str):
        raise ValueError(f'"source" must be a string, got {source!r:.60}')
    if not isinstance(group, str) and type(group) is not int:
        raise ValueError(f'"group" must be a string, got {group!r:.60}')
    f"{source}{group}".encode()  # as in `_text`
    return Pair(query, positive, source, group, negatives, scores)


def _labelled(row: Row, labels: Sequence[str]) -> Labelled:
    text: Text = _text(row.fields, "text")
    if "text_pair" in row.fields:
        text = (text, _text(row.fields, "text_pair"))
    if "label" not in row.fields:
        raise ValueError(f'"label" is missing, got keys {sorted(row.fields)}')
    return Labelled(text, label_of(row.fields["label"], labels))


def label_of(value: object, labels: Sequence[str]) -> Label:
    """A label as a row has it to a class, the classes, or a finite number. ValueError: it is none of them."""
    if isinstance(value, list):
        return tuple(_class(each, labels) for each in value)
    if isinstance(value, float) and not labels:
        return _number("label", value)
    return _class(value, labels)


def _class(value: object, labels: Sequence[str]) -> int:
    if isinstance(value, str) and value in labels:
        return labels.index(value)
    if type(value) is int and 0 <= value < (len(labels) or 1 << 31):
        return value
    known = f"one of {', '.join(labels)}, or its number" if labels else "the number of a class (names need `labels`)"
    raise ValueError(f'"label" must be {known}, got {value!r:.60}')


def _number(name: str, value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST:
        return float(value)
    raise ValueError(f'"{name}" must be a finite number, got {value!r:.60}; those beyond {LARGEST:.1e} are not')


def _all_texts(fields: Mapping[str, object]) -> list[str]:
    negatives = sorted(filter(NEGATIVE.fullmatch, fields), key=lambda name: (len(name), name))
    names = [name for name in ("text", "query", "positive", *negatives, "documents") if name in fields]
    if not names:
        raise ValueError(f'a row needs "text", or the fields of a pair, got keys {sorted(fields)}')
    return [text for name in names for text in _texts_of(fields, name)]


def _texts_of(fields: Mapping[str, object], name: str) -> list[str]:
    """A text or a list of texts, empty ones among them."""
    value = fields[name]
    texts: list[object] = value if isinstance(value, list) else [value]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f'"{name}" must be a string, or a list of them, got {wrong[0]!r:.60}')
    found = [text for text in texts if isinstance(text, str)]
    "".join(found).encode()  # as in `_text`
    return found


def _texts(fields: Mapping[str, object], name: str) -> list[str]:
    values = fields.get(name)
    if not isinstance(values, list):
        raise ValueError(f'"{name}" must be a list of strings, got {values!r:.60}')
    return [_text({f"{name}[{place}]": value}, f"{name}[{place}]") for place, value in enumerate(values)]


def _text(fields: Mapping[str, object], name: str) -> str:
    if name not in fields:
        raise ValueError(f'"{name}" is missing, got keys {sorted(fields)}')
    value = fields[name]
    if not isinstance(value, str):
        raise ValueError(f'"{name}" must be a string, got {value!r:.60}')
    value.encode()  # half a surrogate pair raises here, and not hours later in a tokenizer
    if not value.strip():
        raise EmptyText(f'"{name}" is empty')
    return value
