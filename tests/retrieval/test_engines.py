"""Exports to other engines against the search of the store: same passages, same scores, and only for the same model."""

from __future__ import annotations

import gzip
import http.server
import importlib.util
import json
import os
import sys
import threading
import types
import uuid
from dataclasses import replace
from functools import cache
from importlib.metadata import requires, version

import numpy as np
import pytest
import torch
from stores import corpus, small_colbert, write_corpus

from modernbert import ColBERT, maxsim
from modernbert.heads.colbert import ASSETS
from modernbert.late_interaction import Ragged
from modernbert.retrieval import Hit, Store, index
from modernbert.retrieval.engines import Engine, export, is_target

pytestmark = pytest.mark.filterwarnings("ignore:Failed to obtain server version")

QUERIES = ["owl night mouse", "which storm brought hail?", "peace treaty", "hail on the river", ""]
PACKAGES = {"qdrant": "qdrant_edge", "lancedb": "lancedb"}
EXACT = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(package) is None, reason=f"{package} is not installed (extra {name})"
        ),
    )
    for name, package in PACKAGES.items()
]
qdrant = pytest.mark.skipif(
    None in map(importlib.util.find_spec, ("qdrant_client", "qdrant_edge")), reason="not installed (extra qdrant)"
)
ROUNDED = 1e-3
"""Qdrant rounds a query to float16 for vectors in float16: by up to 2^-11 of the similarity of each of its tokens."""


def ids(found: list[list[Hit]]) -> list[list[int]]:
    return [[hit.passage_id for hit in hits] for hits in found]


@pytest.fixture(scope="module")
def colbert(modernbert_tokenizer_file) -> ColBERT:
    torch.manual_seed(0)
    return small_colbert(modernbert_tokenizer_file.parent)


@pytest.fixture(scope="module")
def make(colbert, tmp_path_factory):
    """Stores of records, opened."""
    opened = []

    @cache
    def make(count: int, dtype: str = "fp16", seed: int = 0) -> Store:
        folder = tmp_path_factory.mktemp("store")
        source = write_corpus(folder / "corpus.jsonl", corpus(count, seed))
        index([source], folder / "store", colbert, dtype=dtype)
        opened.append(Store(folder / "store", colbert))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.fixture(scope="module")
def store(make) -> Store:
    return make(60)


@pytest.mark.parametrize("dtype", ["fp16", "fp32", "int8"])
@pytest.mark.parametrize("name", EXACT)
def test_the_top_ten_are_those_of_exact_search(name, dtype, make, colbert, tmp_path):
    """With everything that a hit shows, and without the store."""
    store, target = make(60, dtype), f"{name}:{tmp_path / 'there'}"
    assert export(store, target) == len(store) > 60
    exact = store.search(QUERIES, top_k=10)
    with Engine(target, colbert) as engine:
        found = engine.search(QUERIES, top_k=10)
        assert ids(found) == [[hit.passage_id for hit in hits] for hits in exact]
        for ours, theirs in zip(exact, found, strict=True):
            atol = ROUNDED if (name, dtype) == ("qdrant", "fp16") else 2e-5
            np.testing.assert_allclose([hit.score for hit in theirs], [hit.score for hit in ours], atol=atol)
            assert [replace(hit, score=0) for hit in theirs] == [replace(hit, score=0) for hit in ours]
        assert engine.search([]) == []
        assert ids(engine.search(QUERIES[:1], top_k=3)) == [[hit.passage_id for hit in found[0][:3]]]
        assert len(engine.search(QUERIES[:1], top_k=1000)[0]) == len(store)


@pytest.mark.parametrize("name", EXACT)
def test_equal_passages_come_in_the_order_of_the_store(name, colbert, tmp_path):
    """Also if they were exported in reverse order."""
    records = [{**corpus(1)[0], "_id": f"d{i}"} for i in range(8)]
    index([write_corpus(tmp_path / "c.jsonl", records)], tmp_path / "store", colbert)
    with Store(tmp_path / "store", colbert) as store:
        rows = [
            row
            for numbers, passages, vectors in store.batches()
            for row in zip(numbers, passages, vectors, strict=True)
        ]
        exact = store.search(QUERIES, top_k=8)
        store.batches = lambda: iter([([n], [p], Ragged.from_list([x])) for n, p, x in reversed(rows)])
        export(store, f"{name}:{tmp_path / 'there'}")
    with Engine(f"{name}:{tmp_path / 'there'}", colbert) as engine:
        found = engine.search(QUERIES, top_k=8)
    assert [[hit.passage.id for hit in hits] for hits in found] == [[hit.passage.id for hit in hits] for hits in exact]


@pytest.mark.parametrize("name", EXACT)
def test_an_export_replaces_the_one_before(name, make, store, colbert, tmp_path):
    other, target = make(9, seed=5), f"{name}:{tmp_path / 'there'}"
    export(store, target)
    export(other, target)
    with Engine(target, colbert) as engine:
        found = engine.search(QUERIES, top_k=1000)
    assert [sorted(hit.passage.text for hit in hits) for hits in found] == [
        sorted(hit.passage.text for hit in hits) for hits in other.search(QUERIES, top_k=1000)
    ]


@pytest.mark.parametrize("name", EXACT)
def test_another_model_is_refused(name, make, colbert, modernbert_tokenizer_file, tmp_path):
    target = f"{name}:{tmp_path / 'there'}"
    export(make(3), target)
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="vectors do not compare") as other:
        Engine(target, small_colbert(modernbert_tokenizer_file.parent))
    with pytest.raises(ValueError, match="had no name") as none:
        Engine(target)
    # A refused export was closed, although the errors still refer to it: the right model can open it.
    with Engine(target, colbert) as engine:
        assert engine.colbert is colbert
    assert other.tb
    assert none.tb


@pytest.mark.parametrize("name", EXACT)
def test_a_model_with_a_name_is_found_by_it(name, colbert, tmp_path):
    colbert.save_pretrained(tmp_path / "model")
    index([write_corpus(tmp_path / "c.jsonl", corpus(3))], tmp_path / "store", tmp_path / "model")
    with Store(tmp_path / "store") as store:
        export(store, f"{name}:{tmp_path / 'there'}")
        exact = store.search(QUERIES)
    with Engine(f"{name}:{tmp_path / 'there'}") as engine:
        assert ids(engine.search(QUERIES)) == [[hit.passage_id for hit in hits] for hits in exact]


@pytest.mark.parametrize("name", EXACT)
def test_where_nothing_was_exported_nothing_is_searched(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="`modernbert export` makes one"):
        Engine(f"{name}:{tmp_path / 'nowhere'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="`modernbert export` makes one"):
        Engine(f"{name}:{tmp_path / 'empty'}")
    assert os.listdir(tmp_path) == ["empty"]
    assert os.listdir(tmp_path / "empty") == []


@pytest.mark.parametrize("name", EXACT)
def test_half_an_export_is_no_export(name, make, store, colbert, tmp_path, monkeypatch):
    """LanceDB keeps the previous export; Qdrant has none."""

    def half():
        for numbers, passages, vectors in whole():
            yield numbers[:20], passages[:20], vectors[:20]
            raise OSError("the disk has failed")

    small, target, whole = make(9, seed=5), f"{name}:{tmp_path / 'there'}", store.batches
    export(small, target)
    monkeypatch.setattr(store, "batches", half)
    if name == "lancedb":  # LanceDB reads the first batch early: let the error come from a later one
        monkeypatch.setattr("modernbert.retrieval.engines.lancedb.ROWS", 8)
    with pytest.raises(OSError, match=r"^the disk has failed$"):
        export(store, target)
    monkeypatch.undo()
    if name == "qdrant":
        with pytest.raises(FileNotFoundError, match="is unfinished: run `modernbert export` again"):
            Engine(target, colbert)
    else:
        with Engine(target, colbert) as engine:
            assert len(engine.search(QUERIES[:1], top_k=1000)[0]) == len(small)
    export(store, target)
    with Engine(target, colbert) as engine:
        assert len(engine.search(QUERIES[:1], top_k=1000)[0]) == len(store)


def test_a_target_names_its_engine(store, colbert):
    assert is_target("qdrant:http://localhost:6333/docs")
    assert is_target("lancedb:s3://bucket/docs")
    assert is_target("fast-plaid:folder")
    assert not is_target("folder")
    assert not is_target("C:\\folder")
    for wrong in ("qdrnt:folder", "qdrant:", "folder"):
        with pytest.raises(
            ValueError, match=r"is not a target; a target is one of qdrant:ADDRESS, lancedb:ADDRESS, fast-plaid"
        ):
            export(store, wrong)
        with pytest.raises(ValueError, match="is not a target"):
            Engine(wrong, colbert)


@pytest.mark.parametrize(("name", "package"), [*PACKAGES.items(), ("fast-plaid", "fast_plaid")])
def test_a_missing_package_is_named_with_its_extra(name, package, store, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    module = "qdrant_folder" if name == "qdrant" else name.replace("-", "_")
    monkeypatch.delitem(sys.modules, f"modernbert.retrieval.engines.{module}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"{name} needs {package}.*: pip install 'modernbert\[{name}\]'"):
        export(store, f"{name}:{tmp_path}")


@pytest.mark.parametrize("name", EXACT[:1])
def test_searches_are_checked_before_they_run(name, make, colbert, tmp_path):
    export(make(3), f"{name}:{tmp_path}")
    with Engine(f"{name}:{tmp_path}", colbert) as engine:
        with pytest.raises(ValueError, match=r"got the text 'owl'; write \[query\]"):
            engine.search("owl")
        with pytest.raises(ValueError, match="top_k is 0"):
            engine.search(["owl"], top_k=0)


@qdrant
def test_a_foreign_folder_is_left_alone(make, colbert, tmp_path):
    """Also that of Qdrant's client, which an older version wrote."""
    (tmp_path / "meta.json").write_text('{"collections": {}, "aliases": {}}')
    with pytest.raises(ValueError, match="is not an export, and not empty"):
        export(make(3), f"qdrant:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="no Qdrant folder"):
        Engine(f"qdrant:{tmp_path}", colbert)
    assert os.listdir(tmp_path) == ["meta.json"]


@qdrant
def test_a_folder_in_use_is_no_crash(make, colbert, tmp_path):
    export(make(3), f"qdrant:{tmp_path}")
    with Engine(f"qdrant:{tmp_path}", colbert), pytest.raises(BlockingIOError, match="another process has this folder"):
        Engine(f"qdrant:{tmp_path}", colbert)


@qdrant
def test_a_multivector_that_a_server_refuses_is_named(make, monkeypatch, tmp_path):
    from modernbert.retrieval.engines import qdrant

    monkeypatch.setattr(qdrant, "FLOATS", 16 * 12)
    with pytest.raises(
        ValueError, match=r"has a passage of \d+ vectors of width 16; Qdrant accepts less than 192 numbers"
    ):
        export(make(3), f"qdrant:{tmp_path}")


class QdrantServer:
    """The part of Qdrant's REST interface that an export needs, on loopback, answered by the client's local mode.

    It shows what we send and how we take a refusal. It is not Qdrant: `QDRANT_URL` names one to test against.
    """

    def __init__(self, key: str) -> None:
        from qdrant_client import QdrantClient

        self.client, self.key, self.sizes, self.paths = QdrantClient(":memory:"), key, [], set()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                outer.sizes.append(len(body))
                outer.paths.add(f"{self.command} {self.path}")
                allowed = self.path == "/" or self.headers.get("api-key") == outer.key
                result = outer.result(self.command, self.path, json.loads(body or "{}")) if allowed else None
                content = json.dumps(
                    result
                    if self.path == "/"
                    else {"result": result, "status": "ok" if allowed else "forbidden", "time": 0}
                ).encode()
                self.send_response(200 if allowed else 403)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = answer

            def log_message(self, *arguments: object) -> None: ...

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def result(self, method: str, path: str, body: dict) -> object:
        from qdrant_client import models

        if path == "/":
            return {"title": "qdrant", "version": version("qdrant-client")}
        name, _, what = path.partition("?")[0].removeprefix("/collections/").partition("/")
        client, updated = self.client, {"operation_id": 0, "status": "completed"}
        match method, what:
            case "GET", "exists":
                return {"exists": client.collection_exists(name)}
            case "GET", "":
                return client.get_collection(name).model_dump(mode="json")
            case "PUT", "":
                create = models.CreateCollection(**body)
                return client.create_collection(name, vectors_config=create.vectors, metadata=create.metadata)
            case "POST", "points/scroll":
                points, offset = client.scroll(name, **body)
                return {"points": [point.model_dump(mode="json") for point in points], "next_page_offset": offset}
            case "POST", "points/delete":
                client.delete(name, models.FilterSelector(**body))
                return updated
            case "POST", "points/payload":
                client.set_payload(name, body["payload"], models.Filter(**body["filter"]))
                return updated
            case "POST", "points/count":
                return client.count(name).model_dump(mode="json")
            case "PATCH", "":
                return client.update_collection(name, metadata=body["metadata"])
            case "DELETE", "":
                return client.delete_collection(name)
            case "PUT", "points":
                client.upsert(name, [models.PointStruct(**point) for point in body["points"]])
                return updated
            case "PUT", "index":
                return updated
            case "POST", "points/query/batch":
                requests = [models.QueryRequest(**search) for search in body["searches"]]
                return [found.model_dump(mode="json") for found in client.query_batch_points(name, requests)]
        raise AssertionError(f"{method} {path} is not part of an export")

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.client.close()


@qdrant
@pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection")
def test_a_server_is_asked_in_requests_that_it_takes(store, colbert, monkeypatch):
    """The address names the collection, the key comes from the environment, and requests stay small."""
    from modernbert.retrieval.engines import qdrant

    monkeypatch.setattr(qdrant, "REQUEST", 40_000)
    monkeypatch.setenv("QDRANT_API_KEY", "secret")
    server = QdrantServer("secret")
    try:
        target = f"qdrant:{server.url}/my-docs"
        export(store, target)
        assert {"PUT /collections/my-docs", "PUT /collections/my-docs/index?wait=true"} <= server.paths
        largest = max(20 * x_NE.numel() + 2000 for *_, vectors in store.batches() for x_NE in vectors)
        assert max(server.sizes) < 40_000 + largest
        assert sum(size > 20_000 for size in server.sizes) > 5
        exact = store.search(QUERIES)
        with Engine(target, colbert) as engine:
            found = engine.search(QUERIES)
        assert ids(found) == [[hit.passage_id for hit in hits] for hits in exact]
        monkeypatch.setenv("QDRANT_API_KEY", "wrong")
        with pytest.raises(OSError, match=f"^Qdrant at {server.url}/my-docs: .*403"):
            Engine(target, colbert)
    finally:
        server.close()
    with pytest.raises(OSError, match=f"^Qdrant at {server.url}/my-docs: .*refused"):
        export(store, target)


@qdrant
@pytest.mark.skipif("QDRANT_URL" not in os.environ, reason="QDRANT_URL names no Qdrant server")
def test_a_real_server_finds_the_top_ten_of_exact_search(make, colbert):
    """In the dtypes that it stores: float16 for a store of float16."""
    from qdrant_client import QdrantClient

    url, name = os.environ["QDRANT_URL"].rstrip("/"), f"modernbert-test-{uuid.uuid4().hex}"
    try:
        for dtype in ("fp16", "fp32", "int8"):
            store = make(120, dtype)
            export(store, f"qdrant:{url}/{name}")
            exact = store.search(QUERIES)
            with Engine(f"qdrant:{url}/{name}", colbert) as engine:
                found = engine.search(QUERIES)
            for ours, theirs in zip(exact, found, strict=True):
                np.testing.assert_allclose([hit.score for hit in theirs], [hit.score for hit in ours], atol=2e-3)
                assert [hit.passage_id for hit in theirs] == [hit.passage_id for hit in ours]
    finally:
        client = QdrantClient(url=url, api_key=os.environ.get("QDRANT_API_KEY"))
        client.delete_collection(name)
        client.close()


lance = pytest.mark.skipif(importlib.util.find_spec("lancedb") is None, reason="lancedb is not installed")


@lance
def test_a_foreign_table_is_left_alone(make, colbert, tmp_path):
    import lancedb

    lancedb.connect(tmp_path).create_table("passages", [{"vector": [1.0, 2.0]}])
    for use in (lambda target: export(make(3), target), lambda target: Engine(target, colbert)):
        with pytest.raises(ValueError, match=r"the table passages in .* was not made by `modernbert export`"):
            use(f"lancedb:{tmp_path}")
    assert lancedb.connect(tmp_path).open_table("passages").count_rows() == 1


@lance
def test_an_index_of_lancedb_is_used_and_scores_stay_exact(make, colbert, tmp_path):
    """Most of the top ten of an untrained model, with exact scores."""
    import lancedb
    from lancedb.index import IvfPq

    store, target = make(400), f"lancedb:{tmp_path}"
    export(store, target)
    table = lancedb.connect(tmp_path).open_table("passages")
    table.create_index("vectors", config=IvfPq(distance_type="cosine", num_partitions=8, num_sub_vectors=8))
    exact = store.search(QUERIES, top_k=len(store))
    with Engine(target, colbert) as engine:
        found = engine.search(QUERIES)
    recalls = []
    for ours, theirs in zip(exact, found, strict=True):
        scores = {hit.passage_id: hit.score for hit in ours}
        np.testing.assert_allclose([hit.score for hit in theirs], [scores[hit.passage_id] for hit in theirs], atol=2e-5)
        recalls.append(len({hit.passage_id for hit in ours[:10]} & {hit.passage_id for hit in theirs}) / 10)
    assert np.mean(recalls) > 0.7


@lance
@pytest.mark.filterwarnings("ignore:optimize")
def test_what_lancedb_keeps_does_not_grow(make, tmp_path, monkeypatch):
    """Old versions are deleted by the next export."""
    from datetime import timedelta

    from modernbert.retrieval.engines import lancedb

    def size() -> int:
        return sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())

    monkeypatch.setattr(lancedb, "KEPT", timedelta(0))
    export(make(60), f"lancedb:{tmp_path}")
    once = size()
    for _ in range(3):
        export(make(60), f"lancedb:{tmp_path}")
    assert size() < 1.1 * once


class FastPlaid:
    """A stand-in for fast-plaid, which works with one torch only: the same calls, exact, in a file."""

    def __init__(self, index: str, device: str) -> None:
        self.file, self.closed = f"{index}/vectors.pt", False

    def create(self, vectors: list[torch.Tensor], start_from_scratch: int) -> None:
        assert {x_NE.dtype for x_NE in vectors} == {torch.float16}
        torch.save(vectors, self.file)

    def search(self, queries: list[torch.Tensor], top_k: int, show_progress: bool) -> list[list[tuple[int, float]]]:
        documents = [x_NE.float() for x_NE in torch.load(self.file)]
        scores, rows = maxsim(queries, documents, top_k=top_k)
        return [list(zip(*found, strict=True)) for found in zip(rows.tolist(), scores.tolist(), strict=True)]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def stand_in(monkeypatch):
    """Our adapter for fast-plaid, on top of the stand-in."""
    name = "modernbert.retrieval.engines.fast_plaid"
    before = sys.modules.pop(name, None)
    monkeypatch.setitem(sys.modules, "fast_plaid", types.ModuleType("fast_plaid"))
    monkeypatch.setitem(sys.modules, "fast_plaid.search", types.SimpleNamespace(FastPlaid=FastPlaid))
    module = importlib.import_module(name)
    monkeypatch.setattr(
        module, "requires", lambda package: ["numpy>=1", f"torch=={torch.__version__.partition('+')[0]}"]
    )
    monkeypatch.setattr(module, "version", lambda package: "1.7.0.2110")
    yield module
    sys.modules.pop(name)
    if before is not None:
        sys.modules[name] = before


def test_an_export_to_fast_plaid_holds_what_a_hit_shows(stand_in, make, store, colbert, tmp_path, monkeypatch):
    """It replaces the previous one when it is complete."""
    target = f"fast-plaid:{tmp_path / 'there'}"
    with pytest.raises(FileNotFoundError, match=r"no modernbert.json in"):
        Engine(target, colbert)
    for each in (make(9, seed=5), store):
        assert export(each, target) == len(each)
        assert len(os.listdir(tmp_path / "there")) == 2
        with Engine(target, colbert) as engine:
            found = engine.search(QUERIES)
        for ours, theirs in zip(each.search(QUERIES), found, strict=True):
            assert [replace(hit, score=0) for hit in theirs] == [replace(hit, score=0) for hit in ours]
            np.testing.assert_allclose([hit.score for hit in theirs], [hit.score for hit in ours], atol=2e-5)
    monkeypatch.setattr(FastPlaid, "create", lambda *arguments, **options: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        export(make(3), target)
    with Engine(target, colbert) as engine:
        assert engine.search(QUERIES) == found


def test_fast_plaid_is_not_called_with_another_torch(stand_in, make, colbert, monkeypatch, tmp_path):
    """It would end the process with a segmentation fault."""
    monkeypatch.setattr(stand_in, "requires", lambda package: ["torch==2.0.1"])
    with pytest.raises(ValueError, match=r"fast-plaid 1.7.0.2110 needs torch==2.0.1, and this is torch"):
        export(make(3), f"fast-plaid:{tmp_path}")
    with pytest.raises(ValueError, match="environment of its own"):
        Engine(f"fast-plaid:{tmp_path}", colbert)


def fast_plaid_reason() -> str:
    """Why the real fast-plaid cannot be tested here, or nothing."""
    if importlib.util.find_spec("fast_plaid") is None:
        return "fast_plaid is not installed (extra fast-plaid)"
    needs = f"torch=={torch.__version__.partition('+')[0]}"
    return "" if needs in (requires("fast-plaid") or []) else f"fast_plaid needs another torch than {needs}"


@pytest.mark.skipif(bool(fast_plaid_reason()), reason=fast_plaid_reason())
def test_fast_plaid_finds_most_of_the_top_ten(tmp_path):
    """On paragraphs of Wikipedia with the built-in model: vectors of an untrained one do not survive compression."""
    with gzip.open(ASSETS / "demo" / "corpus.jsonl.gz", "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line, _ in zip(lines, range(200), strict=False)]
    index([write_corpus(tmp_path / "corpus.jsonl", records)], tmp_path / "store")
    queries = [" ".join(record["text"].split()[3:11]) for record in records[::10]]
    with Store(tmp_path / "store") as store:
        assert export(store, f"fast-plaid:{tmp_path / 'there'}") == len(store)
        exact = store.search(queries)
    with Engine(f"fast-plaid:{tmp_path / 'there'}") as engine:
        found = engine.search(queries)
    recalls = []
    for ours, theirs in zip(exact, found, strict=True):
        assert theirs[0].passage == ours[0].passage
        assert abs(theirs[0].score - ours[0].score) < 0.05 * ours[0].score
        recalls.append(len({hit.passage_id for hit in ours} & {hit.passage_id for hit in theirs}) / 10)
    assert np.mean(recalls) > 0.85
