"""`index` by several processes, on Ray, and into engines: the corpus is cut into units, which are done in any order.

The first process, the driver, finds the units and takes the reports about them; the workers read, encode and write.
What was written is not written again, so a run that was killed anywhere is finished by running it again.
"""

from __future__ import annotations

import os
import pickle
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from itertools import chain, repeat

import torch

from ..progress import progress_bar
from ..train.distributed import Ranks
from .destination import Destination, open_destination, open_engine
from .documents.reading import Reading
from .documents.text import OnNote, file_name
from .on_ray import do_on_ray
from .remote import is_remote
from .store.identity import LoadedModel, ModelSource
from .store.request import IndexRequest
from .store.writer import NO_TEXT, Summary
from .units import Unit, find_units
from .vanished import vanished_note
from .worker import Job, Report, do_units

Paths = Sequence[str | os.PathLike[str]]


class Reports:
    """Reports in a temporary database, which moves from memory to disk as it grows."""

    def __init__(self) -> None:
        self._table = sqlite3.connect("")
        self._table.execute("CREATE TABLE reports (unit INTEGER PRIMARY KEY, report BLOB)")

    def add(self, report: Report) -> None:
        """Keep a report."""
        self._table.execute("INSERT INTO reports VALUES (?, ?)", (report.number, pickle.dumps(report)))

    def __iter__(self) -> Iterator[Report]:
        """In the order of the units."""
        for (content,) in self._table.execute("SELECT report FROM reports ORDER BY unit"):
            yield pickle.loads(content)

    def close(self) -> None:
        self._table.close()


def index_units(
    paths: Paths,
    output: str,
    model: ModelSource | LoadedModel | None,
    request: IndexRequest,
    reading: Reading,
    *,
    engine: str | None,
    ranks: Ranks,
    ray: str | None,
    progress: bool | None,
    note: OnNote,
) -> Summary:
    """Update a store or an engine with all ranks, or on a Ray cluster. Arguments and errors as of `index`.

    All ranks call this, with the same arguments, and get the same summary.

    Args:
        request: of the run, see `open_draft`.
    """
    first = open_destination(output, request, model, engine, note)
    with first if ranks.is_first else nullcontext((None, None, None)) as (destination, manifest, loaded):
        unread: list[str] = []

        def plan() -> tuple[Job, list[Unit]]:
            assert manifest
            assert loaded
            found = find_units(
                paths,
                reading,
                exclude=request.get("exclude", ()),
                gitignore=request.get("gitignore", True),
                on_unread=unread.append,
                on_note=note,
            )
            return Job(output, request["model"] or loaded.identity.name, manifest, reading, engine), list(found)

        job, units = ranks.on_first(plan)
        with closing(Reports()) as reports, progress_bar("indexing units", len(units), progress) as advance:
            done = _do_here(units, job, ranks, destination, loaded) if ray is None else do_on_ray(units, job, ray)
            for report in done:
                reports.add(report)
                advance(1)
            with closing(Reports()) as every:
                for report in _gathered(reports, ranks):
                    if ranks.is_first:
                        every.add(report)

                def finish() -> Summary:
                    assert destination
                    return _finish(every, destination, paths, output, unread, note)

                return ranks.on_first(finish)


def forget_in_engine(paths: Paths, output: str) -> Summary:
    """Remove from an engine every document that was read from under `paths`, which need not exist."""
    with open_engine(output) as destination:
        roots = roots_of(paths)
        destination.writer.remove_unseen(roots)
        return destination.commit(roots)


def absolute_paths(paths: Paths) -> list[str]:
    """The paths independent of the working directory; URLs are unchanged."""
    return [os.fspath(path) if is_remote(path) else os.path.abspath(path) for path in paths]


def roots_of(paths: Paths) -> list[str]:
    """The paths as they begin the names of documents."""
    return [path if is_remote(path) else file_name(path) for path in absolute_paths(paths)]


def _do_here(
    units: Sequence[Unit], job: Job, ranks: Ranks, destination: Destination | None, loaded: LoadedModel | None
) -> Iterator[Report]:
    """The units of this rank."""
    share = list(enumerate(units))[ranks.rank :: ranks.world_size]
    session = job.session() if loaded is None or torch.cuda.is_available() else loaded.session
    if destination:
        yield from do_units(share, job, destination.target, session)
        return
    with closing(job.target()) as target:
        yield from do_units(share, job, target, session)


def _gathered(reports: Iterable[Report], ranks: Ranks) -> Iterator[Report]:
    """The reports of all ranks, on every rank, some at a time."""
    ours: Iterator[Report | None] = chain(reports, repeat(None))
    while any(found := ranks.gather(next(ours))):
        yield from (report for report in found if isinstance(report, Report))


def _finish(
    reports: Iterable[Report],
    destination: Destination,
    paths: Paths,
    output: str,
    unread: Sequence[str],
    note: OnNote,
) -> Summary:
    """Take all reports, and make what was written the new state."""
    writer, roots = destination.writer, roots_of(paths)
    unread = [file_name(path) for path in unread]
    for report in reports:
        destination.take(report)
        unread += report.unread
        for message in report.notes:
            note(message)
    for path in unread:
        if writer.keep(path):
            note(f"{path} cannot be read now: {output} keeps what it holds of it")
    for root in roots:
        if count := writer.is_emptied(root):
            raise ValueError(
                f"{root} held {count:,} documents and has none now: is its disk, bucket or network folder there? If "
                "they are meant to go, remove them with --forget"
            )
    if not writer.summary().documents:
        raise ValueError(NO_TEXT)
    writer.remove_unseen(roots)
    if gone := vanished_note(writer.unseen_files(), output):
        note(gone)
    return destination.commit(roots)
