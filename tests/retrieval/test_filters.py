"""Filters on paths and metadata: what is equal to what, and which questions are errors."""

from __future__ import annotations

import json
import unicodedata
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from stores import write_corpus

from modernbert.cli.converse import parse_fields
from modernbert.retrieval import Store, index
from modernbert.retrieval.store import fields

RECORDS = {
    "a": {
        "year": 2019,
        "lang": "en",
        "tags": ["ml", "ir"],
        "draft": True,
        "author": {"name": "Ann", "born": {"year": 1970}},
    },
    "b": {"year": 2020, "lang": "de", "tags": ["ml"], "author": {"name": "Größe"}, "open": True},
    "c": {"year": 2021.5, "lang": "En", "tags": [], "authors": [{"name": "Ann"}, {"name": "Bob"}], "open": False},
    "d": {"year": "2022", "lang": None, "date": "2024-01-15", "sizes": [1, [20, 300]], "x.y": 1, "x": {"y": 2}},
    "e": {"year": "unknown", "date": "2023-12-31", "open": "TRUE", "author": "Ann", "code": "007", "\u0065\u0301": 1},
    "f": {},
}


@pytest.fixture(scope="module")
def store(colbert, tmp_path_factory):
    folder = tmp_path_factory.mktemp("filters")
    records = [{"_id": name, "text": f"owls of {name}", "metadata": fields} for name, fields in RECORDS.items()]
    index([write_corpus(folder / "corpus.jsonl", records)], folder / "store", colbert)
    with Store(folder / "store", colbert) as opened:
        yield opened


def found(store: Store, where, **options) -> str:
    return "".join(sorted(hit.passage.id for hit in store.search(["owls"], top_k=100, where=where, **options)[0]))


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"year": 2020}, "b"),
        ({"year": "2020"}, "b"),
        ({"year": 2022}, "d"),
        ({"year": 2020.0}, "b"),
        ({"year": np.int64(2020)}, "b"),
        ({"year": Fraction(4043, 2)}, "c"),
        ({"year": [2019, "unknown"]}, "ae"),
        # Named, because the order of a set differs from process to process.
        pytest.param({"year": (2019,), "lang": {"en", "de"}}, "a", id="a tuple and a set"),
        ({"lang": []}, ""),
        ({"lang": "en"}, "a"),
        ({"lang": {"!=": "en"}}, "bcdef"),
        ({"lang": {"!=": ["en", "de", None]}}, "c"),
        ({"lang": None}, "def"),
        ({"lang": "null"}, "def"),
        ({"lang": ["en", None]}, "adef"),
        ({"lang": {"!=": None}}, "abc"),
        ({"tags": "ml"}, "ab"),
        ({"tags": ["ir", "x"]}, "a"),
        ({"tags": {"=": "ir"}}, "a"),
        ({"tags": {"!=": "ir"}}, "bcdef"),
        ({"tags": None}, "cdef"),
        ({"open": True}, "be"),
        ({"open": "true"}, "b"),
        ({"open": "TRUE"}, "be"),
        ({"open": False}, "c"),
        ({"year": {">=": 2020}}, "bcd"),
        ({"year": {">": "2020"}}, "cd"),
        ({"year": {">=": 2019, "<": 2021}}, "ab"),
        ({"year": {"<=": 2021.5, "!=": 2020}}, "ac"),
        ({"date": {">=": "2024-01-01"}}, "d"),
        ({"date": {"<": "2024"}}, "e"),
        ({"sizes": 300}, "d"),
        ({"sizes": {">": 300}}, ""),
        ({"author.name": "Ann"}, "a"),
        ({"author": {"name": "Ann"}}, "a"),
        ({"author": {"name": ["Ann", "Größe"]}}, "ab"),
        ({"author": {"born": {"year": {"<": 1980}}}}, "a"),
        ({"author.born.year": 1970}, "a"),
        ({"authors.name": "Bob"}, "c"),
        ({"author": "Ann"}, "e"),
        ({"x.y": 1}, "d"),
        ({"x.y": 2}, "d"),
        ({"code": "007"}, "e"),
        ({"code": "7"}, ""),
        ({"code": 7}, "e"),
        ({"author.name": unicodedata.normalize("NFD", "Größe")}, "b"),
        ({"é": 1}, "e"),
        ({}, "abcdef"),
    ],
    ids=str,
)
def test_what_a_filter_finds(store, where, expected):
    assert found(store, where) == expected
    assert found(store, where, path="corpus.jsonl", by="document") == expected
    assert found(store, where, path="nothing") == ""


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            {"yeer": 2020},
            r"no document has the field 'yeer'; the fields are: author, author\.born\.year, ",
        ),
        ({"yeer": None}, "no document has the field 'yeer'"),
        ({"yeer": {"!=": 1}}, "no document has the field 'yeer'"),
        ({"Year": 2020}, "no document has the field 'Year'"),
        ({"author.born": 1970}, r"no document has the field 'author\.born'"),
        ({"author": {"nam": "Ann"}}, r"no document has the field 'author\.nam'"),
        ({"open": 1}, "the field 'open' cannot be compared with 1: it holds values such as true"),
        ({"draft": "yes"}, "the field 'draft' cannot be compared with 'yes': it holds values such as true"),
        ({"sizes": "small"}, "the field 'sizes' cannot be compared with 'small': it holds values such as 1"),
        ({"tags": 3}, "the field 'tags' cannot be compared with 3: it holds values such as \"ml\""),
        ({"tags": [True, "ml"]}, "the field 'tags' cannot be compared with True"),
        ({"date": {">": 2024}}, "the field 'date' cannot be compared with 2024"),
        ({"open": {">": 0}}, "the field 'open' cannot be compared with 0"),
        ({"sizes": {"<": "2024-01-01"}}, "the field 'sizes' cannot be compared with '2024-01-01'"),
        ({"year": {">": None}}, "a range ends at a number or a text"),
        ({"year": {">": True}}, "a range ends at a number or a text"),
        ({"year": {">": [1]}}, "a range ends at a number or a text"),
        ({"year": {}}, r"where has 'year': {}; its keys are =, !=, >=, >, <=, < or names of fields"),
        ({"year": {3: 1}}, "its keys are"),
        ({"year": float("nan")}, "where has 'year': nan; give a text, a number"),
        ({"year": b"2020"}, "where has 'year': b'2020'; give a text"),
        ({"year": [[2020]]}, "give a text, a number"),
        ({1: "2020"}, "where has the field 1; give its name as a text"),
        (3, "where is 3; give a dict of fields and values"),
        ([("year", 2020)], "give a dict of fields and values"),
        ("", "where is ''; give a dict"),
    ],
    ids=str,
)
def test_what_a_filter_cannot_mean_is_an_error(store, where, message):
    with pytest.raises(ValueError, match=message):
        found(store, where)


def test_values_that_python_takes_for_equal_are_told_apart(store):
    """1, True and "1" have one place in a cache of Python's."""
    assert [found(store, {"x.y": value}) for value in (1, 1.0, "1")] == ["d"] * 3
    with pytest.raises(ValueError, match="cannot be compared with True"):
        found(store, {"x.y": True})
    assert found(store, {"x.y": 1}) == "d"


def test_a_store_without_metadata_has_no_fields(colbert, tmp_path):
    (tmp_path / "a.txt").write_text("owls")
    index([tmp_path / "a.txt"], tmp_path / "store", colbert)
    with Store(tmp_path / "store", colbert) as opened, pytest.raises(ValueError, match="the fields are: none"):
        found(opened, {"year": 2020})


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["year=2020"], "b"),
        (["year==2020"], "b"),
        (["year>=2020", "year<2022"], "bc"),
        (["year > 2020"], "cd"),
        (["lang!=en"], "bcdef"),
        (["lang=null"], "def"),
        (["lang!=null"], "abc"),
        (["tags=ml", "tags=ir"], "a"),
        (["author.name=Ann"], "a"),
        (["open=true"], "b"),
        (["date>=2024-01-01"], "d"),
        ([unicodedata.normalize("NFD", "author.name=Größe")], "b"),
    ],
    ids=str,
)
def test_conditions_of_the_command_line(store, texts, expected):
    assert found(store, parse_fields(texts)) == expected


@pytest.mark.parametrize("text", ["year", "=2020", " >= 3", "", "year!2020"])
def test_a_condition_of_another_form_is_an_error(text):
    with pytest.raises(ValueError, match="expected FIELD=VALUE, got"):
        parse_fields([text])


def test_a_value_may_hold_signs(colbert, tmp_path):
    records = [{"_id": "a", "text": "owls", "url": "x?a=b&c>d", "empty": ""}]
    index([write_corpus(tmp_path / "corpus.jsonl", records)], tmp_path / "store", colbert)
    with Store(tmp_path / "store", colbert) as opened:
        assert found(opened, parse_fields(["url=x?a=b&c>d", "empty="])) == "a"


def test_paths_are_compared_in_one_form(colbert, tmp_path):
    """F11: macOS writes names in NFD, Linux in NFC. Patterns come in either."""
    for folder, form in (("mac", "NFD"), ("linux", "NFC")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / unicodedata.normalize(form, "größe.md")).write_text("The mill grinds flour.")
    (tmp_path / "linux" / "GRÖSSE.md").write_text("The mill grinds flour.")
    index([tmp_path], tmp_path / "store", colbert, note=lambda _: None)
    with Store(tmp_path / "store", colbert) as opened:
        for form in ("NFC", "NFD"):
            for pattern in ("*größe*", "größe.md", f"{tmp_path}/*/größe.md", "gr[öx]ße.md"):
                paths = [h.passage.path for h in opened.search(["mill"], path=unicodedata.normalize(form, pattern))[0]]
                assert sorted(Path(path).parent.name for path in paths) == ["linux", "mac"]
        assert len(opened.run({"q": "mill"}, path=unicodedata.normalize("NFD", "größe.md"))["q"]) == 2


def test_a_pattern_that_is_not_utf_8_finds_its_file(colbert, tmp_path):
    (tmp_path / "n\udcff.md").write_text("The mill.")
    index([tmp_path], tmp_path / "store", colbert, note=lambda _: None)
    with Store(tmp_path / "store", colbert) as opened:
        for pattern in ("n\udcff.md", r"n\xff.md", "n*.md"):
            assert len(opened.search(["mill"], path=pattern)[0]) == 1


def test_cells_of_a_table_are_texts_that_compare_as_numbers(colbert, tmp_path):
    rows = "id,text,year,zip\nx,owls,2019,00701\ny,owls,2021,701\nz,owls,,\n"
    (tmp_path / "a.csv").write_text(rows)
    index([tmp_path / "a.csv"], tmp_path / "store", colbert)
    with Store(tmp_path / "store", colbert) as opened:
        assert found(opened, {"year": {">=": 2020}}) == "y"
        assert found(opened, parse_fields(["year>=2019"])) == "xy"
        assert found(opened, {"year": 2019}) == "x"
        assert found(opened, {"zip": "00701"}) == "x"
        assert found(opened, {"year": ""}) == "z"


def test_a_number_of_any_length_is_compared(colbert, tmp_path):
    records = [{"_id": "a", "text": "owls", "n": "9" * 5000, "big": 2**63 + 1}]
    index([write_corpus(tmp_path / "corpus.jsonl", records)], tmp_path / "store", colbert)
    with Store(tmp_path / "store", colbert) as opened:
        assert found(opened, {"n": "9" * 5000}) == "a"
        assert found(opened, {"big": 2**63 + 1}) == "a"
        assert found(opened, {"big": 2**63}) == ""
    assert json.loads(json.dumps(records))


def test_the_values_of_a_field_are_read_once(colbert, tmp_path, monkeypatch):
    """At 100,000 documents, each new value took over a second; now only the first one of a field does."""
    records = [{"_id": f"d{i}", "text": f"owl {i}", "metadata": {"year": i, "tags": [f"t{i % 3}"]}} for i in range(9)]
    index([write_corpus(tmp_path / "corpus.jsonl", records)], tmp_path / "store", colbert)
    parsed = []
    monkeypatch.setattr(fields, "_find", lambda *given, find=fields._find: parsed.append(given[1]) or find(*given))
    with Store(tmp_path / "store", colbert) as opened:

        def found(**where):
            return {hit.passage.id for hit in opened.search(["owl"], where=where)[0]}

        for year in range(9):
            assert found(year=year) == {f"d{year}"}
        assert found(year={">": 6}) == {"d7", "d8"}
        assert parsed == ["year"] * 9
        assert found(year={">": 3}, tags="t1") == {"d4", "d7"}
        assert found(tags="t2", year={"<": 4}) == {"d2"}
        assert parsed == ["year"] * 9 + ["year", "tags"] * 9
        with pytest.raises(ValueError, match="cannot be compared"):
            found(year="soon")


def test_fields_of_long_texts_are_not_kept(colbert, tmp_path, monkeypatch):
    monkeypatch.setattr(fields, "LARGEST", 300)
    records = [{"_id": f"d{i}", "text": f"owl {i}", "metadata": {"long": f"{i} " + "x" * 99}} for i in range(9)]
    index([write_corpus(tmp_path / "corpus.jsonl", records)], tmp_path / "store", colbert)
    with Store(tmp_path / "store", colbert) as opened:
        for number in (0, 8):
            (hit,) = opened.search(["owl"], where={"long": f"{number} " + "x" * 99})[0]
            assert hit.passage.id == f"d{number}"
        assert not opened._selection._fields._kept
