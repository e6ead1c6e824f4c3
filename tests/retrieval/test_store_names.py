"""Any name of a folder or a file works, or is refused before anything is written."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from stores import corpus, write_corpus

from modernbert.retrieval import Store, forget, index
from modernbert.retrieval.documents.text import file_name
from modernbert.retrieval.engines import Engine, export, is_target
from modernbert.retrieval.store.request import IndexRequest, read_request, resume_command, write_request

STRANGE = os.fsdecode(b"n\xff")
GOOD = [
    "file:x",
    "file::memory:",
    ":memory:",
    "sqlite:x?mode=memory",
    "a\nb",
    "\x1b[31mred\x1b[0m",
    "x" * 255,
    "ä" * 127,
    " both ends ",
    "-x",
    "--output",
    "~",
    "50% off? #1",
    "it's; $HOME `x` \\n",
    "*",
    "http:",
    "qdrant",
    "store.json",
]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working directory, with a text, and folders that a name could be taken for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("hail")
    (tmp_path / "x").mkdir()
    return tmp_path


@pytest.mark.parametrize("name", GOOD)
def test_a_store_of_any_name_works(colbert, here, name):
    for change in ("added", "changed"):
        assert vars(index(["a.txt"], name, colbert))[change] == 1
        with Store(name, colbert) as store, Store(here / name, colbert) as same:
            assert len(store.search(["hail"])[0]) == len(same.search(["hail"])[0]) == 1
        (here / "a.txt").write_text("hail and storms")
    assert forget(["a.txt"], name).documents == 0
    assert sorted(os.listdir(here)) == sorted({"a.txt", "x", name})
    assert os.listdir(here / "x") == []
    if name != "store.json":
        assert not is_target(name)


@pytest.mark.parametrize("name", ["file:x", "a\nb", "-x", " both ends "])
@pytest.mark.parametrize("engine", ["qdrant", "lancedb"])
def test_an_export_of_any_name_works(colbert, here, engine, name):
    pytest.importorskip({"qdrant": "qdrant_edge"}.get(engine, engine))
    index(["a.txt"], "store", colbert)
    with Store("store", colbert) as store:
        if (engine, name) == ("lancedb", "a\nb"):
            with pytest.raises(ValueError, match="control character"):
                export(store, f"{engine}:{name}")
            assert not (here / name).exists()
            return
        export(store, f"{engine}:{name}")
        export(store, f"{engine}:{name}")
    with Engine(f"{engine}:{name}", colbert) as engine:
        assert len(engine.search(["hail"])[0]) == 1
    assert sorted(os.listdir(here)) == sorted({"a.txt", "x", "store", name})
    assert os.listdir(here / "x") == []


@pytest.mark.parametrize(
    "name",
    [
        *("qdrant:", "", STRANGE, f"new/{STRANGE}", "y" * 256),
        *("file", "dangling", "loop", "fifo", "file/store", "locked/new"),
    ],
)
def test_a_name_that_cannot_work_is_refused_before_anything_is_written(colbert, here, name):
    (here / "file").write_text("own")
    (here / "dangling").symlink_to("nowhere")
    (here / "loop").symlink_to("loop")
    (here / "locked").mkdir(mode=0o500)
    os.mkfifo(here / "fifo")
    before = sorted(here.rglob("*"))
    if name == "locked/new" and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    with pytest.raises((ValueError, OSError)) as refused:
        index(["a.txt"], name, colbert)
    shown = str(refused.value)
    assert "make room" not in shown
    assert file_name(name)[:20] in shown
    assert sorted(here.rglob("*")) == before
    if name and not is_target(name):
        with pytest.raises((ValueError, OSError)):
            Store(name, colbert)
        with pytest.raises((ValueError, OSError)):
            forget(["a.txt"], name)
    assert not os.path.lexists(here / "nowhere")
    assert (here / "file").read_text() == "own"


@pytest.mark.parametrize("name", [STRANGE, "file", "dangling", "loop", "fifo"])
@pytest.mark.parametrize("engine", ["qdrant", "lancedb"])
def test_an_export_to_a_name_that_cannot_work_is_refused(colbert, here, engine, name):
    pytest.importorskip({"qdrant": "qdrant_edge"}.get(engine, engine))
    (here / "file").write_text("own")
    (here / "dangling").symlink_to("nowhere")
    (here / "loop").symlink_to("loop")
    os.mkfifo(here / "fifo")
    index(["a.txt"], "store", colbert)
    before = sorted(here.rglob("*"))
    with Store("store", colbert) as store, pytest.raises((ValueError, NotADirectoryError)) as refused:
        export(store, f"{engine}:{name}")
    assert file_name(name) in str(refused.value)
    assert sorted(here.rglob("*")) == before


def test_a_store_in_the_working_directory(colbert, here, tmp_path):
    (here / "x" / "b").mkdir()
    os.chdir(here / "x" / "b")
    for name in (".", "../b", "..//b/."):
        assert index([here / "a.txt"], name, colbert).documents == 1
    with pytest.raises(ValueError, match="is not a store, and not empty"):
        index([here / "a.txt"], "..", colbert)


def test_names_that_are_shown_alike_are_two(colbert, here):
    r"""The byte \xff and the four characters \xff; what either is written as; and ordinary backslashes."""
    alike = [b"n\xff.txt", rb"n\xff.txt", rb"n\x5cxff.txt", rb"n\x5cx5cxff.txt", rb"n\\xff.txt", b"n\\\xff.txt"]
    usual = [rb"n\xg0.txt", rb"n\x41.txt", rb"n\u00ff.txt", "nÿ.txt".encode(), b"n\\.txt"]
    (here / "in").mkdir()
    for name in alike + usual:
        (here / "in" / os.fsdecode(name)).write_text(f"hail of {name!r}")
    assert index(["in"], "store", colbert).added == 11
    again = index(["in"], "store", colbert)
    assert (again.unchanged, again.added, again.changed, again.removed) == (11, 0, 0, 0)
    for name in usual:
        assert file_name(os.fsdecode(name)) == name.decode()
    with Store("store", colbert) as store:
        paths = {hit.passage.path for hit in store.search(["hail"], top_k=100)[0]}
        assert len(paths) == 11
        assert str(here / "in" / "nÿ.txt") in paths
    for count, name in enumerate(alike + usual, start=1):
        assert forget([here / "in" / os.fsdecode(name)], "store").documents == 11 - count


def test_the_lock_of_a_store_is_not_a_document(colbert, here):
    """That of the store itself, and of others; a file of the user with this name is one."""
    (here / "x" / "lock").write_text("a canal lock lifts boats")
    index(["a.txt"], "other", colbert)
    for _ in range(2):
        assert index(["."], "store", colbert).documents == 2
    with Store("store", colbert) as store:
        paths = {hit.passage.path for hit in store.search(["canal"])[0]}
    assert paths == {str(here / "a.txt"), str(here / "x" / "lock")}


FOREIGN = ["", '{"pathr": ["a"]}', "[1]", '{"paths": null}', "[" * 100_000, "null", '{"forget": "a"}', "\xff", "NaN"]


@pytest.mark.parametrize("content", FOREIGN, ids=range(len(FOREIGN)))
def test_an_unfinished_json_of_another_content(colbert, here, content):
    index(["a.txt"], "store", colbert)
    file = here / "store" / "unfinished.json"
    file.write_bytes(content.encode("latin-1"))
    for write in (index, forget):
        with pytest.raises(ValueError, match=r"store/unfinished\.json is damaged: delete it"):
            write(["a.txt"], "store", *[colbert] * (write is index))
    assert file.read_bytes() == content.encode("latin-1")
    file.unlink()
    assert index(["a.txt"], "store", colbert).unchanged == 1


@pytest.mark.parametrize("name", ["a b", "it's", "a\nb\tc", STRANGE, "\\", "ä", "-x", "$HOME", "\x1b[31m"])
def test_the_command_that_resumes_names_the_same_files(tmp_path, name):
    """For a shell, on one line."""
    request: IndexRequest = {"paths": [f"/docs/{name}"], "model": None, "dtype": "fp16", "prefilter": True}
    write_request(tmp_path, request)
    assert read_request(tmp_path) == request
    command = resume_command(request, Path("store"))
    assert "\n" not in command
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True).stdout
    given = [os.fsdecode(word) for word in words.split(b"\0")[:-1]]
    assert given == ["modernbert", "index", f"/docs/{name}", "--output", "store", "--dtype", "fp16", "--prefilter"]


def test_a_read_only_folder_stays_as_it_was(colbert, tmp_path):
    source, folder = write_corpus(tmp_path / "corpus.jsonl", corpus(3)), tmp_path / "store"
    index([source], folder, colbert)
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    folder.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match="store"):
            index([source], folder, colbert)
    finally:
        folder.chmod(0o700)
    assert json.loads((folder / "store.json").read_text())["documents"] == 3
