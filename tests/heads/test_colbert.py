"""A new ColBERT on an encoder: tokens and rows, gradients through everything, folders, mistakes."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import torch.nn.functional as F
from accuracy import assert_accurate
from hf_twin import make_loud
from torch import Tensor

from modernbert import ColBERT, Session, maxsim, pack
from modernbert.encoder import Encoder
from modernbert.heads.colbert import ColBERTConfig
from modernbert.heads.dense import Dense
from modernbert.late_interaction import Ragged
from modernbert.tokenizer import Tokenizer
from modernbert_kernels import backend

BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
QUERIES = ["How do I fold a tensor?", "a", "the gradient of the norm"]
DOCUMENTS = ["To fold a tensor, reshape it first.", "The norm has a gradient; see below!", "", "words " * 60]


@pytest.fixture(scope="module")
def plain_tokenizer() -> Tokenizer:
    """The fixture's tokenizer without "[Q] " and "[D] ", as of an encoder that is not yet a ColBERT."""
    content = json.loads((BACKBONE / "tokenizer.json").read_text("utf-8"))
    content["added_tokens"] = [x for x in content["added_tokens"] if x["content"] not in ("[Q] ", "[D] ")]
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)))


def make(tokenizer: Tokenizer, **options: Any) -> ColBERT:
    torch.manual_seed(0)
    encoder = Encoder.from_pretrained(BACKBONE)
    make_loud(encoder)
    encoder.resize_token_embeddings(501)  # what the plain tokenizer needs
    return ColBERT.from_encoder(encoder, tokenizer, dim=24, **options).eval()


def test_from_encoder(plain_tokenizer: Tokenizer) -> None:
    """Two tokens more, two rows more; the old rows and the caller's tokenizer are as they were."""
    torch.manual_seed(0)
    encoder = Encoder.from_pretrained(BACKBONE)
    encoder.resize_token_embeddings(501)
    before = encoder.embeddings.tok_embeddings.weight.clone()
    colbert = ColBERT.from_encoder(encoder, plain_tokenizer, dim=24)
    assert colbert.encoder is encoder
    assert plain_tokenizer.token_to_id("[Q] ") is None
    assert [colbert.tokenizer.token_to_id(token) for token in ("[Q] ", "[D] ")] == [501, 502]
    after = encoder.embeddings.tok_embeddings.weight
    assert after.shape == (503, 64)
    assert torch.equal(after[:501], before)
    assert encoder.config.vocab_size == 503
    assert colbert.dim == 24
    (dense,) = colbert.dense
    assert dense.linear.weight.shape == (24, 64)
    assert dense.linear.bias is None
    assert 0.5 < dense.linear.weight.std() * 64**0.5 < 1.5
    assert colbert.config == ColBERTConfig()


def test_an_encoder_with_room_for_the_prefixes_is_not_resized(plain_tokenizer: Tokenizer) -> None:
    encoder = Encoder.from_pretrained(BACKBONE)
    encoder.resize_token_embeddings(512)
    table = encoder.embeddings.tok_embeddings.weight
    colbert = ColBERT.from_encoder(encoder.bfloat16(), plain_tokenizer, dim=8)
    assert colbert.encoder.embeddings.tok_embeddings.weight is table
    assert {p.dtype for p in colbert.parameters()} == {torch.bfloat16}
    again = ColBERT.from_encoder(encoder, colbert.tokenizer, dim=8)
    assert again.tokenizer.vocab_size == 503


def test_what_the_encoder_sees(plain_tokenizer: Tokenizer) -> None:
    config = ColBERTConfig(query_length=12, document_length=20, do_query_expansion=True)
    colbert = make(plain_tokenizer, config=config)
    token = colbert.tokenizer
    cls, sep, mask = token.cls_token_id, token.sep_token_id, token.mask_token_id
    queries = colbert.tokenize_queries(QUERIES)
    for ids, keys, text in zip(
        queries.batch.input_ids.split(queries.batch.lengths), queries.batch.key_lengths, QUERIES, strict=True
    ):
        inner = token.encode_batch([text])[0].ids[1:-1]
        real = [cls, 501, *inner[:9], sep]
        assert ids.tolist() == real + [mask] * (12 - len(real))
        assert int(keys) == len(real)
    assert queries.keep.all()
    documents = colbert.tokenize_documents(DOCUMENTS)
    assert documents.batch.key_lengths is None
    assert documents.batch.lengths[2:] == (3, 20)
    for ids, keep in zip(
        documents.batch.input_ids.split(documents.batch.lengths),
        documents.keep.split(documents.batch.lengths),
        strict=True,
    ):
        assert ids[:2].tolist() == [cls, 502]
        assert int(ids[-1]) == sep
        words = [token.id_to_token(int(i)) for i in ids]
        assert keep.tolist() == [word not in config.skiplist_words for word in words]
    assert not documents.keep.all()


def test_rows_are_unit_vectors_in_the_order_of_the_texts(plain_tokenizer: Tokenizer) -> None:
    colbert = make(plain_tokenizer)
    for encode, texts in ((colbert.encode_queries, QUERIES), (colbert.encode_documents, DOCUMENTS)):
        together = encode(texts)
        torch.testing.assert_close(together.values.norm(dim=-1), torch.ones(len(together.values)))
        for rows, text in zip(together, texts, strict=True):
            torch.testing.assert_close(rows, encode([text])[0], rtol=0, atol=2e-6)
        backwards = encode(texts[::-1])
        for rows, mirrored in zip(together, list(backwards)[::-1], strict=True):
            torch.testing.assert_close(rows, mirrored, rtol=0, atol=2e-6)


def loss(scores: Tensor) -> Tensor:
    return F.cross_entropy(scores, torch.tensor([0, 1, 3]))


def dense_loss(colbert: ColBERT) -> Tensor:
    """The same training step with no packing: one text at a time, every similarity in one matrix."""

    def rows(tokens: Any, index: int) -> Tensor:
        part = tokens.select([index])
        keys = None if part.batch.key_lengths is None else int(part.batch.key_lengths[0])
        ids = part.batch.input_ids[None]
        real = torch.arange(ids.shape[1])[None] < (ids.shape[1] if keys is None else keys)
        batch = pack(ids, real, query_mask=~real) if keys is not None else pack(ids)
        x = colbert.encoder(batch)
        y = x @ colbert.dense[0].linear.weight.T
        return (y / y.square().sum(-1, keepdim=True).sqrt())[part.keep]

    queries, documents = colbert.tokenize_queries(QUERIES), colbert.tokenize_documents(DOCUMENTS)
    q = [rows(queries, i) for i in range(3)]
    d = [rows(documents, i) for i in range(4)]
    return loss(torch.stack([torch.stack([(x @ y.T).amax(1).sum() for y in d]) for x in q]))


def packed_loss(colbert: ColBERT) -> Tensor:
    queries, documents = colbert.tokenize_queries(QUERIES), colbert.tokenize_documents(DOCUMENTS)
    return loss(maxsim(queries.ragged(colbert(queries.batch)), documents.ragged(colbert(documents.batch))))


def value_and_gradients(colbert: ColBERT, run: Any) -> dict[str, Tensor]:
    names, parameters = zip(*colbert.named_parameters(), strict=True)
    value = run(colbert)
    return {"loss": value.detach(), **dict(zip(names, torch.autograd.grad(value, parameters), strict=True))}


@pytest.mark.parametrize("expansion", [False, True])
def test_gradients_flow_from_the_score_to_every_parameter(plain_tokenizer: Tokenizer, expansion: bool) -> None:
    """Tokens, encoder, head, skiplist, MaxSim, cross-entropy: equal to the dense computation in float64."""
    colbert = make(plain_tokenizer, config=ColBERTConfig(query_length=20, do_query_expansion=expansion))
    got = value_and_gradients(colbert, packed_loss)
    with backend("reference"):
        plain = value_and_gradients(colbert, dense_loss)
    colbert.double()
    exact = value_and_gradients(colbert, packed_loss)
    with backend("reference"):
        truth = value_and_gradients(colbert, dense_loss)
    assert "dense.0.linear.weight" in truth
    assert "encoder.embeddings.tok_embeddings.weight" in truth
    for name, value in truth.items():
        assert value.abs().max() > 1e-6, f"{name} has no gradient"
        assert (exact[name] - value).abs().max() <= 1e-10 * value.abs().max(), name
        assert_accurate(got[name], plain[name], value, name)


def test_a_step_of_training_lowers_the_loss(plain_tokenizer: Tokenizer) -> None:
    colbert = make(plain_tokenizer).train()
    optimizer = torch.optim.AdamW(colbert.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(packed_loss(colbert))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_through_a_folder(plain_tokenizer: Tokenizer, dtype: torch.dtype, tmp_path: Path) -> None:
    lengths = {"query_length": 12, "document_length": 30}
    config = ColBERTConfig(**lengths, do_query_expansion=True, skiplist_words=(".", "!"))
    before = make(plain_tokenizer, config=config).to(dtype)
    before.save_pretrained(tmp_path)
    after = ColBERT.from_pretrained(tmp_path, dtype=dtype)
    assert (after.config, after.dim, after.encoder.config) == (before.config, 24, before.encoder.config)
    assert not after.training
    for (name, mine), yours in zip(after.named_parameters(), before.parameters(), strict=True):
        assert mine.dtype == dtype
        assert torch.equal(mine, yours), name
    assert torch.equal(after.encode_queries(QUERIES).values, before.encode_queries(QUERIES).values)
    assert torch.equal(after.encode_documents(DOCUMENTS).values, before.encode_documents(DOCUMENTS).values)
    assert {p.dtype for p in ColBERT.from_pretrained(tmp_path).parameters()} == {torch.float32}


def test_copies_are_equal(plain_tokenizer: Tokenizer) -> None:
    colbert = make(plain_tokenizer)
    wanted = colbert.encode_documents(DOCUMENTS)
    for twin in (copy.deepcopy(colbert), pickle.loads(pickle.dumps(colbert))):
        assert torch.equal(twin.encode_documents(DOCUMENTS).values, wanted.values)


def test_pooling_keeps_fewer_rows(plain_tokenizer: Tokenizer) -> None:
    """[CLS] stays, about half of the others go; PyLate's numbers are in test_colbert_parity."""
    colbert = make(plain_tokenizer)
    whole, pooled = (colbert.encode_documents(DOCUMENTS, pool_factor=factor) for factor in (1, 2))
    for rows, fewer in zip(whole, pooled, strict=True):
        assert len(fewer) <= 2 + len(rows) // 2
        assert torch.equal(fewer[0], rows[0])


def test_mistakes_are_named(plain_tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="put it in a list"):
        make(plain_tokenizer).tokenize_documents("one text")
    encoder = Encoder.from_pretrained(BACKBONE)
    with pytest.raises(ValueError, match="prefix '\\[Q\\] ' is not a token of the tokenizer"):
        ColBERT(encoder, plain_tokenizer, make(plain_tokenizer).dense, ColBERTConfig())
    encoder.save_pretrained(tmp_path)
    plain_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no late-interaction head|no modules\.json"):
        ColBERT.from_pretrained(tmp_path)
    wrapped = make(plain_tokenizer)
    wrapped.dense = torch.nn.ModuleList([torch.nn.Sequential(*wrapped.dense)])
    with pytest.raises(TypeError, match="layer 1 of the head is a Sequential"):
        wrapped.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_ragged_of_tokens_picks_the_scored_rows(plain_tokenizer: Tokenizer) -> None:
    colbert = make(plain_tokenizer)
    tokens = colbert.tokenize_documents(DOCUMENTS)
    numbered = torch.arange(tokens.batch.num_tokens)[:, None].float()
    ragged = tokens.ragged(numbered)
    assert isinstance(ragged, Ragged)
    for rows, whole, keep in zip(
        ragged, numbered.split(tokens.batch.lengths), tokens.keep.split(tokens.batch.lengths), strict=True
    ):
        assert torch.equal(rows, whole[keep])
    part = tokens.select([3, 1])
    alone = colbert.tokenize_documents([DOCUMENTS[3], DOCUMENTS[1]])
    assert torch.equal(part.batch.input_ids, alone.batch.input_ids)
    assert torch.equal(part.keep, alone.keep)
    assert part.spans == alone.spans
    assert [len(spans) for spans in part.spans] == list(part.batch.lengths)


@pytest.mark.parametrize(
    ("out", "options"),
    [(48, {}), (48, {"bias": True}), (64, {"residual": True}), (48, {"residual": True}), (48, {"activation": "Tanh"})],
)
def test_whatever_the_last_layer_does_is_done_before_normalising(out, options):
    """The shorter way of a plain projection is taken by nothing else."""
    model = ColBERT.default()
    torch.manual_seed(0)
    model.dense = torch.nn.ModuleList([Dense(model.encoder.config.hidden_size, 64), Dense(64, out, **options)])
    batch = model.tokenize_documents(["Glaciers move.", "A treaty ended the war."]).batch
    with torch.inference_mode():
        first, last = model.dense
        wanted = F.normalize(last(first(model.encoder(batch))), dim=-1)
        torch.testing.assert_close(model(batch), wanted, rtol=0, atol=1e-6)


def test_what_is_done_to_the_last_layer_counts(plain_tokenizer: Tokenizer) -> None:
    """One kernel projects and normalises, unless that would read past a hook or an adapter."""
    model = make(plain_tokenizer)
    batch = model.tokenize_queries(QUERIES).batch
    wanted = model(batch)
    for name in ("dense.0", "dense.0.linear", "dense.0.activation"):
        handle = model.get_submodule(name).register_forward_hook(lambda module, args, out: out + 1)
        changed = model(batch)
        assert (changed - wanted).abs().max() > 1e-2
        with torch.no_grad():
            torch.testing.assert_close(Session(model)(batch), changed, rtol=0, atol=2e-5)
        handle.remove()
    assert torch.equal(model(batch), wanted)
