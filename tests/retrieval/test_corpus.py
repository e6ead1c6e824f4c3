"""Which files a corpus is, and the documents in them: nothing is lost or doubled, and every repair is noted."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
from importlib.resources import files
from pathlib import Path

import pytest

from modernbert.retrieval import forget, index
from modernbert.retrieval.documents.find import Key, find_files, read_file, read_texts

DEMO = files("modernbert") / "assets" / "demo" / "corpus.jsonl.gz"


def read(*paths, **options):
    """All documents of files and folders, as `index` reads them."""
    return [document for file in find_files(paths, on_note=lambda _: None) for document in read_file(file, **options)]


def write(folder, content):
    """Files below `folder`, by relative name."""
    for name, text in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text) if isinstance(text, bytes) else path.write_text(text)


def test_records_are_read_as_beir_defines_them():
    """The embedded corpus, against a plain reading of its JSON: the encoder sees title, space, text."""
    records = [json.loads(line) for line in gzip.decompress(DEMO.read_bytes()).splitlines()]
    documents = list(read_file(DEMO))
    assert len(documents) == 1581
    assert [(d.id, d.content) for d in documents] == [(r["_id"], r["title"] + " " + r["text"]) for r in records]
    assert [d.line for d in documents] == list(range(1, 1582))
    assert [d.metadata for d in documents] == [
        {key: value for key, value in r.items() if key not in ("_id", "title", "text")} for r in records
    ]
    assert {d.path for d in documents} == {str(DEMO)}


def test_a_folder_is_read_in_order_and_what_is_skipped_is_said(tmp_path):
    kept = ["b.md", "corpus.jsonl", "p.PDF", "w.htm", "a/README", "a/z.txt", "a/deep/code.py", "c/x.rs"]
    names = ["b.tsv", "queries.jsonl", "qrels/test.tsv", ".git/config", "a/.hidden", "node_modules/x.md", "a/photo.png"]
    names += ["jquery.min.js", "pnpm-lock.yaml"]
    write(tmp_path, dict.fromkeys(kept + names, "text"))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "linked.txt").symlink_to(tmp_path / "b.md")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    notes = []
    found = [file.relative_to(tmp_path).as_posix() for file in find_files([tmp_path], on_note=notes.append)]
    assert found == ["b.md", "corpus.jsonl", "linked.txt", "p.PDF", "w.htm", *kept[4:]]
    assert len(notes) == 1
    what, kinds = notes[0].rsplit(": ", 1)
    assert what == f"skipped 11 files and folders in {tmp_path} that are not read"
    assert kinds.split(", ")[:2] == ["3 hidden or node_modules", "2 .tsv"]
    once = {"1 .jsonl", "1 .png", "1 .js", "1 .yaml", "1 linked folder", "1 broken link or special file"}
    assert set(kinds.split(", ")[2:]) == once


def test_a_path_that_is_named_is_read_whatever_its_name(tmp_path):
    write(tmp_path, {".hidden/x.md": "a", "photo.png": "b", ".env": "c", "node_modules/y.txt": "d"})
    (tmp_path / "link").symlink_to(tmp_path / ".hidden")
    paths = [tmp_path / name for name in ("photo.png", ".env", ".hidden", "link", "node_modules")]
    assert [document.text for document in read(*paths)] == ["b", "c", "a", "a", "d"]


def test_paths_that_overlap_give_each_file_once(tmp_path, monkeypatch):
    write(tmp_path, {"a/b/one.md": "1", "a/b/.two.md": "2", "a/three.md": "3", "four.md": "4"})
    monkeypatch.chdir(tmp_path)
    for paths in (["a", "."], [".", "a"], ["a/b", "a/b/one.md", "."], [".", "a/../a/b", "a/b/"], ["four.md", "."]):
        found = [file.relative_to(tmp_path).as_posix() for file in find_files(paths, on_note=lambda _: None)]
        assert sorted(found) == ["a/b/one.md", "a/three.md", "four.md"]
    found = [str(file) for file in find_files([".", "a/b/.two.md", "a/b/.two.md"], on_note=lambda _: None)]
    assert found.count(str(tmp_path / "a/b/.two.md")) == 1
    assert len(found) == 4


def test_a_path_that_is_not_there_is_said_before_anything_is_read(tmp_path):
    write(tmp_path, {"a.md": "text"})
    with pytest.raises(FileNotFoundError, match="no such file or folder: nowhere"):
        next(find_files([tmp_path, "nowhere"]))


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        ("/docs", r"paths must be a list, got '/docs'; write \[path\]"),
        (Path("/docs"), r"paths must be a list, got PosixPath\('/docs'\)"),
        (b"/docs", "paths must be a list, got b'/docs'"),
        (None, "paths must be a list, got one NoneType"),
        ({"/docs": 1}, "paths must be a list, got one dict"),
        (["/", None], r"paths\[1\] is None; give a path as a text"),
        ([b"/docs"], r"paths\[0\] is b'/docs'"),
        ([["/docs"]], r"paths\[0\] is \['/docs'\]"),
    ],
)
def test_paths_are_a_list_of_paths(tmp_path, paths, words):
    """The letters of "/docs" are paths, and the first is the whole disk."""
    for call in (
        lambda: list(find_files(paths)),
        lambda: index(paths, tmp_path / "store"),
        lambda: forget(paths, tmp_path / "store"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert not (tmp_path / "store").exists()


def test_a_folder_that_cannot_be_listed_is_said(tmp_path, monkeypatch):
    write(tmp_path, {"a/x.md": "", "b/y.md": "", "c/z.md": ""})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    notes = []
    assert [file.name for file in find_files([tmp_path], on_note=notes.append)] == ["x.md", "z.md"]
    assert notes == [f"skipped a folder: [Errno 13] Permission denied: '{tmp_path}/b'"]


def test_digest_of_a_file_is_the_sha256_of_its_bytes(tmp_path):
    raw = b"\xef\xbb\xbf# T\r\n\r\nna\xefve\0"
    (tmp_path / "a.txt").write_bytes(b"x" * 9000 + raw)
    (document,) = read_file(tmp_path / "a.txt", on_note=lambda _: None)
    assert document.digest == hashlib.sha256(b"x" * 9000 + raw).hexdigest()
    assert (document.id, document.line, document.metadata) == (document.path, None, {})


def test_digest_of_a_record_is_of_its_content_alone(tmp_path):
    """Its line, its `_id` and its JSON escapes do not matter; title, text and metadata do."""
    lines = [
        r'{"_id": "1", "title": "T", "text": "caf\u00e9", "tags": ["x"], "year": 1999}',
        "",
        '{"tags": ["x"], "metadata": {"year": 1999}, "text": "café", "title": "T", "_id": "2"}',
        '{"_id": "3", "title": "T", "text": "café", "year": "1999", "tags": ["x"]}',
        '{"_id": "4", "title": "T", "text": "cafe", "year": 1999, "tags": ["x"]}',
        '{"_id": "5", "title": "t", "text": "café", "year": 1999, "tags": ["x"]}',
        '{"_id": "6", "title": "", "text": "T café", "year": 1999, "tags": ["x"]}',
    ]
    write(tmp_path, {"a.jsonl": "\n".join(lines)})
    digests = [document.digest for document in read_file(tmp_path / "a.jsonl")]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 5
    assert {len(digest) for digest in digests} == {64}


def test_what_is_known_is_left_out_and_not_even_parsed(tmp_path):
    write(tmp_path, {"a.pdf": b"no PDF", "b.md": "text", "c.jsonl": '{"text": "x"}\n{"_id": "k", "text": "y"}\n'})
    asked, current = [], []

    def known(key):
        asked.append(key)
        return key.id != "1"

    found = read(tmp_path / "a.pdf", tmp_path, tmp_path / "c.jsonl", is_current=known, on_current=current.append)
    assert [document.text for document in found] == ["x"]
    assert current == [asked[0], asked[1], asked[3]]
    pdf, markdown, *records = asked
    digest = hashlib.sha256(b"no PDF").hexdigest()
    assert pdf == Key(str(tmp_path / "a.pdf"), str(tmp_path / "a.pdf"), digest, None)
    assert markdown == (*[str(tmp_path / "b.md")] * 2, hashlib.sha256(b"text").hexdigest(), None)
    assert [(key.path, key.id, key.line) for key in records] == [
        (str(tmp_path / "c.jsonl"), "1", 1),
        (str(tmp_path / "c.jsonl"), "k", 2),
    ]


def test_progress_sums_to_the_sizes_of_the_files(tmp_path):
    lines = "".join(f'{{"_id": "{i}", "text": "{"é" * i}"}}\n' for i in range(3000))
    table = "id,text\n" + "".join(f'{i},"a\n{"b" * i}"\n' for i in range(500))
    write(tmp_path, {"a.md": "é" * 999, "b.jsonl": lines, "c.csv": table, "e.html": "<p>x", "f.txt": ""})
    write(tmp_path, {"d.jsonl.gz": gzip.compress(lines.encode()), "g.tsv": table.replace(",", "\t").encode("utf-16")})
    # Tapes pad gzip files with zeros, which are read after the last record.
    write(tmp_path, {"h.jsonl.gz": gzip.compress(lines.encode()) + b"\0" * 300_000})
    for file in sorted(tmp_path.iterdir()):
        sizes = []
        documents = [(document, len(sizes)) for document in read_file(file, on_bytes=sizes.append)]
        assert sum(sizes) == file.stat().st_size
        assert min(sizes) >= 0
        if len(documents) > 1 and file.name != "h.jsonl.gz":  # reported on the way
            half = sum(sizes[: documents[len(documents) // 2][1]])
            assert 0.1 < half / sum(sizes) < 0.9


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_table_is_a_file_of_records(tmp_path, suffix, encoding, ends):
    """RFC 4180 by hand: quotes, doubled quotes, commas and line ends inside them; unnamed columns are ignored."""
    rows = [
        ["_id", "title", "text", "year", "", "lang"],
        ["a", "Owls", '"Owls, at\tnight"', "1999", "0", "en"],
        ["b", "", '"two\nlines and ""quotes"""', "", "1", ""],
        [],
        ["c", '"T\nT"', "naïve 猫", '"1,5"', "2", "fr"],
    ]
    text = "".join({".csv": ",", ".tsv": "\t"}[suffix].join(row) + "\n" for row in rows).replace("\n", ends)
    path = tmp_path / f"table{suffix}"
    path.write_bytes(text.encode(encoding))
    found = [(d.id, d.title, d.text, d.metadata, d.line) for d in read_file(path)]
    assert found == [
        ("a", "Owls", "Owls, at\tnight", {"year": "1999", "lang": "en"}, 2),
        ("b", "", f'two{ends}lines and "quotes"', {"year": "", "lang": ""}, 3),
        ("c", f"T{ends}T", "naïve 猫", {"year": "1,5", "lang": "fr"}, 6),
    ]


def test_rows_without_an_id_are_numbered_by_their_line(tmp_path):
    write(tmp_path, {"a.csv": "text\none\n\ntwo\n", "b.csv": "id,text\n7,x\n", "c.csv": "text\n"})
    assert [(d.id, d.text) for d in read(*(tmp_path / f"{name}.csv" for name in "abc"))] == [
        ("2", "one"),
        ("4", "two"),
        ("7", "x"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "id,body\n1,x\n", "a.csv: the first row must name the columns, .*'text'.*; got 'id', 'body'"),
        ("a.csv", "id;body\n1;x\n", "got 'id;body'"),
        ("a.csv", "text,text\n1,x\n", "got 'text', 'text'"),
        ("a.csv", "id,text\n1,x\n2,y,z\n", "a.csv, line 3: 3 cells for 2 columns"),
        ("a.csv", "id,text\n1,x\n2\n", "a.csv, line 3: 1 cells for 2 columns"),
        ("a.csv", 'id,text\n1,"x\n2,y\n3,z', "a.csv, line 2: broken table .unexpected end of data"),
        ("a.csv", 'id,text\n1,x\n2,"y" z\n', "a.csv, line 3: broken table"),
        ("a.csv", "id,text\n1,x\n2,y\n1,z\n", "a.csv: lines 2 and 4 both have the \"_id\" '1'"),
        (
            "a.jsonl",
            '{"_id": "k", "text": "x"}\n\n{"_id": "k", "text": "x"}\n',
            "lines 1 and 3 both have the \"_id\" 'k'",
        ),
        ("a.jsonl", '{"text": "x"}\n{"_id": 1, "text": "y"}\n', "lines 1 and 2 both have the \"_id\" '1'"),
        ("a.jsonl", '{"text": "x", "m": ' + "[" * 200 + "]" * 200 + "}", "line 1: not JSON .nested more than 100 deep"),
        ("a.jsonl", '{"text": "x", "n": ' + "9" * 5000 + "}", "line 1: not JSON"),
    ],
)
def test_a_broken_file_of_records_is_named_with_its_lines(tmp_path, name, content, message):
    write(tmp_path, {name: content})
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_the_limit_of_csv_is_the_process_own_again_after_each_row(tmp_path):
    """A long cell is read, and the limit of the process is raised only while the row is read."""
    write(tmp_path, {"a.csv": "text\n" + "x" * 300_000 + "\nshort\n"})
    limit = csv.field_size_limit()
    assert limit < 300_000
    for document, length in zip(read_file(tmp_path / "a.csv"), (300_000, 5), strict=True):
        assert len(document.text) == length
        assert csv.field_size_limit() == limit


def test_fields_of_records_are_metadata(tmp_path):
    lines = [
        '{"_id": 7, "text": "x", "title": null, "metadata": {"url": "u", "year": 1}, "year": 2, "tags": ["a"]}',
        '{"id": "k", "text": "x", "metadata": {}, "score": NaN, "more": [Infinity, 1e999, 0.5]}',
        '{"_id": "m", "id": "k", "text": "x", "metadata": "none"}',
        '{"text": "tab\tand \x1b", "n": true}',
    ]
    write(tmp_path, {"a.jsonl": "\n".join(lines)})
    found = [(d.id, d.title, d.text, d.metadata) for d in read_file(tmp_path / "a.jsonl")]
    assert found == [
        ("7", "", "x", {"url": "u", "year": 2, "tags": ["a"]}),
        ("k", "", "x", {"score": None, "more": [None, None, 0.5]}),
        ("m", "", "x", {"id": "k", "metadata": "none"}),
        ("4", "", "tab\tand \x1b", {"n": True}),
    ]
    json.dumps([metadata for *_, metadata in found], allow_nan=False)


def test_broken_utf8_is_replaced_and_said(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 and \xff; a real \xef\xbf\xbd is not counted")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfbyte order mark")
    (tmp_path / "corpus.jsonl").write_bytes(b'{"text": "na\xefve \\ud800 \xc3\xa9"}\n')
    notes = []
    assert [document.text for document in read(tmp_path, on_note=notes.append)] == [
        "caf\ufffd and \ufffd; a real \ufffd is not counted",
        "byte order mark",
        "na\ufffdve ? é",
    ]
    assert notes == [
        f"{tmp_path}/a.txt: not UTF-8 throughout, 2 broken places were replaced by U+FFFD",
        f"{tmp_path}/corpus.jsonl: not UTF-8 throughout, 1 broken places were replaced by U+FFFD",
    ]


def test_notes_are_warnings_unless_taken(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"na\xc3\xafve caf\xe9")
    with pytest.warns(UserWarning, match="1 broken places"):
        list(read_file(tmp_path / "a.txt"))


def test_records_are_read_one_at_a_time(tmp_path):
    """The first record is yielded before the second, broken one is read."""
    broken = tmp_path / "b.jsonl"
    broken.write_text('{"text": "first"}\n{"text": \n')
    found = read_file(broken)
    assert next(found).text == "first"
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: not JSON"):
        next(found)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", 'line 2: expected an object with a string "text", got \\[1\\]'),
        ('{"_id": "x"}', 'line 2: expected an object with a string "text"'),
        ('{"text": 3}', 'line 2: expected an object with a string "text"'),
        ('{"text": "x", "title": 3}', 'line 2: "title" and "id" must be strings'),
        ('{"text": "x", "_id": null}', 'line 2: "title" and "_id" must be strings'),
        ('{"text": "x", "id": true}', 'line 2: "title" and "id" must be strings'),
        ("[" * 100_000, "line 2: not JSON"),
    ],
)
@pytest.mark.parametrize("reader", [read_file, read_texts])
def test_a_broken_record_is_named_with_its_line(tmp_path, reader, line, message):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ValueError, match=message):
        list(reader(path))


def test_a_broken_gzip_file_is_named(tmp_path):
    packed = gzip.compress(b'{"text": "x"}\n' * 1000)
    for broken in (packed[:-20], packed[:-8] + b"\0" * 8, b"no gzip", packed[:12] + b"\xff" * 9 + packed[21:]):
        (tmp_path / "corpus.jsonl.gz").write_bytes(broken)
        for reader in (read_file, read_texts):
            with pytest.raises(ValueError, match=r"corpus\.jsonl\.gz: broken gzip file"):
                list(reader(tmp_path / "corpus.jsonl.gz"))


def test_lines_of_a_text_file_are_records_for_encoding(tmp_path):
    (tmp_path / "queries.txt").write_text("first query\n\n  second query \n")
    found = [(record.id, record.content) for record in read_texts(tmp_path / "queries.txt")]
    assert found == [("1", "first query"), ("3", "second query")]
    (tmp_path / "wide.txt").write_bytes("first\rquery\nsecond\u2028query".encode("utf-16"))
    assert [record.content for record in read_texts(tmp_path / "wide.txt")] == ["first\rquery", "second\u2028query"]
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "x"}\n{"_id": "q", "text": "y"}\n')
    assert [record.content for record in read_texts(tmp_path / "queries.jsonl")] == ["x", "y"]
