import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from modernbert.train.options import check_same, fixed, option, parse, run


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


@dataclass(frozen=True)
class Kinds:
    compile: bool = option("off by default", False)
    autocast: bool = option("on by default", True)
    rates: tuple[float, ...] = option("some numbers", (1e-3,))
    clip: float | None = option("a number, if any", None)
    parallel: Literal["ddp", "fsdp"] = option("one of two", "ddp")


def test_each_type_of_field_has_its_words(capsys):
    assert parse(Kinds, None, []) == Kinds(False, True, (1e-3,), None, "ddp")
    words = ["--compile", "--no-autocast", "--rates", "1", "2e-3", "--clip", "0.5", "--parallel", "fsdp"]
    assert parse(Kinds, None, words) == Kinds(True, False, (1.0, 2e-3), 0.5, "fsdp")
    for wrong in (["--parallel", "dp"], ["--clip", "much"], ["--compile", "no"]):
        with pytest.raises(SystemExit):
            parse(Kinds, None, wrong)


def test_a_missing_extra_is_one_sentence():
    def main(config):
        raise ModuleNotFoundError("needs an extra: pip install 'modernbert[wandb]'")

    with pytest.raises(SystemExit, match=r"^error: needs an extra: pip install"):
        run(main, Kinds())
