"""What the model does not read is a note of the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from stores import corpus, write_corpus, write_dataset

LONG = "we walked through the old town and then we asked about owls and peace and a treaty and rivers and hail"


@pytest.mark.parametrize("options", [[], ["--json"], ["--no-why"]])
def test_a_long_question(modernbert, model: str, tmp_path: Path, options: list[str]) -> None:
    """The last words of a long question, which were the question, were cut in silence."""
    (tmp_path / "peace.md").write_text("# Peace\nThe treaty ended the war.\n")
    status, out, err = modernbert("search", LONG, tmp_path / "peace.md", "--model", model, *options)
    assert (status, bool(out)) == (0, True)
    assert err.count("note: queries[0] ('we walked") == 1
    assert "of which the model reads 24" in err
    assert "reads" not in modernbert("search", "owl", tmp_path / "peace.md", "--model", model, *options)[2]


def test_a_long_question_of_a_run(modernbert, model: str, tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "corpus.jsonl", corpus(10))
    status, _, err = modernbert("index", source, "--output", tmp_path / "store", "--model", model)
    assert (status, "the model reads" in err) == (0, False)
    records = [{"_id": "q1", "text": "owl"}, {"_id": "q2", "text": LONG}]
    queries = write_corpus(tmp_path / "queries.jsonl", records)
    status, _, err = modernbert(
        "search", "--index", tmp_path / "store", "--queries", queries, "--run", tmp_path / "run"
    )
    assert status == 0
    assert "note: query 'q2' ('we walked" in err


def test_a_long_question_of_a_data_set(modernbert, model: str, tmp_path: Path) -> None:
    pytest.importorskip("ir_measures")
    write_dataset(tmp_path, 10)
    (tmp_path / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": LONG}))
    status, _, err = modernbert("evaluate", tmp_path, "--model", model)
    assert status == 0
    assert err.count("note: query 'q' ('we walked") == 1


@pytest.mark.parametrize("name", ["texts.txt", "texts.jsonl"])
@pytest.mark.parametrize(("options", "read"), [([], 40), (["--queries"], 24)])
def test_a_long_text_to_encode(
    modernbert, model: str, tmp_path: Path, name: str, options: list[str], read: int
) -> None:
    texts = ["owl", "owl " * 60]
    lines = texts if name.endswith(".txt") else [json.dumps({"_id": text[:3], "text": text}) for text in texts]
    (tmp_path / name).write_text("\n".join(lines))
    output = tmp_path / "vectors.npz"
    status, _, err = modernbert("encode", tmp_path / name, "--output", output, "--model", model, *options)
    assert status == 0
    assert err.count("note: texts[1] has at least ") == 1
    assert f"of which the model reads {read} (1 of 2 texts are longer than it reads)" in err
