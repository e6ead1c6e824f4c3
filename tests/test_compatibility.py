"""The page about compatibility has the table of the versions that were run, and names tests that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import compatibility as script
import pytest


def test_the_table_is_that_of_the_rows() -> None:
    page = script.PAGE.read_text("utf-8")
    rows = script.read()
    assert page.split(script.BEGIN)[1].split(script.END)[0] == script.table(rows)
    assert {row["environment"] for row in rows} <= script.ENVIRONMENTS.keys()
    assert all(row["results"].keys() == script.CHECKS.keys() for row in rows)


def test_every_feature_names_tests_that_exist() -> None:
    features = script.PAGE.read_text("utf-8").split("## Features")[1]
    lines = [line.split("|")[1:-1] for line in features.splitlines() if line.startswith("| ")][2:]
    assert len(lines) > 40
    for feature, here, shown in lines:
        files = re.findall(r"`(tests/[\w/]+\.py)`", shown)
        assert files or here.strip().startswith(("no", "not")), feature
        assert all((script.ROOT / file).exists() for file in files), feature


def test_a_check_is_yes_absent_or_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(folder: Path) -> None:
        script.same([1.0], [2.0])

    def absent(folder: Path) -> None:
        import no_such_package  # noqa: F401  # pyright: ignore[reportMissingImports]

    def broken(folder: Path) -> None:
        raise ModuleNotFoundError("Could not import module 'ModernBertModel'.")  # as transformers does

    checks = {"good": script.checkpoints, "broken": broken, "none": absent, "bad": wrong}
    monkeypatch.setattr(script, "CHECKS", checks)
    found = script.check(script.CHECKS)
    assert (found["results"]["good"], found["results"]["none"]) == ("yes", "absent")
    assert found["results"]["bad"].startswith("no: AssertionError")
    assert found["results"]["broken"].startswith("no: ModuleNotFoundError")
    monkeypatch.setattr(script, "ROWS", tmp_path / "rows.jsonl")
    old: dict[str, Any] = {"environment": "newest", "versions": {}, "results": {}}
    for row in ({"environment": "torch-2.11", **found}, old, {"environment": "newest", **found}):
        script.enter(row)
    assert [row["environment"] for row in script.read()] == ["newest", "torch-2.11"]
    assert json.dumps(found["results"]) in script.ROWS.read_text()
    lines = script.table(script.read()).splitlines()
    assert [line.count("|") for line in lines[:4]] == [6] * 4
    assert "| yes | no | – | no |" in lines[2]
    assert "bad: no: AssertionError" in lines[-1]
