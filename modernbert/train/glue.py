"""Tasks of GLUE in its own TSV layout: quotes are characters like any other, and CoLA has no header."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .examples import Labelled, decoded
from .reading import lines


class Task(NamedTuple):
    """Where a task has its texts and its label.

    Attributes:
        columns: names of all columns, where the files do not begin with them.
        texts: the names of one or two columns. label: the name of one.
        labels: names of the classes in the order of their numbers; empty for a number to regress.
    """

    texts: tuple[str, ...]
    label: str
    labels: tuple[str, ...] = ("0", "1")
    columns: tuple[str, ...] = ()


TASKS = {
    "CoLA": Task(("sentence",), "label", columns=("source", "label", "mark", "sentence")),
    "MRPC": Task(("#1 String", "#2 String"), "Quality"),
    "RTE": Task(("sentence1", "sentence2"), "label", ("entailment", "not_entailment")),
    "SST-2": Task(("sentence",), "label"),
    "STS-B": Task(("sentence1", "sentence2"), "score", ()),
}


def read_glue(file: str | os.PathLike[str], task: str) -> Iterator[Labelled]:
    """The rows of a `train.tsv` or `dev.tsv` of one of `TASKS`.

    Raises:
        ValueError: an unknown task, a file without its columns, or a row with another number of columns, an empty text
            or another label, with its line.
    """
    if task not in TASKS:
        raise ValueError(f"{task!r} is not one of {', '.join(TASKS)}")
    about = TASKS[task]
    columns = list(about.columns)
    for where, line in lines(Path(file)):
        cells = decoded(where, line).split("\t")
        if not columns:
            columns = cells
            if len(set(columns)) < len(columns):
                raise ValueError(f"{where}: a column is there twice, got {', '.join(columns)}")
            if missing := {*about.texts, about.label} - set(columns):
                raise ValueError(f"{where}: {task} has a column {min(missing)!r}, the file has {', '.join(columns)}")
            continue
        if len(cells) != len(columns):
            raise ValueError(f"{where}: {len(columns)} columns are wanted, got {len(cells)}")
        row = dict(zip(columns, cells, strict=True))
        yield _labelled(where, row, about)


def _labelled(where: str, row: dict[str, str], about: Task) -> Labelled:
    texts, label = [row[name].strip() for name in about.texts], row[about.label].strip()
    for name, text in zip(about.texts, texts, strict=True):
        if not text:
            raise ValueError(f"{where}: {name!r} is empty")
    text = (texts[0], texts[1]) if len(texts) == 2 else texts[0]
    if about.labels:
        if label not in about.labels:
            raise ValueError(f"{where}: {about.label!r} is {label!r}, but must be one of {', '.join(about.labels)}")
        return Labelled(text, about.labels.index(label))
    try:
        score = float(label)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"{where}: {about.label!r} is {label!r}, but must be a number")
    return Labelled(text, score)
