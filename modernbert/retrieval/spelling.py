"""The form of a text that a model reads: a word has one form, however a file or a question spells it.

Files spell the same word in many ways: with soft hyphens and zero-width spaces inside, with the ligatures of a PDF,
with a no-break space beside it, in full-width letters, broken at the end of a line. This module undoes that where text
becomes tokens, for documents and queries alike, and nowhere else. So readers, stores, hits and pages keep the text as
the file has it, and the spans of tokens are characters of that text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from ..packing import Span, Tokens

INSIDE_WORDS = "\u00ad\u200b-\u200d\u2060\ufeff"
"""Invisible characters that may be inside a word, for a class of a regular expression."""

# Also marks of direction, variation selectors, and what surrounds annotations.
_INVISIBLE = (
    "\u00ad\u034f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufe00-\ufe0f\ufeff\ufff9-\ufffb"
    "\U000e0100-\U000e01ef"
)
_JOINERS = "\u200c\u200d"
# Scripts that write words with joiners, from Arabic to Mongolian, and emoji, which are composed with them.
_JOINED = "\u0600-\u08ff\u0900-\u1cff\ua800-\uabff\ufb50-\ufdff\ufe0f\ufe70-\ufefc\u2190-\u2bff\U0001f000-\U0001ffff"
# Characters whose compatible form (NFKC) means the same within a text: spaces, ligatures and digraphs, letters of
# mathematics, Roman numerals, units, full and half width, radicals for ideographs, presentation forms of Hebrew and
# Arabic. Others are left as they are: NFKC makes 21/2 of 2½.
_COMPATIBLE = (
    "\u00a0\u00b5\u0132\u0133\u017f\u01c4-\u01cc\u01f1-\u01f3\u2000-\u200a\u202f\u205f\u2102\u2103\u2109-\u2113\u2115"
    "\u2116\u2119-\u211d\u2124\u2128\u212c\u212d\u212f-\u2134\u2160-\u217f\u2f00-\u2fd5\u3000\u3300-\u33ff"
    "\ufb00-\ufb06\ufb13-\ufb17\ufb1d-\ufb4f\ufb50-\ufc5d\ufc64-\ufdf9\ufdfc\ufe50-\ufe6b\ufe80-\ufefc\uff01-\uff9f"
    "\uffe0-\uffe2\uffe4-\uffe6\U0001d400-\U0001d7ff"
)
_RAISED = "\u00b2\u00b3\u00b9\u2070\u2074-\u2079\u2080-\u2089"  # digits above and below the line
_HYPHENS = "-\u2010\u2011"
# What a line may end with inside a word, beside a hyphen: U+00AC in texts of libraries, U+0002 and U+FFFE of PDFium.
_SOFT = "\u00ad\u00ac\x02\ufffe"
# TeX prints some accents as a character before the letter; between the two, a PDF may have a space.
_ACCENTS = {"\u00a8": "\u0308", "\u02c6": "\u0302", "\u02dc": "\u0303", "\u02c7": "\u030c", "\u02d8": "\u0306"}

_LETTER = r"[^\W\d_]"
_ASCII = re.compile("[-\x02]")
_GONE = re.compile(f"[{_INVISIBLE}]")
_KEPT_JOINER = re.compile(f"[{_JOINED}]")
_SPECIAL = re.compile(  # Each part begins with a class of characters, which makes the search fast.
    rf"[{_HYPHENS}{_SOFT}](?<={_LETTER}.)[ \t]*\r?\n\f?[ \t]*(?={_LETTER})"
    rf"|[{_INVISIBLE}]+|[{_JOINERS}]+|[{_RAISED}]+|[{_HYPHENS[1:]}]|[{_COMPATIBLE}][\uff9e\uff9f]?"
    rf"|[{''.join(_ACCENTS)}](?:(?<=\w.) )?[A-Za-z\u0131]"
)

# For words that may be compounds. Letters are only looked at from the beginning of a word, and so not twice.
_BROKEN = re.compile(rf"(?<!{_LETTER}){_LETTER}+[{_HYPHENS}][ \t]*\r?\n\f?[ \t]*{_LETTER}+")
_WORD = re.compile(f"{_LETTER}+")
_COMPOUND = re.compile(rf"(?<!{_LETTER})({_LETTER}+)[{_HYPHENS}](?=({_LETTER}+))")
# A hyphen in front of one of these belongs to a shortened word: "pre- and post-war", "Vor- und Nachteile".
_CONJUNCTIONS = frozenset(re.findall(r"\w+", "and or to nor und oder bis bzw sowie et ou en of e o y och og"))
_LONGEST = 100  # letters of each half of a broken word


class Spelling:
    """A text in the form that a model reads.

    Attributes:
        text: that form.
    """

    def __init__(self, shown: str) -> None:
        self._shown = shown
        pieces: list[str] = []
        # For each piece: its beginning in the form, in the text as shown, and its end there, or 0 if it is unchanged.
        self._pieces: list[tuple[int, int, int]] = []
        at = length = 0
        is_plain = shown.isascii() and not _ASCII.search(shown)
        for match in () if is_plain else _SPECIAL.finditer(shown):
            new = self._form(match)
            if new == match.group():
                continue
            first, last = match.span()
            pieces += [shown[at:first], new]
            self._pieces += [(length, at, 0), (length + first - at, first, last)]
            length += first - at + len(new)
            at = last
        self._pieces.append((length, at, 0))
        self.text = "".join([*pieces, shown[at:]]) if pieces else shown

    def locate(self, spans: Sequence[Span]) -> list[Span]:
        """Spans of characters of the form, to those of the text as shown. Spans must not be empty."""
        named = [span for span in spans if span]
        if len(self._pieces) == 1 or not named:
            return list(spans)
        begins, shown, ends = np.array(self._pieces).T
        first, last = np.array(named).T
        last = last - 1
        piece, final = (np.searchsorted(begins, at, side="right") - 1 for at in (first, last))
        starts = shown[piece] + np.where(ends[piece] > 0, 0, first - begins[piece])
        stops = np.where(ends[final] > 0, ends[final], shown[final] + last + 1 - begins[final])
        found = zip(starts.tolist(), stops.tolist(), strict=True)
        return [next(found) if span else None for span in spans]

    def _form(self, match: re.Match[str]) -> str:
        """What a model reads in place of special characters."""
        found, before = match.group(), self._shown[max(0, match.start() - 1) : match.start()]
        if "\n" in found:
            return "" if self._is_one_word(match) else found
        if _GONE.match(found):
            return ""
        if found[0] in _JOINERS:
            return found if _KEPT_JOINER.match(before) else ""
        if found[0] in _HYPHENS:
            return "-"
        if found[0] in _ACCENTS:
            letter = "i" if found[-1] == "\u0131" else found[-1]
            composed = unicodedata.normalize("NFC", letter + _ACCENTS[found[0]])
            return composed if len(composed) == 1 else found
        if before.isdecimal() and found[0].isdigit() and not found[0].isdecimal():
            return found  # 10² is not 102.
        return unicodedata.normalize("NFKC", found)

    def _is_one_word(self, match: re.Match[str]) -> bool:
        """Whether the halves of a word on two lines are one word without a hyphen: a compound may be broken as well."""
        if match.group()[0] in _SOFT:
            return True
        before = self._shown[max(0, match.start() - _LONGEST) : match.start()]
        first = _WORD.match(before[::-1])
        second = _WORD.match(self._shown, match.end(), match.end() + _LONGEST)
        if not first or not second or len(first.group()) < 2 or second.group()[0].isupper():
            return False
        one, other = first.group()[::-1].lower(), second.group().lower()
        words, compounds = self._vocabulary
        if one + other in words:
            return True
        is_compound = (one, other) in compounds or (one in words and other in words)
        return not is_compound and other not in _CONJUNCTIONS

    @cached_property
    def _vocabulary(self) -> tuple[frozenset[str], frozenset[tuple[str, str]]]:
        """The words of the text, and the neighbours in its compounds, but for those that a line end breaks."""
        whole = _BROKEN.sub("\n", self._shown.lower())
        return frozenset(_WORD.findall(whole)), frozenset(_COMPOUND.findall(whole))


def tokenize(tokenizer: Callable[..., Tokens], texts: Sequence[str], *, spans: bool = True) -> Tokens:
    """The tokens of texts in the form that a model reads, with spans of the texts as shown.

    Args:
        tokenizer: `tokenize_queries` or `tokenize_documents` of a model.
    """
    spellings = [Spelling(text) for text in texts]
    tokens = tokenizer([spelling.text for spelling in spellings], spans=spans)
    located = [spelling.locate(row) for spelling, row in zip(spellings, tokens.spans, strict=True)] if spans else []
    return replace(tokens, spans=located)
