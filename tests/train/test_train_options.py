import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from modernbert.train.options import check_same, fixed, option, parse


@dataclass(frozen=True)
class Config:
    output: str = option("where it goes", free=True)
    names: tuple[str, ...] = option("some words", ())
    share: float = option("how much, in %", 0.5)
    steps: int = option("how often", 7, free=True)


def test_a_command_line_is_a_config():
    assert parse(Config, None, ["--output", "o"]) == Config("o", (), 0.5, 7)
    words = ["--output", "o", "--names", "a", "b", "--share", "1e-3", "--steps", "3"]
    assert parse(Config, None, words) == Config("o", ("a", "b"), 1e-3, 3)


def test_a_required_option_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        parse(Config, None, [])
    assert "--output" in capsys.readouterr().err


def test_help_explains_each_option(capsys):
    with pytest.raises(SystemExit):
        parse(Config, "What it does.", ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "What it does." in shown
    assert "--share SHARE how much, in % (default: 0.5)" in shown
    assert "--names [NAMES ...] some words" in shown


def test_free_settings_may_change_and_others_may_not():
    was = json.loads(json.dumps(fixed(Config("o", ("a",), 0.5, 7))))  # as a file gives it back
    check_same(Path("x.pt"), was, fixed(Config("elsewhere", ("a",), 0.5, 9)))
    with pytest.raises(ValueError, match=r"x\.pt .*names is \['a'\], now \['b'\]; share is 0\.5, now 0\.1"):
        check_same(Path("x.pt"), was, fixed(Config("o", ("b",), 0.1)))
    with pytest.raises(ValueError, match=r"share is None, now 0\.5"):
        check_same(Path("x.pt"), {"names": ["a"]}, fixed(Config("o", ("a",))))
