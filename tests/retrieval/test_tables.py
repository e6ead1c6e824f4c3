"""Tables as programs write them: rows are never merged, columns and delimiters are found or named."""

from __future__ import annotations

import csv
import io
import json
import random

import pytest

from modernbert.retrieval.documents import tables
from modernbert.retrieval.documents.find import read_file
from modernbert.retrieval.documents.reading import Reading
from modernbert.retrieval.documents.tables import read_rows


def read(path, content, *, notes=None, **reading):
    """The id and the text of each record of a file with this content."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    on_note = pytest.fail if notes is None else notes.append
    return [(document.id, document.text) for document in read_file(path, Reading(**reading), on_note=on_note)]


def test_a_quote_in_tab_separated_text_joins_no_rows(tmp_path):
    """F03: five rows became two, without a word. The files of MS MARCO have such cells."""
    text = (
        'id\ttext\n1\t"Nothing ventured\n2\tThe bridge opened in 1932.\n3\tSalt in water.\n4\ttwo words"\n5\tlast row\n'
    )
    assert read(tmp_path / "t.tsv", text) == [
        ("1", '"Nothing ventured'),
        ("2", "The bridge opened in 1932."),
        ("3", "Salt in water."),
        ("4", 'two words"'),
        ("5", "last row"),
    ]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ('1\t"a" and "b', '"a" and "b'),
        ('1\t"a" and "b"', '"a" and "b"'),
        ('1\t5" pipe', '5" pipe'),
        ('1\t"', '"'),
        ('1\t""', ""),
        ('1\t"""', '"""'),
        ('1\t"a ""b"" c"', 'a "b" c'),
        ('1\t"a\tb"', "a\tb"),
        ('1\t"whole"', "whole"),
    ],
)
def test_quotes_of_one_cell(tmp_path, row, text):
    """Both ways to write a cell with quotes; the rows around it stay."""
    for end in ("\n", "\r\n"):
        found = read(tmp_path / "t.tsv", end.join(["id\ttext", "0\tfirst", row, "2\tlast", ""]))
        assert found == [("0", "first"), ("1", text), ("2", "last")]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_what_csv_writers_quote_is_read_back(tmp_path, quoting, order):
    """pandas and spreadsheets put line ends, quotes and tabs in quotes, between tabs too."""
    rows = [["id", "text", "year"], ["a", "two\nlines", "1"], ["b", 'a "quote"', "2"], ["c", 'x\n"y"\n\nz', "3"]]
    rows += [["d", "tab\tinside", "4"], ["e", "plain", "5"], ["f", '"', "6"]]
    out = io.StringIO()
    csv.writer(out, delimiter="\t", quoting=quoting).writerows([[row[i] for i in order] for row in rows])
    found = read(tmp_path / "t.tsv", out.getvalue())
    assert found == [(name, text) for name, text, _ in rows[1:]]


def test_tables_without_quotes_are_their_lines():
    """Whatever is in the cells, each line is a row."""
    chance = random.Random(0)
    for _ in range(300):
        width = chance.randint(2, 4)
        cells = [["".join(chance.choices('ab "', k=chance.randint(1, 5))) for _ in range(width - 1)] for _ in range(6)]
        lines = ["\t".join("abcd"[:width]) + "\n", *("\t".join(["k", *row]) + "\n" for row in cells)]
        rows = list(read_rows(lines, "\t", lambda first: True))
        assert [row.line for row in rows] == list(range(1, 8))
        assert all(len(row.cells) == width and not row.problem for row in rows)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "id;text\n1;Das kostet 3,50\n"),
        ("a.csv", "sep=;\nid;text\n1;Das kostet 3,50\n"),
        ("a.csv", "sep=;\r\n\r\nid;text\r\n1;Das kostet 3,50\r\n;\r\n"),
        ("a.csv", '"id";"text"\n"1";"Das kostet 3,50"\n'),
        ("a.csv", "id|text\n1|Das kostet 3,50\n"),
        ("a.csv", "id\ttext\n1\tDas kostet 3,50\n"),
        ("a.tsv", 'id,text\n1,"Das kostet 3,50"\n'),
        ("a.csv", 'text,id\n"Das kostet 3,50",1\n'),
    ],
)
def test_the_delimiter_is_found(tmp_path, name, text):
    """Excel writes semicolons where the comma is in numbers, and may name the delimiter above the table."""
    assert read(tmp_path / name, text) == [("1", "Das kostet 3,50")]
    assert read(tmp_path / name, text.encode("utf-16")) == [("1", "Das kostet 3,50")]


def test_a_delimiter_that_is_named(tmp_path):
    assert read(tmp_path / "a.csv", "id~text\n1~a,b\n", delimiter="~") == [("1", "a,b")]
    with pytest.raises(ValueError, match=r"got 'id~text'.*--delimiter"):
        read(tmp_path / "a.csv", "id~text\n1~a,b\n")
    for wrong in ("", "ab", '"', "\n"):
        with pytest.raises(ValueError, match=r"delimiter is .*; give one character"):
            Reading(delimiter=wrong)


def test_columns_are_chosen_by_name(tmp_path):
    table = "key,headline,body,title,lang\nk1,Owls,They hunt.,T,en\nk2,,Mice.,,en\n"
    assert read(tmp_path / "a.csv", table, text_column="body", id_column="key") == [
        ("k1", "They hunt."),
        ("k2", "Mice."),
    ]
    both = read(tmp_path / "a.csv", table, text_column="headline, body", id_column="key")
    assert both == [("k1", "Owls\n\nThey hunt."), ("k2", "Mice.")]
    (document, _) = read_file(tmp_path / "a.csv", Reading(text_column="headline,body"))
    assert (document.title, document.id) == ("T", "2")
    assert document.metadata == {"key": "k1", "lang": "en"}
    comma = 'id,"name, full"\n1,x\n'
    assert read(tmp_path / "b.csv", comma, text_column="name, full") == [("1", "x")]
    with pytest.raises(
        ValueError, match="one of them 'bdy', none twice; got 'key', 'headline', 'body', 'title', 'lang'"
    ):
        read(tmp_path / "a.csv", table, text_column="bdy")
    with pytest.raises(ValueError, match=r"one of them 'body' and one 'id'.*got 'key', 'headline'"):
        read(tmp_path / "a.csv", table, text_column="body", id_column="id")


def test_fields_of_a_corpus_are_chosen_as_columns_are(tmp_path):
    """BEIR's corpus.jsonl, and what other exports call its fields."""
    records = [{"doc": "a", "abstract": "Owls.", "title": "T"}, {"doc": 7, "abstract": None, "title": "Only"}]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    found = read(tmp_path / "corpus.jsonl", lines, text_column="title,abstract", id_column="doc")
    assert found == [("a", "T\n\nOwls."), ("7", "Only")]
    with pytest.raises(ValueError, match=r"expected an object with a string .body.*; its fields are 'doc', 'abstract'"):
        read(tmp_path / "corpus.jsonl", lines, text_column="body")
    with pytest.raises(ValueError, match="line 1: it has no 'docid'; its fields are 'doc', 'abstract', 'title'"):
        read(tmp_path / "corpus.jsonl", lines, text_column="title", id_column="docid")


def test_a_table_without_names_has_numbers(tmp_path):
    """The collection of MS MARCO: no header, an id and a text."""
    table = '0\tThe presence of "communication\n1\tamid scientific minds"\n'
    found = read(tmp_path / "collection.tsv", table, text_column="2", id_column="1")
    assert found == [("0", 'The presence of "communication'), ("1", 'amid scientific minds"')]
    assert read(tmp_path / "a.csv", "x;y\n", text_column="2") == [("1", "y")]
    with pytest.raises(ValueError, match=r"got '0', 'The presence.*by number if the first row is text"):
        read(tmp_path / "collection.tsv", table)
    with pytest.raises(ValueError, match="one of them '3'"):
        read(tmp_path / "collection.tsv", table, text_column="3")


BAD = 'id,text\n1,one\n2,two,more\n3,three\n4,"x" y\n1,again\n5\n6,six\n'


def test_bad_rows_are_errors_or_are_left_out_with_a_note(tmp_path):
    with pytest.raises(ValueError, match=r"a\.csv, line 3: 3 cells for 2 columns"):
        read(tmp_path / "a.csv", BAD)
    notes = []
    found = read(tmp_path / "a.csv", BAD, skip_bad_rows=True, notes=notes)
    assert found == [("1", "one"), ("3", "three"), ("6", "six")]
    (note,) = notes
    assert note.startswith(f"{tmp_path}/a.csv: skipped 4 bad records: line 3: 3 cells for 2 columns")
    assert "line 5: broken table" in note
    assert "lines 2 and 6 both have the \"_id\" '1'" in note
    assert note.endswith("; ...")


def test_a_quote_that_never_closes_costs_one_row(tmp_path):
    """And not all that follow it."""
    rows = "".join(f"{number},row {number}\n" for number in range(2, 500))
    notes = []
    found = read(tmp_path / "a.csv", f'id,text\n1,"open\n{rows}', skip_bad_rows=True, notes=notes)
    assert [name for name, _ in found] == [str(number) for number in range(2, 500)]
    assert "skipped 1 bad records: line 2: broken table (unexpected end of data)" in notes[0]


def test_bad_json_lines_are_left_out_with_a_note(tmp_path):
    lines = '{"text": "a"}\nnot json\n{"text": 3}\n[1]\n{"text": "b", "title": 3}\n{"text": "c"}\n'
    notes = []
    found = read(tmp_path / "a.jsonl", lines, skip_bad_rows=True, notes=notes)
    assert found == [("1", "a"), ("6", "c")]
    assert "skipped 4 bad records: line 2: not JSON" in notes[0]


def test_empty_rows_and_ids_of_spreadsheets(tmp_path):
    """Below a table, Excel writes rows of delimiters alone. A row without an id has the number of its line."""
    assert read(tmp_path / "a.csv", "id;text\n;x\n;y\n;\n;\n\n9;z\n") == [("2", "x"), ("3", "y"), ("9", "z")]


def test_nuls_in_tables_are_said(tmp_path):
    notes = []
    assert read(tmp_path / "a.tsv", b"id\ttext\n1\ta\0b\n2\tc\n", notes=notes) == [("1", "a\ufffdb"), ("2", "c")]
    assert "1 broken places" in notes[0]


@pytest.mark.parametrize("line", ['x"\t"y\n', '"a\n', '"\n', '1\t"a\n', '""\n', '"\t\n', '"a\tb\n'])
@pytest.mark.parametrize("delimiter", ["\t", ","])
def test_quotes_are_tried_once_for_each_line(monkeypatch, line, delimiter):
    """A cell that is open to the end of the file was tried again from each of its lines."""
    lines = ["a\tb\tc\n".replace("\t", delimiter), *[line.replace("\t", delimiter)] * 2000]
    lines = [*lines, "1\t2\t3\n".replace("\t", delimiter)]
    fed = []
    original = tables._Source.__next__
    monkeypatch.setattr(tables._Source, "__next__", lambda source: (fed.append(1), original(source))[1])
    rows = list(read_rows(lines, delimiter, lambda first: True))
    assert len(fed) < 2 * len(lines) + 10
    assert rows[-1].cells == ["1", "2", "3"] or delimiter == ","


def test_a_quote_in_the_first_row_of_a_table_without_names(tmp_path):
    table = '0\t"Nothing ventured\n1\tb\n2\tc"\n'
    found = read(tmp_path / "c.tsv", table, text_column="2", id_column="1")
    assert found == [("0", '"Nothing ventured'), ("1", "b"), ("2", 'c"')]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "id,text\r1,owl\r2,mouse\r"),
        ("a.csv", 'id,text\r1,owl\r"2","mouse"'),
        ("a.tsv", "id\ttext\r1\towl\r2\tmouse\r"),
        ("a.csv", "sep=;\rid;text\r1;owl\r2;mouse\r"),
        ("a.jsonl", '{"id": 1, "text": "owl"}\r{"id": 2, "text": "mouse"}\r'),
    ],
)
def test_a_carriage_return_ends_the_lines_of_a_file_without_newlines(tmp_path, name, content):
    """As Excel writes tables "for Macintosh"."""
    assert read(tmp_path / name, content) == [("1", "owl"), ("2", "mouse")]
    if name != "a.jsonl":
        assert read(tmp_path / name, content.encode("utf-16")) == [("1", "owl"), ("2", "mouse")]


def test_a_carriage_return_inside_a_line_is_a_character(tmp_path):
    assert read(tmp_path / "a.csv", 'id,text\n1,"a\rb"\n') == [("1", "a\rb")]
    assert read(tmp_path / "a.csv", 'id,text\r\n1,"a\r\nb"\r\n') == [("1", "a\r\nb")]


@pytest.mark.parametrize("mark", ["\ufeff", "\u200b", "\u00a0", "\u2060", " \ufeff "])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_invisible_characters_around_the_names_of_columns(tmp_path, name, mark):
    """A second byte order mark made another column of `id`, and the ids became numbers of lines without a word."""
    table = f"\ufeff{mark}id,text{mark},year\nk,owl,7\n".replace(",", "\t" if name == "a.tsv" else ",")
    (tmp_path / name).write_text(table, encoding="utf-8")
    (document,) = read_file(tmp_path / name, on_note=pytest.fail)
    assert (document.id, document.text, document.metadata) == ("k", "owl", {"year": "7"})


def test_names_of_columns_have_one_form_of_unicode(tmp_path):
    decomposed = "id,re\u0301sume\u0301\n1,owl\n"
    assert read(tmp_path / "a.csv", decomposed, text_column="r\u00e9sum\u00e9") == [("1", "owl")]
