"""Full disks, closed streams, signals and odd outputs: one line that names the path, and nothing left behind."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from stores import corpus, small_colbert, write_corpus, write_dataset

from modernbert.cli import main
from modernbert.cli.output import output_file
from modernbert.cli.streams import ended_by_signals
from modernbert.files import replacing

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def beir(modernbert_tokenizer_file, tmp_path_factory) -> Path:
    """A data set, a model, and a store of the corpus."""
    folder = tmp_path_factory.mktemp("beir")
    write_dataset(folder, 30)
    small_colbert(modernbert_tokenizer_file.parent).save_pretrained(folder / "model")
    with pytest.raises(SystemExit):
        main(["index", f"{folder}/corpus.jsonl", "--output", f"{folder}/store", "--model", f"{folder}/model"])
    return folder


@pytest.fixture
def disk(tmp_path):
    """Mounts small disks at a folder, and removes them at the end."""
    mounted = []

    def mount(name: str, size: str, fill: bool) -> Path:
        place = tmp_path / name
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
        mounted.append(place)
        if fill:
            with pytest.raises(OSError), (place / "full").open("wb", buffering=0) as file:  # noqa: PT011, PT012
                while True:
                    file.write(bytes(4096))
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    "command",
    [
        "search owl --index {beir}/store --html {full}/out",
        "search --index {beir}/store --queries {beir}/queries.jsonl --run {full}/out",
        "evaluate {beir} --index {beir}/store --run {full}/out",
        "evaluate {beir} --index {beir}/store --per-query {full}/out",
        "encode {beir}/corpus.jsonl --model {beir}/model --output {full}/out.npz",
        "encode {beir}/corpus.jsonl --model {beir}/model --output {full}/out.safetensors",
        "index {beir}/corpus.jsonl --model {beir}/model --output {full}/out",
        "export {beir}/store qdrant:{full}/out",
        "export {beir}/store lancedb:{full}/out",
    ],
)
def test_a_full_disk_is_named(modernbert, beir, disk, command):
    if "evaluate" in command:
        pytest.importorskip("ir_measures")
    if "export" in command:
        pytest.importorskip("qdrant_edge" if "qdrant" in command else "lancedb")
    full = disk("full", "64k", fill=True)
    status, _, err = modernbert(*shlex.split(command.format(beir=beir, full=full)))
    assert status == 2
    assert f"{full}/out" in err.splitlines()[-1]
    assert re.search("full|No space left|no room left", err.splitlines()[-1])
    if "--output" in command or "export" in command:
        return
    assert os.listdir(full) == ["full"]


@pytest.mark.parametrize("command", ["search owl {beir}/large.jsonl --model {beir}/model", "evaluate {large}"])
def test_a_full_folder_for_temporary_files_is_named(modernbert, beir, disk, monkeypatch, tmp_path, command):
    pytest.importorskip("ir_measures")
    place, large = disk("tmp", "200k", fill=False), tmp_path / "large"
    large.mkdir()
    for name in ("queries.jsonl", "qrels"):
        (large / name).symlink_to(beir / name)
    write_corpus(large / "corpus.jsonl", corpus(900))
    (beir / "large.jsonl").unlink(missing_ok=True)
    (beir / "large.jsonl").symlink_to(large / "corpus.jsonl")
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    status, _, err = modernbert(*shlex.split(command.format(beir=beir, large=large)), "--model", beir / "model")
    assert status == 2
    assert re.search(f"cannot write to the folder for temporary files, {place} .*: make room there, or set TMPDIR", err)
    assert "resume" not in err
    assert os.listdir(place) == []


def test_a_folder_for_temporary_files_whose_name_is_not_utf_8(modernbert, beir, monkeypatch, tmp_path):
    place = tmp_path / os.fsdecode(b"t\xff")
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    status, _, err = modernbert("search", "owl", beir / "corpus.jsonl", "--model", beir / "model")
    assert (status, r"t\xff" in err, "not UTF-8" in err) == (2, True, True)
    assert os.listdir(place) == []


@pytest.mark.parametrize("name", ["folder", "fifo", "loop", "nowhere/out", "file/out", "device"])
@pytest.mark.parametrize(
    "command",
    [
        "search owl --index {beir}/store --html",
        "search --index {beir}/store --queries {beir}/queries.jsonl --run",
        "evaluate {beir} --run",
        "evaluate {beir} --per-query",
        "encode {beir}/corpus.jsonl --output",
    ],
)
def test_an_output_that_cannot_be_a_file_is_refused_before_any_work(
    modernbert, beir, tmp_path, monkeypatch, command, name
):
    """A device would be replaced by a file."""
    monkeypatch.setattr(
        "modernbert.retrieval.store.search.Store.__init__", lambda *_: pytest.fail("some work was done")
    )
    suffix = ".npz" if command.startswith("encode") else ""
    (tmp_path / f"folder{suffix}").mkdir()
    (tmp_path / "file").write_text("own")
    os.mkfifo(tmp_path / f"fifo{suffix}")
    (tmp_path / f"loop{suffix}").symlink_to(f"loop{suffix}")
    (tmp_path / f"device{suffix}").symlink_to(os.devnull)
    status, _, err = modernbert(*shlex.split(command.format(beir=beir)), f"{tmp_path / name}{suffix}")
    assert status == 2
    assert re.search(f"(--html|--run|--per-query|--output) is {tmp_path / name}{suffix}, (but|which)", err)
    assert (tmp_path / "file").read_text() == "own"
    assert not Path(os.devnull).is_file()


def test_a_link_to_a_file_stays_a_link(modernbert, beir, tmp_path):
    (tmp_path / "real.html").write_text("old")
    (tmp_path / "link.html").symlink_to("real.html")
    (tmp_path / "new.html").symlink_to("later.html")
    for name in ("link.html", "new.html"):
        assert modernbert("search", "owl", "--index", beir / "store", "--html", tmp_path / name)[0] == 0
        assert (tmp_path / name).is_symlink()
        assert "<html" in (tmp_path / name).read_text()


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127, os.fsdecode(b"n\xff" * 100)])
def test_a_file_may_have_the_longest_name(tmp_path, name):
    with replacing(output_file(tmp_path / name, "--html")) as beside:
        beside.write_text("new")
    assert os.listdir(tmp_path) == [name]


def command_line(arguments: str, redirection: str = "") -> list[str]:
    """The command in a process of its own, started by a shell."""
    python = f"{shlex.quote(sys.executable)} -c 'from modernbert.cli import main; main()'"
    return ["bash", "-c", f"exec {python} {arguments} {redirection}"]


ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("redirection", "status", "message"),
    [
        (">&-", 0, b""),
        (">&- 2>&- <&-", 0, b""),
        ("> /dev/full", 2, b"modernbert: cannot write to stdout: No space left on device\n"),
        ("| head -c 0", 0, b""),
    ],
)
def test_a_stdout_that_is_closed_or_full(beir, tmp_path, redirection, status, message):
    """The page is written, and no file of the command takes the number of a closed stream."""
    page = tmp_path / "page.html"
    arguments = f"search owl --index {beir}/store --html {page} --json"
    done = subprocess.run(command_line(arguments, redirection), env=ENVIRONMENT, capture_output=True)
    assert (done.returncode, b"Traceback" in done.stderr) == (status, False)
    assert done.stderr.replace(f"note: wrote {page}\n".encode(), b"") == message
    assert "<html" in page.read_text()


def test_questions_from_a_closed_stdin(beir):
    done = subprocess.run(command_line(f"search --index {beir}/store", "<&-"), env=ENVIRONMENT, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_no_texts_behind(beir, tmp_path, number):
    """While the texts are encoded."""
    source, place = write_corpus(tmp_path / "corpus.jsonl", corpus(8000)), tmp_path / "tmp"
    place.mkdir()
    arguments = f"search owl {source} --model {beir}/model"
    process = subprocess.Popen(
        command_line(arguments),
        env={**ENVIRONMENT, "TMPDIR": str(place)},
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # ignored if the tests run under nohup
    )
    deadline = time.monotonic() + 60
    while not list(place.rglob(".passages*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert list(place.rglob(".passages*"))
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert os.listdir(place) == []


def test_signals_are_as_before_after_a_command():
    """And one that is ignored, as by nohup, stays ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            with pytest.raises(SystemExit) as end:
                signal.raise_signal(signal.SIGTERM)
            assert end.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_size_is_that_of_the_store(modernbert, beir, tmp_path):
    """Not of what others put into it."""
    arguments = ("index", beir / "corpus.jsonl", "--output", tmp_path / "store", "--model", beir / "model")
    _, _, before = modernbert(*arguments)
    (tmp_path / "store" / ".git").mkdir()
    (tmp_path / "store" / ".git" / "pack").write_bytes(bytes(10_000_000))
    _, _, after = modernbert(*arguments)
    assert before.splitlines()[-1] == after.splitlines()[-1]


@pytest.mark.parametrize("content", ["", '{"pathr": ["a"]}', "[" * 100_000])
def test_a_search_beside_a_damaged_unfinished_json(modernbert, beir, tmp_path, content):
    modernbert("index", beir / "corpus.jsonl", "--output", tmp_path / "store", "--model", beir / "model")
    (tmp_path / "store" / "unfinished.json").write_text(content)
    status, out, err = modernbert("search", "owl", "--index", tmp_path / "store")
    assert (status, out) == (2, "")
    assert err.startswith(f"modernbert: {tmp_path}/store/unfinished.json is damaged: delete it")


def test_a_store_named_like_an_engine_is_searched(modernbert, beir, tmp_path, monkeypatch):
    """`qdrant` is a folder; `fast-plaid:x` is an engine that cannot be updated."""
    monkeypatch.chdir(tmp_path)
    arguments = ("index", beir / "corpus.jsonl", "--model", beir / "model", "--output")
    assert modernbert(*arguments, "qdrant")[0] == 0
    status, out, _ = modernbert("search", "owl", "--index", "qdrant", "--json")
    assert (status, len(json.loads(out)["hits"])) == (0, 5)
    status, _, err = modernbert(*arguments, "fast-plaid:x")
    assert (status, os.listdir(tmp_path)) == (2, ["qdrant"])
    assert "fast-plaid" in err
    assert (
        importlib.util.find_spec("ir_measures") is None or modernbert("evaluate", beir, "--index", "lancedb:x")[0] == 2
    )
    assert os.listdir(tmp_path) == ["qdrant"]
