"""Files to passages: nothing lost, nothing doubled, every place findable, every repair said."""

from __future__ import annotations

import gzip
import json
import re
from importlib.resources import files
from itertools import pairwise

import pytest
import tokenizers
from markdown_it import MarkdownIt

from modernbert.retrieval.corpus import read_passages, read_texts
from modernbert.retrieval.passages import Document, passages

DEMO = files("modernbert") / "assets" / "demo" / "corpus.jsonl.gz"

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
    found = [passage.title for passage in passages(guide())]
    assert found == ["Field guide", *expected]


def test_a_heading_without_text_is_itself_the_text():
    found = {passage.title: passage.text for passage in passages(guide())}
    assert found["Field guide: Birds > Empty"] == "## Empty"
    assert found["Field guide: Birds > Last"] == "The end."


def test_title_of_a_file_is_its_only_first_level_heading_or_its_name():
    assert [p.title for p in passages(guide("# Owls\nNight.\n## Food\nMice."))] == ["Owls", "Owls: Food"]
    assert [p.title for p in passages(guide("# A\nx\n# B\ny", "two_parts.md"))] == [
        "two parts: A",
        "two parts: B",
    ]
    assert [p.title for p in passages(guide("# no heading", "list.txt"))] == ["list"]


def test_restructured_text_headings():
    """Overlined and underlined styles are levels in the order in which they appear; `#` lines are text."""
    text = "#####\nBook\n#####\n\nIntro.\n\nOne\n===\n\n# text\n\nDeep\n----\n\nMore.\n\nTwo\n===\nLast.\n"
    found = [(passage.title, passage.text) for passage in passages(guide(text, "book.rst"))]
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
def test_every_word_is_in_exactly_one_passage(name, tokens):
    """The spans are in order, hold the text they name, and leave out nothing but white space."""
    document = guide(LONG[name], "long.txt")
    found = list(passages(document, tokens=tokens))
    end = 0
    for passage in found:
        assert passage.text == document.text[passage.start : passage.end]
        assert passage.text == passage.text.strip() != ""
        assert document.text[end : passage.start].strip() == ""
        assert passage.line == 1 + document.text.count("\n", 0, passage.start)
        assert len(passage.content.split()) <= tokens
        assert len(" ".join(passage.text.split())) <= 9 * tokens  # long words and unspaced scripts are cut, too
        end = passage.end
    assert document.text[end:].strip() == ""


def test_markdown_keeps_every_line_but_headings_and_front_matter():
    kept = "".join(passage.text for passage in passages(guide(), tokens=8))
    body = re.sub(r"^## Empty$", "Empty-heading", GUIDE.split("---\n", 2)[2], flags=re.MULTILINE)
    for heading in ("# Birds #", "## Owls", "### Barn owl", "Setext heading\n--------------", "## Last ##"):
        body = body.replace(heading, "", 1)
    assert "".join(kept.split()) == "".join(body.replace("Empty-heading", "## Empty").split())


def test_cuts_prefer_paragraphs_then_list_items_then_sentences():
    sentence = "Seven short words stand in this sentence. "
    found = list(passages(guide(sentence * 12 + "\n\n" + sentence * 8, "a.txt"), tokens=121))
    assert [len(passage.text.split()) for passage in found] == [84, 56]
    found = list(passages(guide("Take:\n\n" + "- one two three four five six\n" * 6, "a.txt"), tokens=31))
    assert all(passage.text.startswith(("Take", "- one")) for passage in found)
    found = list(passages(guide(sentence * 40, "a.txt"), tokens=121))
    assert all(passage.text.endswith("sentence.") for passage in found)
    assert {len(passage.text.split()) for passage in found} == {91, 98}  # equal shares, no crumb at the end


def test_passages_fit_a_real_tokenizer(modernbert_tokenizer_file):
    """All but 1 in 100 of the demo's passages have at most the 180 tokens of PyLate's default."""
    tokenizer = tokenizers.Tokenizer.from_file(str(modernbert_tokenizer_file))
    encodings = tokenizer.encode_batch([passage.content for passage in read_passages([DEMO])])
    lengths = [1 + len(encoding) for encoding in encodings]  # and the prefix
    assert sum(length > 180 for length in lengths) < 0.01 * len(lengths)
    assert sum(lengths) > 90 * len(lengths)


def test_records_are_read_as_beir_defines_them():
    """The embedded corpus, against a plain reading of its JSON: the encoder sees title, space, text."""
    records = [json.loads(line) for line in gzip.decompress(DEMO.read_bytes()).splitlines()]
    documents = list(read_texts(DEMO))
    assert len(documents) == 1581
    assert [(d.id, d.content) for d in documents] == [(r["_id"], r["title"] + " " + r["text"]) for r in records]
    by_id = {record["_id"]: record for record in records}
    whole = [passage for passage in read_passages([DEMO]) if passage.text == by_id[passage.id]["text"]]
    assert 0 < len(whole) < 1581
    assert whole[0].content == by_id[whole[0].id]["title"] + " " + by_id[whole[0].id]["text"]


def test_a_folder_is_read_in_order_and_what_is_skipped_is_said(tmp_path):
    for name in (
        "b.md",
        "a/z.txt",
        "a/README",
        ".git/config",
        "a/.hidden",
        "node_modules/x.md",
        "a/photo.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "a" / "data.txt").write_bytes(b"a\0b")
    (tmp_path / "corpus.jsonl").write_text('{"_id": "r1", "text": "a record"}\n')
    notes = []
    found = [passage.text for passage in read_passages([tmp_path], note=notes.append)]
    assert found == ["text of b.md", "a record", "text of a/README", "text of a/z.txt"]
    assert notes == [
        f"skipped a binary file: {tmp_path / 'a' / 'data.txt'}",
        f"skipped 4 files and folders in {tmp_path} that are not text or markdown: 3 hidden or node_modules, 1 .png",
    ]


def test_broken_utf8_is_replaced_and_said(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 and \xff; a real \xef\xbf\xbd is not counted")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfbyte order mark")
    (tmp_path / "corpus.jsonl").write_bytes(b'{"text": "na\xefve \\ud800"}\n')
    notes = []
    found = [passage.text for passage in read_passages([tmp_path], note=notes.append)]
    assert found == ["caf\ufffd and \ufffd; a real \ufffd is not counted", "byte order mark", "na\ufffdve ?"]
    assert [note.split(": ")[1].split()[0] for note in notes] == ["2", "1"]


def test_notes_are_warnings_unless_taken(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.warns(UserWarning, match="1 broken places"):
        list(read_passages([tmp_path]))


def test_files_are_read_one_at_a_time(tmp_path):
    """A passage of the first file is out before the second, broken one is touched."""
    (tmp_path / "a.txt").write_text("first")
    broken = tmp_path / "b.jsonl"
    broken.write_text('{"text": "second"}\n{"text": \n')
    found = read_passages([tmp_path / "a.txt", broken])
    assert next(found).text == "first"
    assert next(found).text == "second"
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: not JSON"):
        next(found)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", 'line 2: expected an object with a string "text", got \\[1\\]'),
        ('{"_id": "x"}', 'line 2: expected an object with a string "text"'),
        ('{"text": 3}', 'line 2: expected an object with a string "text"'),
        ('{"text": "x", "title": 3}', 'line 2: "title" and "_id" must be strings'),
        ('{"text": "x", "_id": null}', 'line 2: "title" and "_id" must be strings'),
        ("[" * 100_000, "line 2: not JSON"),
    ],
)
def test_a_broken_record_is_named_with_its_line(tmp_path, line, message):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ValueError, match=message):
        list(read_texts(path))


def test_paths_that_cannot_be_searched(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder: nowhere"):
        list(read_passages(["nowhere"]))
    with pytest.raises(ValueError, match=r"no text to search in .*; read are .*\.md"):
        list(read_passages([tmp_path]))
    (tmp_path / "x.pdf").write_bytes(b"%PDF\0")
    with pytest.raises(ValueError, match=r"x\.pdf is a binary file"):
        list(read_passages([tmp_path / "x.pdf"]))
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    with pytest.raises(ValueError, match="broken gzip file"):
        list(read_passages([tmp_path / "corpus.jsonl.gz"]))


def test_lines_of_a_text_file_are_records_for_encoding(tmp_path):
    (tmp_path / "queries.txt").write_text("first query\n\n  second query \n")
    found = [(record.id, record.content) for record in read_texts(tmp_path / "queries.txt")]
    assert found == [("1", "first query"), ("3", "second query")]
