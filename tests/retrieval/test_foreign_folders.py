"""A store deletes only what it wrote: folders of every shape that are not ours, and what others put into ours."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from stores import corpus, small_shards, write_corpus, write_dataset

from modernbert.cli import main
from modernbert.recipes import contrastive
from modernbert.retrieval import Store, forget, index
from modernbert.retrieval.engines import export
from modernbert.retrieval.store.folder import holds_store

PART = "0123456789abcdef-0123456789abcdef.safetensors"
HASH = "0123456789abcdef"
# The files of a folder. None: an empty folder. A text with "->" in front: a link.
SHAPES: dict[str, dict[str, str | None]] = {
    "a trainer's WebDataset": {"shards/train-0001.tar": "own", "shards/.keep": "", ".env": "own", "thesis.md": "own"},
    "an empty folder of shards": {"shards": None},
    "a lock": {"lock": "own"},
    "an empty lock": {"lock": ""},
    "a lock and shards": {"lock": "", "shards/a.tar": "own"},
    "another unfinished.json": {"unfinished.json": '{"jobs": [1]}', "jobs.db": "own"},
    "half a request": {"unfinished.json": '{"paths": ["a"]}'},
    "a request and more": {"unfinished.json": '{"forget": [], "user": "me"}'},
    "a request of other types": {"unfinished.json": '{"paths": [1], "model": null, "dtype": null, "prefilter": false}'},
    "a list": {"unfinished.json": "[]"},
    "a damaged unfinished.json": {"unfinished.json": '{"pa', "shards/a.tar": "own"},
    "an empty unfinished.json": {"unfinished.json": "", "lock": ""},
    "a shop": {"store.json": '{"name": "shop", "version": 1}', "shards/a.tar": "own"},
    "a shop with a checksum": {"store.json": '{"version": 1, "checksum": "0", "table": "x"}', "shards/" + PART: "own"},
    "an empty store.json": {"store.json": "", "shards/a": "own"},
    "no JSON": {"store.json": "[" * 100_000},
    "a folder named store.json": {"store.json/goods": "own"},
    "hidden files": {".env": "own", ".gitignore": "own", ".git/config": "own"},
    "only .git": {".git/HEAD": "own"},
    "our names without a mark": {f"passages-{HASH}.sqlite": "own", f"shards/{PART}": "own", "lock": ""},
    "names like ours": {"passages-notes.sqlite": "own", ".passages.1": "own", ".store.json.old": "own"},
    "links": {
        "store.json": "->nowhere",
        "lock": "->../beside.txt",
        "shards": "->../beside",
        "unfinished.json": "->lock",
    },
    "a link to a file": {"unfinished.json": "->../beside.txt"},
    "a Qdrant of another kind": {"meta.json": '{"collections": []}', ".lock": "own", "collection/modernbert/a": "own"},
    "lances": {"passages.lance/notes.txt": "own", "old.lance": "own"},
    "plaids": {"fast-plaid-examples/a": "own", f"fast-plaid-{HASH * 2}/a": "own", "modernbert.json": '{"index": 1}'},
}


def lay_out(folder: Path, files: dict[str, str | None]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
        elif content.startswith("->"):
            path.symlink_to(content[2:])
        else:
            path.write_text(content)


def everything(folder: Path) -> dict[str, object]:
    """Names, kinds, bytes and targets of links of all that is in a folder."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        content = os.readlink(path) if path.is_symlink() else path.is_dir() or path.read_bytes()
        found[str(path.relative_to(folder))] = content
    return found


@pytest.fixture(scope="module")
def beir(colbert, tmp_path_factory) -> Path:
    """A data set, the model beside it and a store of its corpus."""
    folder = tmp_path_factory.mktemp("beir")
    write_dataset(folder, 5)
    colbert.save_pretrained(folder / "model")
    index([folder / "corpus.jsonl"], folder / "store", folder / "model")
    return folder


@pytest.fixture(scope="module")
def store(beir, colbert):
    with Store(beir / "store", colbert) as opened:
        yield opened


@pytest.fixture
def fast_plaid(monkeypatch):
    """Our adapter, without the package: a refused folder never gets to it."""
    name = "modernbert.retrieval.engines.fast_plaid"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "fast_plaid", types.ModuleType("fast_plaid"))
    monkeypatch.setitem(sys.modules, "fast_plaid.search", types.SimpleNamespace(FastPlaid=None))
    monkeypatch.setattr(importlib.import_module(name), "_check_torch", lambda: None)
    yield
    sys.modules.pop(name)


def refusals(beir: Path, store: Store) -> dict[str, Callable[[Path], object]]:
    """Every command that writes into a folder, and refuses one that is not its own."""
    source = beir / "corpus.jsonl"
    commands = {
        "index": lambda folder: index([source], folder, beir / "model"),
        "index --prefilter": lambda folder: index([source], folder, beir / "model", prefilter=True),
        "forget": lambda folder: forget([source], folder),
        "evaluate": lambda folder: main(["evaluate", str(beir), "--model", f"{beir}/model", "--index", str(folder)]),
    }
    packages = {"qdrant": "qdrant_edge", "lancedb": "lancedb", "fast-plaid": "json"}

    def exported(engine: str) -> Callable[[Path], object]:
        return lambda folder: export(store, f"{engine}:{folder}")

    return commands | {name: exported(name) for name, needs in packages.items() if importlib.util.find_spec(needs)}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_that_is_not_ours_is_refused_and_keeps_every_byte(beir, store, fast_plaid, tmp_path, shape):
    folder = tmp_path / "my project"
    lay_out(tmp_path, {"beside.txt": "own", "beside/a.tar": "own"})
    lay_out(folder, SHAPES[shape])
    (tmp_path / "link").symlink_to(folder)
    before = everything(tmp_path)
    for name, command in refusals(beir, store).items():
        for given in (folder, tmp_path / "link"):
            with pytest.raises((ValueError, OSError, SystemExit)) as refused:
                command(given)
            assert refused.type is not SystemExit or refused.value.code == 2, name
            assert everything(tmp_path) == before, name


def test_a_folder_that_is_not_ours_keeps_every_byte_when_a_model_is_put_into_it(colbert, tmp_path):
    """`save_pretrained` and training write beside what is there."""
    pairs, folder = tmp_path / "pairs", tmp_path / "project"
    pairs.mkdir()
    rows = [{"query": f"find {i}", "positive": f"the river was seen by {i} people"} for i in range(60)]
    (pairs / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lay_out(folder, OTHERS | SHAPES["a trainer's WebDataset"] | SHAPES["a shop"] | SHAPES["a list"] | SHAPES["a lock"])
    before = everything(folder)
    colbert.save_pretrained(folder)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "dim": 16}
    config = contrastive.Config(pairs=str(pairs), output=str(folder), vocab_size=300, steps=0, threads=1, **small)
    with suppress(ValueError, OSError):  # a training run may also refuse a folder with other files
        contrastive.main(config)
    after = everything(folder)
    assert {name: after.get(name) for name in before} == before


OTHERS = {
    ".git/config": "own",
    ".gitignore": "own",
    ".DS_Store": "own",
    ".env": "own",
    "@eaDir/thumbs": "own",
    "README.md": "own",
    "passages-notes.sqlite": "own",
    ".passages.1": "own",
    ".store.json.1234567": "own",
    "shards/.git/config": "own",
    "shards/.DS_Store": "own",
    "shards/@eaDir/thumbs": "own",
    "shards/train-0001.tar": "own",
    "shards/centroids-old.safetensors": "own",
    f"shards/{HASH}.safetensors": "own",
    f"shards/{PART}.bak": "own",
    f"shards/{PART}/a folder with our name": "own",
    f"shards/.{PART}.12345678/a folder with our name": "own",
    f"shards/centroids-{HASH}.safetensors": "->nowhere",
    f"passages-{HASH}.sqlite": "->README.md",
    "loop": "->loop",
    "folder": "->shards",
}


def test_what_others_put_into_a_store_stays_and_breaks_nothing(colbert, monkeypatch, tmp_path):
    small_shards(monkeypatch, 4)
    source, folder = tmp_path / "corpus.jsonl", tmp_path / "store"
    index([write_corpus(source, corpus(20))], folder, colbert)
    lay_out(folder, OTHERS)
    before = {name: everything(folder)[name] for name in OTHERS}

    def check(documents: int) -> None:
        found = everything(folder)
        assert {name: found.get(name) for name in OTHERS} == before
        with Store(folder, colbert) as store:
            assert store.documents == documents
            assert len(store.search(["owl"], top_k=1000)[0]) == len(store)

    for documents, options in ((20, {}), (9, {}), (30, {"prefilter": True}), (5, {}), (40, {})):
        index([write_corpus(source, corpus(documents))], folder, colbert, **options)
        check(documents)
    assert forget([source], folder).documents == 0
    check(0)


def test_what_runs_leave_behind_is_deleted_by_its_whole_name(colbert, tmp_path):
    """Half-written files, and shards that no manifest names."""
    source, folder = write_corpus(tmp_path / "corpus.jsonl", corpus(5)), tmp_path / "store"
    index([source], folder, colbert)
    clean = set(everything(folder))
    names = [
        ".store.json.12345678",
        ".unfinished.json.abcdef01",
        ".passages.sqlite.00000000",
        f"passages-{HASH}.sqlite",
    ]
    names += [f"shards/{name}" for name in (PART, f".{PART}.12345678", f"centroids-{HASH}.safetensors")]
    names += [f"shards/lists-{HASH}-{PART}", f"shards/.lists-{HASH}-{PART}.12345678"]
    lay_out(folder, dict.fromkeys(names, "ours"))
    index([source], folder, colbert)
    assert set(everything(folder)) == clean


def killed_at(step: int, folder: str) -> None:
    """End this process before an operation on files in a folder."""
    left = step

    def count(event: str, values: tuple) -> None:
        nonlocal left
        paths = [os.fsdecode(value) for value in values if isinstance(value, (str, bytes, Path))]
        left -= event.split(".")[0] in ("open", "os") and any(path.startswith(folder) for path in paths)
        if left == 0:
            os._exit(9)

    sys.addaudithook(count)


@pytest.mark.sweep
def test_a_first_run_that_is_killed_anywhere_is_known_as_a_store_and_resumed(colbert, tmp_path):
    """Before each operation on a file of the folder."""
    source = write_corpus(tmp_path / "corpus.jsonl", corpus(3))
    index([source], tmp_path / "calm", colbert)
    calm, seen = everything(tmp_path / "calm"), []
    for step in range(1, 200):
        folder = tmp_path / str(step)
        if step % 2:
            folder.mkdir()
        child = os.fork()
        if child == 0:
            killed_at(step, str(folder))
            index([source], folder, colbert)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seen.append(holds_store(folder))
        assert index([source], folder, colbert).documents == 3
        assert everything(folder) == calm
        if status == 0:
            break
    assert status == 0
    assert len(seen) > 20
    assert seen == sorted(seen)  # first an empty folder, then a store


def test_a_request_that_was_impossible_leaves_a_folder_that_can_be_used(colbert, tmp_path):
    source, folder = tmp_path / "corpus.jsonl", tmp_path / "store"
    source.write_text('{"_id": "a", "text": "x"}\n{"_id": "b"}\n')
    for _ in range(2):
        with pytest.raises(ValueError, match="line 2"):
            index([source], folder, colbert)
        with pytest.raises(FileNotFoundError, match="holds no store; make one with"):
            Store(folder, colbert)
    other = write_corpus(tmp_path / "other.jsonl", corpus(3))
    assert index([other], folder, colbert).documents == 3
    assert not (folder / "unfinished.json").exists()


@pytest.mark.parametrize("engine", ["qdrant", "lancedb"])
def test_an_export_that_was_killed_before_it_held_anything_is_made_again(beir, store, tmp_path, engine):
    """And the folder of a store, of another engine, or of the user is not one for it."""
    if not importlib.util.find_spec({"qdrant": "qdrant_edge"}.get(engine, engine)):
        pytest.skip(f"{engine} is not installed")
    mark = ".modernbert.json.12345678"
    lay_out(tmp_path / "killed", {mark: ""})
    assert export(store, f"{engine}:{tmp_path / 'killed'}") == len(store)
    lay_out(tmp_path / "killed", {"README.md": "own", ".git/config": "own"})
    assert export(store, f"{engine}:{tmp_path / 'killed'}") == len(store)
    assert (tmp_path / "killed" / ".git" / "config").read_text() == "own"
    if engine == "lancedb":
        lay_out(tmp_path / "later", {"modernbert.json": '{"engine": "lancedb"}', "passages.lance/data/a": "half"})
        assert export(store, f"lancedb:{tmp_path / 'later'}") == len(store)
    before = everything(beir / "store")
    with pytest.raises(ValueError, match="is not an export, and not empty"):
        export(store, f"{engine}:{beir / 'store'}")
    assert everything(beir / "store") == before
    with pytest.raises(ValueError, match="is not a store, and not empty"):
        index([beir / "corpus.jsonl"], tmp_path / "killed", beir / "model")
