"""What a tokenizer is given: texts and lists of words, checked, lower-cased, with offsets that still fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, TypeAlias

import tokenizers

Text: TypeAlias = str | tuple[str, str]
Words: TypeAlias = Sequence[str] | tuple[Sequence[str], Sequence[str]]
"""A text, or a pair of texts, that is split into words already."""

Offsets: TypeAlias = list[tuple[int, int]]


def checked(texts: str | Iterable[Text] | Iterable[Words]) -> list[Text]:
    if isinstance(texts, (bytes, Mapping, Set, tuple)) or not isinstance(texts, Iterable):
        raise TypeError(f"wanted a str or a list of str and pairs, got {type(texts).__name__} {texts!r:.60}")
    batch: list[Any] = [texts] if isinstance(texts, str) else list(texts)
    for index, text in enumerate(batch):
        for part in text if isinstance(text, tuple) and len(text) == 2 else (text,):
            if not isinstance(part, str):
                got = f"{type(part).__name__} {part!r:.60}"
                raise TypeError(f"texts[{index}]: wanted a str or a (str, str) pair, got {got}")
            check_unicode(index, part)
    return batch


def checked_words(texts: Any) -> list[Words]:
    """Lists of words as a list of them, and one list of words as the only one."""
    if isinstance(texts, (str, bytes, Mapping, Set)) or not isinstance(texts, Iterable):
        raise TypeError(f"wanted a list of words or a list of such lists, got {type(texts).__name__} {texts!r:.60}")
    batch = list(texts)
    batch = [batch] if batch and isinstance(batch[0], str) else batch
    for index, text in enumerate(batch):
        for words in _parts(text):
            if isinstance(words, (str, bytes, Mapping, Set)) or not isinstance(words, Iterable):
                got = f"{type(words).__name__} {words!r:.60}"
                raise TypeError(f"texts[{index}]: wanted a list of words or a pair of such lists, got {got}")
            for place, word in enumerate(words):
                if not isinstance(word, str):
                    got = f"{type(word).__name__} {word!r:.60}"
                    raise TypeError(f"texts[{index}]: word {place} must be a str, got {got}")
                check_unicode(index, word)
    return [(list(text[0]), list(text[1])) if _is_pair(text) else list(text) for text in batch]


def _is_pair(text: Text | Words) -> bool:
    return isinstance(text, tuple) and len(text) == 2 and not any(isinstance(part, str) for part in text)


def _parts(text: Any) -> Sequence[Any]:
    """The texts of a pair, or the only one, that are split into words."""
    return text if _is_pair(text) else (text,)


def check_unicode(index: int, text: str) -> None:
    """Raise ValueError, with the index of the text, for half a surrogate pair in it."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"texts[{index}] has half a surrogate pair at character {error.start}"
        raise ValueError(f"{where}; repair it: text.encode('utf-8', 'replace').decode()") from error


def lower_cased(text: Any) -> Any:
    """A `Text`, or `Words` that `checked_words` has seen, in lower case."""
    if isinstance(text, str):
        return text.lower()
    return type(text)(map(lower_cased, text))


def offsets_before_lower(text: Text | Words, whole: tokenizers.Encoding) -> Offsets:
    """Offsets in the lower-cased text to offsets in `text`: a few characters get longer ("İ" becomes two)."""
    texts = text if isinstance(text, tuple) else (text,)
    # Offsets are in a text, or in a word of one. `first` is where the words of each text begin among all parts.
    parts = [part for one in texts for part in ((one,) if isinstance(one, str) else one)]
    if all(len(part) == len(part.lower()) for part in parts):
        return whole.offsets
    first = (0, 1) if isinstance(texts[0], str) else (0, len(texts[0]))
    inside = [0] * len(whole) if isinstance(texts[0], str) else whole.word_ids
    origins = [[at for at, char in enumerate(part) for _ in char.lower()] for part in parts]
    offsets: Offsets = []
    for (start, end), owner, word in zip(whole.offsets, whole.sequence_ids, inside, strict=True):
        if owner is None or word is None or start == end:
            offsets.append((0, 0))
        else:
            origin = origins[first[owner] + word]
            offsets.append((origin[start], origin[end - 1] + 1))
    return offsets
