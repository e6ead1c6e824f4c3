"""GradCache (arXiv 2101.06983): large contrastive batches in the memory of one chunk.

The batch is encoded chunk by chunk without a graph, the loss is computed over all vectors, and its backward pass encodes
each chunk again, with a graph, and carries the gradient of its vectors on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from ..late_interaction import Ragged, check_count, token_blocks
from ..packing import Packed, Tokens

C = TypeVar("C")
P = TypeVar("P", Packed, Tokens)


def token_chunks(batch: P, max_tokens: int) -> list[P]:
    """Consecutive texts of at most `max_tokens` tokens together; a longer text is a chunk of its own."""
    check_count("max_tokens", max_tokens)
    lengths = batch.batch.lengths if isinstance(batch, Tokens) else batch.lengths
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int64, device="cpu")
    return [batch.select(range(first, last)) for first, last in token_blocks(offsets, max_tokens)]


def grad_cache(
    encode: Callable[[C], Ragged | Tensor],
    columns: Sequence[Sequence[C]],
    loss: Callable[..., Tensor],
    *,
    no_sync: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """`loss(*vectors)` with the gradients of one large batch, in the memory of one chunk.

    Use the result as any loss: its backward pass encodes every chunk again, with the random numbers and under the
    autocast of the first time. Gradients equal those without chunks up to rounding, whatever the result is multiplied by.

        queries, documents = token_chunks(queries, 65_536), token_chunks(documents, 65_536)
        loss = grad_cache(encode, [queries, documents], partial(in_batch_info_nce, temperature=0.02))
        loss.backward()

    Args:
        encode: a chunk to its vectors, with the model's graph: the token vectors of texts as a `Ragged` for late
            interaction, or `[b, E]`. Called twice for each chunk.
        columns: the chunks of each argument of `loss`, such as queries and documents.
        loss: called once, with the joined vectors of each column. It may have parameters of its own.
        no_sync: a context for all chunks but the last, in which gradients are not reduced over ranks, such as
            `DistributedDataParallel.no_sync`.

    Raises:
        ValueError: a column without chunks.
    """
    if not columns or not all(columns):
        raise ValueError("columns must each have at least one chunk")
    chunks = [chunk for column in columns for chunk in column]
    states, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_State())
            with states[-1].autocast():
                parts.append(encode(chunk))
    matrices = [part.values if isinstance(part, Ragged) else part for part in parts]
    sizes = [len(matrix) for matrix in matrices]
    values = torch.cat(matrices).requires_grad_(torch.is_grad_enabled())

    def encode_again(grad: Tensor) -> None:
        for index, (chunk, state, part) in enumerate(zip(chunks, states, grad.split(sizes), strict=True)):
            with no_sync() if index + 1 < len(chunks) else nullcontext():
                with state.random(), state.autocast(), torch.enable_grad():
                    again = encode(chunk)
                again = again.values if isinstance(again, Ragged) else again
                if again.requires_grad:  # not of a column whose encoder is frozen
                    again.backward(part)

    if values.requires_grad:
        values.register_hook(encode_again)
    return loss(*_columns(values, parts, [len(column) for column in columns]))


def _columns(values: Tensor, parts: Sequence[Ragged | Tensor], counts: Sequence[int]) -> list[Ragged | Tensor]:
    """The joined vectors, split into columns of `counts` chunks each."""
    ends = list(accumulate(counts, initial=0))
    groups = [parts[first:last] for first, last in zip(ends, ends[1:], strict=False)]
    sizes = [sum(len(part.values) if isinstance(part, Ragged) else len(part) for part in group) for group in groups]
    columns: list[Ragged | Tensor] = []
    for column, group in zip(values.split(sizes), groups, strict=True):
        lengths = [part.offsets.diff() for part in group if isinstance(part, Ragged)]
        if lengths:
            offsets = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), *lengths]).cumsum(0)
            columns.append(Ragged(column, offsets))
        else:
            columns.append(column)
    return columns


class _State:
    """What a forward pass depends on beside its arguments: random states and autocast."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        kinds = ("cpu", "cuda") if self.cuda else ("cpu",)
        self.kinds = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]

    def autocast(self) -> ExitStack:
        """Without a cache: weights that were cast without a graph would get no gradient."""
        stack = ExitStack()
        for kind, dtype, enabled in self.kinds:
            stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
        return stack

    def random(self) -> ExitStack:
        """The random states of then; those of now come back at the end."""
        stack = ExitStack()
        stack.enter_context(torch.random.fork_rng(devices=range(len(self.cuda))))
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        return stack
