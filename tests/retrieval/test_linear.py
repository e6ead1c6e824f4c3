"""Work is linear in the input, counted in characters, tokens and operators. `test_sweep.py` measures it."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import zlib
from contextlib import suppress

import pytest
from shapes import SENTENCE, shapes

from modernbert import ColBERT
from modernbert.retrieval.documents import readers, records
from modernbert.retrieval.documents.find import read_file
from modernbert.retrieval.documents.readers import read_pdf
from modernbert.retrieval.documents.text import MOST, decode
from modernbert.retrieval.explain import LONGEST, TokenMatch, strongest_words
from modernbert.retrieval.passages import Document, cut, sections
from modernbert.retrieval.windows import windows
from modernbert.tokenizer import CHARACTERS, Tokenizer

SIZE = 8_000


@pytest.fixture(scope="module")
def colbert() -> ColBERT:
    return ColBERT.default()


@pytest.fixture
def tokenized(monkeypatch) -> list[int]:
    """Characters that were given to the tokenizer, in each call."""
    counts: list[int] = []
    real = Tokenizer._encode

    def counting(tokenizer, texts, *args, **options):
        counts.append(sum(map(len, texts)))
        return real(tokenizer, texts, *args, **options)

    monkeypatch.setattr(Tokenizer, "_encode", counting)
    return counts


def work(colbert: ColBERT, path, tokenized: list[int]) -> tuple[int, int, int]:
    """Characters tokenised, tokens for the model, and characters stored."""
    tokenized.clear()
    found = []
    with suppress(ValueError):
        found = list(windows(colbert, read_file(path, on_note=lambda _: None)))
    return sum(tokenized), sum(len(w.ids) for w in found), sum(len(w.passage.content) for w in found)


def test_any_shape_is_as_much_work_as_a_few_times_its_size(colbert, tmp_path, tokenized):
    files = shapes(SIZE)
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    _, plain, _ = work(colbert, tmp_path / "plain.txt", tokenized)
    for name in files:
        characters, tokens, stored = work(colbert, tmp_path / name, tokenized)
        assert characters < 5 * SIZE, name
        assert stored < 5 * SIZE, name
        assert tokens < 6 * plain, name


@pytest.mark.parametrize("number", [10, 100, 1000])
def test_titles_cost_no_more_than_a_few_times_the_text(colbert, tokenized, number):
    """A long heading above many short sections was tokenised with each of them."""
    for title in ("w " * 2000, "A title. " * 30, "t"):
        text = f"# {title}\n\n" + "## s\n\nx\n\n" * number
        found = list(windows(colbert, [Document("/a.md", "/a.md", "", text)]))
        assert sum(tokenized) < 4 * len(text) + 15_000
        words = " ".join(window.passage.content for window in found).split()
        assert words.count("x") == number
        assert title.split()[0] in " ".join(words)
        tokenized.clear()


def test_headings_of_an_ordinary_document_are_used():
    text = "# Changes\n\n" + "".join(f"## 1.{number}\n\n- One thing is mended.\n\n" for number in range(2000))
    found = list(sections(Document("/changes.md", "/changes.md", "", text)))
    assert [section.title for section in found] == [f"Changes: 1.{number}" for number in range(2000)]


def test_a_title_longer_than_a_block_is_read_once(colbert, tokenized, monkeypatch):
    monkeypatch.setattr("modernbert.retrieval.windows.BLOCK", 3000)
    title = " ".join(f"t{number}" for number in range(3000))
    text = " ".join(f"x{number}" for number in range(3000))
    found = list(windows(colbert, [Document("/a.jsonl", "d", title, text, line=1)]))
    assert max(tokenized) < 3 * 3000
    assert " ".join(window.passage.content for window in found).split() == [*title.split(), *text.split()]
    assert {window.passage.title for window in found} == {""}


@pytest.mark.parametrize("text", ["a" * 60_000, SENTENCE * 600, "猫" * 30_000, "qzxj!" * 12_000])
def test_a_long_query_is_read_no_further_than_the_model_reads(colbert, tokenized, text):
    whole = colbert.tokenizer.encode_batch([text], max_length=colbert.config.query_length - 1, warn=False)
    tokenized.clear()
    assert colbert.query_ids([text]) == [whole[0].ids[1:-1]]
    assert sum(tokenized) <= CHARACTERS * colbert.config.query_length


@pytest.mark.parametrize("text", [" " * 50_000 + "owl", "\u200b" * 50_000 + "owl", "owl" + " " * 50_000 + "mouse"])
def test_words_after_much_white_space_are_still_read(colbert, text):
    limit = colbert.config.query_length - 1
    whole = colbert.tokenizer.encode_batch([text], max_length=limit)
    assert colbert.tokenizer.encode_beginnings([text], max_length=limit) == whole
    assert whole[0].truncated == 0


def test_words_that_are_shown_are_short():
    query, document = "a" * 1_000_000, "b" * 1_000_000
    matches = [TokenMatch((at, at + 4), (at, at + 4), 1.0) for at in range(0, 120, 4)]
    for word in strongest_words(matches, query, document):
        assert len(word.query) <= LONGEST
        assert len(word.document or "") <= LONGEST
    (unknown,) = strongest_words([TokenMatch((0, 3), (0, 9999), 1.0)], "owl", "?" * 9999)
    assert len(unknown.document or "") == LONGEST


class Counted(str):
    """A text that counts the characters of the slices that are taken of it."""

    taken = 0

    def __getitem__(self, key):
        found = super().__getitem__(key)
        Counted.taken += len(found)
        return found


@pytest.mark.parametrize("blank", [" ", "\n", "\t", "\u3000"])
def test_white_space_is_not_looked_at_again_for_each_token(blank):
    text = Counted("a" + blank * 20_000 + "b")
    spans = [(at, at + 1) for at in range(len(text))]
    Counted.taken = 0
    assert list(cut(text, spans, 200))[-1][1] == len(spans)
    assert Counted.taken < 400 * len(text)


def test_broken_bytes_in_a_row_are_not_all_kept():
    for raw in (b"\0" * 10**6, b"\xff" * 10**6):
        assert decode(b"owl" + raw + b"mouse") == ("owl" + "\ufffd" * MOST + "mouse", 10**6)
    meant = "\ufffd" * 1000
    assert decode(meant.encode()) == (meant, 0)


def test_a_packed_line_is_shorter_than_one_that_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LARGEST", 1 << 22)
    line = json.dumps({"text": "x" * (1 << 21)}).encode()
    (tmp_path / "a.jsonl").write_bytes(line)
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(line))
    assert len(list(read_file(tmp_path / "a.jsonl"))) == 1
    with pytest.raises(ValueError, match="a line of more than 1 MiB"):
        list(read_file(tmp_path / "corpus.jsonl.gz"))


def pdf(content: bytes, *, layers: int = 1, pages: int = 1, form: bytes = b"") -> bytes:
    """A PDF whose pages share their content, and may draw the form `/X`."""

    def stream(data: bytes, entries: bytes = b"") -> bytes:
        for _ in range(layers):
            data = zlib.compress(data, 9)
        filters = b"/FlateDecode " * layers
        return b"<<%s/Length %d/Filter[%s]>>stream\n%s\nendstream" % (entries, len(data), filters, data)

    names = b"<</Font<</F 3 0 R>>/XObject<</X 6 0 R>>>>"
    page = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 9 9]/Resources%s/Contents 4 0 R>>" % names
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[%s]/Count %d>>" % (b"5 0 R " * pages, pages),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
        stream(content),
        page,
        stream(form, b"/Type/XObject/Subtype/Form/BBox[0 0 9 9]/Resources<</Font<</F 3 0 R>>>>"),
    ]
    body, places = b"%PDF-1.4\n", []
    for number, entry in enumerate(objects, start=1):
        places.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, entry)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    tail = b"trailer<</Root 1 0 R/Size %d>>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, len(body))
    return body + head + table + tail


WORDS = b"BT /F 9 Tf (owl) Tj ET "


@pytest.mark.parametrize(
    "raw",
    [
        pdf(WORDS * 60_000),
        pdf(WORDS * 100_000, layers=3),
        pdf(b"BT /F 9 Tf (" + b"a" * 10**7 + b") Tj ET"),
        pdf(WORDS * 100, pages=500),
        pdf(b"/X Do " * 5000, form=WORDS * 100),
        pdf(b"/X Do " * 100, form=WORDS * 100_000),
    ],
    ids=["stream", "layers", "string", "shared pages", "forms", "form"],
)
def test_a_pdf_is_read_no_further_than_its_size_explains(monkeypatch, raw):
    visited = []
    real = readers._Work.visit
    monkeypatch.setattr(readers._Work, "visit", lambda *args: (visited.append(1), real(*args)))
    notes = []
    tracemalloc.start()
    with suppress(ValueError):
        notes.append(f"{len(read_pdf(raw, notes.append)[1])} characters")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(visited) < 12_000 + 2 * len(raw)
    assert peak < 60e6
    assert not any(note.startswith("10000000") for note in notes)


def test_an_ordinary_pdf_is_read_to_its_end():
    raw = pdf(b"BT /F 9 Tf (owls) Tj ET", pages=60)
    assert read_pdf(raw, pytest.fail)[1].split() == ["owls"] * 60
