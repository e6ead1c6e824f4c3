"""Named entities of texts of any length, as transformers' token-classification pipeline aggregates them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..inference.encode import Modules, encode_tokens, list_of_texts
from ..packing import Tokens, pack
from ..tokenizer import TextWindow, Tokenizer
from .pairs import longest
from .token_classifier import TokenClassifier

Strategy: TypeAlias = Literal["none", "simple", "first", "average", "max"]


class FoundEntity(NamedTuple):
    """Characters `start` to before `stop` of a text, what they are, and the mean probability of their words or tokens.

    As in transformers, a word includes the space in front of it.
    """

    start: int
    stop: int
    name: str
    score: float


# The probabilities [C] of a word, of those of its tokens [N, C].
WORDS: dict[str, Callable[[Tensor], Tensor]] = {
    "first": lambda x_NC: x_NC[0],
    "average": lambda x_NC: x_NC.mean(0),
    "max": lambda x_NC: x_NC[x_NC.max(1).values.argmax()],
}
STRATEGIES = ("none", "simple", *WORDS)


def find_entities(
    model: TokenClassifier,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    strategy: Strategy = "first",
    max_length: int | None = None,
    stride: int = 0,
    batch_tokens: int | None = None,
) -> list[list[FoundEntity]]:
    """The entities of each text, in its order; "O" is none.

    A long text is read in windows. Of entities of two windows that overlap the longer one counts, or the more probable.

    Args:
        strategy: "none": each token with its whole label; "simple": tokens with the labels B-x, I-x, I-x, ... or x, x,
            ... are one entity x. "first", "average", "max": the same of words, which have the label of their first
            token, of the mean of its probabilities, or of the token with the largest one. A word begins at a space.
        max_length: tokens of a window; None: as many as the tokenizer and the encoder allow.
        stride: tokens that two windows share.
        batch_tokens: tokens of one forward pass; None: a good value for the device.

    Raises:
        TypeError, ValueError: as `list_of_texts` and `Tokenizer.encode_windows`; another strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r:.80}, but must be one of {', '.join(STRATEGIES)}")
    texts = list_of_texts(texts)
    limit = longest(tokenizer, model.base_model.config) if max_length is None else max_length
    windows = tokenizer.encode_windows(texts, max_length=limit, stride=stride)
    unknown = tokenizer.unk_token_id
    units = [_units(window, texts[window.text], unknown, strategy) for window in windows]
    if strategy == "first":  # no other row of a word leaves the last layer
        read = [{rows[0] for rows in of_window} for of_window in units]
    else:
        read = [{row for rows in of_window for row in rows} for of_window in units]
    keep = [row in rows for window, rows in zip(windows, read, strict=True) for row in range(len(window.ids))]
    batch = pack([window.ids for window in windows], vocab_size=model.base_model.config.vocab_size)
    tokens = Tokens(batch, torch.tensor(keep, dtype=torch.bool, device="cpu"))
    logits = encode_tokens(Modules(model), tokens, batch_tokens=batch_tokens)
    found: list[list[FoundEntity]] = [[] for _ in texts]
    several = {window.text for window, before in zip(windows[1:], windows, strict=False) if window.text == before.text}
    for window, rows_of_units, logits_NC in zip(windows, units, logits, strict=True):
        labelled = _labelled(window, rows_of_units, logits_NC.softmax(-1), model.labels, strategy)
        groups = labelled if strategy == "none" else _groups(labelled)
        found[window.text] += [each for each in groups if each.name != "O"]
    return [_apart(of_text) if index in several else of_text for index, of_text in enumerate(found)]


def _units(window: TextWindow, text: str, unknown: int | None, strategy: str) -> list[list[int]]:
    """The rows of each word, or of each token alone."""
    units: list[list[int]] = []
    for row, ((start, _), owner) in enumerate(zip(window.offsets, window.sequence_ids, strict=True)):
        if owner is None:
            continue
        within = start > 0 and " " not in text[start - 1 : start + 1] and window.ids[row] != unknown
        if units and within and strategy in WORDS:
            units[-1].append(row)
        else:
            units.append([row])
    return units


def _labelled(
    window: TextWindow, units: Sequence[Sequence[int]], scores_NC: Tensor, labels: Sequence[str], strategy: str
) -> list[FoundEntity]:
    """Each unit with its label; `scores_NC` are of the rows of all units, or of their first ones."""
    sizes = [1 if strategy == "first" else len(rows) for rows in units]
    found = []
    for rows, x_NC in zip(units, scores_NC.split(sizes), strict=True):
        best = WORDS.get(strategy, WORDS["first"])(x_NC).max(0)
        start, stop = window.offsets[rows[0]][0], window.offsets[rows[-1]][1]
        found.append(FoundEntity(start, stop, labels[int(best.indices)], best.values.item()))
    return found


def _groups(labelled: Sequence[FoundEntity]) -> list[FoundEntity]:
    """Neighbours of one name as one entity, unless the second begins another."""
    groups: list[list[FoundEntity]] = []
    for each in labelled:
        begins, name = _parsed(each.name)
        if groups and not begins and _parsed(groups[-1][-1].name)[1] == name:
            groups[-1].append(each)
        else:
            groups.append([each])
    return [
        FoundEntity(
            group[0].start,
            group[-1].stop,
            group[0].name.split("-", 1)[-1],
            sum(each.score for each in group) / len(group),
        )
        for group in groups
    ]


def _parsed(label: str) -> tuple[bool, str]:
    """Whether a label begins an entity, and the name of that."""
    return (label[:2] == "B-", label[2:]) if label[:2] in ("B-", "I-") else (False, label)


def _apart(found: Sequence[FoundEntity]) -> list[FoundEntity]:
    """The entities of all windows of a text without those that overlap a better one."""
    kept: list[FoundEntity] = []
    for each in sorted(found, key=lambda entity: entity.start):
        if not kept or not kept[-1].start <= each.start < kept[-1].stop:
            kept.append(each)
        elif (each.stop - each.start, each.score) > (kept[-1].stop - kept[-1].start, kept[-1].score):
            kept[-1] = each
    return kept
