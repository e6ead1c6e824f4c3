"""The options of the commands: their number is frozen, and every one has help."""

from __future__ import annotations

import pytest
import typer

from modernbert.cli import app

COMMANDS = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]

NUMBER_OF_OPTIONS = {
    "search": 19,
    "index": 15,
    "evaluate": 8,
    "compare": 2,
    "export": 0,
    "encode": 4,
    "serve": 8,
    "info": 0,
    "convert": 1,
    "demo": 0,
}
"""An option more needs a reason that is worth the reading of everybody who calls --help."""


@pytest.mark.parametrize("name", NUMBER_OF_OPTIONS)
def test_a_command_has_this_many_options(name):
    options = [option for option in COMMANDS[name].params if option.param_type_name == "option"]
    assert len(options) == NUMBER_OF_OPTIONS[name], [option.name for option in options]


@pytest.mark.parametrize("name", NUMBER_OF_OPTIONS)
def test_everything_has_help(name):
    assert COMMANDS[name].help
    for parameter in COMMANDS[name].params:
        assert parameter.help, parameter.name  # pyright: ignore[reportAttributeAccessIssue]


def test_no_command_is_missing():
    assert COMMANDS.keys() == NUMBER_OF_OPTIONS.keys()
