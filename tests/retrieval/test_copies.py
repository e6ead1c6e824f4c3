"""One document in several places: copies are one hit, and places that are gone are named."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from stores import corpus, write_corpus

from modernbert.retrieval import Store, forget, index


def hits(store: Path, colbert, query="owls hunt mice", **options):
    with Store(store, colbert) as opened:
        return opened.search([query], top_k=100, **options)[0]


def names(found) -> list[str]:
    return [Path(hit.passage.path).name for hit in found]


@pytest.fixture
def docs(tmp_path) -> Path:
    folder = tmp_path / "docs"
    for name, text in {"a.md": "# Owls\nOwls hunt mice.\n# Ice\nIt is cold.", "b.txt": "Peace"}.items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_copies_of_a_file_are_one_hit_with_all_paths(tmp_path, docs, colbert):
    """Under the same name and under others, in a folder and in another run."""
    (docs / "sub").mkdir()
    for name in ("sub/a.md", "z.md"):
        shutil.copy(docs / "a.md", docs / name)
    store = tmp_path / "store"
    assert index([docs], store, colbert).documents == 4
    for by, expected in (("passage", ["a.md", "a.md", "b.txt"]), ("document", ["a.md", "b.txt"])):
        found = hits(store, colbert, by=by)
        assert sorted(names(found)) == expected
        for hit in found:
            copies = (str(docs / "z.md"), str(docs / "a.md")) if names([hit]) == ["a.md"] else ()
            assert (hit.passage.path, hit.copies) in (
                (str(docs / "sub" / "a.md"), copies),
                (str(docs / "b.txt"), copies),
            )
            assert [hit.rank for hit in found] == list(range(1, len(found) + 1))
    (tmp_path / "later").mkdir()
    shutil.copy(docs / "b.txt", tmp_path / "later" / "peace.txt")
    index([tmp_path / "later"], store, colbert)
    assert sorted(names(hits(store, colbert))) == ["a.md", "a.md", "peace.txt"]
    assert [hit.copies for hit in hits(store, colbert) if names([hit]) == ["peace.txt"]] == [(str(docs / "b.txt"),)]


def test_a_copy_is_found_by_its_own_path(tmp_path, docs, colbert):
    shutil.copytree(docs, tmp_path / "more")
    index([docs, tmp_path / "more"], tmp_path / "store", colbert)
    for folder, other in ((docs, tmp_path / "more"), (tmp_path / "more", docs)):
        found = hits(tmp_path / "store", colbert, path=f"{folder}/*")
        assert {hit.passage.path for hit in found} == {str(folder / "a.md"), str(folder / "b.txt")}
        assert {hit.copies for hit in found} == {(str(other / "a.md"),), (str(other / "b.txt"),)}
    assert len(hits(tmp_path / "store", colbert)) == 3
    assert len(hits(tmp_path / "store", colbert, path="*")) == 6


def test_a_copy_that_changes_is_a_document_of_its_own(tmp_path, docs, colbert):
    shutil.copy(docs / "b.txt", docs / "c.txt")
    index([docs], tmp_path / "store", colbert)
    assert sorted(names(hits(tmp_path / "store", colbert))) == ["a.md", "a.md", "c.txt"]
    (docs / "c.txt").write_text("War")
    index([docs], tmp_path / "store", colbert)
    assert sorted(names(hits(tmp_path / "store", colbert))) == ["a.md", "a.md", "b.txt", "c.txt"]
    forget([docs / "c.txt"], tmp_path / "store")
    assert {hit.copies for hit in hits(tmp_path / "store", colbert)} == {()}


def test_records_are_copies_only_with_their_id(tmp_path, colbert):
    """Two records with one text are two documents that are judged; the same file in two folders holds copies."""
    twins = [{"_id": name, "text": "owls hunt"} for name in ("t1", "t2")]
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_corpus(tmp_path / folder / "corpus.jsonl", twins)
    index([tmp_path / "x"], tmp_path / "store", colbert)
    assert [hit.passage.id for hit in hits(tmp_path / "store", colbert)] == ["t1", "t2"]
    index([tmp_path / "y"], tmp_path / "store", colbert)
    found = hits(tmp_path / "store", colbert)
    assert [hit.passage.id for hit in found] == ["t1", "t2"]
    assert {hit.copies for hit in found} == {(str(tmp_path / "x" / "corpus.jsonl"),)}
    with Store(tmp_path / "store", colbert) as store:
        assert len(store.run({"q": "owls"}, path="x/*")["q"]) == 2


def test_a_run_lists_copies(tmp_path, docs, colbert):
    shutil.copy(docs / "b.txt", docs / "c.txt")
    index([docs], tmp_path / "store", colbert)
    with Store(tmp_path / "store", colbert) as store:
        assert {Path(name).name for name in store.run({"q": "peace"})["q"]} == {"a.md", "b.txt", "c.txt"}


def test_a_pre_filter_has_the_same_copies(tmp_path, docs, colbert, monkeypatch):
    monkeypatch.setattr("modernbert.retrieval.store.search.LARGE", 1)
    shutil.copy(docs / "a.md", docs / "z.md")
    index([docs], tmp_path / "store", colbert, prefilter=True)
    exact, likely = (hits(tmp_path / "store", colbert, prefilter=prefilter) for prefilter in (False, True))
    assert [(hit.passage_id, hit.copies) for hit in exact] == [(hit.passage_id, hit.copies) for hit in likely]


def update(paths, store, colbert) -> list[str]:
    notes: list[str] = []
    index(paths, store, colbert, note=notes.append)
    return notes


def test_a_folder_that_was_moved_is_named_with_the_command(tmp_path, docs, colbert):
    """The hits are in the new place, and the command leaves only these."""
    store = tmp_path / "store"
    assert update([docs], store, colbert) == []
    new = docs.rename(tmp_path / "handbook")
    (note,) = update([new], store, colbert)
    assert note.startswith("2 documents of other paths are kept, but their files are not there now")
    assert note.endswith(f"remove them with: modernbert index --forget {docs} --output {store}")
    found = hits(store, colbert)
    assert {Path(hit.passage.path).parent for hit in found} == {new}
    assert {Path(path).parent for hit in found for path in hit.copies} == {docs}
    assert forget([docs], store).removed == 2
    assert update([new], store, colbert) == []


@pytest.mark.parametrize("name", ["it's", "n\udcff", "a\nb", r"n\xff"])
def test_the_command_names_a_file_of_any_name(tmp_path, docs, colbert, name):
    (docs / name).mkdir()
    (docs / name / "c.txt").write_text("hail")
    index([docs / name, docs / "b.txt"], tmp_path / "store", colbert)
    shutil.rmtree(docs / name)
    (note,) = update([docs / "b.txt"], tmp_path / "store", colbert)
    command = note.split("remove them with: modernbert index --forget ")[1]
    shown = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True).stdout
    assert os.fsdecode(shown.split(b"\0")[0]) == str(docs / name)


def test_many_places_are_summed_up(tmp_path, colbert):
    folders = [tmp_path / f"d{number}" for number in range(8)]
    for number, folder in enumerate(folders):
        folder.mkdir()
        (folder / "a.txt").write_text(f"owl {number}")
    index(folders, tmp_path / "store", colbert)
    for folder in folders[1:]:
        shutil.rmtree(folder)
    (note,) = update([folders[0]], tmp_path / "store", colbert)
    assert note.startswith("7 documents")
    assert note.endswith("(the first 5 of 7 places)")


def test_what_cannot_be_examined_is_not_gone(tmp_path, docs, colbert, monkeypatch):
    index([docs], tmp_path / "store", colbert)
    (tmp_path / "other.txt").write_text("hail")
    real = os.lstat

    def failing(path, **options):
        if str(path).startswith(str(docs)):
            raise PermissionError(13, "Permission denied", path)
        return real(path, **options)

    monkeypatch.setattr(os, "lstat", failing)
    assert update([tmp_path / "other.txt"], tmp_path / "store", colbert) == []


def test_a_corpus_that_is_gone_counts_its_records(tmp_path, docs, colbert):
    source = write_corpus(tmp_path / "corpus.jsonl", corpus(4))
    index([docs, source], tmp_path / "store", colbert)
    source.unlink()
    (note,) = update([docs], tmp_path / "store", colbert)
    assert note.startswith("4 documents of other paths")
    assert f"--forget {source} --output" in note


def test_a_store_inside_its_own_folder_changes_nothing(tmp_path, docs, colbert):
    """Nor does another one, whatever is in it."""
    first = update([docs], docs / "store", colbert)
    index([docs / "b.txt"], docs / "other", colbert)
    (docs / "other" / "README.md").write_text("about the store")
    for _ in range(2):
        notes: list[str] = []
        summary = index([docs], docs / "store", colbert, note=notes.append)
        assert (summary.unchanged, summary.added, summary.changed, summary.removed) == (2, 0, 0, 0)
    assert first == [f"skipped 1 files and folders in {docs} that are not read: 1 store"]
    assert notes == [f"skipped 2 files and folders in {docs} that are not read: 2 store"]
