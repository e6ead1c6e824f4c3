"""A word has one form for the model, however it is spelled, and spans point into the text as shown."""

from __future__ import annotations

import random
import unicodedata

import numpy as np
import pytest
from stores import small_colbert

from modernbert import ColBERT
from modernbert.retrieval import Store, index
from modernbert.retrieval.documents.find import read_file
from modernbert.retrieval.explain import explain, strongest_words
from modernbert.retrieval.passages import Document
from modernbert.retrieval.queries import encode_queries, query_vectors
from modernbert.retrieval.spelling import Spelling, tokenize
from modernbert.retrieval.windows import windows

SPELLED = {
    "sedimentation": ["sedi\u00admen\u00adtation", "sedi\u200bmentation", "\ufeffsedimentation", "sedi\u2060mentation"],
    "financial office": ["ﬁnancial oﬃce", "financial\u00a0office", "ﬁnancial\u2009o\ufb03ce", "financial\u3000office"],
    "hydroelectric": ["hydro-\nelectric", "hydro-\r\n   electric", "hydro\u00ad\nelectric", "hydro¬\nelectric"],
    "hydroelectric dams": ["hydro\x02\r\nelectric dams", "hydro\ufffe\nelectric dams", "hydro\u2010\nelectric dams"],
    "hydroelectric lifetime": ["hydro-\n\felectric lifetime", "hydro\u00ad\n\felectric life-\n\ftime"],  # next pages
    "well-known": ["well\u2011known", "well\u2010known"],
    "shelfful": ["shelf\u200cful", "shelf\u200dful"],
    "CO2 in 5 m2": ["CO₂ in 5 m²", "ＣＯ２ in 5 ㎡"],
    "Schrödinger": ["Schr¨odinger", "Schr¨ odinger"],
    "μm": ["µm"],
    "ガイド": ["ｶﾞｲﾄﾞ"],
    "人工": ["⼈⼯"],
    "محمد": ["ﻣﺤﻤﺪ", "\u202bمحمد\u202c", "\u200fمحمد"],
    "Chapter IV": ["Chapter Ⅳ", "𝐂𝐡𝐚𝐩𝐭𝐞𝐫 𝖨𝖵"],
    "❤ 葛": ["❤\ufe0f 葛\U000e0100"],
}
KEPT = [
    "می\u200cخواهم",  # Persian writes a joiner inside words
    "क्\u200dष",
    "👩\u200d🚀 👨\u200d👩\u200d👧\u200d👦 🏳\u200d🌈",
    "10² and 2½, ① ™ “quoted” don’t …",
    "pre-\nand post-war, Vor-\nund Nachteile",
    "Jean-\nPierre, x-\nray, 1939-\n1945, a -\nb, --\nname",
    "well-known: a well-\nknown word",
    "a high tower and water of a high-\nwater mark",
    "naïve café, e\u0301, 한국어, ไทย",
    "plain text - with hyphens",
]


@pytest.mark.parametrize(("form", "spelled"), [(form, one) for form, many in SPELLED.items() for one in many])
def test_a_word_has_one_form(form, spelled):
    assert Spelling(spelled).text == form
    assert Spelling(f"The {spelled}.").text == f"The {form}."
    assert Spelling(form).text == form


@pytest.mark.parametrize("text", KEPT)
def test_what_means_something_is_kept(text):
    assert Spelling(text).text == text


def test_a_word_that_is_whole_elsewhere_decides():
    """A compound that a line end breaks keeps its hyphen; over and come are words too, but overcome is one."""
    assert Spelling("We overcome. They over-\ncome what will come over.").text.count("overcome") == 2
    assert Spelling("A state-of-the-\nart is state-of-the-art.").text.startswith("A state-of-the-\nart")


def test_spans_point_into_the_text_as_shown():
    shown = "a\u00ad\u200b ﬁnd hydro-\nelectric \u202bend ㎏"
    spelling = Spelling(shown)
    assert spelling.text == "a find hydroelectric end kg"
    words = [(0, 1), (2, 6), (7, 20), (21, 24), (25, 27)]
    found = [span and shown[slice(*span)] for span in spelling.locate([None, *words])]
    assert found == [None, "a", "ﬁnd", "hydro-\nelectric", "end", "㎏"]
    # Half a ligature is the whole character.
    assert [shown[slice(*span)] for span in spelling.locate([(2, 3), (3, 4), (25, 26)])] == ["ﬁ", "ﬁ", "㎏"]


def test_spans_of_single_characters_are_right_for_any_text():
    chance = random.Random(0)
    alphabet = "ab e-\n\u00ad\u200b\u200dﬁ㎏²\u00a0猫🦉\u202a"
    for _ in range(500):
        shown = "".join(chance.choices(alphabet, k=chance.randint(0, 12)))
        spelling = Spelling(shown)
        spans = spelling.locate([(at, at + 1) for at in range(len(spelling.text))])
        assert len(spans) == len(spelling.text)
        for character, span in zip(spelling.text, spans, strict=True):
            assert character in unicodedata.normalize("NFKC", shown[slice(*span)])
        assert spans == sorted(spans)


def test_documents_and_queries_meet_in_one_form():
    colbert = ColBERT.default()
    for tokenizer in (colbert.tokenize_queries, colbert.tokenize_documents):
        for form, spelled in SPELLED.items():
            wanted, *found = (tokenize(tokenizer, [text]).batch.input_ids.tolist() for text in [form, *spelled])
            assert all(ids == wanted for ids in found), form


def test_passages_are_slices_of_the_text_as_shown():
    text = "\n\n".join(f"Sedi\u00admen\u00adtation ﬁlls hydro-\nelectric dam {number}. " * 40 for number in range(9))
    found = list(windows(ColBERT.default(), [Document("/a.txt", "/a.txt", "", text)]))
    assert len(found) > 9
    for passage, ids, _, spans in found:
        assert passage.text == text[passage.start : passage.end]
        assert len(ids) <= 300
        shown = [passage.content[first:last].strip() for first, last in spans if last]
        assert "Sedi\u00admen\u00adtation" in "".join(shown)
        assert np.all(spans[:, 1] <= len(passage.content))


def test_a_question_finds_the_word_however_the_file_spells_it(tmp_path):
    """F04: soft hyphens hid a word from its question. Scores are equal, whichever of the two has which spelling."""
    text = "<h1>Notes</h1><p>Sedi{0}men{0}tation shortens the life{0}time of the dam."
    questions = ["sedimentation lifetime", "sedi\u00admen\u200btation lifetime"]
    scores = {}
    for name, mark in {"plain": "", "shy": "&shy;", "zwsp": "&#8203;", "wbr": "<wbr>"}.items():
        (tmp_path / "dam.html").write_text(text.format(mark))
        (tmp_path / "river.html").write_text("<h1>Page</h1><p>Sediments are found in rivers.")
        index([tmp_path / "dam.html", tmp_path / "river.html"], tmp_path / name, progress=False)
        with Store(tmp_path / name) as store:
            for question in questions:
                (hits,) = store.search([question])
                scores[name, question] = [(hit.passage.path, round(hit.score, 4)) for hit in hits]
                (encoded,) = store.encode([question])
                assert store.search([encoded])[0][0].score == pytest.approx(hits[0].score, abs=1e-4)
                content = hits[0].passage.content
                words = strongest_words(store.explain(encoded, hits[0]), question, content)
                assert {"Sedimentation", "lifetime"} <= {word.document for word in words}
                spans = [match.document for match in store.explain(encoded, hits[0]) if match.document]
                shown = {content[slice(*span)].strip() for span in spans}
                mark = {"shy": "\u00ad", "zwsp": "\u200b"}.get(name, "")
                assert f"i{mark}men{mark}t" in shown
    assert len({tuple(found) for found in scores.values()}) == 1
    assert scores["plain", questions[0]][0][0].endswith("dam.html")


def test_explain_and_search_read_the_same_form(modernbert_tokenizer_file):
    from modernbert import Session

    session = Session(small_colbert(modernbert_tokenizer_file.parent))
    shown = "The ﬁnance of hydro-\nelectric dams"
    (query,) = encode_queries(session, ["ﬁnance"])
    assert query_vectors(session, ["finance"])[0].equal(query.vectors)
    assert query.text == "ﬁnance"
    (matches,) = explain(session, query, [shown])
    assert {shown[slice(*match.document)].strip() for match in matches if match.document} <= set(shown.split()) | {
        "hydro-\nelectric"
    }
    assert all(query.text[slice(*match.query)] for match in matches if match.query)


def test_readers_keep_what_the_file_has(tmp_path):
    (tmp_path / "a.txt").write_text("ﬁ\u00ad hydro-\nelectric\u200b")
    (document,) = read_file(tmp_path / "a.txt")
    assert document.text == "ﬁ\u00ad hydro-\nelectric\u200b"
