"""Kills, full disks, two writers, flipped bytes: the store is the old or the new one, and never opens if damaged."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stores import corpus, small_colbert, small_shards, write_corpus

from modernbert import Session, files
from modernbert.late_interaction import Ragged
from modernbert.retrieval import Store, index
from modernbert.retrieval.store import search, writer
from modernbert.retrieval.store.draft import open_draft
from modernbert.retrieval.store.format import read_manifest, write_manifest

KILLS = 20


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    small_shards(monkeypatch, 8)


def state(folder: Path) -> tuple:
    """The content of a store: rows of its tables, bytes of its shards, manifest without the hash of the table."""
    manifest = json.loads((folder / "store.json").read_bytes())
    with closing(sqlite3.connect(folder / manifest["table"])) as table:
        names = ("documents", "passages", "shards")
        rows = [table.execute(f"SELECT * FROM {name} ORDER BY number").fetchall() for name in names]
    shards = {file: (folder / "shards" / file).read_bytes() for _, file, *_ in rows[2]}
    return rows, shards, {key: manifest[key] for key in ("model", "fingerprint", "dtype", "documents", "passages")}


def in_a_fork(work: Callable[[], object]) -> int:
    """Start a process that does the work, and ends with status 0, or with 1 after an exception."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def killed_after(seconds: float, work: Callable[[], object]) -> bool:
    """Do the work in a fork. Returns whether SIGKILL came before its end."""
    child, deadline = in_a_fork(work), time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0
            return False
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


@pytest.mark.sweep
def test_twenty_kills_at_random_moments(colbert, tmp_path):
    """A first index is killed over and over, then an update: each time, the store has its old state or
    its new one, and the last run ends in the same store as an uninterrupted one.
    """
    source, folder, calm = tmp_path / "corpus.jsonl", tmp_path / "store", tmp_path / "calm"
    write_corpus(source, corpus(60))
    started = time.monotonic()
    index([source], calm, colbert)
    duration, chance, kills = time.monotonic() - started, random.Random(0), 0

    while kills < KILLS // 2:
        if killed_after(chance.uniform(0, 1.1 * duration), lambda: index([source], folder, colbert)):
            kills += 1
        if (folder / "store.json").exists():
            assert state(folder) == state(calm)
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
        elif (folder / "unfinished.json").exists():
            with pytest.raises(FileNotFoundError, match=f"unfinished; resume with: modernbert index {source} --output"):
                Store(folder, colbert)
    index([source], folder, colbert)
    assert state(folder) == state(calm)

    old, changed = state(calm), corpus(60, seed=1)[::2] + corpus(60)[1::2]
    write_corpus(source, changed)
    index([source], calm, colbert)
    new = state(calm)
    assert old != new
    while kills < KILLS:
        if killed_after(chance.uniform(0, duration), lambda: index([source], folder, colbert)):
            kills += 1
        found = state(folder)
        assert found in (old, new)
        with Store(folder, colbert) as store:
            assert len(store.search(["owl"], top_k=1000)[0]) == len(store) == len(found[0][1])
        if found == new:  # Start again from the old store.
            write_corpus(source, corpus(60))
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            index([source], folder, colbert)
            write_corpus(source, changed)
    index([source], folder, colbert)
    assert state(folder) == new


OPERATIONS = ["replace", "fsync", "unlink"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_kill_at_every_step_of_an_update(colbert, tmp_path, operation):
    """Before each rename, flush and removal of a file that an update makes."""
    source, folder = tmp_path / "corpus.jsonl", tmp_path / "store"
    write_corpus(source, corpus(24))
    index([source], folder, colbert)
    old = state(folder)
    write_corpus(source, corpus(24, seed=2)[:16])

    def killed_at(step: int) -> None:
        calls = 0

        def counted(original):
            def call(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **options)

            return call

        os.fsync = counted(os.fsync) if operation == "fsync" else os.fsync
        Path.replace = counted(Path.replace) if operation == "replace" else Path.replace
        Path.unlink = counted(Path.unlink) if operation == "unlink" else Path.unlink
        index([source], folder, colbert)

    states = []
    for step in range(1, 60):
        child = in_a_fork(lambda step=step: killed_at(step))
        status = os.waitpid(child, 0)[1]
        Store(folder, colbert).close()
        states.append(state(folder))
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert len(states) > 3
    assert states[0] == old
    switched = next(i for i, found in enumerate(states) if found != old)
    assert all(found == states[-1] for found in states[switched:])


@pytest.mark.parametrize("size", [300, 3_000, 9_000, 30_000, 60_000])
def test_a_disk_that_is_full_at_some_size(colbert, tmp_path, size):
    """RLIMIT_FSIZE: whichever file is too large, the old store stays, and the message has the command that resumes."""
    source, folder = tmp_path / "corpus.jsonl", tmp_path / "store"
    write_corpus(source, corpus(5))
    index([source], folder, colbert)
    old = state(folder)
    write_corpus(source, corpus(200))
    reading, writing = os.pipe()

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            index([source], folder, colbert)
        except OSError as error:
            os.write(writing, str(error).encode())

    child = in_a_fork(full)
    os.close(writing)
    with open(reading) as pipe:
        message = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    assert "the store is as it was" in message
    assert f"modernbert index {source} --output {folder}" in message
    assert state(folder) == old
    assert not list(folder.rglob(".*"))
    Store(folder, colbert).close()
    index([source], folder, colbert)
    index([source], tmp_path / "calm", colbert)
    with Store(folder, colbert) as store, Store(tmp_path / "calm", colbert) as calm:
        assert [hit.score for hit in store.search(["owl"], top_k=300)[0]] == pytest.approx(
            [hit.score for hit in calm.search(["owl"], top_k=300)[0]], abs=2e-3
        )


@pytest.mark.parametrize("after", range(5))
def test_a_writer_that_fails(colbert, tmp_path, monkeypatch, after):
    """The disk is full from the n-th file on."""
    source, folder = tmp_path / "corpus.jsonl", tmp_path / "store"
    write_corpus(source, corpus(10))
    index([source], folder, colbert)
    old = state(folder)
    write_corpus(source, corpus(40, seed=3))
    original, calls = files.flush, 0

    def full(*paths: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > 2 * after:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(files, "flush", full)
        patch.setattr(writer, "flush", full)
        with pytest.raises(OSError, match=r"no room left for .*the store is as it was"):
            index([source], folder, colbert)
    assert state(folder) == old
    assert not list(folder.rglob(".*"))
    index([source], folder, colbert)
    assert len(state(folder)[0][0]) == 40


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_a_real_disk(colbert, tmp_path, kind):
    """A tmpfs of 200 kB that fills up; a mount that is read-only."""
    source, mount = tmp_path / "corpus.jsonl", tmp_path / "mount"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(mount)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    folder = mount / "store"
    try:
        write_corpus(source, corpus(20))
        index([source], folder, colbert)
        old = state(folder)
        write_corpus(source, corpus(900))
        if kind == "full":
            with pytest.raises(OSError, match="the store is as it was"):
                index([source], folder, colbert)
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
            with pytest.raises(OSError, match="Read-only file system"):
                index([source], folder, colbert)
        assert state(folder) == old
        with Store(folder, colbert) as store:
            assert store.search(["owl"])[0]
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_two_writers(colbert, tmp_path):
    """The second is refused while the first is working; a killed one leaves no lock."""
    source, folder = write_corpus(tmp_path / "corpus.jsonl", corpus(10)), tmp_path / "store"
    index([source], folder, colbert)
    reading, writing = os.pipe()

    def hold() -> None:
        with open_draft(folder, {"paths": [str(source)], "model": None, "dtype": None, "prefilter": False}):
            os.write(writing, b"x")
            time.sleep(60)

    child = in_a_fork(hold)
    os.read(reading, 1)
    started = time.monotonic()
    with pytest.raises(OSError, match="another process is writing to"):
        index([source], folder, colbert)
    assert time.monotonic() - started < 5
    Store(folder, colbert).close()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert index([source], folder, colbert).unchanged == 10


def test_an_unfinished_update_is_not_given_up_silently(colbert, tmp_path):
    source, other = write_corpus(tmp_path / "corpus.jsonl", corpus(10)), write_corpus(tmp_path / "b.jsonl", corpus(3))
    folder = tmp_path / "store"
    child = in_a_fork(
        lambda: [setattr(writer, "write_manifest", lambda *_: os._exit(9)), index([source], folder, colbert)]
    )
    assert os.waitpid(child, 0)[1] >> 8 == 9
    with pytest.raises(
        ValueError, match=f"unfinished; resume with: modernbert index {source} --output .*or, to give that"
    ):
        index([other], folder, colbert)
    index([source], folder, colbert)
    assert index([other], folder, colbert).documents == 13


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << (at % 8)
    path.write_bytes(content)


def test_a_flipped_byte_anywhere_is_found(colbert, tmp_path):
    """In 120 places of all files: the store does not open, or its first search says which file is damaged."""
    source, folder = write_corpus(tmp_path / "corpus.jsonl", corpus(20)), tmp_path / "store"
    index([source], folder, colbert)
    chance = random.Random(0)
    for path in [*folder.glob("*.sqlite"), *folder.glob("shards/*"), folder / "store.json"]:
        original = path.read_bytes()
        for _ in range(30):
            at = chance.randrange(len(original))
            flip(path, at)
            if path.name == "store.json" and original[at : at + 1].isspace():
                continue  # white space may change unnoticed
            with pytest.raises((ValueError, OSError)) as caught, Store(folder, colbert) as store:
                store.search(["owl night"])
            assert path.name in str(caught.value)
            assert re.search("restore it from a copy, or index again|is of version", str(caught.value))
            path.write_bytes(original)


@pytest.mark.parametrize("damage", ["cut", "gone", "swapped"])
@pytest.mark.parametrize("kind", ["*.sqlite", "shards/*", "store.json"])
def test_files_that_are_cut_gone_or_swapped(colbert, tmp_path, kind, damage):
    source, folder = write_corpus(tmp_path / "corpus.jsonl", corpus(20)), tmp_path / "store"
    index([source], folder, colbert)
    path = sorted(folder.glob(kind))[0]
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "gone":
        path.unlink()
    else:
        others = [other for other in folder.rglob("*") if other.is_file() and other != path and other.name != "lock"]
        path.write_bytes(max(others, key=lambda other: other.suffix == path.suffix).read_bytes())
    with pytest.raises((ValueError, FileNotFoundError), match=f"{path.name}|holds no store"):  # noqa: SIM117
        with Store(folder, colbert) as store:
            store.search(["owl"])


def test_a_store_that_is_updated_while_it_is_opened(colbert, tmp_path, monkeypatch):
    """The files of the manifest are deleted after it was read: the new manifest is read then."""
    source, folder = write_corpus(tmp_path / "corpus.jsonl", corpus(5)), tmp_path / "store"
    index([source], folder, colbert)
    answers = [read_manifest(folder)]
    index([write_corpus(source, corpus(9, seed=1))], folder, colbert)
    monkeypatch.setattr(search, "read_manifest", lambda path: answers.pop() if answers else read_manifest(path))
    with Store(folder, colbert) as store:
        assert (len(answers), store.documents, len(store.search(["owl"], top_k=99)[0])) == (0, 9, len(store))


def test_vectors_that_are_no_numbers_are_not_stored(colbert, tmp_path, monkeypatch):
    source, folder = write_corpus(tmp_path / "corpus.jsonl", corpus(5)), tmp_path / "store"
    vectors = Ragged.from_list([torch.full((3, 16), torch.nan)] * 5)
    monkeypatch.setattr(Session, "encode_tokens", lambda *_, **__: vectors)
    with pytest.raises(ValueError, match="vectors that are not finite"):
        index([source], folder, colbert)


def test_another_version_is_named(colbert, tmp_path):
    source, folder = write_corpus(tmp_path / "corpus.jsonl", corpus(5)), tmp_path / "store"
    index([source], folder, colbert)
    write_manifest(folder, replace(read_manifest(folder), version=3))
    for use in (lambda: Store(folder, colbert), lambda: index([source], folder, colbert)):
        with pytest.raises(ValueError, match="is of version 3, and this modernbert reads 1 and 2"):
            use()


@pytest.mark.sweep
def test_control_c_can_be_resumed(tmp_path, modernbert_tokenizer_file):
    """The command is interrupted: it prints one line, and the same command finishes the work."""
    model, source, folder = tmp_path / "model", tmp_path / "corpus.jsonl", tmp_path / "store"
    small_colbert(modernbert_tokenizer_file.parent).save_pretrained(model)
    write_corpus(source, corpus(1000))
    code = (
        "from modernbert.retrieval import build\nfrom modernbert.retrieval.store import writer\n"
        "build.PASSAGES = writer.PASSAGES = 64\nfrom modernbert.cli import main; main()"
    )
    command = [sys.executable, "-c", code, "index", str(source), "--output", str(folder), "--model", str(model)]
    where = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.Popen(
        command,
        env=where,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a job of the background
    )
    while len(list(folder.glob("shards/*.safetensors"))) < 3:
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"modernbert: interrupted; {folder} is as it was")
    ended = subprocess.run(command, env=where, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "")
    assert "1,000 documents added" in ended.stderr
