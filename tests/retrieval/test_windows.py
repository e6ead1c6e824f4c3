"""Windows: every token of a document is in exactly one, none is too long, and each has its neighbours as context."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modernbert import ColBERT, Encoder, EncoderConfig, Tokenizer
from modernbert.heads.colbert import ColBERTConfig
from modernbert.retrieval import windows as module
from modernbert.retrieval.passages import Document
from modernbert.retrieval.spelling import tokenize
from modernbert.retrieval.windows import OVERLAP, Window, batch, windows

LIMIT = 40
PROSE = "\n\n".join(f"Paragraph {i} has a few words, and some. " * (i % 7 + 1) for i in range(30))
LONG = {
    "prose": PROSE,
    "one line": "word " * 600,
    "one word": "x" * 2000,
    "japanese": "猫は夜に狩りをする。" * 40,
    "emoji": "👍🏽👩‍👩‍👧 " * 60,
    "windows": "\r\n\r\n".join(f"Line {i}.\r\nNext line." for i in range(60)),
    "right to left": "שלום עולם, مرحبا بالعالم. " * 40,
    "control": "a\0b\x07c\u200bd " * 80,
}


@pytest.fixture(scope="module")
def colbert(modernbert_tokenizer_file) -> ColBERT:
    """Without a skiplist, so that a window keeps all of its own rows."""
    config = EncoderConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    tokenizer = Tokenizer.from_pretrained(modernbert_tokenizer_file.parent)
    settings = ColBERTConfig(document_length=LIMIT, skiplist_words=())
    return ColBERT.from_encoder(Encoder.from_config(config), tokenizer, dim=16, config=settings).eval()


def text_file(text: str, name: str = "notes.txt") -> Document:
    return Document(f"/a/{name}", f"/a/{name}", "", text)


def record(text: str, title: str = "") -> Document:
    return Document("/a/corpus.jsonl", "d1", title, text, line=7)


def check(colbert: ColBERT, document: Document, found: list[Window]) -> None:
    """The windows of a document without headings are overlapping runs of its tokens; their own parts cover it."""
    if not document.text.strip():
        assert found == []
        return
    title, text = found[0].passage.title, document.text.strip()
    offset = document.text.index(text)
    content = f"{title} {text}" if title else text
    tokens = tokenize(partial(colbert.tokenize_documents, truncate=False), [content])
    ids, spans = tokens.batch.input_ids.numpy(), tokens.spans[0]
    start_of_text = len(content) - len(text)
    header = next((row for row, span in enumerate(spans) if span and span[1] > start_of_text), len(ids) - 1)
    body, at = ids[header:-1], 0
    for window in found:
        assert len(window.ids) == len(window.keep) == len(window.spans) <= LIMIT
        assert window.ids[:header].tolist() == ids[:header].tolist()
        assert window.ids[-1] == ids[-1]
        own = np.flatnonzero(window.keep[header:-1])
        before, count = int(own[0]), len(own)
        assert own.tolist() == list(range(before, before + count))
        inner = window.ids[header:-1]
        assert inner.tolist() == body[at - before : at - before + len(inner)].tolist()
        overlap = min(OVERLAP, (LIMIT - header - 1) // 8) if len(found) > 1 else 0
        assert before == min(at, overlap)
        assert len(inner) - before - count == min(len(body) - at - count, overlap)
        at += count
        passage = window.passage
        assert passage.text == document.text[passage.start : passage.end] == passage.text.strip()
        assert passage.line == (document.line or 1 + document.text.count("\n", 0, passage.start))
        for row, (first, last) in enumerate(window.spans.tolist()):
            if last and header <= row < len(window.ids) - 1:
                whole = spans[at - count + row - before]
                assert whole is not None
                named = passage.content[first:last]
                first, last = (max(0, character - start_of_text + offset) for character in whole)
                assert named.strip() == content[slice(*whole)].strip() == document.text[first:last].strip()
    assert at == len(body)


@pytest.mark.parametrize("title", ["", "A title, short"])
@pytest.mark.parametrize("name", LONG)
def test_every_token_is_in_exactly_one_passage(colbert, name, title):
    document = record(LONG[name], title)
    found = list(windows(colbert, [document]))
    assert len(found) > 5
    check(colbert, document, found)
    check(colbert, text_file(LONG[name]), list(windows(colbert, [text_file(LONG[name])])))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=300))
def test_any_text(colbert, text):
    check(colbert, record(text), list(windows(colbert, [record(text)])))


@pytest.mark.parametrize("title", ["", "Owls", "A title with ! punctuation"])
def test_a_document_that_fits_is_encoded_as_the_model_encodes_it(colbert, title):
    """BEIR's way: title, space, text, and the rows that `encode_documents` keeps."""
    documents = [record("Owls hunt mice, at midnight.", title), record("Short.", title)]
    tokens = colbert.tokenize_documents([document.content for document in documents])
    ours = batch(list(windows(colbert, documents)))
    assert ours.batch.input_ids.tolist() == tokens.batch.input_ids.tolist()
    assert ours.keep.tolist() == tokens.keep.tolist()
    assert ours.batch.lengths == tokens.batch.lengths


def test_punctuation_is_dropped_in_windows_too(colbert, modernbert_tokenizer_file):
    tokenizer = Tokenizer.from_pretrained(modernbert_tokenizer_file.parent)
    settings = ColBERTConfig(document_length=LIMIT)
    skipping = ColBERT.from_encoder(colbert.encoder, tokenizer, dim=16, config=settings)
    found = list(windows(skipping, [record(PROSE)]))
    kept = np.concatenate([window.ids[window.keep] for window in found])
    whole = skipping.tokenize_documents([PROSE], truncate=False)
    specials = 3 * (len(found) - 1)  # [CLS], [D] and [SEP] of all windows but one
    assert len(kept) == int(whole.keep.sum()) + specials < whole.batch.num_tokens + specials
    assert not set(kept.tolist()) & set(skipping.skip_ids.tolist())


def test_a_title_that_would_crowd_out_the_text_is_cut_with_it(colbert):
    title = "Long title " * 30
    found = list(windows(colbert, [record("The text.", title)]))
    assert {window.passage.title for window in found} == {""}
    assert max(len(window.ids) for window in found) <= LIMIT
    said = " ".join(window.passage.text for window in found).split()
    assert said == [*title.split(), "The", "text."]
    assert all(0 <= window.passage.start <= window.passage.end <= 9 for window in found)


def test_a_record_may_be_all_title_and_an_empty_document_has_no_window(colbert):
    (only,) = windows(colbert, [record("", "Only a title"), record(" \n"), text_file(""), text_file("\n\t")])
    assert (only.passage.title, only.passage.text, only.passage.content.strip()) == ("Only a title", "", "Only a title")
    assert only.ids.tolist() == colbert.tokenize_documents(["Only a title"]).batch.input_ids.tolist()


def test_long_texts_are_tokenised_in_parts(colbert, monkeypatch):
    """Parts end at white space, lose nothing, and keep counting lines."""
    monkeypatch.setattr(module, "BLOCK", 100)
    document = text_file(PROSE + "\n" + "y" * 350)
    found = list(windows(colbert, [document]))
    end = 0
    for window in found:
        passage = window.passage
        assert passage.text == document.text[passage.start : passage.end]
        assert document.text[end : passage.start].strip() == ""
        assert passage.line == 1 + document.text.count("\n", 0, passage.start)
        end = passage.end
    assert document.text[end:].strip() == ""


def test_sections_are_windows_of_their_own_with_their_headings(colbert):
    guide = text_file("# Birds\nDay birds sing.\n\n## Owls\n" + "Owls hunt mice. " * 40, "guide.md")
    found = [
        (w.passage.title, w.passage.line, w.passage.content[slice(*w.spans[2])]) for w in windows(colbert, [guide])
    ]
    assert found[0] == ("Birds", 2, "B")
    assert len(found) > 3
    assert set(found[1:]) == {("Birds: Owls", 5, "B")}


@pytest.fixture(scope="module")
def default() -> ColBERT:
    """The model that ships. Its tokenizer has no tokens for punctuation."""
    return ColBERT.default()


KEEPER = (
    "The keeper number {} of the old lighthouse climbed the tower every evening and lit the big lamp for the ships{}"
)
ENDS = [".", "!", "?", "…", ".”", '."', ".)", ".**", " (really).", ". »", "\u00a0!\u202f»"]


@pytest.mark.parametrize("end", ENDS)
def test_cuts_fall_at_sentence_ends_with_the_model_that_ships(default, end):
    """F01: its tokenizer has no punctuation, so no cut was at one, and the period at each cut was lost."""
    text = " ".join(KEEPER.format(number, end) for number in range(40))
    found = [window.passage for window in windows(default, [text_file(text)])]
    assert len(found) > 3
    assert " ".join(passage.text for passage in found) == text
    assert all(passage.text.startswith("The keeper") and passage.text.endswith(end) for passage in found)
    assert all(passage.text == text[passage.start : passage.end] for passage in found)


@pytest.mark.parametrize(
    "mark", ["- ", "* ", "+ ", "• ", "1. ", "2) ", "(3) ", "  - ", "- [ ] ", "a. ", "iv. ", "(XII) "]
)
def test_cuts_fall_at_list_items_with_the_model_that_ships(default, mark):
    text = "".join(f"{mark}{KEEPER.format(number, '; e.g. so.')}\n" for number in range(40))
    found = [window.passage for window in windows(default, [text_file(text)])]
    assert len(found) > 3
    assert all(passage.text.startswith(mark.strip()) for passage in found)
    assert "".join("".join(passage.text.split()) for passage in found) == "".join(text.split())


@pytest.mark.parametrize(
    "text",
    [
        "「猫は夜に狩りをする。」",
        "猫は夜に狩りをする！",
        "猫は．３．５で狩りをする．",
        "»Die Eule jagt nachts.« ",
        "क्या बिल्ली रात में शिकार करती है। ",
        "هل القط يصيد ليلا؟ ",
    ],
)
def test_cuts_fall_at_sentence_ends_of_other_scripts(default, text):
    found = [window.passage.text for window in windows(default, [text_file(text * 120)])]
    assert len(found) > 3
    assert all(one.startswith(text.strip()) and one.endswith(text.strip()) for one in found)


SHORTENED = ["Jan. 5", "approx. 30", "etc. and", "Inc. said", "etc.) and", "Abb. 3", "… and", "Gov. Smith", "Mt. Fuji"]
PLAIN = "Of the old lighthouse the keeper told in {} all that he knew {} and more than that to the ships"


@pytest.mark.parametrize(
    "inside", ["e.g. J. R. Smith", "Dr. Smith", "Fig. 3", "U.S. waters", "version 3.14 here", "a.b.c", *SHORTENED]
)
def test_a_period_is_not_always_the_end_of_a_sentence(default, inside):
    text = " ".join(PLAIN.format(number, inside) + "." for number in range(60))
    found = [window.passage.text for window in windows(default, [text_file(text)])]
    assert all(one.startswith("Of the") and one.endswith("the ships.") for one in found)


def test_a_text_of_small_letters_is_cut_at_its_periods(default):
    text = "\n".join(KEEPER.format(number, ".").lower().replace("climbed ", "climbed\n") for number in range(60))
    found = [window.passage.text for window in windows(default, [text_file(text)])]
    assert all(one.startswith("the keeper") and one.endswith("the ships.") for one in found)


def test_no_character_is_lost_before_between_and_after_cuts(default):
    """Not the marks around the first and last word, and not those that no token stands for."""
    text = "“(" + "word—word, \u200b;-) /word/ …\n" * 400 + ")”!"
    for document in (text_file(text), record(text), record(text, "A title")):
        found = [window.passage for window in windows(default, [document])]
        assert len(found) > 3
        assert "".join("".join(passage.text.split()) for passage in found) == "".join(text.split())


def test_rows_of_a_table_and_lines_of_code_are_not_cut(default):
    for line in ("| owl | {} | grey and brown |", "    call(argument_{}, 'owl', night=True)"):
        text = "\n".join(line.format(number) for number in range(300))
        lines = text.split("\n")
        for window in windows(default, [text_file(text)]):
            assert {one.strip() for one in window.passage.text.split("\n")} <= {one.strip() for one in lines}


def test_long_sections_are_cut_at_sentences_before_they_are_tokenised(default, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 3000)
    text = " ".join(KEEPER.format(number, ".") for number in range(100))
    for window in windows(default, [text_file(text)]):
        assert window.passage.text.strip().endswith("ships.")


@pytest.mark.parametrize(
    ("name", "line", "place"),
    [
        ("a.txt", 3, ":3"),
        ("a.rst", 3, ":3"),
        ("a.py", 3, ":3"),
        ("a.html", None, ""),
        ("a.HTM", None, ""),
        ("a.ipynb", None, ""),
    ],
)
def test_a_line_is_named_only_where_it_is_one_of_the_file(default, name, line, place):
    """F13: lines of the markdown that was made of a page were given as lines of the page."""
    (window,) = windows(default, [text_file("\n\nOwls hunt mice.", name)])
    assert (window.passage.line, window.passage.page, window.passage.place) == (line, None, place)
