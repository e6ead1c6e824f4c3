"""A progress bar on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal


@contextmanager
def progress_bar(
    description: str, total: int, shown: bool | None, *, unit: Literal["items", "bytes"] = "items"
) -> Iterator[Callable[[float], None]]:
    """Show how much of `total` is done. Yields a function that takes the amount that was just finished.

    Args:
        shown: whether to show the bar. None: only if stderr is a terminal.
        unit: what `total` counts. Bytes are shown with their rate.
    """
    if shown is False or (shown is None and not sys.stderr.isatty()):
        yield lambda amount: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amounts = [MofNCompleteColumn()] if unit == "items" else [DownloadColumn(), TransferSpeedColumn()]
    columns = [TextColumn(description), BarColumn(), *amounts, TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.advance(task, amount)
