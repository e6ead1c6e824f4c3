"""Notebooks are read as their text and code."""

from __future__ import annotations

import json

import pytest

from modernbert.retrieval.documents.find import find_files, read_file
from modernbert.retrieval.documents.notebook import read_notebook
from modernbert.retrieval.passages import sections

IMAGE = "data:image/png;base64," + "iVBORw0KGgo+/=" * 500
CELLS = [
    {"cell_type": "markdown", "source": ["# Owls\n", "\n", "They hunt at night."]},
    {"cell_type": "code", "source": "count = 3\nprint(count)", "outputs": [{"text": "a long result"}]},
    {"cell_type": "code", "source": ["print('''\n", "```\n", "''')"]},
    {"cell_type": "markdown", "source": f"## Mice\n\n![a mouse]({IMAGE}) They hide."},
    {"cell_type": "raw", "source": ""},
]


def read(folder, content, name="a.ipynb", notes=None):
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / name).write_bytes(raw)
    (document,) = read_file(folder / name, on_note=(notes if notes is not None else []).append)
    return document


def test_cells_become_markdown_with_sections(tmp_path):
    notebook = {"nbformat": 4, "metadata": {"language_info": {"name": "python"}}, "cells": CELLS}
    document = read(tmp_path, notebook)
    assert document.text == (
        "# Owls\n\nThey hunt at night.\n\n```python\ncount = 3\nprint(count)\n```\n\n"
        "````python\nprint('''\n```\n''')\n````\n\n## Mice\n\n![a mouse]() They hide."
    )
    assert [section.title for section in sections(document)] == ["Owls", "Owls: Mice"]
    assert [file.name for file in find_files([tmp_path])] == ["a.ipynb"]


def test_the_format_of_old_notebooks_is_read(tmp_path):
    cells = [
        {"cell_type": "heading", "level": 2, "source": "Owls"},
        {"cell_type": "code", "input": ["x = 1"], "language": "python"},
    ]
    assert read(tmp_path, {"nbformat": 3, "worksheets": [{"cells": cells}]}).text == "## Owls\n\n```\nx = 1\n```"


def test_encodings_and_broken_characters(tmp_path):
    notebook = {"cells": [{"cell_type": "markdown", "source": "größe \ud800 \0"}], "metadata": None}
    assert read(tmp_path, notebook).text == "größe ? \ufffd"
    raw = json.dumps({"cells": [{"source": "größe"}]}, ensure_ascii=False)
    for encoding in ("utf-8-sig", "utf-16"):
        assert read(tmp_path, raw.encode(encoding)).text == "größe"
    notes: list[str] = []
    assert read(tmp_path, raw.encode("latin-1"), notes=notes).text == "gr\ufffd\ufffde"
    assert notes == [f"{tmp_path}/a.ipynb: not UTF-8 throughout, 2 broken places were replaced by U+FFFD"]


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[1]",
        b'"text"',
        b"null",
        {"cells": 3},
        {"cells": [3]},
        {"cells": [{"source": 3}]},
        {"cells": [{"source": [None]}]},
        {"worksheets": [[]]},
        {"cells": [{"cell_type": "heading", "level": "x", "source": "y"}]},
        b"[" * 100_000,
    ],
    ids=range(11),
)
def test_a_broken_notebook_is_named(tmp_path, content):
    with pytest.raises(ValueError, match=r"a\.ipynb: a broken notebook \(.*\); save it again in Jupyter"):
        read(tmp_path, content)


def test_a_notebook_without_cells_has_no_text(tmp_path):
    for content in ({}, {"cells": []}, b""):
        assert read(tmp_path, content).text == ""


def test_a_level_of_a_heading_that_no_heading_has():
    """There was one hash for each level, whatever the number."""
    for level, hashes in ((10**12, "######"), (0, "#"), (-3, "#"), (6, "######")):
        cells = [{"cell_type": "heading", "level": level, "source": "Owls"}]
        assert read_notebook(json.dumps({"cells": cells}).encode(), pytest.fail)[1] == f"{hashes} Owls"


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        "x",
        [],
        {"language_info": {"name": "p" * 10**6}, "kernelspec": None},
        {"language_info": "python", "kernelspec": "python3"},
        {"language_info": {"name": "p\n```\n# y"}, "kernelspec": {"language": 3}},
    ],
)
def test_metadata_that_names_no_language(metadata):
    """The name was in the text once for each cell, whatever its length."""
    notebook = {"cells": [{"cell_type": "code", "source": "owl()"}] * 3, "metadata": metadata, "worksheets": None}
    assert read_notebook(json.dumps(notebook).encode(), pytest.fail)[1] == "\n\n".join(["```\nowl()\n```"] * 3)


@pytest.mark.parametrize(
    "image",
    [
        "![owl](data:image/png;base64,{})",
        '<img src="data:image/png;base64,{}" alt="owl">',
        "[owl]: <data:image/png;base64,{}>",
        "[owl]: data:image/png;base64,{}",
    ],
)
@pytest.mark.parametrize("data", ["iVBORw0KGgo" * 300, "\n".join(["iVBORw0KGgo" * 7] * 40) + "=="])
def test_the_data_of_images_is_not_text(image, data):
    cells = [{"cell_type": "markdown", "source": f"Before\n\n{image.format(data)}\n\nafter it some words"}]
    text = read_notebook(json.dumps({"cells": cells}).encode(), pytest.fail)[1]
    assert "iVBOR" not in text
    assert text.startswith("Before")
    assert "owl" in text
    assert text.endswith("after it some words")
