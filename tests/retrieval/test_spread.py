"""A corpus that is indexed in units, by several ranks or into an engine, against `index` by one process."""

from __future__ import annotations

import importlib.util
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from stores import corpus, rows, write_corpus

from modernbert import ColBERT
from modernbert.retrieval import Store, forget, index, targets, units, worker
from modernbert.retrieval.documents.reading import Reading
from modernbert.retrieval.engines import Engine, export, open_table
from modernbert.retrieval.store.format import Manifest
from modernbert.retrieval.units import find_units, read_unit
from modernbert.train.distributed import Ranks

ENGINES = [
    pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"extra {name}"))
    for name, package in (("lancedb", "lancedb"), ("qdrant", "qdrant_edge"))
]
QUERIES = ["owl night mouse", "which storm brought hail?", "peace treaty"]


class Threads(Ranks):
    """Ranks as threads of one process."""

    def __init__(self, rank: int, size: int, shared: list[object], barrier: threading.Barrier) -> None:
        super().__init__(rank, size)
        object.__setattr__(self, "shared", shared)
        object.__setattr__(self, "barrier", barrier)

    def gather(self, value):
        self.shared[self.rank] = value
        self.barrier.wait(60)
        found = list(self.shared)
        self.barrier.wait(60)
        return found

    def on_first(self, work):
        return self.gather(work() if self.is_first else None)[0]


def index_by(size: int, *arguments: object, **options: object) -> list[object]:
    """`index` by several ranks; the summary of each."""
    shared, barrier = [None] * size, threading.Barrier(size)

    def run(rank: int) -> object:
        try:
            return index(*arguments, ranks=Threads(rank, size, shared, barrier), **options)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def alone() -> Ranks:
    return Threads(0, 1, [None], threading.Barrier(1))


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A corpus of three files, of which the largest makes several units."""
    monkeypatch.setattr(units, "UNIT", 2000)
    folder = tmp_path / "docs"
    folder.mkdir()
    write_corpus(folder / "corpus.jsonl", corpus(40))
    (folder / "a.md").write_text("# Owls\n\nOwls hunt mice at night.\n")
    (folder / "empty.txt").write_text("")
    return folder


def test_units_hold_every_document_once(files):
    """In the order of the files, with the lines and ids of the whole file."""
    lines = [json.dumps({"text": f"owl {number}"}) for number in range(300)]
    (files / "plain.jsonl").write_text("\n".join(lines))
    paths = [files / "corpus.jsonl", files / "plain.jsonl", files / "a.md"]
    note = pytest.fail
    cut = list(find_units(paths, Reading(), on_unread=note, on_note=note))
    assert len(cut) > 5
    documents = []
    for unit in cut:
        options = {"is_current": lambda key: False, "on_current": note, "on_unread": note, "on_note": note}
        documents += read_unit(unit, Reading(), **options)
    assert [document.id for document in documents[:40]] == [f"d{number}" for number in range(40)]
    assert [document.line for document in documents[:40]] == list(range(1, 41))
    assert [document.id for document in documents[40:340]] == [str(number) for number in range(1, 301)]
    assert documents[340].path == str(files / "a.md")


def test_lines_that_are_not_utf8_are_not_cut(files):
    (files / "old.jsonl").write_bytes(b"".join(b'{"text": "caf\xe9 %d"}\n' % number for number in range(400)))
    cut = list(find_units([files / "old.jsonl"], Reading(), on_unread=pytest.fail, on_note=pytest.fail))
    assert cut == [(units.Piece(str(files / "old.jsonl")),)]


def test_parquet_is_cut_at_its_row_groups(files):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    table = pa.table({"id": [f"p{n}" for n in range(100)], "text": [f"owl {n} " * 20 for n in range(100)]})
    pq.write_table(table, files / "t.parquet", row_group_size=10)
    cut = list(find_units([files / "t.parquet"], Reading(), on_unread=pytest.fail, on_note=pytest.fail))
    assert len(cut) > 2
    options = {name: lambda *_: False for name in ("is_current", "on_current", "on_unread", "on_note")}
    documents = [document for unit in cut for document in read_unit(unit, Reading(), **options)]
    assert [(document.id, document.line) for document in documents] == [(f"p{n}", n + 1) for n in range(100)]


def test_ranks_make_the_rows_of_one_process(files, model, tmp_path):
    """A new store; then an update of it, with a document less, one changed and one more."""
    index([files], tmp_path / "alone", model)
    summaries = index_by(2, [files], tmp_path / "ranks", model)
    assert summaries[0] == summaries[1]
    assert (summaries[0].added, summaries[0].documents) == (42, 42)
    assert rows(tmp_path / "ranks", model) == rows(tmp_path / "alone", model)
    assert not targets.parts_folder(str(tmp_path / "ranks")).exists()
    records = corpus(40)[1:]
    records[3]["text"] = "A treaty of peace."
    write_corpus(files / "corpus.jsonl", [*records, {"_id": "new", "text": "storm and hail"}])
    index([files], tmp_path / "alone")
    again = index_by(3, [files], tmp_path / "ranks")[0]
    assert (again.added, again.changed, again.removed, again.unchanged) == (1, 1, 1, 40)
    assert sorted(rows(tmp_path / "ranks", model)) == sorted(rows(tmp_path / "alone", model))


def test_a_run_that_broke_off_is_finished_without_encoding_again(files, model, tmp_path, monkeypatch):
    index([files], tmp_path / "alone", model)
    encode, calls = worker.encode_share, []

    def breaks(share, session):
        calls.append(share.name)
        if len(calls) == 4:
            raise OSError("the node is gone")
        return encode(share, session)

    monkeypatch.setattr(worker, "encode_share", breaks)
    monkeypatch.setattr(Ranks, "is_alone", property(lambda self: False))  # units with one rank
    with pytest.raises(OSError, match="the node is gone"):
        index([files], tmp_path / "store", model, ranks=alone())
    parts = targets.parts_folder(str(tmp_path / "store"))
    assert len(os.listdir(parts)) == 3
    foreign = parts / os.listdir(parts)[0] / "README"
    foreign.write_text("of another program")
    calls.clear()
    counts = []
    monkeypatch.setattr(worker, "encode_share", lambda s, e: (counts.append(len(s.windows)), encode(s, e))[1])
    index([files], tmp_path / "store", model, ranks=alone())
    assert counts[:3] == [0, 0, 0]
    assert rows(tmp_path / "store", model) == rows(tmp_path / "alone", model)
    assert [path for path in parts.rglob("*") if path.is_file()] == [foreign]


def test_an_id_that_comes_twice_is_refused(files, model, tmp_path, monkeypatch):
    """Also if the two are in different units."""
    write_corpus(files / "corpus.jsonl", [*corpus(40), {"_id": "d0", "text": "owl"}])
    monkeypatch.setattr(Ranks, "is_alone", property(lambda self: False))
    with pytest.raises(ValueError, match=r"line 41: the \"_id\" 'd0' comes twice"):
        index([files], tmp_path / "store", model, ranks=alone())


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_holds_what_a_store_holds(name, files, model, tmp_path):
    """After a first run, an update, and `forget`: the same passages, scores, filters and counts as a store."""
    (files / "empty.txt").unlink()  # A document without text is in no engine, and is read again each time.
    target, store = f"{name}:{tmp_path / 'there'}", tmp_path / "store"
    colbert = ColBERT.from_pretrained(model)

    def compare(summary, other) -> None:
        assert replace(summary, passages=0) == replace(other, passages=0)
        with Store(store) as exact, Engine(target, colbert) as engine:
            for options in ({}, {"path": "*.jsonl"}, {"where": {"even": True, "year": {">=": 2001}}}):
                ours, theirs = exact.search(QUERIES, top_k=200, **options), engine.search(QUERIES, top_k=200, **options)
                for left, right in zip(ours, theirs, strict=True):
                    assert len(left) == len(right) > 0
                    np.testing.assert_allclose([hit.score for hit in left], [hit.score for hit in right], atol=1e-3)
                    assert {hit.passage for hit in _plain(left)} == {hit.passage for hit in _plain(right)}
            assert engine.run({"q": QUERIES[0]}, top_k=5).keys() == {"q"}

    compare(index([files], store, model), index([files], target, model))
    records = corpus(40)[1:]
    records[3]["text"] = "A treaty of peace."
    write_corpus(
        files / "corpus.jsonl", [*records, {"_id": "new", "text": "storm", "metadata": {"year": 1, "even": 0}}]
    )
    compare(index([files], store), index([files], target))
    compare(forget([files / "a.md"], store), forget([files / "a.md"], target))
    with Store(store) as exact:
        export(exact, f"{name}:{tmp_path / 'exported'}")
    again = index([files / "corpus.jsonl"], f"{name}:{tmp_path / 'exported'}")
    assert (again.added, again.changed, again.removed, again.unchanged) == (0, 0, 0, 40)
    with pytest.raises(ValueError, match="no document has the field 'colour'"), Engine(target, colbert) as engine:
        engine.search(QUERIES, where={"colour": "red"})
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="no text to index"):
        index([tmp_path / "folder"], f"{name}:{tmp_path / 'none'}", model)


def _plain(hits):
    """Hits whose passages can be in a set."""
    return [replace(hit, passage=replace(hit.passage, metadata=json.dumps(dict(hit.passage.metadata)))) for hit in hits]


@pytest.mark.parametrize("name", ENGINES)
def test_what_a_killed_worker_has_left_in_an_engine_is_written_again(name, files, model, tmp_path, monkeypatch):
    """A document of which some rows are missing does not count. A run over other files leaves it alone."""
    first = index([files], f"{name}:{tmp_path / 'whole'}", model)
    target, manifest = f"{name}:{tmp_path / 'broken'}", Manifest(1, model, "", "fp16", 16)
    with closing(open_table(f"{name}:{tmp_path / 'whole'}", manifest)) as table:
        long = next(row for row in table.scan() if row.parts > 1)

    def left() -> int:
        with closing(open_table(target, manifest)) as table:
            return sum(row.document == long.document for row in table.scan())

    kind, written = import_module(f"modernbert.retrieval.engines.{name}").Table, []
    add = kind.add

    def add_until_killed(table, rows) -> None:
        written.extend(row.document for row in rows)
        if written.count(long.document) == 2:
            raise OSError("killed")
        add(table, rows)

    monkeypatch.setattr(targets, "PASSAGES", 1)  # rows of a call
    monkeypatch.setattr(kind, "add", add_until_killed)
    with pytest.raises(OSError, match="killed"):
        index([files], target, model)
    monkeypatch.setattr(kind, "add", add)
    assert left() == 1
    (tmp_path / "other.md").write_text("# Storms\n\nHail falls.\n")
    index([tmp_path / "other.md"], target)
    assert left() == 1
    forget([tmp_path / "other.md"], target)
    assert index([files], target).passages == first.passages
    assert left() == long.parts


def test_a_damaged_store_is_repaired_by_one_process(files, model, tmp_path):
    index([files], tmp_path / "store", model)
    shard = next((tmp_path / "store" / "shards").iterdir())
    shard.write_bytes(b"broken")
    with pytest.raises(ValueError, match="repair the store first"):
        index_by(2, [files], tmp_path / "store")


def test_files_of_an_object_store(files, model, tmp_path):
    """In memory here. What is not there is named."""
    system = pytest.importorskip("fsspec").filesystem("memory")
    system.pipe("/docs/corpus.jsonl", (files / "corpus.jsonl").read_bytes())
    index([files / "corpus.jsonl"], tmp_path / "here", model)
    assert index(["memory://docs"], tmp_path / "there", model).documents == 40
    here, there = ([(*row[1:5], row[-1]) for row in rows(tmp_path / name, model)] for name in ("here", "there"))
    assert here == there
    with pytest.raises(FileNotFoundError, match="nothing is at memory://none"):
        index(["memory://none"], tmp_path / "there", model)
