"""Ids to `Tokens` in one place: what training assembles is what inference reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from modernbert import ColBERT, Ragged, Session, maxsim
from modernbert.encoder import Encoder
from modernbert.heads.colbert import ColBERTConfig
from modernbert.packing import Tokens
from modernbert.tokenizer import Tokenizer

BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
TEXTS = ["How do I fold a tensor?", "", "  a b.  ", "words, " * 60]


def make(template: dict[str, Any] | None = None, **settings: Any) -> ColBERT:
    content = json.loads((BACKBONE / "tokenizer.json").read_text("utf-8"))
    if template is not None:
        content["post_processor"] = template
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))
    settings = {"query_length": 12, "document_length": 20} | settings
    return ColBERT.from_encoder(Encoder.from_pretrained(BACKBONE), tokenizer, dim=8, config=ColBERTConfig(**settings))


def assert_same(got: Tokens, wanted: Tokens) -> None:
    assert got.batch.input_ids.tolist() == wanted.batch.input_ids.tolist()
    assert got.batch.lengths == wanted.batch.lengths
    assert got.keep.tolist() == wanted.keep.tolist()
    keys = [None if batch.key_lengths is None else batch.key_lengths.tolist() for batch in (got.batch, wanted.batch)]
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_query_expansion": True},
        {"do_query_expansion": True, "attend_to_expansion_tokens": True},
        {"query_prefix": "", "document_prefix": ""},
        {"query_prompt": "ask: ", "document_prompt": "read: ", "strip": False},
        {"query_length": 3, "document_length": 3},
    ],
)
def test_ids_to_tokens_is_the_second_half_of_tokenizing(settings: dict[str, Any]) -> None:
    model = make(**settings)
    ids = model.query_ids(TEXTS)
    assert_same(model.query_tokens(ids), model.tokenize_queries(TEXTS, spans=False))
    longer = [[*row, *[7] * (99 if len(row) > 7 else 0)] for row in ids]
    assert_same(model.query_tokens(longer), model.query_tokens(ids))
    ids = model.document_ids(TEXTS)
    assert_same(model.document_tokens(ids), model.tokenize_documents(TEXTS, spans=False))
    assert_same(model.document_tokens([*ids[:3], ids[3] * 9]), model.document_tokens(ids))


def test_spans_are_cut_and_framed_with_their_ids() -> None:
    model = make(do_query_expansion=True, query_length=6)
    tokens = model.query_tokens([[10, 11, 12, 13], [14]], [[(0, 1), None, (2, 3), (3, 4)], [(0, 2)]])
    assert tokens.spans == [[None, None, (0, 1), None, (2, 3), None], [None, None, (0, 2), None, None, None]]
    assert [len(row) for row in tokens.spans] == list(tokens.batch.lengths)


def test_an_uncut_document_stays_uncut() -> None:
    model = make()
    assert model.document_tokens([[10] * 50], truncate=False).batch.lengths == (53,)
    assert model.document_tokens([[10] * 50]).batch.lengths == (20,)


@pytest.mark.parametrize(("single", "front", "back"), [("$A [SEP]", 0, 1), ("[CLS] $A", 1, 0), ("$A", 0, 0)])
def test_the_template_of_the_tokenizer_is_kept(single: str, front: int, back: int) -> None:
    """Not every tokenizer puts [CLS] and [SEP] around a text."""
    names = [name for name in ("[CLS]", "[SEP]") if name in single]
    ids = {name: make().tokenizer.token_to_id(name) for name in names}
    pieces = [
        {"Sequence": {"id": "A", "type_id": 0}} if piece == "$A" else {"SpecialToken": {"id": piece, "type_id": 0}}
        for piece in single.split()
    ]
    model = make(
        {
            "type": "TemplateProcessing",
            "single": pieces,
            "pair": [*pieces, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in names},
        },
        document_prefix="",
    )
    tokens = model.tokenize_documents(["fold a tensor"])
    whole = model.tokenizer.encode_batch(["fold a tensor"])[0].ids
    assert tokens.batch.input_ids.tolist() == whole
    assert model.document_ids(["fold a tensor"]) == [whole[front : len(whole) - back]]


def test_a_length_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="a length of 2 has no room for the 3 tokens around a text"):
        make(query_length=2).query_tokens([[10]])


def test_tokens_give_a_ragged_with_gradients() -> None:
    """Three calls were needed: the batch, its rows, its offsets."""
    model = make().train()
    queries, documents = model.tokenize_queries(TEXTS), model.tokenize_documents(TEXTS)
    assert documents.rows is not None
    scores = maxsim(model(queries.to("cpu")), model(documents))
    parts = [Ragged(model(t.batch, rows=t.rows), t.offsets) for t in (queries, documents)]
    assert torch.equal(scores, maxsim(*parts))
    weights = [p for p in model.parameters() if p.requires_grad]
    cross_entropy(scores, torch.arange(len(TEXTS))).backward()
    got = [p.grad.clone() for p in weights if p.grad is not None]
    assert len(got) == len(weights)
    wanted = torch.autograd.grad(cross_entropy(maxsim(*parts), torch.arange(len(TEXTS))), weights)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_hooks_see_one_call_with_its_ragged() -> None:
    model, seen = make(), []
    model.register_forward_hook(lambda module, args, output: seen.append(type(output)))
    model(model.tokenize_queries(["one"]))
    assert seen == [Ragged]


@pytest.mark.parametrize("settings", [{}, {"do_query_expansion": True}])
def test_a_ragged_is_what_encoding_gives(settings: dict[str, Any]) -> None:
    model = make(**settings).eval()
    with torch.no_grad():
        for tokenize, encode in (
            (model.tokenize_queries, model.encode_queries),
            (model.tokenize_documents, model.encode_documents),
        ):
            got, wanted = model(tokenize(TEXTS)), encode([text[:40] for text in TEXTS])
            assert len(got) == len(wanted)
            torch.testing.assert_close(got[0], wanted[0], rtol=0, atol=1e-5)
        assert len(model(model.tokenize_queries([]))) == 0


def test_what_else_is_called_with_tokens_says_what_it_takes() -> None:
    model = make().eval()
    tokens = model.tokenize_queries(["one"])
    with pytest.raises(ValueError, match="Tokens have rows of their own"):
        model(tokens, rows=torch.tensor([0]))
    with pytest.raises(TypeError, match="got one Tokens: a model takes its `batch`"):
        model.encoder(tokens)
    with pytest.raises(TypeError, match=r"called with a Packed, got Tokens: .* encode_tokens"):
        Session(model)(tokens)  # pyright: ignore
    with pytest.raises(TypeError, match=r"called with a Packed, got list: .* Tokens with tokenize_queries\(texts\)"):
        model(["a text"])  # pyright: ignore


def test_tokens_know_what_was_cut() -> None:
    model = make()
    tokens = model.tokenize_documents([TEXTS[0], "word " * 40])
    whole = model.tokenize_documents(["word " * 40], truncate=False)
    assert tokens.truncated == (0, whole.batch.num_tokens - 20)
    assert whole.truncated == (0,)
    assert model.query_tokens([[10] * 3, [10] * 30]).truncated == (0, 30 + 3 - 12)


class Scores(nn.Module):
    """A model that gives a Ragged inside of what a trainer wraps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = make().double()

    def forward(self, tokens: Tokens) -> Ragged:
        return self.model(tokens)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    scores = Scores()
    ddp = nn.parallel.DistributedDataParallel(scores, static_graph=True)
    found = {}
    for step in range(2):
        scores.zero_grad()
        ddp(scores.model.tokenize_documents(TEXTS[2 * rank : 2 * rank + 2])).values[:, 0].sum().backward()
        found[f"ddp {step}"] = [p.grad.clone() for p in scores.parameters() if p.grad is not None]
    scores = Scores()
    for part in (*scores.model.encoder.layers, scores.model, scores):
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    scores(scores.model.tokenize_documents(TEXTS[2 * rank : 2 * rank + 2])).values[:, 0].sum().backward()
    found["fsdp"] = [p.grad.full_tensor() for p in scores.parameters() if p.grad is not None]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.sweep
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_ddp_and_fsdp_find_the_tensors_of_a_ragged(tmp_path: Path) -> None:
    """With a static graph, DDP never joined the gradients of the first step."""
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    scores = Scores()
    scores(scores.model.tokenize_documents(TEXTS)).values[:, 0].sum().backward()
    wanted = [p.grad for p in scores.parameters() if p.grad is not None]
    for rank in range(2):
        for way, got in torch.load(tmp_path / f"{rank}.pt").items():
            assert len(got) == len(wanted), way
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(2 * a, b, rtol=0, atol=1e-12 * b.abs().max().item(), msg=way)
