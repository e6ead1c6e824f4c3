"""The command line in the process of the tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from modernbert.cli import main


@pytest.fixture
def modernbert(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return int(end.value.code or 0), *capsys.readouterr()

    return run
