"""`index` on a Ray cluster: its errors, and two node processes, of which one is killed, against one process."""

from __future__ import annotations

import socket
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from stores import corpus, rows, small_colbert, write_corpus

from modernbert.retrieval import index, on_ray, spread, targets, units, worker
from modernbert.retrieval.documents.reading import Reading
from modernbert.retrieval.engines import open_table
from modernbert.retrieval.store.format import Manifest
from modernbert.train.distributed import Ranks


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """A corpus of several units."""
    monkeypatch.setattr(units, "UNIT", 2000)
    return write_corpus(tmp_path / "corpus.jsonl", corpus(200))


def test_without_ray_the_extra_is_named(source, model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ModuleNotFoundError, match=r"--ray needs ray: pip install 'modernbert\[ray\]'"):
        index([source], tmp_path / "store", model, ray="auto")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(None, "refused"), (b"", "timed out"), (b"HTTP/1.1 400 Bad Request", "what listens there is something else")],
)
def test_a_cluster_that_is_not_there_is_named(source, model, tmp_path, monkeypatch, answer, reason):
    monkeypatch.setattr(on_ray, "PATIENCE", 0.2)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if answer is not None:
            server.listen()
        if answer:
            Thread(target=lambda: server.accept()[0].sendall(answer), daemon=True).start()
        with pytest.raises(ConnectionError, match=f"no Ray cluster at {address}: .*{reason}"):
            index([source], tmp_path / "store", model, ray=address)


def test_what_the_nodes_could_not_do_is_refused(source, model, tmp_path, modernbert_tokenizer_file):
    with pytest.raises(ValueError, match="give its folder or its hub id, not a loaded one"):
        index([source], tmp_path / "store", small_colbert(modernbert_tokenizer_file.parent), ray="auto")
    with pytest.raises(ValueError, match="leave out torchrun, or --ray"):
        index([source], tmp_path / "other", model, ray="auto", ranks=Ranks(0, 2))


class Lost(Exception):
    """As `ray.exceptions.RayError`."""


class FakeRay:
    """A cluster of one core, in this process, that loses some tasks after their work was done."""

    def __init__(self, lost: dict[int, int]) -> None:
        self.exceptions = SimpleNamespace(RayTaskError=type("RayTaskError", (Lost,), {}), RayError=Lost)
        self.lost, self.most = lost, 0
        self.again: list[tuple[int, bool]] = []

    def cluster_resources(self):
        return {"CPU": 1.0}

    def put(self, value):
        return value

    def remote(self, **options):
        def decorate(function):
            def submit(job, number, unit, *, again):
                self.again.append((number, again))
                return Task(number, function(job, number, unit, again=again))

            return SimpleNamespace(remote=submit)

        return decorate

    def wait(self, tasks):
        self.most = max(self.most, len(tasks))
        return tasks[-1:], tasks[:-1]

    def get(self, task):
        if self.lost.get(task.number):
            self.lost[task.number] -= 1
            raise Lost("the node died")
        return task.report


class Task(NamedTuple):
    number: int
    report: worker.Report

    def __hash__(self) -> int:
        return id(self)


def test_units_that_are_lost_are_done_again(source, model, tmp_path):
    """Few are handed out at a time. The rows that a lost process has written are not there twice."""
    pytest.importorskip("lancedb")
    write_corpus(source, corpus(40))
    target = f"lancedb:{tmp_path / 'table'}"
    found = list(units.find_units([source], Reading(), on_unread=pytest.fail, on_note=pytest.fail))
    job = worker.Job(target, model, Manifest(1, model, "", "fp16", 16), Reading(), None)
    ray = FakeRay({1: 1, 2: 3})
    reports = list(on_ray._do(ray, found, job))
    assert sorted(report.number for report in reports) == list(range(len(found)))
    assert ray.most == 2
    assert sorted(number for number, again in ray.again if again) == [1, 2, 2, 2]
    with closing(open_table(target, job.manifest)) as table:
        held = list(table.scan())
    assert len({row.document for row in held}) == 40
    assert Counter(row.document for row in held) == {row.document: row.parts for row in held}
    with pytest.raises(ConnectionError, match=r"4 processes .* while they did .*corpus.jsonl.* node died"):
        list(on_ray._do(FakeRay({0: 4}), found, job))


@pytest.mark.sweep
@pytest.mark.timeout(300)
def test_a_node_that_is_killed_costs_nothing_but_time(source, model, tmp_path, monkeypatch):
    """The other node does the units that it had. The rows, and an error of a worker, are those of one process."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster  # pyright: ignore[reportMissingImports]

    index([source], tmp_path / "alone", model)
    options = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    try:
        second = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        done: list[float] = []
        add = spread.Reports.add

        def add_and_kill(self, report) -> None:
            done.append(time.monotonic())
            if len(done) == 4:
                cluster.remove_node(second, allow_graceful=False)
            add(self, report)

        monkeypatch.setattr(spread.Reports, "add", add_and_kill)
        summary = index([source], tmp_path / "ray", model, ray=cluster.address)
        assert len(done) > 20
        assert summary.documents == 200
        assert rows(tmp_path / "ray", model) == rows(tmp_path / "alone", model)
        assert not targets.parts_folder(str(tmp_path / "ray")).exists()
        source.write_text('{"text": "owl"}\n' * 60 + "no record\n")
        with pytest.raises(ValueError, match="line 61"):
            index([source], tmp_path / "broken", model, ray=cluster.address)
    finally:
        cluster.shutdown()
