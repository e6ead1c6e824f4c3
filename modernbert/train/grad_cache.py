"""GradCache (arXiv 2101.06983): large contrastive batches in the memory of one chunk.

The batch is encoded chunk by chunk without a graph, and the loss is computed over all vectors. Its backward pass
encodes each chunk again, with a graph, and takes the gradient of its vectors on to the weights. The price is one more
forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import accumulate
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..late_interaction import Ragged, check_count, token_blocks
from ..packing import Packed, Tokens

C = TypeVar("C")
P = TypeVar("P", Packed, Tokens)


def token_chunks(batch: P, max_tokens: int, *, at_least: int = 1) -> list[P]:
    """Consecutive texts of at most `max_tokens` tokens together; a longer text is a chunk of its own.

    Args:
        at_least: a number of chunks that empty ones fill up. All ranks of a model sharded by `fully_shard` need as many
            chunks, as each gathers weights: `max(ranks.gather(len(token_chunks(batch, max_tokens))))`.

    Raises:
        ValueError: a `max_tokens` or `at_least` that is not a whole number from 1.
    """
    check_count("max_tokens", max_tokens)
    check_count("at_least", at_least)
    lengths = batch.batch.lengths if isinstance(batch, Tokens) else batch.lengths
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int64, device="cpu")
    spans = list(token_blocks(offsets, max_tokens))
    spans += [(0, 0)] * (at_least - len(spans))
    return [batch.select(range(first, last)) for first, last in spans]


def grad_cache(
    encode: Callable[[C], Ragged | Tensor],
    columns: Sequence[Sequence[C]],
    loss: Callable[..., Tensor],
    *,
    no_sync: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Tensor:
    """`loss(*vectors)` with the gradients of one large batch, in the memory of one chunk.

    The result is used as any loss: `backward()` encodes every chunk again, with the random numbers and the autocast of
    the first time. Gradients equal those without chunks up to rounding, whatever the result is multiplied by.

        queries, documents = token_chunks(queries, 65_536), token_chunks(documents, 65_536)
        loss = grad_cache(encode, [queries, documents], partial(in_batch_info_nce, temperature=0.02))
        loss.backward()

    Args:
        encode: a chunk to its vectors, with the model's graph: the token vectors of texts as a `Ragged` for late
            interaction, or `[b, E]`. Called twice for each chunk, it has to give the same vectors.
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
    moments, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            moments.append(_Moment())
            parts.append(encode(chunk))
    # One leaf for all chunks, so that one hook sees all gradients, and knows the last chunk.
    values = torch.cat([_rows(part) for part in parts]).requires_grad_(torch.is_grad_enabled())
    sizes = [len(_rows(part)) for part in parts]

    def encode_again(grad: Tensor) -> None:
        for index, (chunk, moment, grad_part) in enumerate(zip(chunks, moments, grad.split(sizes), strict=True)):
            with no_sync() if index + 1 < len(chunks) else nullcontext():
                with moment.again(), torch.enable_grad():
                    rows = _rows(encode(chunk))
                if rows.requires_grad:  # those of a frozen encoder do not
                    rows.backward(grad_part)

    if values.requires_grad:
        values.register_hook(encode_again)
    remaining = iter(parts)
    groups = [[next(remaining) for _ in column] for column in columns]
    joined = values.split([sum(len(_rows(part)) for part in group) for group in groups])
    return loss(*map(_texts, joined, groups))


def _rows(vectors: Ragged | Tensor) -> Tensor:
    return vectors.values if isinstance(vectors, Ragged) else vectors


def _texts(rows: Tensor, parts: Sequence[Ragged | Tensor]) -> Ragged | Tensor:
    """The joined rows of chunks, divided into texts if those of the chunks are."""
    lengths = [part.offsets.diff() for part in parts if isinstance(part, Ragged)]
    return Ragged(rows, F.pad(torch.cat(lengths).cumsum(0), (1, 0))) if lengths else rows


class _Moment:
    """What a forward pass depends on besides its arguments and the weights: random states and autocast."""

    def __init__(self) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        kinds = ("cpu", "cuda") if self.cuda else ("cpu",)
        self.autocast = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds]

    @contextmanager
    def again(self) -> Iterator[None]:
        """The random numbers and the autocast of then. The random states of now come back at the end."""
        with torch.random.fork_rng(devices=range(len(self.cuda))), ExitStack() as stack:
            torch.set_rng_state(self.cpu)
            if self.cuda:
                torch.cuda.set_rng_state_all(self.cuda)
            for arguments in self.autocast:
                stack.enter_context(torch.autocast(*arguments))
            yield
