"""Hostile documents: read unchanged, or refused with one sentence, in bounded memory and time."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import signal
import socket
import sqlite3
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modernbert.retrieval.documents import find as corpus
from modernbert.retrieval.documents import records
from modernbert.retrieval.documents.find import Key, find_files, read_file, read_texts
from modernbert.retrieval.documents.html import read_html
from modernbert.retrieval.documents.readers import READERS, read_pdf, read_plain
from modernbert.retrieval.documents.text import decode, file_name, storable

MB = 1_000_000

TEXTS = {
    "hebrew and arabic": "הינשוף צד בלילה. \u202bالبومة تصطاد ليلاً\u202c \u200fא1",
    "cjk": "猫は夜に狩りをする。貓頭鷹在夜間狩獵。올빼미는 밤에 사냥한다。𠮷野家",
    "thai without spaces": "นกฮูกล่าเหยื่อในเวลากลางคืน",
    "emoji": "🦉🌙 👩‍🚀👨‍👩‍👧‍👦 🏳️‍🌈 1️⃣ 👍🏽",
    "combining": "e\u0301 é Å A\u030a ﬁ Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢",
    "control characters": "bell\x07 escape\x1b[31m delete\x7f next line\x85 separators\u2028\u2029 end",
    "noncharacters": "\ufffe \uffff \U0010ffff \ufeff private \ue000",
    "100,000 words": "owl mouse " * 50_000 + "end",
    "one long word": "x" * 300_000,
}


def read(path: str | os.PathLike[str], **options) -> list:
    return list(read_file(path, on_note=pytest.fail, **options))


@contextlib.contextmanager
def hurry(seconds: int) -> Iterator[None]:
    """Fails if the block hangs."""

    def fail(*_):
        raise TimeoutError(f"still not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", TEXTS)
def test_any_script_comes_through_every_kind_of_file(tmp_path, name):
    """Nothing is normalised, reordered or dropped, except white space by the rules of HTML and CSV."""
    text = TEXTS[name]
    record = {"_id": text[:50], "title": text[:100], "text": text, "other": {text[:9]: [text[:70]]}}
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "wide.txt").write_text(text, encoding="utf-16")
    (tmp_path / "big-endian.txt").write_bytes(b"\xfe\xff" + text.encode("utf-16-be"))
    (tmp_path / "a.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    (tmp_path / "a.csv").write_text(f'text\n"{text}"\n', encoding="utf-8", newline="")
    (tmp_path / "a.html").write_text(f"<meta charset=utf-8><p>{text}</p>", encoding="utf-8")
    for file in ("a.txt", "wide.txt", "big-endian.txt", "a.csv"):
        assert read(tmp_path / file)[0].text == text
    for file in ("a.jsonl", "b.jsonl"):
        (document,) = read(tmp_path / file)
        assert (document.id, document.title, document.text) == (text[:50], text[:100], text)
        assert document.metadata == {"other": {text[:9]: [text[:70]]}}
    assert read(tmp_path / "a.jsonl")[0].digest == read(tmp_path / "b.jsonl")[0].digest
    # libxml2 drops what XML forbids, and a page has no other white space than single spaces.
    if name not in ("control characters", "noncharacters"):
        assert read(tmp_path / "a.html")[0].text == " ".join(text.split())


@pytest.mark.parametrize("suffix", ["", ".txt", ".md", ".py", ".html", ".pdf"])
def test_an_empty_file_is_a_document_without_text(tmp_path, suffix):
    path = tmp_path / f"empty{suffix}"
    path.touch()
    asked = []
    (document,) = read(path, is_current=lambda key: asked.append(key))
    assert (document.text, document.title, document.path) == ("", "", str(path))
    nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert asked == [Key(str(path), str(path), nothing, None)]


@pytest.mark.parametrize("content", [b"", b"\n\r\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n", b"\xff\xfe"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".csv", ".tsv"])
def test_an_empty_file_of_records_has_none(tmp_path, suffix, content):
    path = tmp_path / f"empty{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") and content else content)
    assert read(path) == []


@pytest.mark.parametrize(
    "content",
    [
        b"\x7fELF\x02\x01\x01" + b"\0" * 9,
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        gzip.compress(b"text " * 100),
        b"name.txt\0other.txt\0",
        "no text\x01".encode("utf-16-le"),
        b"x" * 8191 + b"\0",
    ],
    ids=["elf", "png", "gzip", "names", "control", "late"],  # not gzip's bytes, which contain the time
)
@pytest.mark.parametrize("suffix", ["", ".txt", ".py", ".bin"])
def test_a_binary_file_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"data{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: a binary file; supported are text, .*PDF, .*CSV"):
        read(path)


def test_a_stray_nul_is_replaced_everywhere(tmp_path):
    """No database and no C library truncates a text at a NUL, and it is not an `_id`."""
    (tmp_path / "a.txt").write_bytes(b"x" * 8192 + b"\0end")
    (tmp_path / "a.jsonl").write_bytes(
        b'{"_id": "k\\u0000", "title": "\0", "text": "a\0b\\u0000c \\\\u0000", "m": "\\u0000"}'
    )
    (tmp_path / "a.csv").write_bytes(b"_id,text\nk\0,a\0b\n")
    (tmp_path / "a.html").write_bytes(b"<p>a\0b")
    notes = []
    found = [
        document
        for name in ("a.txt", "a.jsonl", "a.csv", "a.html")
        for document in read_file(tmp_path / name, on_note=notes.append)
    ]
    assert [document.text[-14:] for document in found] == [
        "x" * 10 + "\ufffdend",
        "a\ufffdb\ufffdc \\u0000",
        "a\ufffdb",
        "a\ufffdb",
    ]
    assert [document.id for document in found[1:3]] == ["k\ufffd", "k\ufffd"]
    assert (found[1].title, found[1].metadata) == ("\ufffd", {"m": "\ufffd"})
    assert len(notes) == 4


@settings(deadline=None)
@given(st.binary(max_size=60), st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252", "gb18030"]))
@example(b"\xef\xbf\xbd \xff \0", "utf-8")
@example(b"\xff\xfe\x00\xd8a", "utf-16")
def test_any_bytes_become_storable_text(raw, encoding):
    text, count = decode(raw, encoding)
    assert text == raw.decode(encoding, "replace").replace("\0", "\ufffd")
    assert storable(text) == text
    text.encode("utf-8")
    if encoding == "utf-8":
        assert (count == 0) == (raw.decode("utf-8", "ignore").encode() == raw and b"\0" not in raw)


@settings(deadline=None)
@given(st.binary(max_size=400), st.sampled_from([*READERS, ".txt"]))
@example(b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 1 0 R>>endobj trailer<</Root 1 0 R>>startxref 0 %%EOF", ".pdf")
@example(b"<" * 400, ".html")
def test_any_bytes_are_read_or_refused(raw, suffix):
    """No reader raises anything but ValueError, and what it reads can be stored."""
    with contextlib.suppress(ValueError):
        title, text = READERS.get(suffix, read_plain)(raw, lambda note: note.encode())
        assert storable(title + text) == title + text


ANY_TEXT = st.text(st.characters(exclude_categories=[]), max_size=20)  # halves of surrogate pairs included
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=6,
)
NAMES = {"_id", "id", "title", "text", "metadata"}


def stored(value):
    """The expected JSON value, written differently than in the code."""
    if isinstance(value, str):
        return "".join("?" if "\ud800" <= c <= "\udfff" else "\ufffd" if c == "\0" else c for c in value)
    if isinstance(value, float):
        return value if abs(value) <= 1.8e308 and value == value and abs(value) != float("inf") else None
    if isinstance(value, list):
        return [stored(item) for item in value]
    return {stored(key): stored(item) for key, item in value.items()} if isinstance(value, dict) else value


@settings(deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"text": ANY_TEXT},
            optional={"title": ANY_TEXT, "m": ANY_JSON, "n": st.dictionaries(ANY_TEXT, ANY_JSON, max_size=2)},
        ),
        max_size=4,
    ),
    st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_records_come_back_as_they_were_written(tmp_path_factory, written, ends):
    path = tmp_path_factory.mktemp("records") / "a.jsonl"
    path.write_text("".join(json.dumps(record) + ends for record in written))
    found = read(path)
    # Two adjacent halves of a surrogate pair are one character.
    expected = [stored(json.loads(json.dumps(record))) for record in written]
    assert [(d.title, d.text) for d in found] == [(r.get("title", ""), r["text"]) for r in expected]
    assert [d.metadata for d in found] == [{k: v for k, v in r.items() if k in "mn"} for r in expected]
    assert [d.line for d in found] == [1 + i * ends.count("\n") for i in range(len(written))]
    again = read(path)
    assert [d.digest for d in again] == [d.digest for d in found]
    content = [json.dumps([d.title, d.text, d.metadata], sort_keys=True) for d in found]
    assert len({d.digest for d in found}) == len(set(content))
    with sqlite3.connect(":memory:") as database:
        for document in found:
            values = (document.id, document.title, document.text, json.dumps(document.metadata))
            row = database.execute("SELECT ?, ?, ?, json(?)", values).fetchone()
            assert (*row[:3], json.loads(row[3])) == (*values[:3], document.metadata)


STRANGE_NAMES = [
    b"new\nline.md",
    b"tab\t and \"quotes\" 'both'.md",
    b"\x1b[31mred\x07.md",
    b" blank .md",
    b"-rf.md",
    b"[a]*?{b}.md",
    b"100%s %00.md",
    b"back\\slash.md",
    b"not utf-8 \xff\xfe.md",
    b"half a pair \xed\xa0\x80.md",
    "猫 🦉 é e\u0301 \u202egnp.md".encode(),
    b"x" * 252 + b".md",
]


def test_files_of_any_name_are_found_read_and_named(tmp_path):
    folder = os.fsencode(tmp_path) + b"/a\nb\xff/"
    os.mkdir(folder)
    for name in STRANGE_NAMES:
        Path(os.fsdecode(folder + name)).write_bytes(b"# text of " + name)
    (Path(os.fsdecode(folder)) / "no.bin").write_bytes(b"")
    notes = []
    files = list(find_files([tmp_path], on_note=notes.append))
    assert [os.fsencode(file) for file in files] == sorted(
        (folder + name for name in STRANGE_NAMES), key=lambda path: os.fsdecode(path)
    )
    assert list(find_files(files)) == files
    documents = [document for file in files for document in read_file(file, on_note=notes.append)]
    ids = {document.id: document for document in documents}
    assert len(ids) == len(STRANGE_NAMES)
    for name in STRANGE_NAMES:
        spelled = (folder + name).decode("utf-8", "backslashreplace")
        assert spelled == file_name(os.fsdecode(folder + name))
        assert ids[spelled].path == spelled
        # Two texts are not UTF-8, and read in the encoding that they look like.
        encodings = ["utf-8"] if name.decode("utf-8", "ignore").encode() == name else ["utf-8", "cp1252"]
        assert ids[spelled].text in ["# text of " + name.decode(each, "replace") for each in encodings]
        assert sqlite3.connect(":memory:").execute("SELECT ?", (spelled,)).fetchone() == (spelled,)
    assert len(notes) == 3  # two names that are not UTF-8 are in the texts, and one file was skipped
    "".join(notes).encode()
    strange = Path(os.fsdecode(folder + b"\xff.jsonl"))
    strange.write_bytes(b'{"_id": "k", "text": "x"}\n{"_id": "k", "text": "y"}\n')
    for reader, expected in ((read_file, ValueError), (read_texts, None)):
        if expected is None:
            assert [document.path for document in reader(strange)] == [file_name(strange)] * 2
        else:
            with pytest.raises(ValueError, match=r"\\xff\.jsonl: lines 1 and 2 both") as error:
                list(reader(strange))
            str(error.value).encode()


def test_what_is_no_regular_file_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.md")
    (tmp_path / "real.md").write_text("text")
    (tmp_path / "tty.md").symlink_to("/dev/zero")
    (tmp_path / "loop.md").symlink_to(tmp_path / "loop.md")
    notes = []
    with hurry(20), socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "socket.md"))
        assert [file.name for file in find_files([tmp_path], on_note=notes.append)] == ["real.md"]
        for name in ("pipe.md", "tty.md", "socket.md", "."):
            with pytest.raises(ValueError, match="not a regular file"):
                read(tmp_path / name)
        with pytest.raises(OSError, match="symbolic links"):
            list(find_files([tmp_path / "loop.md"]))
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "gone.md")
    assert notes == [f"skipped 4 files and folders in {tmp_path} that are not read: 4 broken link or special file"]


def test_folders_may_be_nested_deeper_than_python_recurses(tmp_path):
    depth, here = 1100, os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
        Path("bottom.md").write_text("text")
        (found,) = find_files([tmp_path])
        assert (found.name, len(found.parts)) == ("bottom.md", len(tmp_path.parts) + depth + 1)
        found.unlink()
    finally:
        os.chdir(tmp_path)
        for _ in range(depth):  # pytest cannot delete this
            if os.path.isdir("d/d"):
                os.rename("d/d", "e")
                os.rmdir("d")
                os.rename("e", "d")
        os.chdir(here)


def test_pages_may_be_nested_deeper_than_python_recurses():
    for tag in ("div", "b", "ul><li", "table><tr><td", "blockquote", "pre", "h1", "p", "span"):
        page = f"<{tag}>" * 20_000 + "owl" + f"</{tag.split('>')[0]}>" * 20_000 + "<p>mouse"
        text = read_html(page.encode(), pytest.fail)[1]
        assert text.count("owl") == text.count("mouse") == 1


def test_a_comment_of_12_mb_is_still_no_text():
    """libxml2 gives up on comments of 10 MB unless told not to, and what is behind that is text to it."""
    assert read_html(b"<!--" + b"y" * 12 * MB + b"--><p>owl", pytest.fail)[1] == "owl"


@pytest.mark.parametrize(
    ("name", "raw", "most"),
    [
        ("a.txt", b"owl " * (50 * MB // 4), 3),
        ("wide.txt", "🦉".encode() * (50 * MB // 4), 8),  # Python allocates four bytes per byte, then shrinks
        ("a.jsonl", b'{"text": "' + b"owl " * (50 * MB // 4) + b'"}\n', 5),
        ("a.jsonl.gz", b'{"text": "' + b"owl " * (50 * MB // 4) + b'"}\n', 5),
        ("escaped.jsonl", b'{"text": "' + b"\\u732b" * (50 * MB // 6) + b'"}\n', 5),
        (
            "a.csv",
            b"text\n" + b"owl " * (50 * MB // 4) + b"\n",
            12,
        ),  # Python's csv module needs four bytes per character, and doubles its buffer
        ("a.html", b"<p>" + b"owl " * (50 * MB // 4), 6),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_line_of_50_mb_takes_a_few_times_its_size(tmp_path, name, raw, most):
    path = tmp_path / name
    path.write_bytes(gzip.compress(raw, 1) if name.endswith(".gz") else raw)
    size = len(raw)
    del raw
    started = time.perf_counter()
    tracemalloc.start()
    try:
        (document,) = read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size / 6.1 < len(document.text) <= size
    assert peak < most * size
    assert time.perf_counter() - started < 60


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "wide.csv", "queries.txt"])
def test_a_line_without_end_is_refused_before_memory_is_full(tmp_path, monkeypatch, name):
    monkeypatch.setattr(records, "LARGEST", MB)
    raw = b'{"text": "' + b"x" * 40 * MB
    raw = raw.decode().encode("utf-16") if name == "wide.csv" else raw
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    tracemalloc.start()
    with pytest.raises(ValueError, match=rf"{name}: a line of more than 0 MiB; cut it into several records"):
        list((read_texts if name == "queries.txt" else read_file)(tmp_path / name))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * MB


def test_a_file_that_is_too_large_is_refused_before_memory_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LARGEST", MB)
    with (tmp_path / "sparse.txt").open("wb") as file:
        file.truncate(10**12)
    with hurry(20), pytest.raises(ValueError, match=r"sparse\.txt: more than 0 MiB in one document; split it"):
        read(tmp_path / "sparse.txt")


def test_memory_does_not_grow_with_the_number_of_records(tmp_path):
    """Including the ids, which are checked to be unique."""
    peaks = {}
    for count in (1_000, 12_000):
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(f'{{"_id": "a long name {i:050d}", "text": "owl {i}"}}\n' for i in range(count)))
        tracemalloc.start()
        assert sum(1 for _ in read_file(path)) == count
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peaks[12_000] < peaks[1_000] + 200_000


def test_pdfs_with_random_damage_are_read_or_refused():
    raw = (Path(__file__).parents[1] / "fixtures" / "documents" / "owls.pdf").read_bytes()
    chance = random.Random(0)
    refused = 0
    with hurry(60):
        for _ in range(60):
            damaged = bytearray(raw)
            for _ in range(chance.choice([1, 20, 200])):
                place = chance.randrange(len(damaged))
                damaged[place : place + chance.choice([0, 1, 30])] = chance.choices(
                    b"0123 <>[]/()R\n", k=chance.choice([0, 1, 9])
                )
            try:
                read_pdf(bytes(damaged), lambda note: None)
            except ValueError:
                refused += 1
    assert 5 < refused < 55
