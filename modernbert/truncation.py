"""Texts that a model reads only in part: one warning a call, with the first of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .packing import Tokenized


class TruncationWarning(UserWarning):
    """Some texts were longer than what the model reads, and were truncated."""


class Cut(NamedTuple):
    """The first text of a call that is longer than the model reads.

    Attributes:
        index: of the text. length: its tokens, as far as they were looked at. read: how many of them the model reads.
        count: of the texts like this one, among the first `seen` texts.
    """

    index: int
    length: int
    read: int
    count: int
    seen: int

    def warn(self, name: str) -> None:
        """A TruncationWarning about the text `name`."""
        among = f" ({self.count:,} of {self.seen:,} texts are longer than it reads)" if self.seen > 1 else ""
        what = f"{name} has at least {self.length:,} tokens, of which the model reads {self.read:,}{among}"
        warnings.warn(f"{what}: split or shorten it", TruncationWarning, stacklevel=3)


def find_cut(tokens: Tokenized, before: int = 0) -> Cut | None:
    """What was cut of `tokens`, which follow `before` texts that were read whole."""
    cut = [index for index, count in enumerate(tokens.truncated) if count]
    if not cut:
        return None
    read = tokens.batch.lengths[cut[0]]
    return Cut(before + cut[0], read + tokens.truncated[cut[0]], read, len(cut), before + len(tokens))


def warn_if_cut(tokens: Tokenized, name: Callable[[int], str]) -> None:
    """One TruncationWarning if a text of `tokens` was cut; `name` gives that of a text by its index."""
    if cut := find_cut(tokens):
        cut.warn(name(cut.index))


def watched(parts: Iterable[Tokenized], on_cut: Callable[[Cut], None]) -> Iterator[Tokenized]:
    """The parts of one call; `on_cut` is called once, for the first text that was cut."""
    seen, found = 0, False
    for tokens in parts:
        if not found and (cut := find_cut(tokens, seen)):
            found = True
            on_cut(cut)
        seen += len(tokens)
        yield tokens
