"""What cannot be read is not gone: an update drops a document only where its folder was listed without it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest
from stores import small_colbert

from modernbert import ColBERT
from modernbert.cli import main
from modernbert.retrieval import Store, forget, index
from modernbert.retrieval.store.writer import Summary

NAMES = ["a.txt", "sub/b.txt", "sub/deep/c.md", "sub/deep/d.txt", "z.txt"]
ERRORS = [errno.EACCES, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG, errno.ENOENT]


@pytest.fixture(scope="module")
def colbert(modernbert_tokenizer_file) -> ColBERT:
    return small_colbert(modernbert_tokenizer_file.parent)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    for name in NAMES:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"owls of {name}")
    return tmp_path / "in"


@pytest.fixture
def store(tmp_path: Path, docs: Path, colbert: ColBERT) -> Path:
    index([docs], tmp_path / "store", colbert)
    return tmp_path / "store"


@pytest.fixture
def update(docs: Path, store: Path, colbert: ColBERT) -> Callable[[], tuple[Summary, list[str]]]:
    def run() -> tuple[Summary, list[str]]:
        notes: list[str] = []
        return index([docs], store, colbert, note=notes.append), notes

    return run


def held(store: Path, docs: Path, colbert: ColBERT) -> list[str]:
    with Store(store, colbert) as opened:
        return sorted(str(Path(p.path).relative_to(docs)) for _, ps, _ in opened.batches() for p in ps)


def fail(monkeypatch: pytest.MonkeyPatch, function: str, place: Path, code: int) -> None:
    real = getattr(os, function)

    def failing(path, *args, **options):
        if not isinstance(path, int) and os.fspath(path) == os.fspath(place):
            raise OSError(code, os.strerror(code), os.fspath(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, function, failing)


@pytest.mark.parametrize("code", ERRORS)
@pytest.mark.parametrize(("place", "unread"), [("sub", 3), ("sub/deep", 2), ("", 5)])
def test_a_folder_that_cannot_be_listed_keeps_all_below_it(
    monkeypatch, docs, store, colbert, update, code, place, unread
):
    fail(monkeypatch, "scandir", docs / place, code)
    summary, notes = update()
    assert (summary.removed, summary.documents, summary.unread) == (0, 5, unread)
    assert any(str(docs / place) in note and os.strerror(code) in note for note in notes)
    assert held(store, docs, colbert) == sorted(NAMES)


def test_an_error_in_the_middle_of_a_listing_keeps_all_of_it(monkeypatch, docs, update):
    real = os.scandir

    @contextmanager
    def breaking(path):
        with real(path) as entries:

            def some():
                for number, entry in enumerate(entries):
                    if number and os.fspath(path) == str(docs / "sub" / "deep"):
                        raise OSError(errno.EIO, "Input/output error", os.fspath(path))
                    yield entry

            yield some()

    monkeypatch.setattr(os, "scandir", breaking)
    summary, _ = update()
    assert (summary.unchanged, summary.removed, summary.documents, summary.unread) == (3, 0, 5, 2)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ENOENT])
@pytest.mark.parametrize(("place", "unread"), [("sub", 3), ("sub/b.txt", 1)])
def test_a_stat_that_fails_keeps_what_is_there(monkeypatch, docs, store, colbert, update, code, place, unread):
    """ENOENT: it was deleted after the listing, and is skipped as if it had vanished later. The next run drops it."""
    fail(monkeypatch, "stat", docs / place, code)
    summary, notes = update()
    assert (summary.removed, summary.documents, summary.unread) == (0, 5, unread)
    assert any(str(docs / place) in note for note in notes)
    assert held(store, docs, colbert) == sorted(NAMES)


def test_a_file_that_vanishes_while_files_are_counted_is_skipped(monkeypatch, docs, update):
    real, seen = Path.stat, []

    def vanishing(path, **options):
        if path.name == "b.txt" and not seen:
            seen.append(path)
            path.unlink()
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", vanishing)
    summary, _ = update()
    assert (summary.unchanged, summary.removed) == (4, 1)


def test_a_link_to_a_disk_that_is_not_mounted_keeps_its_document(tmp_path, docs, store, colbert, update):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "far.txt").write_text("owls from afar")
    (docs / "far.txt").symlink_to(tmp_path / "disk" / "far.txt")
    update()
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    summary, notes = update()
    assert (summary.removed, summary.documents, summary.unread) == (0, 6, 1)
    assert any(note.startswith(f"{docs / 'far.txt'} cannot be read now") for note in notes)
    (docs / "far.txt").unlink()
    assert update()[0].removed == 1


def test_documents_that_are_really_gone_are_dropped(docs, store, colbert, update):
    shutil.rmtree(docs / "sub" / "deep")
    (docs / "a.txt").unlink()
    summary, notes = update()
    assert (summary.removed, summary.unread, notes) == (3, 0, [])
    assert held(store, docs, colbert) == ["sub/b.txt", "z.txt"]


def test_a_folder_that_cannot_be_listed_adds_what_can_be_read_elsewhere(monkeypatch, docs, store, colbert, update):
    """Also of a root below it: its documents get new numbers, which the kept ones had."""
    (docs / "z.txt").write_text("changed")
    (docs / "sub" / "deep" / "d.txt").write_text("changed too")
    fail(monkeypatch, "scandir", docs / "sub", errno.EIO)
    summary = index([docs, docs / "sub" / "deep"], store, colbert, note=lambda _: None)
    assert (summary.changed, summary.removed, summary.documents) == (2, 0, 5)
    assert held(store, docs, colbert) == sorted(NAMES)


@pytest.mark.parametrize("kind", ["empty folder", "no text", "empty records", "gone"])
def test_a_path_that_held_documents_and_has_none_is_refused(tmp_path, docs, store, colbert, kind):
    root = docs
    if kind == "empty records":
        root = tmp_path / "corpus.jsonl"
        root.write_text('{"text": "owls"}\n')
        index([root], store, colbert)
        root.write_text("")
    else:
        shutil.rmtree(docs)
        if kind != "gone":
            docs.mkdir()
        if kind == "no text":
            (docs / "lost+found").mkdir()
            (docs / "photo.png").touch()
    other = tmp_path / "other.txt"
    other.write_text("mice")
    before = {path.name: path.read_bytes() for path in store.iterdir() if path.is_file()}
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        index([other, root], store, colbert, note=lambda _: None)
    assert f"modernbert index --forget {root} --output {store}" in str(error.value)
    assert {path.name: path.read_bytes() for path in store.iterdir() if path.is_file()} == before
    forget([root], store)
    if kind != "gone":
        assert index([other, root], store, colbert, note=lambda _: None).added == 1


def test_a_path_that_never_held_documents_may_be_empty(tmp_path, docs, store, colbert):
    (tmp_path / "inbox").mkdir()
    assert index([docs, tmp_path / "inbox"], store, colbert).documents == 5


def test_the_exit_status_is_1_if_documents_were_kept_unread(monkeypatch, capsys, tmp_path, docs, colbert):
    colbert.save_pretrained(tmp_path / "model")
    store = tmp_path / "store"

    def run() -> int:
        with pytest.raises(SystemExit) as end:
            main(["index", str(docs), "--output", str(store), "--model", str(tmp_path / "model")])
        return int(end.value.code or 0)

    assert run() == 0
    fail(monkeypatch, "scandir", docs / "sub", errno.EIO)
    capsys.readouterr()
    assert run() == 1
    err = capsys.readouterr().err
    assert f"note: {docs / 'sub'} cannot be read now: the store keeps what it holds of it\n" in err
    assert err.endswith("note: 3 of them could not be read now, and are kept as they were\n")
    monkeypatch.undo()
    assert run() == 0
