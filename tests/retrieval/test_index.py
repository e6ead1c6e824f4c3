"""Building and updating stores: which passages are encoded, and which stay."""

from __future__ import annotations

import json
import os
import random
import sqlite3
from pathlib import Path

import pytest
from stores import corpus, small_shards, write_corpus

from modernbert import ColBERT, Session
from modernbert.retrieval import Store, forget, index


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    small_shards(monkeypatch, 8)


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """The number of passages that each call encoded."""
    counts: list[int] = []
    original = Session.encode_tokens

    def counting(session, tokens, **options):
        counts.append(len(tokens.batch))
        return original(session, tokens, **options)

    monkeypatch.setattr(Session, "encode_tokens", counting)
    return counts


def content(folder: Path, colbert: ColBERT) -> dict[tuple[str, str], list[tuple[str, str, int, int, bytes]]]:
    """For each document its passages, with their vectors."""
    found: dict[tuple[str, str], list[tuple[str, str, int, int, bytes]]] = {}
    with Store(folder, colbert) as store:
        for _, passages, vectors in store.batches():
            for p, matrix in zip(passages, vectors, strict=True):
                row = (p.title, p.text, p.start, p.line, matrix.numpy().tobytes())
                found.setdefault((p.path, p.id), []).append(row)
    return {key: sorted(rows, key=lambda row: row[2]) for key, rows in found.items()}


def tables(folder: Path) -> dict[str, list[tuple]]:
    (path,) = folder.glob("passages-*.sqlite")
    with sqlite3.connect(path) as table:
        return {
            name: table.execute(f"SELECT * FROM {name} ORDER BY number").fetchall()
            for name in ("documents", "passages", "shards")
        }


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "shards").iterdir()}


def fresh(paths, tmp_path: Path, colbert: ColBERT):
    """The content of a new store of the same files."""
    folder = tmp_path / f"fresh{random.random()}"
    index(paths, folder, colbert)
    return content(folder, colbert)


def without_vectors(found):
    """In an update, passages share shards with others, and so the last bits of a vector may differ."""
    return {key: [row[:-1] for row in rows] for key, rows in found.items()}


def test_only_what_changed_is_encoded(colbert, tmp_path, encoded):
    source, folder = tmp_path / "corpus.jsonl", tmp_path / "store"
    records = [record for i, record in enumerate(corpus(40)) if i % 7 != 3]  # one passage each
    write_corpus(source, records)
    first = index([source], folder, colbert)
    assert (first.added, first.documents, first.passages, sum(encoded)) == (34, 34, 34, 34)
    encoded.clear()
    again = index([source], folder, colbert)
    assert (again.unchanged, again.added, again.changed, again.removed) == (34, 0, 0, 0)
    assert encoded == []

    records[5]["text"] = "Now about glaciers and ice."
    records[9]["metadata"] = {"year": "1999"}
    gone = records.pop(20)["_id"]
    records.insert(0, {"_id": "new", "title": "", "text": "A new record, first in the file."})
    random.Random(0).shuffle(records)
    write_corpus(source, records)
    third = index([source], folder, colbert)
    assert (third.added, third.changed, third.removed, third.unchanged, third.documents) == (1, 2, 1, 31, 34)
    assert sum(encoded) == 3
    found = content(folder, colbert)
    assert (str(source), gone) not in found
    assert without_vectors(found) == without_vectors(fresh([source], tmp_path, colbert))  # lines included


def test_a_folder_is_followed_and_others_are_left_alone(colbert, tmp_path, encoded):
    docs, other, folder = tmp_path / "docs", tmp_path / "docs-more", tmp_path / "store"
    for path, text in {
        docs / "a.md": "# A\nOwls.",
        docs / "sub" / "b.txt": "Ice and storm",
        other / "c.txt": "Peace",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    index([docs, other], folder, colbert)
    (docs / "a.md").write_text("# A\nOwls and mice.\n# B\nMore.")
    (docs / "sub" / "b.txt").rename(docs / "sub" / "d.txt")
    (other / "c.txt").unlink()
    encoded.clear()
    summary = index([docs], folder, colbert)
    assert (summary.added, summary.changed, summary.removed) == (1, 1, 1)
    assert sum(encoded) == 2  # the two short sections of a.md are one passage
    assert {Path(path).name for path, _ in content(folder, colbert)} == {"a.md", "d.txt", "c.txt"}
    with pytest.raises(ValueError, match="held 1 documents and has none now"):
        index([other], folder, colbert)
    assert forget([other], folder).removed == 1
    assert forget([docs / "sub"], folder).removed == 1
    assert {Path(path).name for path, _ in content(folder, colbert)} == {"a.md"}
    assert forget([docs / "a.md"], folder).documents == 0
    with Store(folder, colbert) as store:
        assert (len(store), store.search(["owls"])) == (0, [[]])
    assert shard_bytes(folder) == {}


def test_a_file_that_cannot_be_read_now_stays_as_it_was(colbert, tmp_path):
    docs, folder, notes = tmp_path / "docs", tmp_path / "store", []
    docs.mkdir()
    (docs / "a.txt").write_text("Owls")
    (docs / "b.txt").write_text("Ice")
    index([docs], folder, colbert)
    (docs / "a.txt").write_bytes(b"\0\0 binary now")
    summary = index([docs], folder, colbert, note=notes.append)
    assert (summary.unchanged, summary.removed, summary.documents) == (1, 0, 2)
    assert len(notes) == 1
    assert str(docs / "a.txt") in notes[0]
    with pytest.raises(ValueError, match="binary"):
        index([docs / "a.txt"], folder, colbert)
    assert len(content(folder, colbert)) == 2


def test_many_small_runs_leave_few_shards(colbert, tmp_path):
    """Half-empty shards are joined and free space, and nothing else changes."""
    source, folder = tmp_path / "corpus.jsonl", tmp_path / "store"
    records = corpus(60)
    for count in range(3, 60, 3):
        write_corpus(source, records[:count])
        index([source], folder, colbert)
    assert len(shard_bytes(folder)) <= 2 * (sum(len(rows) for rows in content(folder, colbert).values()) // 8 + 1)
    kept = [record for i, record in enumerate(records[:57]) if i % 5 == 0]
    write_corpus(source, kept)
    index([source], folder, colbert)
    found = content(folder, colbert)
    assert without_vectors(found) == without_vectors(fresh([source], tmp_path, colbert))
    rows = sum(len(passages) for passages in found.values())
    assert len(shard_bytes(folder)) <= 2 * (rows // 8 + 1)
    with Store(folder, colbert) as store:
        numbers = [number for keys, _, _ in store.batches() for number in keys]
        assert len(set(numbers)) == len(numbers) == rows


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_vectors_move_between_shards_unchanged(colbert, tmp_path, dtype):
    source, folder = tmp_path / "corpus.jsonl", tmp_path / "store"
    write_corpus(source, corpus(20))
    index([source], folder, colbert, dtype=dtype)
    before = content(folder, colbert)
    write_corpus(source, [record for i, record in enumerate(corpus(20)) if i % 5 == 0])
    files = set(shard_bytes(folder))
    index([source], folder, colbert)
    after = content(folder, colbert)
    assert set(shard_bytes(folder)).isdisjoint(files)
    assert len(after) == 4
    for key, rows in after.items():
        assert [(*row[:3], row[4]) for row in rows] == [(*row[:3], row[4]) for row in before[key]]  # except the line


def test_the_same_input_makes_the_same_store(colbert, tmp_path):
    """Byte by byte and row by row: no time stamps, no randomness."""
    source = write_corpus(tmp_path / "corpus.jsonl", corpus(30))
    for name in ("one", "two"):
        index([source], tmp_path / name, colbert)
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "two")
    assert tables(tmp_path / "one") == tables(tmp_path / "two")
    assert (tmp_path / "one" / "store.json").read_text() == (tmp_path / "two" / "store.json").read_text()


def test_what_cannot_be_indexed(colbert, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("not a store")
    source, folder = write_corpus(tmp_path / "corpus.jsonl", corpus(3)), tmp_path / "store"
    with pytest.raises(FileNotFoundError, match="no such file or folder: nowhere"):
        index(["nowhere"], folder, colbert)
    with pytest.raises(ValueError, match="no text to index"):
        index([tmp_path / "empty"], folder, colbert)
    with pytest.raises(FileNotFoundError, match="holds no store; make one with: modernbert index"):
        Store(folder, colbert)
    with pytest.raises(ValueError, match="is not a store, and not empty"):
        index([source], tmp_path / "full", colbert)
    assert os.listdir(tmp_path / "full") == ["letter.txt"]
    with pytest.raises(ValueError, match="dtype is 'fp8'; it can be fp16, fp32, int8"):
        index([source], folder, colbert, dtype="fp8")
    index([source], folder, colbert, dtype="fp32")
    with pytest.raises(ValueError, match="holds fp32, not fp16"):
        index([source], folder, colbert, dtype="fp16")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        forget([source], tmp_path / "none")
    source.write_text('{"_id": "a", "text": "x"}\n{"_id": "b"}\n')
    before = tables(folder), shard_bytes(folder)
    with pytest.raises(ValueError, match="line 2"):
        index([source], folder, colbert)
    assert (tables(folder), shard_bytes(folder)) == before
    assert not (folder / "unfinished.json").exists()


def test_progress_counts_every_byte_of_input_once(colbert, tmp_path, monkeypatch):
    from contextlib import contextmanager

    source, told, seen = write_corpus(tmp_path / "corpus.jsonl", corpus(30)), [], []

    @contextmanager
    def bar(description, total, shown, *, unit):
        told.append(total)
        yield seen.append

    monkeypatch.setattr("modernbert.retrieval.build.progress_bar", bar)
    index([source], tmp_path / "store", colbert)
    assert told == [source.stat().st_size]
    assert sum(seen) == pytest.approx(told[0])
    assert all(size >= 0 for size in seen)
    assert len(seen) > 5
    index([source], tmp_path / "store", colbert)
    assert sum(seen) == pytest.approx(2 * told[0])


def test_metadata_and_empty_documents_are_kept(colbert, tmp_path, encoded):
    source = tmp_path / "corpus.jsonl"
    records = [{"_id": "a", "text": "", "title": ""}, {"_id": "b", "text": "Owls", "metadata": {"ü": [1, None]}}]
    write_corpus(source, records)
    summary = index([source], tmp_path / "store", colbert)
    assert (summary.documents, summary.passages) == (2, 1)
    with Store(tmp_path / "store", colbert) as store:
        (hit,) = store.search(["owls"])[0]
    assert json.dumps(dict(hit.passage.metadata), ensure_ascii=False) == '{"ü": [1, null]}'
    encoded.clear()
    assert index([source], tmp_path / "store", colbert).unchanged == 2
    assert encoded == []
