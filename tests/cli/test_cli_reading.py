"""How files are read that do not show it: options of `modernbert index`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from modernbert.retrieval.store.request import IndexRequest, read_request, resume_command, write_request

TABLE = "key~headline~body\n1~Owls~Owls hunt mice at midnight, größer.\n2~bad\n3~Ice~Glaciers move.\n"
OPTIONS = ["--text-column", "headline,body", "--id-column", "key", "--delimiter", "~", "--encoding", "cp1252"]


def test_a_table_of_any_form_is_indexed(modernbert, model, tmp_path):
    table, store = tmp_path / "a.csv", tmp_path / "store"
    table.write_bytes(TABLE.encode("cp1252"))
    status, _, err = modernbert("index", table, "--output", store, "--model", model)
    assert status == 2
    assert "got 'key~headline~body'; choose with --text-column and --id-column" in err
    status, _, err = modernbert("index", table, "--output", store, "--model", model, *OPTIONS)
    assert (status, "a.csv, line 3: 2 cells for 3 columns" in err) == (2, True)
    arguments = ["index", table, "--output", store, "--model", model, *OPTIONS, "--skip-bad-rows"]
    status, _, err = modernbert(*arguments)
    assert status == 0
    assert "skipped 1 bad records: line 3" in err
    assert "note: 2 documents added" in err
    status, out, _ = modernbert("search", "owls", "--index", store, "--json")
    texts = {hit["id"]: hit["text"] for hit in json.loads(out)["hits"]}
    assert texts == {"1": "Owls\n\nOwls hunt mice at midnight, größer.", "3": "Ice\n\nGlaciers move."}


def paths_of(hit):
    """Of a hit and of its copies."""
    return [hit["path"], *hit.get("copies", [])]


def test_files_are_searched_as_they_would_be_indexed(modernbert, model, tmp_path):
    """`search QUERY PATH` had none of these options, so that it could not read the files that `index` reads."""
    table = tmp_path / "a.csv"
    table.write_bytes(TABLE.encode("cp1252"))
    (tmp_path / "texts").mkdir()
    for name, content in {".gitignore": "hidden.txt", "hidden.txt": "Owls sleep.", "left.txt": "Owls sleep."}.items():
        (tmp_path / "texts" / name).write_text(content)
    search = ["search", "owls", table, tmp_path / "texts", "--model", model, "--json", *OPTIONS, "--skip-bad-rows"]
    status, out, err = modernbert(*search, "--exclude", "left.txt")
    assert status == 0, err
    texts = {hit["text"] for hit in json.loads(out)["hits"]}
    assert texts == {"Owls\n\nOwls hunt mice at midnight, größer.", "Ice\n\nGlaciers move."}
    _, out, _ = modernbert(*search, "--no-gitignore")
    assert {"hidden.txt", "left.txt"} <= {Path(path).name for hit in json.loads(out)["hits"] for path in paths_of(hit)}


@pytest.mark.parametrize("option", ["--no-gitignore", "--skip-bad-rows", "--encoding=cp1252", "--exclude=a"])
def test_how_files_are_read_is_no_question_to_a_store(modernbert, tmp_path, option):
    status, _, err = modernbert("search", "owls", "--index", tmp_path / "store", option)
    assert (status, "say how files are read" in " ".join(err.split())) == (2, True)


def test_a_tab_has_a_name(modernbert, model, tmp_path):
    (tmp_path / "a.csv").write_text("text,a\tid\nowls hunt\t1\n")
    for number, tab in enumerate(("tab", "\\t", "\t")):
        store, options = tmp_path / str(number), ["--delimiter", tab, "--text-column", "1"]
        status, _, err = modernbert("index", tmp_path / "a.csv", "--output", store, "--model", model, *options)
        assert (status, "2 documents added" in err) == (0, True)


def test_an_encoding_that_is_none_is_refused_first(modernbert, tmp_path):
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
