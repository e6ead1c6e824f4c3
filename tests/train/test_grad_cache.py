"""GradCache: the gradients of one large batch, with dropout and autocast, in the memory of one chunk."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from cached_model import DOCUMENTS, DROPOUT, QUERIES, Model, assert_same, chunks, gradients, make, random_ids
from torch import Tensor, nn

from modernbert import ColBERT, Encoder, EncoderConfig, Ragged, Tokenizer, pack
from modernbert.heads.colbert import ColBERTConfig
from modernbert.packing import Packed, Tokens
from modernbert.train.grad_cache import grad_cache, token_chunks
from modernbert.train.in_batch import ELEMENTS, in_batch_info_nce
from modernbert.train.losses import kl_distill, n_way_scores
from modernbert.train.vector_losses import matryoshka

LOSS = partial(in_batch_info_nce, temperature=0.5)


def without_cache(encode: Callable, columns: list[list[Packed]], loss: Callable[..., Tensor], **_: object) -> Tensor:
    """The same chunks in the same order, all of them with their graph."""
    encoded = [[encode(chunk) for chunk in column] for column in columns]
    joined = [
        Ragged.from_list([text for part in parts for text in part])
        if isinstance(parts[0], Ragged)
        else torch.cat(parts)
        for parts in encoded
    ]
    return loss(*joined)


def step(run: Callable[..., Tensor], model: Model, factor: float, loss_of: Callable[..., Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    loss = run(model, chunks(), loss_of)
    between = torch.rand(1)
    (factor * loss).backward()
    return {"loss": loss.detach(), "random": torch.cat([between, torch.rand(1)]), **gradients(model)}


def assert_as_without_cache(
    model: Model, *, limit: float = 1e-12, factor: float = 1.0, loss: Callable[..., Tensor] = LOSS
) -> None:
    """Loss, gradients and random numbers, to `limit` of the largest entry."""
    got, wanted = (step(run, model, factor, loss) for run in (grad_cache, without_cache))
    assert_same(got, wanted, limit)


@pytest.mark.parametrize("late", [True, False], ids=["late interaction", "dense"])
@pytest.mark.parametrize("config", [{}, DROPOUT], ids=["", "dropout"])
@pytest.mark.parametrize("factor", [1.0, 96.0])
def test_gradients_are_those_without_cache(late: bool, config: dict[str, Any], factor: float) -> None:
    """In float64, where only the order of sums differs. PyLate's are off by the batch size.

    The random numbers that come after each pass are the same too, so that all else in a run stays as it is.
    """
    assert_as_without_cache(make(late, **config), factor=factor)


@pytest.mark.parametrize("late", [True, False], ids=["late interaction", "dense"])
def test_float32_gradients_are_as_accurate_as_without_cache(late: bool) -> None:
    """Chunks of 25 tokens against all texts in one forward pass; the truth is the latter in float64."""
    whole = [[pack(QUERIES)], [pack(DOCUMENTS)]]
    results = []
    for dtype, columns in ((torch.float32, chunks()), (torch.float32, whole), (torch.float64, whole)):
        model = make(late, dtype)
        grad_cache(model, columns, LOSS).backward()
        results.append(gradients(model))
    for name, truth in results[2].items():
        assert_accurate(results[0][name], results[1][name], truth, name)


@pytest.mark.parametrize("late", [True, False], ids=["late interaction", "dense"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_float32_with_dropout_draws_the_same_masks(device: str, late: bool) -> None:
    """A hundred rounding steps of the largest entry; other masks would change gradients by their own size."""
    model = make(late, torch.float32, **DROPOUT).to(device)
    assert_as_without_cache(model, limit=100 * torch.finfo(torch.float32).eps)


def test_late_interaction_of_colbert_with_expansion_and_a_skiplist() -> None:
    """The head of this package with all that its rows can be: unattended [MASK], rows that are left out."""
    folder = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
    settings = ColBERTConfig(query_length=12, document_length=20, do_query_expansion=True)
    encoder, tokenizer = Encoder.from_pretrained(folder), Tokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    model = ColBERT.from_encoder(encoder, tokenizer, dim=8, config=settings).double()
    queries = model.tokenize_queries(["what is a tensor?", "why", "how, and where?"])
    documents = model.tokenize_documents(["a tensor. is, a thing", "because!", "here; and (there).", "no words"])
    assert documents.rows is not None
    assert queries.batch.key_lengths is not None

    def encode(tokens: Tokens) -> Ragged:
        return Ragged(model(tokens.batch, rows=tokens.rows), tokens.offsets)

    results = []
    for columns in ([token_chunks(queries, 12), token_chunks(documents, 9)], [[queries], [documents]]):
        assert len(columns[0]) in (1, 3)
        model.zero_grad()
        loss = grad_cache(encode, columns, LOSS) if len(columns[0]) > 1 else LOSS(*map(encode, (queries, documents)))
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(model)})
    assert_same(*results, 1e-12)


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside of autocast", "backward inside"])
def test_chunks_are_encoded_again_under_the_same_autocast(inside: bool) -> None:
    """Also where the backward pass is inside of it, and autocast keeps weights of the pass without a graph."""
    model, seen = make(True, torch.float32), []

    def encode(batch: Packed) -> Ragged:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_grad_enabled()))
        return model(batch)

    columns = chunks()
    results = []
    for run in (grad_cache, without_cache):
        model.zero_grad()
        # Without cache, the plain gradients of chunks would be added up in bfloat16.
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=run is grad_cache):
            loss = run(encode, columns, LOSS)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        results.append(gradients(model))
    count = sum(map(len, columns))
    assert seen[:count] == [(True, torch.bfloat16, False)] * count
    assert seen[count : 2 * count] == [(True, torch.bfloat16, True)] * count
    assert results[0].keys() == dict(model.named_parameters()).keys()
    # bfloat16 rounds to 1/256; both sides round the same numbers, up to the order of sums.
    assert_same(*results, 2**-8)


def test_autocast_of_the_backward_pass_does_not_leak_into_chunks() -> None:
    """The reverse: encoded in float32, backward under autocast, as some loops do by mistake."""
    model, seen = make(False, torch.float32), []

    def encode(batch: Packed) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return model(batch)  # pyright: ignore[reportReturnType]

    loss = grad_cache(encode, chunks(), LOSS)
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    assert not any(seen)


def test_parameters_of_the_loss_are_trained_too() -> None:
    """A learned temperature, under a factor of the loss."""
    model, log_scale = make(False), torch.zeros((), dtype=torch.float64, requires_grad=True)

    def loss(queries: Tensor, documents: Tensor) -> Tensor:
        logits = queries @ documents.T * log_scale.exp()
        return F.cross_entropy(logits, torch.arange(len(queries)))

    found = []
    for run in (grad_cache, without_cache):
        log_scale.grad = None
        found.append(step(run, model, 3.0, loss))
        assert log_scale.grad is not None
        found[-1]["scale"] = log_scale.grad.clone()
    assert_same(*found, 1e-12)


@pytest.mark.parametrize("loss", ["KL of n documents each", "Matryoshka", "both directions"])
def test_any_loss_over_vectors(loss: str) -> None:
    losses: dict[str, Callable[..., Tensor]] = {
        "KL of n documents each": lambda q, d: kl_distill(n_way_scores(q, d), torch.eye(5)[:, :2]),
        "Matryoshka": partial(matryoshka, LOSS, widths=(16, 5)),
        "both directions": partial(LOSS, both_directions=True, elements=60),
    }
    assert_as_without_cache(make(True, **DROPOUT), loss=losses[loss])


def test_a_loss_that_ignores_a_column_gives_it_no_gradient() -> None:
    assert_as_without_cache(make(False), loss=lambda q, d: q.sum())


def test_a_frozen_encoder_of_one_side() -> None:
    """Queries are trained against documents that are not."""
    model, frozen = make(False), make(False).requires_grad_(False)

    def encode(named: tuple[str, Packed]) -> Tensor:
        return (model if named[0] == "query" else frozen)(named[1])  # pyright: ignore[reportReturnType]

    queries, documents = chunks()
    columns = [[("query", chunk) for chunk in queries], [("document", chunk) for chunk in documents]]
    results = []
    for run in (grad_cache, without_cache):
        model.zero_grad()
        run(encode, columns, LOSS).backward()
        results.append(gradients(model))
    assert_same(*results, 1e-12)
    assert not gradients(frozen)


def test_gradients_add_up_over_steps_as_any_gradient() -> None:
    model = make(False)
    once = {name: value.clone() for name, value in step(grad_cache, model, 1.0, LOSS).items()}
    (2 * grad_cache(model, chunks(), LOSS)).backward()
    assert_same(gradients(model), {name: 3 * once[name] for name in gradients(model)}, 1e-12)


def test_validation_encodes_once() -> None:
    model, calls = make(True), []

    def encode(batch: Packed) -> Ragged | Tensor:
        calls.append(batch)
        return model(batch)

    with torch.no_grad():
        loss = grad_cache(encode, chunks(), LOSS)
    assert not loss.requires_grad
    assert len(calls) == sum(map(len, chunks()))


def test_all_chunks_but_the_last_are_within_no_sync() -> None:
    model, inside, seen = make(False), [], []

    @contextmanager
    def no_sync() -> Iterator[None]:
        inside.append(True)
        yield
        inside.pop()

    def encode(batch: Packed) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(bool(inside))
        return model(batch)  # pyright: ignore[reportReturnType]

    grad_cache(encode, chunks(), LOSS, no_sync=no_sync).backward()
    assert seen == [True] * (len(seen) - 1) + [False]
    assert len(seen) > 3


# Chunks


def test_chunks_hold_no_more_tokens_than_asked_for() -> None:
    batch = pack(DOCUMENTS)
    for tokens in (1, 20, 33, 40, 1000):
        found = token_chunks(batch, tokens)
        assert all(chunk.num_tokens <= tokens or len(chunk) == 1 for chunk in found)
        assert torch.equal(torch.cat([chunk.input_ids for chunk in found]), batch.input_ids)
        assert sum((chunk.lengths for chunk in found), ()) == batch.lengths
    assert len(token_chunks(batch, 1000)) == 1


def test_empty_chunks_fill_up_for_ranks_that_need_as_many() -> None:
    """They change nothing, on a rank without any pair either."""
    model = make(True)
    wanted = step(grad_cache, model, 1.0, LOSS)
    columns = [token_chunks(pack(texts), 25, at_least=9) for texts in (QUERIES, DOCUMENTS)]
    assert [len(column) for column in columns] == [9, 9]
    model.zero_grad()
    grad_cache(model, columns, LOSS).backward()
    assert_same(gradients(model), {name: wanted[name] for name in gradients(model)}, 1e-12)
    assert [len(chunk) for chunk in token_chunks(pack([]), 25)] == [0]
    model.zero_grad()
    grad_cache(model, [token_chunks(pack([]), 25)] * 2, LOSS).backward()
    assert not any(grad.any() for grad in gradients(model).values())


def test_wrong_arguments_are_named() -> None:
    for tokens in (0, -1, 2.5):
        with pytest.raises(ValueError, match="max_tokens must be at least 1"):
            token_chunks(pack(QUERIES), tokens)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="at_least must be at least 1"):
        token_chunks(pack(QUERIES), 10, at_least=0)
    for columns in ([], [[], chunks()[0]]):
        with pytest.raises(ValueError, match="at least one chunk"):
            grad_cache(make(False), columns, LOSS)


# Memory


class Saved:
    """Bytes that autograd keeps for the backward pass besides the weights, and the most that it has kept."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        self.uses: dict[int, int] = {}
        self.now = self.most = 0

    def keep(self, storage: int, size: int) -> None:
        self.uses[storage] = self.uses.get(storage, 0) + 1
        self.now += size if self.uses[storage] == 1 else 0
        self.most = max(self.most, self.now)

    def free(self, storage: int, size: int) -> None:
        self.uses[storage] -= 1
        self.now -= 0 if self.uses[storage] else size

    @contextmanager
    def counted(self) -> Iterator[Saved]:
        def pack_hook(tensor: Tensor) -> Callable[[], Tensor]:
            def kept() -> Tensor:
                return tensor

            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.weights:
                found = storage.data_ptr(), storage.nbytes()
                self.keep(*found)
                weakref.finalize(kept, self.free, *found)
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda kept: kept()):
            yield self


def test_the_graph_of_one_chunk_is_kept_at_a_time() -> None:
    """Sixteen chunks of equal texts take what one takes, and a sixteenth of one batch without cache."""
    texts = random_ids([40] * 16)
    columns = [[pack(texts[:2])], token_chunks(pack(texts), 40)]
    assert len(columns[1]) == 16
    most = []
    for run in (grad_cache, without_cache):
        model = make(True)
        with Saved(model).counted() as saved:
            run(model, columns, partial(LOSS, elements=1)).backward()
        most.append(saved.most)
        assert saved.now == 0
    with Saved(model).counted() as one:
        kept = model(columns[0][0])
    assert kept is not None
    assert most[0] < 1.5 * one.most
    assert most[1] > 6 * most[0]


def test_16384_pairs_of_the_17m_fit_into_80_gb() -> None:
    """By calculation from what autograd keeps of a token of Ettin-17m in bfloat16, 2 bytes an element.

    Queries of 32 and documents of 180 tokens are 3.5 million tokens. Autograd keeps 94 kB of each without fused ops:
    326 GB for all of them, and 6 GB for a chunk of 65,536. The vectors with their gradients take 1.3 GB, a block of
    scores 0.5 GB, the weights and the optimizer 0.3 GB.
    """
    torch.manual_seed(0)
    none = dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id"))
    config = replace(EncoderConfig.preset("ettin-17m"), vocab_size=100, **none)
    encoder, length, pairs = Encoder(config).bfloat16(), 256, 16_384
    with Saved(encoder).counted() as saved:
        kept = encoder(pack(random_ids([length])))
    assert kept.dtype is torch.bfloat16
    bytes_per_token = saved.most / length
    without, chunk = (tokens * bytes_per_token / 1e9 for tokens in (pairs * (32 + 180), 65_536))
    width = 48
    vectors = pairs * (32 + 180) * width * (2 + 2 + 4) / 1e9  # with their gradients in both dtypes
    block = (2 * ELEMENTS + 4 * 4 * ELEMENTS / 32 + 2 * pairs * 180 * width) / 1e9  # maxima, scores, a gradient
    weights = 17e6 * 16 / 1e9  # float32, with gradients and the two moments of AdamW
    assert without > 80
    assert chunk + vectors + block + weights < 20
