"""What a process does with its units: read them, encode them, write them."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from ..heads.colbert import ColBERT
from ..inference.session import Session
from ..late_interaction import Ragged
from .documents.find import Key
from .documents.reading import Reading
from .engines import is_target
from .passages import Document
from .store.format import Manifest
from .store.identity import load_colbert
from .targets import EngineTarget, Share, StoreTarget, Target
from .units import Unit, read_unit
from .windows import batch, windows


@dataclass(frozen=True)
class Job:
    """What all workers of a run need to know. It can be pickled.

    Attributes:
        output: a store or the target of an engine. model: folder or hub id; None: the built-in one.
        manifest: of the store, or what it would be. engine: of the `Session`.
    """

    output: str
    model: str | None
    manifest: Manifest
    reading: Reading
    engine: str | None

    def target(self) -> Target:
        """Where the units are written."""
        return (EngineTarget if is_target(self.output) else StoreTarget)(self.output, self.manifest)

    def session(self) -> Session[ColBERT]:
        """A model on this process's GPU, if there is one, else on the CPU."""
        colbert = load_colbert(self.model)
        return Session(colbert.to("cuda") if torch.cuda.is_available() else colbert, engine=self.engine)


@dataclass(frozen=True)
class Report:
    """A unit that is done.

    Attributes:
        number: of the unit. part: the name of the part with its new documents.
        keys: of all documents, in order. unread: files that could not be read. notes: what was repaired.
    """

    number: int
    part: str
    keys: list[Key]
    unread: list[str]
    notes: list[str]


def read_share(unit: Unit, job: Job, target: Target, colbert: ColBERT) -> Share:
    """The documents of a unit; those that the target does not have are cut and tokenised."""
    keys: list[Key] = []
    documents: list[Document] = []
    unread: list[str] = []
    notes: list[str] = []
    digest = hashlib.sha256(f"{job.manifest.fingerprint} {job.manifest.dtype} {job.manifest.pool}".encode())
    found = read_unit(
        unit,
        job.reading,
        is_current=target.is_current,
        on_current=keys.append,
        on_unread=unread.append,
        on_note=notes.append,
    )
    for document in found:
        key = Key(document.path, document.id, document.digest, document.line)
        keys.append(key)
        documents.append(document)
        digest.update(repr(key).encode())
    name = digest.hexdigest()[:32]
    cut = [] if target.is_finished(name) else list(windows(colbert, documents))
    return Share(name, keys, unread, notes, documents, cut)


def encode_share(share: Share, session: Session[ColBERT]) -> Ragged:
    """The vectors of the passages of a share.

    Raises ValueError if they are not finite.
    """
    if not share.windows:
        return Ragged.from_list([torch.empty(0, session.model.dim, device="cpu")])[:0]
    vectors = session.encode_tokens(batch(share.windows))
    if not vectors.values.isfinite().all():
        raise ValueError("the model gives vectors that are not finite: are its weights complete?")
    return vectors


def write_share(number: int, share: Share, vectors: Ragged, target: Target) -> Report:
    """Write a share. When this returns, it is not lost."""
    if share.documents:
        target.write(share, vectors)
    return Report(number, share.name, share.keys, share.unread, share.notes)


def do_units(
    units: Sequence[tuple[int, Unit]], job: Job, target: Target, session: Session[ColBERT]
) -> Iterator[Report]:
    """Do units one after the other in this process. The next one is read while one is encoded."""
    with ThreadPoolExecutor(1) as reader:
        read = partial(read_share, job=job, target=target, colbert=session.model)
        waiting = deque(reader.submit(read, unit) for _, unit in units[:1])
        for position, (number, _) in enumerate(units, start=1):
            share = waiting.popleft().result()
            waiting.extend(reader.submit(read, unit) for _, unit in units[position : position + 1])
            yield write_share(number, share, encode_share(share, session), target)
