"""`modernbert index`, `search --index`, `evaluate` and `export`, as used by a person or in a pipe."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from stores import corpus, write_corpus

from modernbert import ColBERT
from modernbert.retrieval.store.search import Store

NIGHT = "# Birds\n\nDay birds sing.\n\n## Owls\n\nOwls hunt mice at midnight.\n"


@pytest.fixture
def store(modernbert, model, tmp_path) -> Path:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "night.md").write_text(NIGHT)
    (docs / "ice.txt").write_text("Glaciers move under their own weight.\n")
    write_corpus(tmp_path / "more.jsonl", corpus(20))
    folder = tmp_path / "store"
    status, out, err = modernbert("index", docs, tmp_path / "more.jsonl", "--output", folder, "--model", model)
    assert (status, out) == (0, "")
    assert "note: 22 documents added, 0 changed, 0 removed, 0 unchanged\n" in err
    assert re.search(rf"note: {folder} holds \d\d passages of 22 documents in \d\.\d MB\n", err)
    return folder


def test_a_store_is_searched_with_its_own_model(modernbert, store, model):
    status, out, err = modernbert("search", "owls hunt mice", "--index", store, "--json", "--top", 3)
    assert (status, err) == (0, "")
    printed = json.loads(out)
    with Store(store, ColBERT.from_pretrained(model)) as opened:
        hits = opened.search(["owls hunt mice"], top_k=3)[0]
    assert [(hit["score"], hit["text"], hit["line"]) for hit in printed["hits"]] == [
        (hit.score, hit.passage.text, hit.passage.line) for hit in hits
    ]
    status, out, _ = modernbert("search", "owls hunt mice", "--index", store, "--top", 1)
    assert f"{store.parent}/docs/night.md:7\n   Birds: Owls\n   Owls hunt mice at midnight.\n   why: " in out


def test_an_update_says_what_it_did(modernbert, store):
    (store.parent / "docs" / "ice.txt").unlink()
    (store.parent / "docs" / "night.md").write_text(NIGHT + "More.\n")
    _, _, err = modernbert("index", store.parent / "docs", "--output", store)
    assert "note: 0 documents added, 1 changed, 1 removed, 0 unchanged\n" in err
    _, _, err = modernbert("index", "--forget", store.parent / "docs", "--output", store)
    assert "note: 0 documents added, 0 changed, 1 removed, 0 unchanged\n" in err
    assert "of 20 documents" in err


def test_files_are_left_out(modernbert, store):
    docs = store.parent / "docs"
    (docs / ".gitignore").write_text("ice.txt\n")
    for options, removed in (((), 1), (["--no-gitignore"], 0), (["--exclude", "*.txt", "--exclude", "/a"], 1)):
        status, _, err = modernbert("index", docs, "--output", store, *options)
        assert (status, f"changed, {removed} removed" in err) == (0, True)


def test_filters(modernbert, store):
    def found(*options) -> list[dict]:
        return json.loads(modernbert("search", "owl", "--index", store, "--json", "--top", 100, *options)[1])["hits"]

    assert {Path(hit["path"]).name for hit in found("--path", "docs/*")} == {"night.md", "ice.txt"}
    assert {hit["metadata"]["year"] for hit in found("--where", "year=2001")} == {"2001"}
    both = found("--where", "year=2001", "--where", "even=true")
    assert both
    assert all(int(hit["id"][1:]) % 3 == 1 and int(hit["id"][1:]) % 2 == 0 for hit in both)
    status, _, err = modernbert("search", "owl", "--index", store, "--where", "year")
    assert (status, err) == (2, "modernbert: expected FIELD=VALUE, got 'year'\n")


def test_a_run_is_trec(modernbert, store, tmp_path):
    """From queries in BEIR's format: each id once, ranks from 1, decreasing scores."""
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": "owl night"}\n{"_id": "q2", "text": "ice"}\n')
    status, out, err = modernbert(
        "search", "--index", store, "--queries", tmp_path / "queries.jsonl", "--run", tmp_path / "out.trec", "--top", 7
    )
    assert (status, out) == (0, "")
    assert err == f"note: wrote the best 7 documents for each of 2 queries to {tmp_path / 'out.trec'}\n"
    rows = [line.split() for line in (tmp_path / "out.trec").read_text().splitlines()]
    assert [row[0] for row in rows] == ["q1"] * 7 + ["q2"] * 7
    assert [row[3] for row in rows] == [str(rank) for rank in range(1, 8)] * 2
    with Store(store) as opened:
        run = opened.run({"q1": "owl night", "q2": "ice"}, top_k=7)
    assert [row[2] for row in rows] == [*run["q1"], *run["q2"]]
    assert [float(row[4]) for row in rows] == pytest.approx([*run["q1"].values(), *run["q2"].values()], abs=1e-5)


def test_questions_that_are_piped_in(modernbert, store, monkeypatch):
    """The model is loaded once; a line with a colon is a command, and a wrong one does not end the loop."""
    lines = "owls\n\n:top 1\nice\n:path docs/*.md\nowls\n:where year\n:nonsense\n:path\nglaciers move\n:quit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    status, out, err = modernbert("search", "--index", store, "--json")
    answers = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert status == 0
    assert [answer["query"] for answer in answers] == ["owls", "ice", "owls", "glaciers move"]
    assert [len(answer["hits"]) for answer in answers] == [5, 1, 1, 1]
    assert answers[2]["hits"][0]["path"].endswith("night.md")
    assert ":quit" in out
    assert err == "note: expected FIELD=VALUE, got 'year'\n"


def test_a_conversation_on_a_terminal(store):
    """A real terminal: a prompt, an answer, the reasons of a hit as a table that sums to its score."""
    ours, theirs = pty.openpty()
    where = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "100", "TERM": "xterm"}
    code = "from modernbert.cli import main; main()"
    command = [sys.executable, "-c", code, "search", "--index", str(store), "--top", "2"]
    run = subprocess.Popen(command, env=where, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, b"owls hunt\n:why 1\n:quit\n")
    said = b""
    with contextlib.suppress(OSError):  # a terminal fails like this when the other end is closed
        while part := os.read(ours, 4096):
            said += part
    assert run.wait(timeout=60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.decode()).replace("\r", "")
    assert "passages of 22 documents. Ask, or :help" in text
    score = float(re.search(r"\n *1\. (\d+\.\d+)", text)[1])
    table = text.split("query token")[1].split("score")[0]
    assert sum(map(float, re.findall(r"(-?\d+\.\d{3})\s*\n", table))) == pytest.approx(score, abs=0.01)


def test_the_page_is_written(modernbert, store, tmp_path):
    _, _, err = modernbert("search", "owls hunt mice", "--index", store, "--html", tmp_path / "why.html", "--top", 2)
    page = (tmp_path / "why.html").read_text()
    assert err == f"note: wrote {tmp_path / 'why.html'}\n"
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")
    assert "midnight" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "owls"], "say where to search"),
        (["search", "owls", "docs", "--index", "store"], "say where to search"),
        (["search", "", "--index", "store"], "the query is empty: give a question in quotes"),
        (["search", " \n", "docs"], "the query is empty: give a question in quotes"),
        (["search", "owls", "--index", "nowhere"], "nowhere does not exist; make one with: modernbert index PATH..."),
        (["search", "owls", "--index", "docs"], "docs holds no store; make one with: modernbert index PATH..."),
        (["search", "--index", "store", "--queries", "q.jsonl"], "a run needs --index STORE, --queries FILE"),
        (["search", "owls", "--index", "qdrant:"], "'qdrant:' is not a target; a target is one of"),
        (["index", "nothing", "--output", "new"], "no such file or folder: "),
        (["index", "docs", "--output", "store", "--dtype", "int8"], "the store store holds fp16, not int8"),
        (["index", "docs", "--output", "docs"], "docs is not a store, and not empty"),
        (["evaluate", "docs"], "no corpus.jsonl or corpus.jsonl.gz in docs"),
        (["export", "store", "elsewhere"], "'elsewhere' is not a target"),
    ],
)
def test_an_error_is_one_line_that_says_what_to_do(modernbert, store, monkeypatch, arguments, message):
    monkeypatch.chdir(store.parent)
    status, out, err = modernbert(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("modernbert: ")
    assert message in err
    assert err.count("\n") == 1


def test_evaluation_agrees_with_a_count_by_hand(modernbert, model, tmp_path):
    """Relevant is what the store ranks first for q1 and third for q2: MRR (1 + 1/3) / 2."""
    beir, run = tmp_path / "beir", tmp_path / "out.trec"
    (beir / "qrels").mkdir(parents=True)
    write_corpus(beir / "corpus.jsonl", corpus(20))
    (beir / "queries.jsonl").write_text('{"_id": "q1", "text": "owl night"}\n{"_id": "q2", "text": "ice"}\n')
    modernbert("index", beir, "--output", tmp_path / "store", "--model", model)
    with Store(tmp_path / "store") as store:
        ranks = {name: list(found) for name, found in store.run({"q1": "owl night", "q2": "ice"}).items()}
    qrels = f"query-id\tcorpus-id\tscore\nq1\t{ranks['q1'][0]}\t1\nq2\t{ranks['q2'][2]}\t1\n"
    (beir / "qrels" / "test.tsv").write_text(qrels)
    arguments = ["evaluate", beir, "--model", model, "--run", run, "--per-query", tmp_path / "each.jsonl"]
    status, out, _ = modernbert(*arguments, "--json")
    printed = json.loads(out)
    assert status == 0
    assert printed["queries"] == 2
    assert printed["MRR@10"]["mean"] == pytest.approx((1 + 1 / 3) / 2)
    assert printed["nDCG@10"]["mean"] == pytest.approx((1 + 1 / 2) / 2)  # 1 / log2(4) at rank 3
    assert printed["recall@100"]["mean"] == 1
    each = [json.loads(line) for line in (tmp_path / "each.jsonl").read_text().splitlines()]
    assert [(row["query"], row["MRR@10"]) for row in each] == [("q1", 1.0), ("q2", pytest.approx(1 / 3))]
    assert [line.split()[2] for line in run.read_text().splitlines()] == [*ranks["q1"], *ranks["q2"]]
    # Other documents in the store with the same ids change nothing.
    (tmp_path / "other").mkdir()
    write_corpus(tmp_path / "other" / "corpus.jsonl", corpus(20))
    modernbert("index", tmp_path / "other", "--output", tmp_path / "store", "--model", model)
    assert json.loads(modernbert(*arguments, "--index", tmp_path / "store", "--json")[1]) == printed
    status, out, _ = modernbert(*arguments)
    assert re.search(r"MRR@10 +0\.6667 +0\.3333 to 1\.0000", out)


def test_an_export_is_searched_like_a_store(modernbert, store, tmp_path):
    pytest.importorskip("qdrant_edge")
    target = f"qdrant:{tmp_path / 'there'}"
    status, _, err = modernbert("export", store, target)
    assert status == 0
    assert err.splitlines()[-1].endswith(f"search it with: modernbert search QUERY --index {target}")
    status, out, _ = modernbert("search", "owls hunt mice", "--index", target, "--json", "--top", 3)
    there = json.loads(out)["hits"]
    here = json.loads(modernbert("search", "owls hunt mice", "--index", store, "--json", "--top", 3)[1])["hits"]
    assert status == 0
    assert [(hit["id"], hit["text"]) for hit in there] == [(hit["id"], hit["text"]) for hit in here]
    assert [hit["score"] for hit in there] == pytest.approx([hit["score"] for hit in here], abs=1e-2)
