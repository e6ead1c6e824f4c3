"""How files are read that do not show it: options of `modernbert index` and of a search in files."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from stores import small_colbert

from modernbert.retrieval.store.request import IndexRequest, read_request, resume_command, write_request

TABLE = "key~headline~body\n1~Owls~Owls hunt mice at midnight, größer.\n2~bad\n3~Ice~Glaciers move.\n"
OPTIONS = ["--text-column", "headline,body", "--id-column", "key", "--delimiter", "~", "--encoding", "cp1252"]


@pytest.fixture(scope="module")
def model(modernbert_tokenizer_file, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("colbert") / "model"
    small_colbert(modernbert_tokenizer_file.parent).save_pretrained(folder)
    return str(folder)


def test_a_table_of_any_form_is_indexed_and_searched(modernbert, model, tmp_path):
    table, store = tmp_path / "a.csv", tmp_path / "store"
    table.write_bytes(TABLE.encode("cp1252"))
    status, _, err = modernbert("index", table, "--output", store, "--model", model)
    assert status == 2
    assert "got 'key~headline~body'; choose with --text-column and --id-column" in err
    status, _, err = modernbert("index", table, "--output", store, "--model", model, *OPTIONS)
    assert (status, "a.csv, line 3: 2 cells for 3 columns" in err) == (2, True)
    where = {"index": ["--output", store, "--model", model], "search": ["owls", table, "--model", model, "--json"]}
    status, _, err = modernbert("index", table, *where["index"], *OPTIONS, "--skip-bad-rows")
    assert status == 0
    assert "skipped 1 bad records: line 3" in err
    assert "note: 2 documents added" in err
    for found in (where["search"], ["owls", "--index", store, "--json"]):
        options = [*OPTIONS, "--skip-bad-rows"] if found[1] == table else []
        status, out, _ = modernbert("search", *found, *options)
        assert status == 0
        texts = {hit["id"]: hit["text"] for hit in json.loads(out)["hits"]}
        assert texts == {"1": "Owls\n\nOwls hunt mice at midnight, größer.", "3": "Ice\n\nGlaciers move."}


def test_a_tab_has_a_name(modernbert, model, tmp_path):
    (tmp_path / "a.csv").write_text("text,a\tid\nowls hunt\t1\n")
    for tab in ("tab", "\\t", "\t"):
        options = ["--delimiter", tab, "--text-column", "1"]
        status, out, _ = modernbert("search", "owls", tmp_path / "a.csv", "--model", model, "--json", *options)
        assert status == 0
        assert {hit["text"] for hit in json.loads(out)["hits"]} == {"text,a", "owls hunt"}


def test_options_of_files_are_refused_for_a_store(modernbert, tmp_path):
    status, _, err = modernbert("search", "owls", "--index", tmp_path, "--encoding", "cp1252")
    assert (status, "options of files are those of `modernbert index`" in err) == (2, True)
    (tmp_path / "a.txt").write_text("x")
    status, _, err = modernbert("index", tmp_path / "a.txt", "--output", tmp_path / "s", "--encoding", "utf-9")
    assert (status, "encoding is 'utf-9', which is not an encoding of text" in err) == (2, True)
    assert not (tmp_path / "s").exists()


def test_the_command_that_resumes_reads_files_the_same_way(tmp_path):
    reading = {"encoding": "cp1252", "text_column": "-a, b", "delimiter": "\t", "skip_bad_rows": True}
    request: IndexRequest = {"paths": ["a"], "model": None, "dtype": None, "prefilter": False, "reading": reading}
    write_request(tmp_path, request)
    assert read_request(tmp_path) == request
    command = resume_command(request, Path("store"))
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True).stdout
    given = [os.fsdecode(word) for word in words.split(b"\0")[:-1]]
    options = ["--encoding=cp1252", "--text-column=-a, b", "--delimiter=\t", "--skip-bad-rows"]
    assert given == ["modernbert", "index", "a", "--output", "store", *options]
