"""Damage that an update repairs, stores that are closed, forked or pickled, and arguments of the wrong kind."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import pytest
from stores import corpus, small_colbert, small_shards, write_corpus

from modernbert import ColBERT
from modernbert.retrieval import Store, forget, index
from modernbert.retrieval.store.format import read_manifest


@pytest.fixture(scope="module")
def store(colbert, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    source = write_corpus(folder / "corpus.jsonl", corpus(6))
    index([source], folder / "store", colbert, prefilter=True)
    return folder / "store"


@pytest.fixture
def two(colbert, tmp_path, monkeypatch) -> Path:
    """A store of two files in several shards, with a pre-filter."""
    small_shards(monkeypatch, 8)
    for name, seed in (("a", 0), ("b", 1)):
        write_corpus(
            tmp_path / f"{name}.jsonl", [row | {"_id": f"{name}{i}"} for i, row in enumerate(corpus(20, seed))]
        )
    index([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "store", colbert, prefilter=True)
    return tmp_path / "store"


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "gone":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        middle = len(content) // 2
        changed = {"cut": content[:-7], "empty": b"", "flipped": content[:middle] + b"?" + content[middle + 1 :]}
        path.write_bytes(changed[kind] if changed[kind] != content else content[::-1])


def found(folder: Path, colbert: ColBERT) -> list[tuple[list[str], list[float]]]:
    """The ids and the scores of all passages, of an exact and of a pre-filtered search."""
    with Store(folder, colbert) as store:
        rows = [store.search(["owl night"], top_k=1000, prefilter=likely)[0] for likely in (False, True)]
    return [(sorted(hit.passage.id for hit in hits), sorted(hit.score for hit in hits)) for hits in rows]


@pytest.mark.parametrize("kind", ["gone", "cut", "empty", "flipped"])
@pytest.mark.parametrize("files", ["[0-9a-f]*", "centroids-*", "lists-*", "*"])
def test_an_update_rebuilds_what_is_damaged(colbert, two, kind, files):
    """Also what was read from a file that this run does not name."""
    source, calm, notes = two.parent / "a.jsonl", found(two, colbert), []
    before = read_manifest(two)
    for path in sorted((two / "shards").glob(files))[::2]:
        damage(path, kind)
    summary = index([source], two, colbert, note=notes.append)
    assert (summary.documents, summary.passages) == (before.documents, before.passages)
    for (ids, scores), (ids_before, scores_before) in zip(found(two, colbert), calm, strict=True):
        assert ids == ids_before
        assert scores == pytest.approx(scores_before, abs=2e-2)
    if files == "[0-9a-f]*":
        assert summary.changed > 0
        assert all("is damaged or missing: its documents are read and encoded again" in note for note in notes)
        assert notes
    notes.clear()
    assert index([source], two, colbert, note=notes.append).changed == 0
    assert notes == []


def test_what_cannot_be_rebuilt_is_named_and_kept_until_it_is_forgotten(colbert, two):
    source, other, notes = two.parent / "a.jsonl", two.parent / "b.jsonl", []
    moved = other.rename(two.parent / "moved.jsonl")
    manifest = (two / "store.json").read_bytes()
    for path in (two / "shards").glob("[0-9a-f]*"):
        damage(path, "flipped")
    with pytest.raises(ValueError, match=f"{two} is damaged, and {other}, one of 1 files .* --forget"):
        index([source], two, colbert, note=notes.append)
    assert (two / "store.json").read_bytes() == manifest
    moved.rename(other)
    assert index([source], two, colbert, note=notes.append).documents == 40
    other.unlink()
    for path in (two / "shards").glob("[0-9a-f]*"):
        damage(path, "gone")
    assert forget([other, source], two).documents == 0
    assert index([source], two, colbert).documents == 20


def test_a_document_that_has_vanished_is_not_rebuilt(colbert, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in ("a", "b"):
        (docs / f"{name}.txt").write_text(f"hail {name}")
    index([docs], tmp_path / "store", colbert)
    (docs / "a.txt").unlink()
    for path in (tmp_path / "store" / "shards").iterdir():
        damage(path, "cut")
    summary = index([docs], tmp_path / "store", colbert, note=[].append)
    assert (summary.removed, summary.changed, summary.documents) == (1, 1, 1)


USES = {
    "search": lambda store, hit: store.search(["hail"]),
    "pre-filter": lambda store, hit: store.search(["hail"], prefilter=True),
    "path": lambda store, hit: store.search(["hail"], path="*.txt"),
    "encoded": lambda store, hit: store.search([]),
    "encode": lambda store, hit: store.encode(["hail"]),
    "explain": lambda store, hit: store.explain("hail", hit),
    "run": lambda store, hit: store.run({"q": "hail"}),
    "passages": lambda store, hit: store.passages([hit.passage_id]),
    "batches": lambda store, hit: list(store.batches()),
}


@pytest.mark.parametrize("use", USES)
def test_a_closed_store_says_so(colbert, store, use, monkeypatch):
    monkeypatch.setattr("modernbert.retrieval.store.search.LARGE", 1)
    with Store(store, colbert) as opened:
        hit = opened.search(["hail"], prefilter=True)[0][0]
        USES[use](opened, hit)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"the store {store} is closed: open it again"):
            USES[use](opened, hit)
        opened.close()


@pytest.mark.parametrize("use", USES)
def test_a_store_is_not_used_after_a_fork(colbert, store, use):
    """Before the model computes, which may wait for threads that the parent had. It can be closed, and opened again."""
    with Store(store, colbert) as opened:
        hit = opened.search(["hail"])[0][0]
        child = os.fork()
        if child == 0:
            status = 1
            try:
                USES[use](opened, hit)
            except RuntimeError as error:
                opened.close()
                status = 7 if "was opened before a fork: open it again in each process" in str(error) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        USES[use](opened, hit)


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_store_is_not_pickled_or_copied(colbert, store, copied):
    with Store(store, colbert) as opened:
        with pytest.raises(TypeError, match=f"cannot be pickled or copied: pass on the folder {store}"):
            copied(opened)
        assert opened.search(["hail"])[0]


@pytest.mark.parametrize("fault", ["a shard", "the model", "the table"])
def test_a_store_that_does_not_open_keeps_no_file_open(colbert, two, modernbert_tokenizer_file, fault):
    """Although the error still refers to it."""
    model = colbert
    if fault == "a shard":
        damage(sorted((two / "shards").glob("[0-9a-f]*"))[-1], "cut")
    elif fault == "the table":
        damage(next(two.glob("*.sqlite")), "flipped")
    else:
        model = small_colbert(modernbert_tokenizer_file.parent, query_length=30)

    def opened() -> list[str]:
        links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
        return [os.readlink(link) for link in links if os.path.lexists(link) and str(two) in os.readlink(link)]

    errors = []
    for _ in range(3):
        with pytest.raises((ValueError, OSError)) as error:
            Store(two, model)
        errors.append(error)
        assert opened() == []


class Text(str):
    """A text of a kind of its own."""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "x"}, "by is 'x'; it can be 'passage' or 'document'"),
        ({"by": None}, "by is None"),
        ({"top_k": 1.5}, "top_k is 1.5; ask for a whole number of 1 or more"),
        ({"top_k": 3.0}, "top_k is 3.0"),
        ({"top_k": "3"}, "top_k is '3'"),
        ({"top_k": True}, "top_k is True"),
        ({"top_k": None}, "top_k is None"),
        ({"top_k": -1}, "top_k is -1"),
        ({"path": Path("a.txt")}, "give a shell pattern as a text"),
        ({"path": 3}, "path is 3"),
        ({"where": "year=2001"}, "where is 'year=2001'; give a dict"),
        ({"where": {"year": b"2001"}}, "where has 'year': b'2001'; give a text, a number"),
        ({"where": {1: "2001"}}, "where has the field 1; give its name as a text"),
        ({"queries": [None]}, r"queries\[0\] is None; give a text"),
        ({"queries": ["owl", 3]}, r"queries\[1\] is 3; give a text"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(colbert, store, options, message):
    with Store(store, colbert) as opened, pytest.raises(ValueError, match=message):
        opened.search(**{"queries": ["owl"], **options})


def test_arguments_of_a_kind_that_is_as_good(colbert, store):
    import numpy as np

    with Store(store, colbert) as opened:
        assert len(opened.search((Text("owl"),), top_k=np.int64(2))[0]) == 2
        for top_k in (1.5, 0, "3"):
            with pytest.raises(ValueError, match="top_k is"):
                opened.run({"q": "owl"}, top_k=top_k)


def test_a_hit_of_another_store_is_not_explained(colbert, store, two):
    with Store(two, colbert) as opened:
        hit = opened.search(["owl"], top_k=1000)[0]
    last = max(hit, key=lambda one: one.passage_id)
    with Store(store, colbert) as opened, pytest.raises(KeyError, match="the hit is of another one"):
        opened.explain("owl", last)
