"""The command line: `modernbert search`, `index`, `evaluate`, `compare`, `export`, `encode`, `serve`, `info`, `convert`
and `demo`.

Everything that needs torch is imported inside the commands, so that `modernbert --help` is instant.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from .compare import compare
from .convert import convert
from .encode import encode
from .evaluate import evaluate
from .export import export
from .index import index
from .info import info
from .search import demo, search
from .serve import serve
from .show import note, printable
from .streams import ended_by_signals, flush_stdout, message_of, open_closed_streams

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
for command in (search, index, evaluate, compare, export, encode, serve, info, convert, demo):
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. An error that the user can fix is printed in one line on stderr, with exit status 2."""
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # Documents may contain characters that the encoding of the terminal lacks: print "?" instead of failing.
        stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    options = {"debug": False}
    with warnings.catch_warnings(), ended_by_signals():
        warnings.showwarning = lambda message, *_, **__: note(str(message))
        try:
            try:
                app(args=arguments, prog_name="modernbert", obj=options)
            finally:
                flush_stdout()
        except (ValueError, OSError, ModuleNotFoundError) as error:
            if options["debug"]:
                raise
            print(f"modernbert: {printable(message_of(error))}", file=sys.stderr)
            sys.exit(2)


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Search and encode text with ModernBERT, Ettin and ColBERT models."""
    context.obj["debug"] = debug
