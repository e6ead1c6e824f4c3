"""Requests share batches: one thread owns a Session and encodes the texts of all requests that wait. No HTTP here.

A batch is made whenever the thread is free, of what waits at that moment. So a lone request is encoded at once, and
many requests share batches. Each has a fair share of the tokens of a batch, so that a short request does not wait for a
long one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from math import ceil

from torch import Tensor

from ..inference.batches import CPU_TOKENS, GPU_TOKENS
from ..inference.callers import callers
from ..inference.encode import encode_tokens
from ..inference.session import Session
from ..late_interaction import Ragged
from ..packing import Tokenized
from .joined import join

BATCHES_WAITING = 64
"""The queue holds the tokens of this many batches."""

SMOOTHING = 0.2
"""The weight of the last batch in the mean speed."""


class QueueFull(Exception):
    """The queue has no room for a request.

    Attributes:
        retry_after: seconds, from 1, after which there should be room.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full: try again in {retry_after} s")
        self.retry_after = retry_after


class RequestTooLarge(ValueError):
    """A request that the queue could not hold if it were empty."""


@dataclass(eq=False)
class _Job:
    """The texts of a request, and where its answer goes.

    Attributes:
        taken: the texts that batches have taken. left: the tokens of the others.
    """

    tokens: Tokenized
    left: int
    taken: int = 0
    future: Future[Ragged] = field(default_factory=Future)
    rows: list[Tensor] = field(default_factory=list)

    def take(self, most: int) -> range:
        """The next texts of `most` tokens together, or one that is longer."""
        first, lengths, total = self.taken, self.tokens.batch.lengths, 0
        while self.taken < len(lengths) and (self.taken == first or total + lengths[self.taken] <= most):
            total += lengths[self.taken]
            self.taken += 1
        self.left -= total
        return range(first, self.taken)

    def add(self, rows: Ragged) -> None:
        """The rows of the texts that were taken. The last ones are the answer, unless the request was cancelled."""
        self.rows.extend(rows)
        if len(self.rows) == len(self.tokens) and self.future.set_running_or_notify_cancel():
            self.future.set_result(Ragged.from_list(self.rows))

    def fail(self, error: Exception) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class Batcher:
    """Encodes the texts of many callers in shared batches, in a thread of its own.

    Args:
        session: of a model that encodes texts. No other thread may call it.
        batch_tokens: tokens of a batch; None: a good value for the device. One longer text is a batch too.
        queue_tokens: tokens that may wait; None: those of `BATCHES_WAITING` batches.
        on_batch: called after each batch with its texts, its tokens and its seconds.
    """

    def __init__(
        self,
        session: Session,
        *,
        batch_tokens: int | None = None,
        queue_tokens: int | None = None,
        on_batch: Callable[[int, int, float], None] = lambda texts, tokens, seconds: None,
    ) -> None:
        on_cpu = session.device.type == "cpu"
        self.session = session
        self.batch_tokens = batch_tokens or (CPU_TOKENS * callers(session.device) if on_cpu else GPU_TOKENS)
        self.queue_tokens = queue_tokens or BATCHES_WAITING * self.batch_tokens
        self.on_batch = on_batch
        self._waiting: list[_Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._tokens_per_second = 0.0
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting_tokens(self) -> int:
        """Tokens that no batch has taken yet."""
        with self._changed:
            return self._count()

    def submit(self, tokens: Tokenized) -> Future[Ragged]:
        """The rows of each text, `[n_i, E]` float32 on the CPU, when they are there.

        Cancelling the future takes the request out of the queue.

        Raises:
            ValueError: there is no text. RequestTooLarge: more tokens than the queue holds.
            QueueFull: no room now. RuntimeError: after `close`.
        """
        if not len(tokens):
            raise ValueError("there is no text to encode")
        count = tokens.batch.num_tokens
        if count > self.queue_tokens:
            raise RequestTooLarge(
                f"the request has {count:,} tokens, and the queue holds {self.queue_tokens:,}: send fewer texts"
            )
        job = _Job(tokens, left=count)
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            waiting = self._count()
            if waiting + count > self.queue_tokens:
                raise QueueFull(max(1, ceil(waiting / self._tokens_per_second)) if self._tokens_per_second else 1)
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Take nothing new, encode what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _count(self) -> int:
        return sum(job.left for job in self._waiting if not job.future.done())

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                batch = self._take()
            if batch:
                self._encode(batch)

    def _take(self) -> list[tuple[_Job, range]]:
        """The texts of the next batch. What a request does not need of its share is left to those behind it."""
        jobs = [job for job in self._waiting if not job.future.done()]
        batch: list[tuple[_Job, range]] = []
        room = self.batch_tokens
        for number, job in enumerate(jobs):
            if room <= 0:
                break
            left = job.left
            batch.append((job, job.take(room // (len(jobs) - number))))
            room -= left - job.left
        # A request with more texts waits behind those that this batch had no room for.
        served = [job for job, _ in batch if job.taken < len(job.tokens)]
        self._waiting = jobs[len(batch) :] + served
        return batch

    def _encode(self, batch: Sequence[tuple[_Job, range]]) -> None:
        started = time.perf_counter()
        try:
            tokens = join(
                [job.tokens if len(texts) == len(job.tokens) else job.tokens.select(texts) for job, texts in batch]
            )
            rows = encode_tokens(self.session, tokens)
        except Exception as error:
            # One request may be the cause, and the others must not fail with it.
            if len(batch) == 1:
                batch[0][0].fail(error)
            else:
                for one in batch:
                    self._encode([one])
            return
        seconds = time.perf_counter() - started
        first = 0
        for job, texts in batch:
            job.add(rows[first : first + len(texts)])
            first += len(texts)
        self._measured(len(tokens), tokens.batch.num_tokens, seconds)

    def _measured(self, texts: int, tokens: int, seconds: float) -> None:
        speed = tokens / max(seconds, 1e-9)
        with self._changed:
            before = self._tokens_per_second or speed
            self._tokens_per_second = (1 - SMOOTHING) * before + SMOOTHING * speed
        self.on_batch(texts, tokens, seconds)
