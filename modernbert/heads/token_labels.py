"""Labels of words and of characters to labels of tokens, and results of tokens back to words and entities.

Tokens come from `Tokenizer.encode_windows`, so that no word of a long text is lost. A word has its label at its first
token; the others have none, unless they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..tokenizer import TextWindow
from .prediction import IGNORED


class Entity(NamedTuple):
    """What is from `start` to before `stop`, in words or in characters, without "B-" or "I-"."""

    start: int
    stop: int
    name: str


def rows_of_words(window: TextWindow) -> dict[int, list[int]]:
    """The rows of each word that begins in a window of a text that was split into words, by the index of the word.

    A word of which a window has only the end is left out of it: an earlier window has its beginning. Offsets tell, so a
    word that is cut inside of its first character (of several tokens, such as an emoji) begins in both.
    """
    rows: dict[int, list[int]] = {}
    for row, word in enumerate(window.word_ids):
        if word is not None:
            rows.setdefault(word, []).append(row)
    first = next(iter(rows), None)
    if first is not None and window.offsets[rows[first][0]][0] > 0:  # offsets are in the word
        del rows[first]
    return rows


def labels_of_words(window: TextWindow, labels: Sequence[int], *, every_token: bool = False) -> list[int]:
    """For each token of a window the label of the word that begins there, or IGNORED.

    Args:
        window: of `Tokenizer.encode_windows(..., is_split_into_words=True)`.
        labels: of each word of the whole text.
        every_token: all tokens of a word have its label.

    Raises:
        ValueError: the window has a word without a label.
    """
    found = [IGNORED] * len(window.ids)
    for word, rows in rows_of_words(window).items():
        if word >= len(labels):
            raise ValueError(f"text {window.text}: word {word} has no label, because there are {len(labels)}")
        for row in rows if every_token else rows[:1]:
            found[row] = labels[word]
    return found


def labels_of_spans(window: TextWindow, spans: Sequence[tuple[int, int, str]], ids: Mapping[str, int]) -> list[int]:
    """For each token of a window the label of the span that it touches, "O" outside of them; IGNORED for [CLS], [SEP].

    The first token of a span has the label "B-name" and the others "I-name", or "name" where `ids` has no such labels.

    Args:
        window: of `Tokenizer.encode_windows` of a text that is not split into words.
        spans: `(start, stop, name)` in characters of the text, none over another.
        ids: the id of each label, as in `label2id`.

    Raises:
        ValueError: a span that is empty or over another, or a name without a label.
    """
    if "O" not in ids:
        raise ValueError(f"ids has no 'O', the label of what is outside of spans: {', '.join(ids)}")
    spans = sorted(spans)
    for index, (start, stop, name) in enumerate(spans):
        if start >= stop or (index and start < spans[index - 1][1]):
            raise ValueError(f"text {window.text}: the span {start} to {stop} is empty or over another one")
        if not {f"B-{name}", f"I-{name}"} <= ids.keys() and name not in ids:
            raise ValueError(f"text {window.text}: {name!r} is not among the labels {', '.join(ids)}")
    found: list[int] = []
    before: tuple[int, int, str] | None = None
    for (start, stop), owner in zip(window.offsets, window.sequence_ids, strict=True):
        if owner is None or start == stop:
            found.append(IGNORED)
            continue
        touched = next((span for span in spans if span[0] < stop and start < span[1]), None)
        if touched is None:
            found.append(ids["O"])
        else:
            # A token includes the space in front of its word, so the first of a span may begin before it.
            prefix = "B" if start <= touched[0] and touched != before else "I"
            found.append(ids.get(f"{prefix}-{touched[2]}", ids.get(touched[2], IGNORED)))
        before = touched
    return found


def scores_of_words(
    windows: Sequence[TextWindow], scores: Sequence[Tensor], *, how: Literal["first", "mean", "max"] = "first"
) -> Tensor:
    """The windows of one text and the scores of their tokens, `[n_i, C]` each, to `[W, C]`, in the order of its words.

    Args:
        how: the scores of a word are those of its "first" token, or the "mean" or "max" over its tokens.

    Raises:
        ValueError: another `how`, other scores than tokens, or a word without a token, such as an empty one.
    """
    if how not in HOW:
        raise ValueError(f"how is {how!r:.80}, but must be one of {', '.join(HOW)}")
    found: dict[int, tuple[int, Tensor]] = {}
    for index, (window, scores_TC) in enumerate(zip(windows, scores, strict=True)):
        if len(scores_TC) != len(window.ids):
            raise ValueError(f"window {index} has {len(window.ids)} tokens, but scores of {len(scores_TC)}")
        for word, rows in rows_of_words(window).items():
            # Windows may share a word. The first that has most of it also has the most text in front of it.
            if word not in found or len(rows) > found[word][0]:
                found[word] = len(rows), HOW[how](scores_TC[rows])
    words = max(found, default=-1) + 1
    if missing := sorted(set(range(words)) - found.keys()):
        raise ValueError(f"word {missing[0]} has no token: leave out empty words before tokenising")
    return torch.stack([found[word][1] for word in range(words)]) if words else torch.zeros(0, 0, device="cpu")


HOW: dict[str, Callable[[Tensor], Tensor]] = {
    "first": lambda x_NC: x_NC[0],
    "mean": lambda x_NC: x_NC.mean(0),
    "max": lambda x_NC: x_NC.max(0).values,
}

PREFIXES = ("B", "I", "E", "S")
"""Begin, inside, end, single: of the schemes BIO, IOB, and BIOES."""


def entities(labels: Sequence[str]) -> list[Entity]:
    """The entities in the labels of the words of a text, such as "B-person", "I-person" and "O".

    As `conlleval` and `seqeval` count them: an "I-" after another name, or after "O", begins an entity too.
    """
    found: list[Entity] = []
    for place, label in enumerate(labels):
        if label == "O":
            continue
        prefix, _, name = label.partition("-")
        if prefix not in PREFIXES or not name:
            prefix, name = "I", label  # a scheme without prefixes
        if prefix in "IE" and found and found[-1].stop == place and found[-1].name == name:
            found[-1] = Entity(found[-1].start, place + 1, name)
        else:
            found.append(Entity(place, place + 1, name))
    return found
