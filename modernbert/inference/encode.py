"""Texts to rows: tokenised in parts, sorted, packed to a token budget, called, and put back in order."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from ..late_interaction import Ragged, check_count
from ..modules import Norm
from ..packing import Packed, Tokenized, Tokens
from ..progress import progress_bar
from ..texts import check_unicode
from ..truncation import Cut, watched
from .batches import plan, token_budget
from .callers import callers, check_process, map_callers
from .replica import evaluated

T = TypeVar("T")
R = TypeVar("R")

_Matrix = tuple[int, Tensor]
"""The index of a text and its scored rows `[n, E]`."""

TEXTS = 1024
"""Texts tokenised and sorted at a time, so that memory does not grow with the corpus, and a GPU soon has work."""

PROGRESS_TEXTS = 500
"""Fewer texts than this show no progress bar unless one is asked for."""


class Caller(Protocol):
    """What `encode_tokens` calls with batches that are on the CPU: `Modules` or a `Session`."""

    device: torch.device

    def budget(self, total: int) -> int: ...
    def __call__(self, batch: Packed, *, rows: Tensor | None = None) -> Tensor: ...


@runtime_checkable
class TextModel(Protocol):
    """A late-interaction head: how texts become tokens, and the width of its vectors."""

    dim: int

    def tokenize_queries(self, texts: Sequence[str], *, spans: bool = True) -> Tokens: ...
    def tokenize_documents(self, texts: Sequence[str], *, truncate: bool = True, spans: bool = True) -> Tokens: ...


class Modules:
    """A plain model, called in evaluation mode whatever mode its modules are in.

    Attributes:
        device: of the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = evaluated(model)
        self.device, self._width = placement(model)

    def budget(self, total: int) -> int:
        """Tokens of one call when `total` are to be encoded."""
        return token_budget(self.device, self._width, total, callers(self.device))

    def __call__(self, batch: Packed, *, rows: Tensor | None = None) -> Tensor:
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
            rows = None if rows is None else rows.pin_memory().to(self.device, non_blocking=True)
        elif self.device.type != "cpu":
            batch, rows = batch.to(self.device), None if rows is None else rows.to(self.device)
        return self.model(batch, rows=rows)


def placement(model: nn.Module) -> tuple[torch.device, int]:
    """The device of a model, and the width of its encoder, or of its first matrix if the encoder is not ours."""
    norms = [module.weight for module in model.modules() if isinstance(module, Norm)]
    weights = norms or [parameter for parameter in model.parameters() if parameter.dim() > 1]
    if not weights:
        raise ValueError(f"{type(model).__name__} has no encoder")
    if weights[0].is_meta:
        raise ValueError(
            f"{type(model).__name__} is on the meta device, so that it has no weights: load them first. If a library "
            "has offloaded them, call the model: model(model.tokenize_queries(texts))"
        )
    return weights[0].device, weights[0].shape[-1]


def encode_texts(
    caller: Caller,
    tokenize: Callable[..., Tokenized],
    texts: Iterable[str],
    *,
    dim: int,
    batch_tokens: int | None = None,
    progress: bool | None = None,
    on_cut: Callable[[Cut], None] | None = None,
) -> Ragged:
    """Texts to float32 rows on the CPU, `[n_i, dim]` for each, in the order given.

    Args:
        tokenize: `tokenize_queries` or `tokenize_documents` of the model; `Texts` get one row for each text.
        on_cut: called once, for the first text that is longer than the model reads; None: a TruncationWarning.

    Raises:
        TypeError, ValueError: as `checked_texts`; a `batch_tokens` that is not a whole number from 1; a vector that is
            not finite, with the index of its text.
        RuntimeError: in a forked process (see `check_process`).
    """
    found = list_of_texts(texts)
    shown = progress if progress is not None else None if len(found) >= PROGRESS_TEXTS else False
    with progress_bar("encoding", len(found), shown) as advance:
        return joined(list(_texts_to_rows(caller, tokenize, found, batch_tokens, advance, on_cut or warn_of)), dim)


def stream_texts(
    caller: Caller, tokenize: Callable[..., Tokenized], texts: Iterable[str], *, batch_tokens: int | None = None
) -> Iterator[Tensor]:
    """As `encode_texts`, but takes texts as it needs them, and gives the rows of each as soon as they are there.

    At most three parts of `TEXTS` texts are in memory.
    """
    return _texts_to_rows(caller, tokenize, checked_texts(texts), batch_tokens, advance=None, on_cut=warn_of)


def warn_of(cut: Cut) -> None:
    """The TruncationWarning of a call with `texts`."""
    cut.warn(f"texts[{cut.index}]")


def encode_tokens(
    caller: Caller,
    tokens: Tokenized,
    *,
    batch_tokens: int | None = None,
    advance: Callable[[int], None] | None = None,
) -> Ragged:
    """The scored rows of each text of `tokens`, `[n_i, E]` float32 on the CPU; `advance` gets counts of texts.

    `Texts` have one row each. Raises TypeError for what is neither these nor `Tokens`.
    """
    if not isinstance(tokens, Tokenized):
        what = f"tokens must be Tokens, as of tokenize_queries(texts), got {type(tokens).__name__}"
        raise TypeError(f"{what}: encode_queries takes texts")
    return Ragged.from_list(list(_encode(caller, [tokens], batch_tokens, advance)))


def joined(matrices: Sequence[Tensor], dim: int) -> Ragged:
    """The matrices as one ordinary tensor, which may meet autograd later: it is made outside of inference mode."""
    if not matrices:
        values = torch.zeros(0, dim, dtype=torch.float32, device="cpu")
        return Ragged(values, torch.zeros(1, dtype=torch.int64, device="cpu"))
    return Ragged.from_list(matrices)


def list_of_texts(texts: Iterable[str]) -> list[str]:
    """The texts as a list, which `checked_texts` has seen."""
    return list(checked_texts(texts))


def checked_texts(texts: Iterable[str]) -> Iterator[str]:
    """The texts, one after another, as long as each is a `str`.

    Any iterable with an order is taken: a list, a generator, a column of pandas, an array of strings.

    Raises:
        TypeError: at once for one text, whose letters would be encoded, a mapping or a table, whose keys would be, or
            a set, which has no order; for anything else in the place of a text, with its index.
        ValueError: half a surrogate pair in a text, with its index.
    """
    if isinstance(texts, (str, bytes, bytearray, Mapping, Set)) or not isinstance(texts, Iterable):
        todo = "put it in a list" if isinstance(texts, (str, bytes, bytearray)) else "make a list of its texts"
        raise TypeError(f"texts must be a list of str, got one {type(texts).__name__}: {todo}")
    if getattr(texts, "ndim", 1) != 1:
        raise TypeError(f"texts must be a list of str, got a {type(texts).__name__} that is not one column of texts")
    return itertools.starmap(_checked_text, enumerate(texts))


def _checked_text(index: int, text: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"texts[{index}] must be a str, got {type(text).__name__} {text!r:.60}")
    check_unicode(index, text)
    return text


def one_ahead(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map`, but a thread works on the next item while the caller uses this one."""
    with ThreadPoolExecutor(1) as thread:
        coming: deque[Future[R]] = deque()
        for item in items:
            coming.append(thread.submit(function, item))
            if len(coming) > 1:
                yield coming.popleft().result()
        yield from (last.result() for last in coming)


def _texts_to_rows(
    caller: Caller,
    tokenize: Callable[..., Tokenized],
    texts: Iterable[str],
    batch_tokens: int | None,
    advance: Callable[[int], None] | None,
    on_cut: Callable[[Cut], None],
) -> Iterator[Tensor]:
    texts = iter(texts)
    parts = iter(lambda: list(itertools.islice(texts, TEXTS)), [])
    # While a GPU encodes one part, the CPU tokenises the next. On a CPU they would only share its cores.
    in_turn = one_ahead if caller.device.type == "cuda" else map
    tokens = watched(in_turn(partial(tokenize, spans=False), parts), on_cut)
    return _encode(caller, tokens, batch_tokens, advance)


def _encode(
    caller: Caller, parts: Iterable[Tokenized], batch_tokens: int | None, advance: Callable[[int], None] | None
) -> Iterator[Tensor]:
    """The matrix of each text of all `parts`, in order; those that come too early wait."""
    check_process()
    if batch_tokens is not None:
        check_count("batch_tokens", batch_tokens)
    run = _overlapped if caller.device.type == "cuda" else _called
    return _in_order(run(caller, parts, batch_tokens), advance)


def _in_order(results: Iterable[list[_Matrix]], advance: Callable[[int], None] | None) -> Iterator[Tensor]:
    waiting: dict[int, Tensor] = {}
    count = 0
    for matrices in results:
        waiting.update(matrices)
        if advance is not None:
            advance(len(matrices))
        while count in waiting:
            yield waiting.pop(count)
            count += 1


class _Batch(NamedTuple):
    """Tokens that are encoded in one call, and the texts that they are of."""

    indices: list[int]
    tokens: Tokenized

    def matrices(self, x_QE: Tensor) -> list[_Matrix]:
        """A copy of the rows of each text.

        The thread that called the model makes them. Where a call has one thread they must not be made by the main
        thread: its OpenMP threads would wait actively from one parallel operation to the next, and slow the callers.
        """
        rows = Ragged(x_QE, self.tokens.offsets)
        if not bool(rows.values.isfinite().all()):
            wrong = min(index for index, x_NE in zip(self.indices, rows, strict=True) if not x_NE.isfinite().all())
            raise ValueError(
                f"texts[{wrong}] has a vector that is not finite: does the model have NaN among its weights, or do its "
                "activations overflow in float16?"
            )
        return list(zip(self.indices, rows, strict=True))


def _batches(caller: Caller, parts: Iterable[Tokenized], batch_tokens: int | None) -> Iterator[list[_Batch]]:
    """For each part its batches, longest texts first."""
    first = 0
    for tokens in parts:
        groups = plan(tokens.batch.lengths, batch_tokens or caller.budget(tokens.batch.num_tokens))
        yield [_Batch([first + index for index in group], tokens.select(group)) for group in groups]
        first += len(tokens.batch)


def _called(caller: Caller, parts: Iterable[Tokenized], batch_tokens: int | None) -> Iterator[list[_Matrix]]:
    """Batch after batch on a CPU, by a caller a core."""

    def call(batch: _Batch) -> list[_Matrix]:
        x_QE = caller(batch.tokens.batch, rows=batch.tokens.rows)
        return batch.matrices(x_QE.float().cpu())

    for batches in _batches(caller, parts, batch_tokens):
        yield from map_callers(call, batches, callers(caller.device))


@torch.inference_mode()
def _overlapped(caller: Caller, parts: Iterable[Tokenized], batch_tokens: int | None) -> Iterator[list[_Matrix]]:
    """A GPU is given a batch before the one before it is back."""
    underway: deque[tuple[_Batch, Tensor, torch.cuda.Event]] = deque()

    def finish() -> list[_Matrix]:
        batch, rows, done = underway.popleft()
        done.synchronize()
        return batch.matrices(rows)  # in ordinary memory: two batches share the pinned memory, which is scarce

    for batches in _batches(caller, parts, batch_tokens):
        for batch in batches:
            x_QE = caller(batch.tokens.batch, rows=batch.tokens.rows)
            rows = x_QE.float().to("cpu", non_blocking=True)  # into pinned memory of its own
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(caller.device))
            underway.append((batch, rows, done))
            if len(underway) > 1:
                yield finish()
    while underway:
        yield finish()
