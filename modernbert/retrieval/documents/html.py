"""A web page to markdown, so that its headings, lists and code are treated as in any other document."""

from __future__ import annotations

import re
from collections.abc import Callable

from .encodings import page_encoding
from .main_part import MARKS, Attributes, Block, Marks, main_part
from .text import OnNote, decode, replaced


def read_html(raw: bytes, on_note: OnNote, named: str | None = None) -> tuple[str, str]:
    """The title of a page, and its text as markdown: headings, paragraphs, list items, rows of tables, code.

    If the page marks its main part, only that part is read. Scripts, styles, navigation, page footers and hidden
    elements are left out, unless there is nothing else. Menus and asides are left out if there is enough other text.
    Links and emphasis are reduced to their text. The title is empty if the page has exactly one first-level heading,
    which is the better title.

    Args:
        named: the encoding of pages that declare none.
    """
    from lxml.etree import HTMLParser

    encoding = page_encoding(raw, named, on_note)
    text, count = decode(raw, encoding)
    if count:
        on_note(replaced(count, encoding))
    for noise in (_is_noise, _is_unseen):
        # The parser calls the writer and builds no tree, so no page is too long or too deeply nested for it.
        writer = MarkdownWriter(noise)
        parser = HTMLParser(target=writer, encoding="utf-8", huge_tree=True)
        parser.feed(text.encode())
        title, markdown = parser.close()
        if markdown:
            break
    else:
        on_note("a page without text; if a script writes its text, save it from a browser")
    return title, markdown


_UNSEEN_TAGS = "audio canvas embed iframe noframes noscript object script style svg template video"
_NOISY_TAGS = "annotation annotation-xml button datalist del footer nav select textarea"  # annotations repeat formulas
_BLOCK_TAGS = """
    address article aside blockquote body br caption center dd details dialog div dl dt fieldset figcaption figure form
    head header hr html legend li listing main p pre section summary table tbody td tfoot th thead title tr
"""
_UNSEEN = frozenset(_UNSEEN_TAGS.split())
_NOISE = _UNSEEN | frozenset(_NOISY_TAGS.split())
_NUMBERS = frozenset({"lineno", "linenos"})  # classes of the line numbers that Pygments adds to code
_ANCHORS = frozenset({"#", "§", "¶", "🔗"})  # the text of a link from a heading to itself
_DISPLAY_NONE = re.compile(r"display\s*:\s*none")

_HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
_LISTS = frozenset({"dir", "menu", "ol", "ul"})
_BLOCKS = frozenset(_BLOCK_TAGS.split()) | _LISTS | _HEADINGS.keys()
_SPACES = re.compile(r"[^\S ]\s*| \s+")
_FILE_NAME = re.compile(r"\.(?:avif|bmp|emf|gif|jpe?g|png|svg|tiff?|webp|wmf)\s*$", re.IGNORECASE)
_MARKUP = re.compile(r"#{1,6}( |$)|```|~~~|([-=])\2{2,}$")


def _is_unseen(tag: str, attributes: Attributes) -> bool:
    return tag in _UNSEEN


def _is_noise(tag: str, attributes: Attributes) -> bool:
    if tag in _NOISE:
        return True
    if not attributes:
        return False
    return (
        "hidden" in attributes
        or attributes.get("aria-hidden") == "true"
        or attributes.get("role") == "navigation"
        or not _NUMBERS.isdisjoint(attributes.get("class", "").split())
        or bool(_DISPLAY_NONE.search(attributes.get("style", "")))
    )


class MarkdownWriter:
    """Writes markdown from the calls of an lxml parser: starts and ends of tags, and the text between them.

    Args:
        noise: whether an element, given its tag and attributes, is left out with its content.
    """

    def __init__(self, noise: Callable[[str, Attributes], bool]) -> None:
        self._noise, self._depth_of_noise = noise, 0
        self._title = ""
        self._depths = [0] * len(MARKS)  # of open elements, for each mark from the first that has it
        self._blocks: list[Block] = []
        self._words: list[str] = []  # of the block that is being read
        self._link, self._in_link, self._linked = 0, False, 0  # where the last link begins, and characters in links
        self._prefix, self._gap = "", ""  # to be written in front of the block, and before that prefix
        self._lists: list[int | None] = []  # for each open list the number of its last item; None: bullets
        self._in_code = self._is_row_empty = False

    def start(self, tag: str, attributes: Attributes) -> None:
        """Begin a tag. The parser calls `end` for every tag."""
        if self._depth_of_noise or self._noise(tag, attributes):
            self._depth_of_noise += 1
            return
        if self._in_code:
            self._new_line_of_code(tag)
        elif tag == "br" and self._prefix in _HEADINGS.values():
            self._words.append(" ")
        elif tag in _BLOCKS:
            self._end_block()
            self._begin_block(tag, attributes)
        elif tag == "img":
            self._words.append(f" {alternative(attributes.get('alt', ''))} ")
        elif tag == "a":
            self._link, self._in_link = len(self._words), True
        for mark, is_marked in enumerate(MARKS):
            if self._depths[mark] or is_marked(tag, attributes):
                self._depths[mark] += 1

    def end(self, tag: str) -> None:
        """End a tag."""
        if self._depth_of_noise:
            self._depth_of_noise -= 1
            return
        if tag in ("pre", "listing"):
            self._end_code()
        elif self._in_code:
            self._new_line_of_code(tag)
        elif tag == "title":
            self._title = self._title or _words("".join(self._words))
            self._words.clear()
        elif tag in _BLOCKS and tag != "br":
            self._end_block()
            self._prefix, self._gap = "", "\n\n"
            if tag in _LISTS and self._lists:
                self._lists.pop()
        elif tag == "a":
            self._end_link()
        self._depths = [max(0, depth - 1) for depth in self._depths]

    def data(self, text: str) -> None:
        """Take the text between two tags, or a part of it."""
        if not self._depth_of_noise:
            self._words.append(text)

    def close(self) -> tuple[str, str]:
        """Title and markdown."""
        self._end_block()
        blocks = main_part(self._blocks)
        first_levels = sum(block.text.startswith("# ") for block in blocks)
        text = "".join(block.gap * (at > 0) + block.text for at, block in enumerate(blocks))
        return self._title if first_levels != 1 else "", text

    def _begin_block(self, tag: str, attributes: Attributes) -> None:
        if tag in _HEADINGS:
            self._prefix, self._gap = _HEADINGS[tag], "\n\n"
        elif tag in _LISTS:
            begin = attributes.get("start", "")
            self._lists.append((int(begin) if re.fullmatch(r"\d{1,9}", begin) else 1) - 1 if tag == "ol" else None)
        elif tag == "li":
            number = self._lists[-1] if self._lists else None
            mark = "-" if number is None else f"{number + 1}."
            if number is not None:
                self._lists[-1] = number + 1
            self._prefix, self._gap = "  " * (min(len(self._lists), 8) - 1) + mark + " ", "\n"
        elif tag in ("br", "dd", "tr"):
            self._gap, self._is_row_empty = "\n", tag == "tr"
        elif tag in ("td", "th"):
            self._gap = "\n" if self._is_row_empty else " | "
        self._in_code = tag in ("pre", "listing")

    def _end_block(self) -> None:
        if self._in_code:
            return self._end_code()
        if self._in_link:
            self._end_link()
            self._in_link = True  # for the next block, too
        text = _words("".join(self._words))
        is_link = self._linked > 0.8 * len(text) and self._gap != " | "  # a table of links is not a menu
        self._words.clear()
        self._link = self._linked = 0
        if not text:
            return None
        if self._prefix in _HEADINGS.values():
            text += " #" if text.endswith("#") else ""  # otherwise it would count as decoration, as in "# title #"
        elif not self._prefix:
            text = escaped(text)
        return self._write(self._prefix + text, is_link)

    def _end_code(self) -> None:
        self._in_code = False
        code = "".join(self._words).rstrip().removeprefix("\n")
        self._words.clear()
        if code:
            fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`{3,}", code))])
            self._gap = "\n\n"
            self._write(f"{fence}\n{code}\n{fence}")

    def _new_line_of_code(self, tag: str) -> None:
        if tag in _BLOCKS and self._words and not self._words[-1].endswith("\n"):
            self._words.append("\n")

    def _end_link(self) -> None:
        text = "".join(self._words[self._link :]).strip()
        if text in _ANCHORS:
            del self._words[self._link :]
        else:
            self._linked += len(text)
        self._link, self._in_link = len(self._words), False

    def _write(self, text: str, is_link: bool = False) -> None:
        marks = Marks(*(depth > 0 for depth in self._depths))
        self._blocks.append(Block(self._gap, text, marks, is_link))
        self._prefix, self._gap, self._is_row_empty = "", "\n\n", False


def escaped(line: str) -> str:
    """A line of text in a form that is not a mark of markdown."""
    return "\\" + line if _MARKUP.match(line) else line


def alternative(text: str) -> str:
    """The alternative text of a picture on one line; "" if it is only the name of a file."""
    return "" if _FILE_NAME.search(text) else _words(text)


def _words(text: str) -> str:
    """The text on one line, with single spaces. Fast for a long text that has only single spaces already."""
    return _SPACES.sub(" ", text).strip()
