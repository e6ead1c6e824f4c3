import json
import math

import pytest

from modernbert.train.examples import (
    Labelled,
    Pair,
    Tagged,
    read_conll,
    read_labelled,
    read_pairs,
    read_scored,
    read_texts,
    read_triples,
)
from modernbert.train.glue import TASKS, read_glue

PAIR = {"query": "q", "positive": "p"}
TRIPLE = {**PAIR, "negatives": ["n", "m"]}
SCORED = {"query": "q", "documents": ["a", "b", "c"], "scores": [1, 0.5, -2]}
LABELLED = {"text": "t", "label": 1}


def test_a_row_of_each_kind():
    assert list(read_pairs([PAIR | {"group": 3}])) == [Pair("q", "p", "", 3)]
    assert list(read_triples([TRIPLE])) == [Pair("q", "p", "", "p", ("n", "m"))]
    assert list(read_scored([SCORED | {"source": "s"}])) == [Pair("q", "a", "s", "a", ("b", "c"), (1.0, 0.5, -2.0))]
    assert list(read_texts([{"text": "t", "id": 1}])) == ["t"]
    assert list(read_labelled([LABELLED])) == [Labelled("t", 1)]


@pytest.mark.parametrize(
    ("fields", "negatives"),
    [
        ({"negatives": "n"}, ("n",)),
        ({"negative": "n"}, ("n",)),
        ({"negative": ["n", "m"]}, ("n", "m")),
        ({"negative_2": "b", "negative_10": "c", "negative_1": "a"}, ("a", "b", "c")),
        ({"negative": "a", "negative_1": "b"}, ("a", "b")),
    ],
)
def test_negatives_come_as_a_list_or_as_fields(fields, negatives):
    assert next(read_triples([PAIR | fields])).negatives == negatives


@pytest.mark.parametrize(
    ("row", "labels", "wanted"),
    [
        ({"text": "t", "label": "no"}, ("yes", "no"), Labelled("t", 1)),
        ({"text": "t", "text_pair": "u", "label": 0}, ("yes", "no"), Labelled(("t", "u"), 0)),
        ({"text": "t", "label": 2.5}, (), Labelled("t", 2.5)),
        ({"text": "t", "label": ["b", 0]}, ("a", "b"), Labelled("t", (1, 0))),
        ({"text": "t", "label": []}, ("a", "b"), Labelled("t", ())),
        ({"text": "t", "label": 77}, (), Labelled("t", 77)),
    ],
)
def test_labels_are_classes_several_classes_or_numbers(row, labels, wanted):
    assert list(read_labelled([row], labels=labels)) == [wanted]


BAD = {
    # reader, row, what the error has
    "no positive": (read_pairs, {"query": "q"}, r"a pair needs .* got keys \['query'\]"),
    "empty query": (read_pairs, PAIR | {"query": " "}, '"query" is empty'),
    "empty positive": (read_triples, TRIPLE | {"positive": ""}, '"positive" is empty'),
    "ignored scores": (read_pairs, PAIR | {"scores": [1]}, '"scores" would be ignored'),
    "ignored scores of a triple": (read_triples, TRIPLE | {"scores": [1, 2]}, '"scores" would be ignored'),
    "no negative": (read_triples, PAIR, 'a triple needs "negatives"'),
    "no negatives in the list": (read_triples, PAIR | {"negatives": []}, 'a triple needs "negatives"'),
    "an empty negative": (read_triples, PAIR | {"negatives": ["n", "\t"]}, r'"negatives\[1\]" is empty'),
    "a negative that is a number": (read_triples, PAIR | {"negatives": [3]}, r'"negatives\[0\]" must be a string'),
    "no negative text": (read_triples, PAIR | {"negative": None}, '"negative" must be a string, got None'),
    "no scores": (read_scored, {"query": "q", "documents": ["a", "b"]}, '"scores" must be a list of 2 numbers.*None'),
    "too few scores": (read_scored, SCORED | {"scores": [1, 2]}, "a list of 3 numbers, one for each document, got 2"),
    "too many scores": (read_scored, SCORED | {"scores": [1, 2, 3, 4]}, "a list of 3 numbers.*got 4"),
    "a NaN": (read_scored, SCORED | {"scores": [1, math.nan, 2]}, r'"scores\[1\]" must be a finite number, got nan'),
    "an infinity": (read_scored, SCORED | {"scores": [1, 2, -math.inf]}, r'"scores\[2\]" .*got -inf'),
    "a huge number": (read_scored, SCORED | {"scores": [1, 10**400, 3]}, r'"scores\[1\]" must be a finite number'),
    "a score beyond float32": (
        read_scored,
        SCORED | {"scores": [1, 1e39, 3]},
        r'"scores\[1\]" must be a finite number',
    ),
    "a score in words": (read_scored, SCORED | {"scores": [1, "2", 3]}, r'"scores\[1\]" must be a finite number'),
    "a score that is true": (read_scored, SCORED | {"scores": [True, 2, 3]}, r'"scores\[0\]" must be a finite number'),
    "one document": (read_scored, SCORED | {"documents": ["a"], "scores": [1]}, '"documents" has 1 texts'),
    "an unread label": (read_scored, SCORED | {"negatives": ["n"]}, '"negatives" would be ignored'),
    "an empty document": (read_scored, SCORED | {"documents": ["a", "", "c"]}, r'"documents\[1\]" is empty'),
    "documents that are a text": (read_scored, SCORED | {"documents": "a b"}, '"documents" must be a list'),
    "no query": (read_scored, {"documents": ["a", "b"], "scores": [1, 2]}, '"query" is missing'),
    "no text": (read_texts, {"body": "t"}, r"\"text\" is missing, got keys \['body'\]"),
    "an empty text": (read_texts, {"text": "\n"}, '"text" is empty'),
    "half a surrogate pair": (read_texts, {"text": "\ud800"}, "surrogates not allowed"),
    "no label": (read_labelled, {"text": "t"}, '"label" is missing'),
    "a class that is not known": (read_labelled, LABELLED | {"label": "maybe"}, "'maybe'"),
    "a class out of range": (read_labelled, LABELLED | {"label": -1}, '"label" must be'),
    "a label that is NaN": (read_labelled, LABELLED | {"label": math.nan}, '"label" must be a finite number'),
    "a label that is null": (read_labelled, LABELLED | {"label": None}, '"label" must be'),
    "an empty second text": (read_labelled, LABELLED | {"text_pair": ""}, '"text_pair" is empty'),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named(tmp_path, case):
    read, row, sentence = BAD[case]
    good = next(each for each in (PAIR, TRIPLE, SCORED, LABELLED) if not _raises(read, each))
    (tmp_path / "x.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"x\.jsonl:2: .*{sentence}"):
        list(read(tmp_path))


def _raises(read, row):
    try:
        return not list(read([row]))
    except ValueError:
        return True


def test_a_class_beyond_the_known_ones_is_named():
    with pytest.raises(ValueError, match='row 1: "label" must be one of a, b, or its number, got 2'):
        list(read_labelled([{"text": "t", "label": 2}], labels=("a", "b")))


def test_rows_with_empty_texts_can_be_left_out():
    rows = [PAIR, PAIR | {"query": ""}, PAIR | {"positive": " "}]
    assert len(list(read_pairs(rows, skip_empty=True))) == 1
    rows = [TRIPLE, TRIPLE | {"negatives": ["n", ""]}]
    assert len(list(read_triples(rows, skip_empty=True))) == 1
    rows = [SCORED, SCORED | {"documents": ["a", "b", ""]}]
    assert len(list(read_scored(rows, skip_empty=True))) == 1
    assert list(read_texts([{"text": ""}, {"text": "t"}], skip_empty=True)) == ["t"]


@pytest.mark.parametrize(("read", "row"), [(read_pairs, PAIR), (read_triples, TRIPLE), (read_scored, SCORED)])
def test_sources_can_be_excluded(read, row):
    rows = [row | {"source": name} for name in "abca"]
    assert [pair.source for pair in read(rows, exclude_sources={"a"})] == ["b", "c"]


TABLES = {
    "CoLA": (
        'gj04\t1\t\tThe "sailors" rode.\nclc95\t0\t*\t"In quotes.\n',
        ['The "sailors" rode.', '"In quotes.'],
        [1, 0],
    ),
    "SST-2": ("sentence\tlabel\nhide new secretions \t0\r\n", ["hide new secretions"], [0]),
    "MRPC": (
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t2\t3\tHe said " so\t" So .\r\n',
        [('He said " so', '" So .')],
        [1],
    ),
    "RTE": (
        "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n1\tc\td\tentailment",
        [("a", "b"), ("c", "d")],
        [1, 0],
    ),
    "STS-B": ("genre\tsentence1\tsentence2\tscore\nx\ta\tb\t3.800\n", [("a", "b")], [3.8]),
}


@pytest.mark.parametrize("task", TASKS)
def test_glue(tmp_path, task):
    """Quotes are characters, a byte-order mark and the ends of lines are not of a cell, CoLA has no header."""
    table, texts, labels = TABLES[task]
    (tmp_path / "dev.tsv").write_bytes(table.encode())
    assert list(read_glue(tmp_path / "dev.tsv", task)) == [Labelled(*row) for row in zip(texts, labels, strict=True)]


@pytest.mark.parametrize(
    ("task", "table", "sentence"),
    [
        ("CoLA", "a\t1\t\tx\na\t2\t\tx\n", r"dev\.tsv:2: 'label' is '2', but must be one of 0, 1"),
        ("CoLA", "a\t1\tx\n", r"dev\.tsv:1: 4 columns are wanted, got 3"),
        ("SST-2", "sentence\tlabel\nfine\t1\n \t1\n", r"dev\.tsv:3: 'sentence' is empty"),
        ("SST-2", "text\tlabel\nfine\t1\n", r"dev\.tsv:1: SST-2 has a column 'sentence', the file has text, label"),
        ("RTE", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\tx\n", r"dev\.tsv:2: 4 columns .* got 5"),
        ("RTE", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n", "'label' is '1', but must be one of entailment"),
        ("STS-B", "sentence1\tsentence2\tscore\na\tb\tnan\n", r"dev\.tsv:2: 'score' is 'nan', but must be a number"),
        ("STS-B", "sentence1\tsentence2\tscore\na\tb\t\n", "'score' is ''"),
        ("QQP", "", "'QQP' is not one of CoLA"),
    ],
)
def test_a_bad_row_of_glue_is_named(tmp_path, task, table, sentence):
    (tmp_path / "dev.tsv").write_text(table)
    with pytest.raises(ValueError, match=sentence):
        list(read_glue(tmp_path / "dev.tsv", task))


def test_a_table_in_another_encoding_is_named(tmp_path):
    (tmp_path / "dev.tsv").write_bytes(b"sentence\tlabel\ncaf\xe9\t1\n")
    with pytest.raises(ValueError, match=r"dev\.tsv:2: .*invalid continuation byte"):
        list(read_glue(tmp_path / "dev.tsv", "SST-2"))


@pytest.mark.parametrize(
    "text",
    [
        "The\tO\nE. U.\tB-org\n\nYes\tO\n",
        "The\tO\nE. U.\tB-org\n\t\n\t\nYes\tO",  # as in WNUT 2017
        "\ufeff-DOCSTART- -X- O\r\n\r\nThe\tDT\tO\r\nE. U.\tNN\tB-org\r\n\r\nYes\tUH\tO\r\n",  # as in CoNLL 2003
    ],
)
def test_conll(tmp_path, text):
    (tmp_path / "a.conll").write_bytes(text.encode())
    assert list(read_conll(tmp_path / "a.conll")) == [
        Tagged(("The", "E. U."), ("O", "B-org")),
        Tagged(("Yes",), ("O",)),
    ]


def test_conll_with_spaces(tmp_path):
    (tmp_path / "a.conll").write_text("EU NNP B-NP B-ORG\nrejects VBZ B-VP O\n")
    assert list(read_conll(tmp_path / "a.conll")) == [Tagged(("EU", "rejects"), ("B-ORG", "O"))]


@pytest.mark.parametrize("line", ["word", "\tO", "word\t", "word\t "])
def test_a_bad_line_of_conll_is_named(tmp_path, line):
    (tmp_path / "a.conll").write_text(f"The\tO\n{line}\n")
    with pytest.raises(ValueError, match=r"a\.conll:2: wanted a word and its tag"):
        list(read_conll(tmp_path / "a.conll"))
