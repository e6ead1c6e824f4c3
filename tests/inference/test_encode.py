"""How batches reach the model: nothing lost, doubled or reordered, budgets hold, processes are one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_twin import TINY, random_ids, twins
from torch import Tensor, nn

from modernbert import ColBERT, Packed, Session, pack
from modernbert.encoder import Encoder
from modernbert.heads.colbert import ColBERTConfig
from modernbert.inference import batches, devices, encode
from modernbert.inference.batches import CPU_TOKENS, full_wave, micro_batches, plan, token_budget
from modernbert.inference.callers import map_callers
from modernbert.tokenizer import Tokenizer

BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
LONG = "a longer text, of some more words than the others have " * 3
TEXTS = ["one", "", LONG, "two words", "wal, rus!"] * 4


@pytest.fixture(scope="module")
def colbert() -> ColBERT:
    torch.manual_seed(0)
    encoder, tokenizer = Encoder.from_pretrained(BACKBONE), Tokenizer.from_pretrained(BACKBONE)
    config = ColBERTConfig(query_length=16, document_length=40, do_query_expansion=True)
    return ColBERT.from_encoder(encoder, tokenizer, dim=24, config=config).eval()


# The planner


@pytest.mark.parametrize("lengths", [[], [0], [5], [0, 0, 0], [9, 1, 30, 7, 7, 100, 2, 0, 99, 3]])
@pytest.mark.parametrize("tokens", [1, 30, 1000])
def test_plan(lengths: list[int], tokens: int) -> None:
    """Every text once, longest first, no batch over budget unless it is one text, none closed too early."""
    batches = plan(lengths, tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    in_order = [lengths[i] for batch in batches for i in batch]
    assert in_order == sorted(lengths, reverse=True)
    sizes = [sum(lengths[i] for i in batch) for batch in batches]
    for batch, size in zip(batches, sizes, strict=True):
        assert size <= tokens or len(batch) == 1
    for size, following in zip(sizes, batches[1:], strict=False):
        assert size + lengths[following[0]] > tokens


@pytest.mark.parametrize("lengths", [[3000], [5, 3000, 7], [900] * 5, [0, 2048, 0, 1, 0], [2048], [], [1] * 5000])
def test_micro_batches_are_the_batch(lengths: list[int]) -> None:
    """In order, whole sequences, within the budget unless it is one sequence alone."""
    batch = pack(random_ids(lengths, 100))
    parts = micro_batches(batch, CPU_TOKENS)
    for name in ("input_ids", "positions"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert sum((part.lengths for part in parts), ()) == batch.lengths
    for part in parts:
        assert part.cu_seqlens.tolist() == pack([[0] * n for n in part.lengths]).cu_seqlens.tolist()
        assert part.num_tokens <= CPU_TOKENS or sum(n > 0 for n in part.lengths) == 1
    for part, following in pairwise(parts):
        assert part.num_tokens + following.lengths[0] > CPU_TOKENS
    assert len(parts) > 1 or sum(lengths) <= 2048 or len(lengths) == 1


def test_callers_share_the_work_and_one_caller_does_not_cut_it() -> None:
    cpu = torch.device("cpu")
    assert token_budget(cpu, 256, total=10**6, callers=2) == CPU_TOKENS
    assert token_budget(cpu, 256, total=8000, callers=2) == 1000
    assert token_budget(cpu, 256, total=500, callers=8) == batches.FEWEST_TOKENS
    assert token_budget(cpu, 256, total=500, callers=1) == CPU_TOKENS


def test_callers_have_one_thread_each_and_leave_the_number_as_it_was() -> None:
    """The number that a thread sets last is that of every thread that starts later."""

    def threads_of_a_new_thread() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = list(
            map_callers(lambda item: (item, torch.get_num_threads(), torch.is_inference_mode_enabled()), range(9), 2)
        )
        assert found == [(item, 1, True) for item in range(9)]
        assert torch.get_num_threads() == threads_of_a_new_thread() == 2
        with pytest.raises(ZeroDivisionError):
            list(map_callers(lambda item: 1 // item, [1, 0, 1], 2))
        assert threads_of_a_new_thread() == 2
    finally:
        torch.set_num_threads(before)


def test_several_callers_give_the_rows_of_one(colbert: ColBERT) -> None:
    texts = [LONG * (1 + n % 3) for n in range(60)]
    wanted = colbert.encode_documents(texts)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        got = [colbert.encode_documents(texts), Session(colbert).encode_documents(texts)]
        with torch.autocast("cpu", torch.bfloat16):  # a setting of one thread
            half = colbert.encode_documents(texts)
    finally:
        torch.set_num_threads(before)
    for ragged in got:
        torch.testing.assert_close(ragged.values, wanted.values, rtol=0, atol=2e-6)
    assert 1e-4 < (half.values - wanted.values).abs().max() < 0.1


# Texts to rows


def one_by_one(model: ColBERT, texts: list[str]) -> list[Tensor]:
    return [model.encode_documents([text])[0] for text in texts]


@pytest.mark.parametrize("batch_tokens", [None, 1, 45, 10_000])
def test_order_and_budget(colbert: ColBERT, batch_tokens: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come back in the order of the texts, whatever the batches were; tokenising goes in parts too."""
    monkeypatch.setattr(encode, "TEXTS", 7)
    seen: list[Packed] = []
    hook = colbert.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ragged = colbert.encode_documents(TEXTS, batch_tokens=batch_tokens)
    hook.remove()
    assert sum(len(batch) for batch in seen) == len(TEXTS)
    for batch in seen:
        assert batch.num_tokens <= (batch_tokens or CPU_TOKENS) or len(batch) == 1
    wanted = one_by_one(colbert, TEXTS)
    assert len(ragged) == len(wanted)
    for mine, yours in zip(ragged, wanted, strict=True):
        torch.testing.assert_close(mine, yours, rtol=0, atol=2e-6)


def test_rows_are_ordinary_float32(colbert: ColBERT) -> None:
    """They may meet autograd later, which inference tensors may not; for one text, and in bfloat16, too."""
    for texts in (TEXTS[:1], TEXTS):
        values = colbert.encode_queries(texts).values
        assert not values.is_inference()
        (values * torch.ones(24, requires_grad=True)).sum().backward()
    twin = ColBERT.from_encoder(colbert.encoder, colbert.tokenizer, dim=24).bfloat16()
    try:
        assert twin.encode_queries(TEXTS).values.dtype == torch.float32
    finally:
        colbert.float()
    for empty in (colbert.encode_queries([]), colbert.encode_documents([], devices=["cpu"])):
        assert (len(empty), empty.values.shape) == (0, (0, 24))


def test_modes_are_never_changed(colbert: ColBERT) -> None:
    """A frozen backbone stays in evaluation mode, one part in training stays so; what is encoded is in evaluation."""
    seen: list[bool] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(module.training)

    for part in (colbert, colbert.dense, colbert.encoder.layers[1], nn.Module()):
        colbert.eval()
        part.train()
        before = {name: module.training for name, module in colbert.named_modules()}
        seen.clear()
        hooks = [module.register_forward_pre_hook(note) for module in colbert.modules()]
        try:
            colbert.encode_queries(TEXTS[:2])
            with pytest.raises(TypeError):
                colbert.encode_queries([3])  # pyright: ignore
        finally:
            for hook in hooks:
                hook.remove()
        assert seen
        assert not any(seen)
        assert {name: module.training for name, module in colbert.named_modules()} == before
    colbert.eval()


def test_a_head_gets_the_mode_of_its_encoder() -> None:
    for training in (False, True):
        encoder = Encoder.from_pretrained(BACKBONE).train(training)
        encoder.layers[0].train(not training)
        made = ColBERT.from_encoder(encoder, Tokenizer.from_pretrained(BACKBONE), dim=24)
        assert made.training == made.dense.training == made.dense[0].linear.training == training
        assert encoder.layers[0].training != training


def test_dropout_is_replayed_at_any_size() -> None:
    """GradCache computes a batch without gradients, and with them again from the same random state."""
    encoder = twins(replace(TINY, mlp_dropout=0.1))[1].train()
    for count in (30, 60):
        batch = pack(random_ids([60] * count, 100))
        with torch.no_grad():
            torch.manual_seed(7)
            first = encoder(batch)
        torch.manual_seed(7)
        assert torch.equal(first, encoder(batch).detach())


def test_two_processes_give_the_rows_of_one(colbert: ColBERT, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = colbert.encode_documents(TEXTS)
    monkeypatch.setattr(devices, "TEXTS", 3)  # several parts for each process
    got = colbert.encode_documents(TEXTS, devices=["cpu", "cpu"])
    assert torch.equal(got.offsets, wanted.offsets)
    torch.testing.assert_close(got.values, wanted.values, rtol=0, atol=2e-6)
    assert not got.values.is_shared(), "rows in /dev/shm fill it up"


def test_progress_is_silent_unless_asked_for(
    colbert: ColBERT, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal long work shows a bar; it never writes to stdout, where results go."""

    def written(texts: int, terminal: bool, **options: Any) -> str:
        monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
        capsys.readouterr()
        colbert.encode_queries(["a"] * texts, **options)
        out, err = capsys.readouterr()
        assert out == ""
        return err

    monkeypatch.setattr(encode, "PROGRESS_TEXTS", 20)
    assert written(30, terminal=False) == ""
    assert written(19, terminal=True) == ""
    assert written(30, terminal=True, progress=False) == ""
    assert "30/30" in written(30, terminal=True)
    assert "2/2" in written(2, terminal=True, progress=True)


def test_wrong_calls(colbert: ColBERT) -> None:
    with pytest.raises(TypeError, match="got one str: put it in a list"):
        colbert.encode_queries("a text")
    with pytest.raises(ValueError, match="devices is empty"):
        colbert.encode_queries(["a text"], devices=[])


# Batches on their way


def test_one_ahead_is_map_and_hands_on_what_is_raised() -> None:
    begun: list[int] = []

    def double(item: int) -> int:
        begun.append(item)
        if item == 5:
            raise ValueError("five")
        return 2 * item

    assert list(encode.one_ahead(double, [])) == []
    taken = encode.one_ahead(double, range(9))
    assert [next(taken) for _ in range(4)] == [0, 2, 4, 6]
    assert max(begun) <= 5  # no further ahead than one
    assert next(taken) == 8
    with pytest.raises(ValueError, match="five"):
        next(taken)


@pytest.mark.parametrize(
    ("processors", "width", "rows"),
    [(132, 768, 2816), (132, 256, 8448), (128, 768, 8192), (128, 1024, 2048), (3, 100, 384)],
)
def test_full_waves(processors: int, width: int, rows: int) -> None:
    assert full_wave(processors, width) == rows
    tiles = rows // 128 * -(-width // 128)
    assert tiles % processors == 0


def test_tokens_without_spans_are_the_same_tokens(colbert: ColBERT) -> None:
    for tokenize in (colbert.tokenize_queries, colbert.tokenize_documents):
        plain, full = tokenize(TEXTS, spans=False), tokenize(TEXTS)
        assert plain.spans == []
        assert len(full.spans) == len(TEXTS)
        assert torch.equal(plain.batch.input_ids, full.batch.input_ids)
        assert torch.equal(plain.keep, full.keep)
        assert plain.select([3, 0]).spans == []
