"""The main part of a web page: its blocks without menus, asides and what is around the article.

A page is judged when all of its blocks are known, so that nothing is left out of a page that has little else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

Attributes = Mapping[str, str]

ENOUGH = 500
"""Characters of text, other than links, that are enough for a page: then menus and asides are left out."""

MENU = 3
"""So many blocks in a row that are only links are a menu."""

_WHOLE = frozenset({"html", "body", "main", "article"})
_ASIDE_ROLES = frozenset({"alert", "alertdialog", "complementary", "dialog", "menu", "menubar"})
# From Mozilla's Readability (Apache-2.0), but without the names for comments, which are content.
_ASIDE_NAMES = re.compile(
    "-ad-|ad-break|agegate|banner|breadcrumb|combx|cookie|footer|gdpr|menu|navbar|newsletter|pager|pagination|popup|promo"
    "|related|rss|share|shoutbox|sidebar|skyscraper|social|sponsor|subscribe|supplemental|yom-remote",
    re.IGNORECASE,
)
_MAIN_NAMES = re.compile("article|body|column|content|main|mathjax|shadow", re.IGNORECASE)


def _is_main(tag: str, attributes: Attributes) -> bool:
    return tag == "main" or attributes.get("role") == "main"


def _is_article(tag: str, attributes: Attributes) -> bool:
    return tag == "article" or attributes.get("itemprop") == "articleBody"


def _is_aside(tag: str, attributes: Attributes) -> bool:
    if not attributes or tag in _WHOLE:
        return tag == "aside"
    names = f"{attributes.get('class', '')} {attributes.get('id', '')}"
    is_named = _ASIDE_NAMES.search(names) and not _MAIN_NAMES.search(names)
    return tag == "aside" or attributes.get("role") in _ASIDE_ROLES or bool(is_named)


MARKS: Sequence[Callable[[str, Attributes], bool]] = (_is_main, _is_article, _is_aside)
"""Whether an element has the mark of the same place in `Marks`, given its tag and attributes."""


class Marks(NamedTuple):
    """Whether a block is inside of an element with each of these marks."""

    main: bool
    article: bool
    aside: bool


class Block(NamedTuple):
    """A block of markdown.

    Attributes:
        gap: what separates it from the block before.
        is_link: whether nearly all of it is the text of links.
    """

    gap: str
    text: str
    marks: Marks
    is_link: bool


def main_part(blocks: Sequence[Block]) -> Sequence[Block]:
    """The blocks in the marked main part of a page, or all; without menus and asides if there is enough other text."""
    blocks = [block for block in blocks if block.marks.main] or blocks
    kept: list[Block] = []
    for is_link, run in groupby(blocks, key=lambda block: block.is_link):
        members = list(run)
        if not is_link or len(members) < MENU:
            kept += [block for block in members if not block.marks.aside]
    for part in ([block for block in kept if block.marks.article], kept):
        if _prose(part) >= max(ENOUGH, _prose(blocks) / 2):
            return part
    return blocks


def _prose(blocks: Sequence[Block]) -> int:
    """Characters of blocks that are not links."""
    return sum(len(block.text) for block in blocks if not block.is_link)
