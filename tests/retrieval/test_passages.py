"""Where documents are cut: headings as in another parser, and no word is lost or doubled."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import pytest
from markdown_it import MarkdownIt

from modernbert.retrieval.passages import Document, cut, sections

ROUGH_TOKEN = re.compile(r"[\u3001-\u9fff]|[^\W\u3001-\u9fff]{1,8}|[^\w\s]")


class Piece(NamedTuple):
    title: str
    text: str
    start: int
    end: int


def pieces(document: Document, *, tokens: int = 140) -> Iterator[Piece]:
    """The sections of a document, cut into pieces of at most `tokens` rough tokens."""
    for title, start, end in sections(document):
        spans = [token.span() for token in ROUGH_TOKEN.finditer(document.text, start, end)]
        for first, last in cut(document.text, spans, tokens):
            begin, stop = spans[first][0], spans[last - 1][1]
            yield Piece(title, document.text[begin:stop], begin, stop)


GUIDE = """\
---
title: "Field guide"
sidebar: 3
---
Before any heading.

# Birds #

## Owls

Owls hunt at night. They turn their heads far.

```bash
# not a heading
echo owl
```

```owl``` opens no block

### Barn owl
Pale face.

Setext heading
--------------

* first item
* second item

~~~
```
# still not a heading
~~~

#hashtag is text
## Empty
## Last ##
The end.
"""


def guide(text: str = GUIDE, name: str = "guide.md") -> Document:
    return Document(name, name, "", text)


def test_headings_are_those_of_a_markdown_parser():
    """Levels, places and nesting of headings agree with markdown-it, fences and underlines included."""
    body = GUIDE.split("---\n", 2)[2]
    tokens = MarkdownIt().parse(body)
    expected, trail = [], []
    for opening, inline in pairwise(tokens):
        if opening.type == "heading_open":
            level = int(opening.tag[1])
            trail = [above for above in trail if above[0] < level] + [(level, inline.content)]
            expected.append("Field guide: " + " > ".join(title for _, title in trail))
    # Birds has only a subheading below it, so it shows up inside the titles of others.
    expected.remove("Field guide: Birds")
    found = [piece.title for piece in pieces(guide())]
    assert found == ["Field guide", *expected]


def test_a_heading_without_text_is_itself_the_text():
    found = {piece.title: piece.text for piece in pieces(guide())}
    assert found["Field guide: Birds > Empty"] == "## Empty"
    assert found["Field guide: Birds > Last"] == "The end."


def test_title_of_a_file_is_its_only_first_level_heading_or_its_name():
    assert [p.title for p in pieces(guide("# Owls\nNight.\n## Food\nMice."))] == ["Owls", "Owls: Food"]
    assert [p.title for p in pieces(guide("# A\nx\n# B\ny", "two_parts.md"))] == [
        "two parts: A",
        "two parts: B",
    ]
    assert [p.title for p in pieces(guide("# no heading", "list.txt"))] == ["list"]


def test_restructured_text_headings():
    """Overlined and underlined styles are levels in the order in which they appear; `#` lines are text."""
    text = "#####\nBook\n#####\n\nIntro.\n\nOne\n===\n\n# text\n\nDeep\n----\n\nMore.\n\nTwo\n===\nLast.\n"
    found = [(piece.title, piece.text) for piece in pieces(guide(text, "book.rst"))]
    assert found == [
        ("Book", "Intro."),
        ("Book: One", "# text"),
        ("Book: One > Deep", "More."),
        ("Book: Two", "Last."),
    ]


LONG = {
    "paragraphs": "\n\n".join(f"Paragraph {i} has a few words. " * (i % 9 + 1) for i in range(60)),
    "one line": "word " * 5000,
    "one word": "x" * 9000,
    "japanese": "猫は夜に狩りをする。" * 300,
    "windows": "\r\n\r\n".join(f"Line {i}.\r\nNext line." for i in range(200)),
    "blank": " \n\n\t",
    "empty": "",
    "mixed": GUIDE * 20,
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("tokens", [8, 50, 160])
def test_every_word_is_in_exactly_one_piece(name, tokens):
    """The spans are in order, contain their text, and leave out only white space."""
    document = guide(LONG[name], "long.txt")
    found = list(pieces(document, tokens=tokens))
    end = 0
    for piece in found:
        assert piece.text == document.text[piece.start : piece.end]
        assert piece.text == piece.text.strip() != ""
        assert document.text[end : piece.start].strip() == ""
        assert len(piece.text.split()) <= tokens
        assert len(" ".join(piece.text.split())) <= 9 * tokens  # long words and unspaced scripts are cut, too
        end = piece.end
    assert document.text[end:].strip() == ""


def test_markdown_keeps_every_line_but_headings_and_front_matter():
    kept = "".join(piece.text for piece in pieces(guide(), tokens=8))
    body = re.sub(r"^## Empty$", "Empty-heading", GUIDE.split("---\n", 2)[2], flags=re.MULTILINE)
    for heading in ("# Birds #", "## Owls", "### Barn owl", "Setext heading\n--------------", "## Last ##"):
        body = body.replace(heading, "", 1)
    assert "".join(kept.split()) == "".join(body.replace("Empty-heading", "## Empty").split())


def test_cuts_prefer_paragraphs_then_list_items_then_sentences():
    sentence = "Seven short words stand in this sentence. "
    found = list(pieces(guide(sentence * 12 + "\n\n" + sentence * 8, "a.txt"), tokens=121))
    assert [len(piece.text.split()) for piece in found] == [84, 56]
    found = list(pieces(guide("Take:\n\n" + "- one two three four five six\n" * 6, "a.txt"), tokens=31))
    assert all(piece.text.startswith(("Take", "- one")) for piece in found)
    found = list(pieces(guide(sentence * 40, "a.txt"), tokens=121))
    assert all(piece.text.endswith("sentence.") for piece in found)
    assert {len(piece.text.split()) for piece in found} == {91, 98}  # equal shares, no tiny rest


def test_no_heading_takes_more_than_linear_time():
    """5,000 blanks inside a heading once took minutes."""
    started = time.perf_counter()
    for inner in (" " * 20_000, "#" * 20_000, " #" * 10_000):
        assert [piece.text for piece in pieces(guide(f"# a{inner}b\nText.", "x.md"))] == ["Text."]
        assert list(pieces(guide(f"---\ntitle: a{inner}b\n---\nText.", "x.md")))
    assert time.perf_counter() - started < 5


def test_hashes_that_belong_to_a_heading_stay():
    titles = [section.title for section in sections(guide("# C#\nx\n## F# and J#\ny\n## G ##\nz"))]
    assert titles == ["C#", "C#: F# and J#", "C#: G"]
