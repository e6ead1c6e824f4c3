"""Labels of words and of characters to labels of tokens, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..tokenizer import Encoding, TextWindow

IGNORED = -100


def labels_of_words(window: TextWindow, labels: Sequence[int], *, every_token: bool = False) -> list[int]:
    """Per token of `Tokenizer.encode_windows(words, is_split_into_words=True)` the label of the word that it begins;
    IGNORED for others (`every_token`: all tokens of a word have its label).
    """
    raise NotImplementedError


def labels_of_spans(
    encoding: Encoding | TextWindow, spans: Sequence[tuple[int, int, str]], label2id: Mapping[str, int]
) -> list[int]:
    """Per token the id of B-name or I-name (or name) of the span of characters that it is in, else of "O"."""
    raise NotImplementedError


def scores_of_words(window: TextWindow, scores_TC: Tensor, *, how: str = "first") -> dict[int, Tensor]:
    """For each word of which the window has the beginning its scores `[C]`: of its "first" token, "mean" or "max"."""
    raise NotImplementedError


def spans_of_labels(names: Sequence[str]) -> list[tuple[int, int, str]]:
    """The entities `(start, stop, name)`, in words, of a list of BIO labels of words (as conlleval counts them)."""
    raise NotImplementedError
