"""A Session gives the numbers of its model, stays what it was made of, and says when the model has changed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from hf_twin import TINY, random_ids, twins
from torch import Tensor, nn
from torch.nn.functional import linear as product
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune

import modernbert_kernels as ops
from modernbert import ColBERT, Encoder, Packed, Session, pack
from modernbert.encoder import Layer
from modernbert.heads.dense import Dense
from modernbert.inference import session as module
from modernbert.inference import short
from modernbert.modules import Linear, Norm
from modernbert_kernels.cpu import linear

CONFIGS = {
    "plain": TINY,
    "biases": replace(TINY, norm_bias=True, attention_bias=True, mlp_bias=True),
    "silu": replace(TINY, hidden_activation="silu"),
    "one head": replace(TINY, num_attention_heads=1),
    "wide window": replace(TINY, local_attention=128),
}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each batch that took the short way."""
    tokens: list[int] = []
    run = short.ShortEncoder._one_text

    def counted(encoder: short.ShortEncoder, batch: Packed, rows_Q: Tensor | None) -> Tensor:
        tokens.append(batch.num_tokens)
        return run(encoder, batch, rows_Q)

    monkeypatch.setattr(short.ShortEncoder, "_one_text", counted)
    return tokens


def loud(name: str = "plain") -> Encoder:
    """With random biases too: fresh ones are zero."""
    encoder = twins(CONFIGS[name])[1].eval()
    for parameter in encoder.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1.0, 0.3)
    return encoder


def text(length: int) -> Packed:
    return pack(random_ids([length], TINY.vocab_size))


@torch.no_grad()
def compare(encoder: Encoder, batch: Packed, rows: Tensor | None = None, session: Session | None = None) -> None:
    """With the reference: different arithmetic, the same numbers but for rounding."""
    with ops.backend("reference"):
        wanted = encoder(batch, rows=rows)
    torch.testing.assert_close((session or Session(encoder))(batch, rows=rows), wanted, rtol=1e-5, atol=2e-5)


# Numbers


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_short_text(name: str, length: int, taken: list[int]) -> None:
    compare(loud(name), text(length))
    assert taken == [length]


@pytest.mark.parametrize("length", [16, 63, 64])
def test_up_to_the_longest(length: int, taken: list[int]) -> None:
    compare(loud("wide window"), text(length))
    assert taken == [length]


@pytest.mark.parametrize("keys", [0, 1, 9, 20])
@pytest.mark.parametrize("rows", [None, [], [0], [3, 4, 19]])
def test_query_rows_and_chosen_rows(keys: int, rows: list[int] | None, taken: list[int]) -> None:
    batch = replace(text(20), key_lengths=torch.tensor([keys], dtype=torch.int32))
    compare(loud("wide window"), batch, None if rows is None else torch.tensor(rows, dtype=torch.int64))
    assert taken == [20]


def test_what_takes_the_modules(taken: list[int]) -> None:
    """No token, too many, several texts, positions of one's own, a window that cuts, another dtype."""
    encoder = loud("wide window")
    session = Session(encoder)
    others = [text(0), text(65), pack(random_ids([3, 4], 100)), replace(text(5), positions=torch.arange(5) * 3 + 7)]
    for batch in others:
        compare(encoder, batch, session=session)
    compare(twins(replace(TINY, local_attention=8))[1], text(6))  # four neighbours on each side
    with torch.no_grad():
        double = encoder.double()
        assert torch.equal(Session(double)(text(5)), double(text(5)))
    assert taken == []


def test_one_session_serves_all_sizes(taken: list[int]) -> None:
    encoder = loud()
    session = Session(encoder)
    for batch in (text(5), text(3), pack(random_ids([900, 800, 3, 700], 100)), text(5)):
        compare(encoder, batch, session=session)
    assert taken == [5, 3, 5]


@pytest.mark.parametrize("layout", ["packed", "transposed", "as an op"])
def test_every_layout_of_a_weight_gives_its_product(layout: str) -> None:
    """As an op, oneDNN gets rows that were filled up to a step."""
    if layout != "transposed" and not linear.AVAILABLE:
        pytest.skip("this PyTorch has no oneDNN")
    weight_FD, bias_F = torch.randn(24, 40), torch.randn(24)
    if layout == "as an op":
        multiply = partial(ops.linear, weight_FD=linear.pack_weight(weight_FD), bias_F=bias_F)
    else:
        multiply = getattr(linear, layout)(weight_FD, bias_F)
    for rows in (0, 1, 15, 16, 17, 300):
        x_TD = torch.randn(rows, 40)
        wanted = product(x_TD.double(), weight_FD.double(), bias_F.double()).float()
        torch.testing.assert_close(multiply(x_TD), wanted, rtol=1e-5, atol=2e-5)


def test_row_counts_come_in_steps() -> None:
    """A new number of rows costs oneDNN time and memory: up to 2,048 there are 64 of them, and few are filled up."""
    counts = {rows + -rows % linear.row_step(rows) for rows in range(1, 2049)}
    assert len(counts) <= 80
    assert all(-rows % linear.row_step(rows) <= max(15, rows / 16) for rows in range(1, 2049))


def test_bulk_with_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a processor with AVX-512 does, on any."""
    if not linear.AVAILABLE:
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(module.linear, "FASTER_THAN_MKL", True)
    encoder, batch = loud("biases"), pack(random_ids([900, 800, 3, 700], 100))
    session = Session(encoder)
    assert session._bulk.layers[0].mlp.Wi.weight.is_mkldnn
    assert not encoder.layers[0].mlp.Wi.weight.is_mkldnn
    compare(encoder, batch, session=session)
    compare(encoder, batch, torch.arange(0, 2403, 7), session)


def test_a_head_with_several_layers() -> None:
    """Layers of a head with bias, activation and residual."""
    torch.manual_seed(1)
    model = ColBERT.default()
    head = [Dense(256, 64, bias=True, activation="GELU"), Dense(64, 64, residual=True), Dense(64, 32, residual=True)]
    model = ColBERT(model.encoder, model.tokenizer, head, model.config).eval()
    session, texts = Session(model), ["one", "two words", "a text of some more words " * 9] * 3
    for group in (texts[:1], texts):
        got, wanted = session.encode_documents(group), model.encode_documents(group)
        assert torch.equal(got.offsets, wanted.offsets)
        torch.testing.assert_close(got.values, wanted.values, rtol=0, atol=2e-6)
    tokens = model.tokenize_documents(texts)
    torch.testing.assert_close(session.encode_tokens(tokens).values, wanted.values, rtol=0, atol=2e-6)
    pooled = session.encode_documents(texts, pool_factor=2)
    assert len(pooled.values) < len(wanted.values)


def test_results_are_the_callers(taken: list[int]) -> None:
    session, batch = Session(loud()), text(5)
    first = session(batch)
    kept = first.clone()
    session(pack([[1, 2, 3, 4, 5]])).zero_()
    assert torch.equal(first, kept)
    assert not first.requires_grad
    assert not first.is_inference()
    first.zero_()
    assert torch.equal(session(batch), kept)
    assert len(taken) == 3


def test_defaults_of_the_process_do_not_matter() -> None:
    encoder, batch = loud(), text(7)
    wanted = Session(encoder)(batch)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.device("meta"):
            got = Session(encoder)(batch)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)


# What is refused


def test_what_cannot_be_done_is_refused() -> None:
    encoder = loud()
    session = Session(encoder)
    with pytest.raises(ValueError, match="leave it on the CPU"):
        session(text(5).to("meta"))
    with pytest.raises(ValueError, match="leave autocast"), torch.autocast("cpu", torch.bfloat16):
        session(text(5))
    with pytest.raises(ValueError, match="leave autocast and backend"), ops.backend("reference"):
        session(text(5))
    with pytest.raises(ValueError, match="less than the 5 tokens"):
        session(text(5), rows=torch.tensor([5]))
    with pytest.raises(TypeError, match="Encoder encodes no texts"):
        session.encode_queries(["a text"])
    with pytest.raises(TypeError, match="put it in a list"):
        Session(ColBERT.default()).encode_queries("a text")


def test_it_answers_in_evaluation_mode_and_changes_no_mode() -> None:
    encoder = twins(replace(TINY, mlp_dropout=0.5, attention_dropout=0.5))[1].eval()
    batches = [text(5), pack(random_ids([30, 40], 100))]
    wanted = [Session(encoder)(batch) for batch in batches]
    encoder.layers[1].train()
    session = Session(encoder)
    for batch, exact in zip(batches, wanted, strict=True):
        torch.testing.assert_close(session(batch), exact, rtol=0, atol=2e-5)
    assert [layer.training for layer in encoder.layers] == [False, True, False, False]


# Changes


def layer(encoder: Encoder) -> Layer:
    last = encoder.layers[-1]
    assert isinstance(last, Layer)
    return last


def assign(encoder: Encoder) -> None:
    encoder.load_state_dict({name: x.clone() for name, x in encoder.state_dict().items()}, assign=True)


def fused_step(encoder: Encoder) -> None:
    """The default of transformers' Trainer; PyTorch counts no version."""
    optimizer = torch.optim.AdamW(encoder.parameters(), fused=True)
    encoder(text(5)).sum().backward()
    optimizer.step()


CHANGES: dict[str, Callable[[Encoder], object]] = {
    "in place": lambda encoder: layer(encoder).mlp.Wi.weight.data.view(-1).mul_(1.5),
    "counted": lambda encoder: torch.no_grad()(layer(encoder).attn_norm.weight.add_)(1),
    "one number, counted": lambda encoder: torch.no_grad()(layer(encoder).mlp.Wo.weight[3, 5].add_)(1),
    "data": lambda encoder: setattr(encoder.final_norm.weight, "data", encoder.final_norm.weight * 2),
    "through data": lambda encoder: encoder.final_norm.weight.data.mul_(2),
    "new parameter": lambda encoder: setattr(layer(encoder).mlp.Wi, "weight", nn.Parameter(torch.zeros(192, 64))),
    "new module": lambda encoder: setattr(layer(encoder).mlp, "Wi", nn.Linear(64, 192, bias=False)),
    "assigned": assign,
    "resized": lambda encoder: encoder.resize_token_embeddings(200),
    "a module more": lambda encoder: encoder.layers.append(nn.Identity()),
    "another dtype": lambda encoder: encoder.double(),
    "fused optimizer": fused_step,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_weights_is_an_error(change: str) -> None:
    encoder = loud()
    session, batch = Session(encoder), text(5)
    session(batch)
    CHANGES[change](encoder)
    for call in (batch, pack(random_ids([30, 40], 100))):
        with pytest.raises(RuntimeError, match="make a new one"):
            session(call)
    if change != "a module more":
        compare(encoder.float(), batch)


def test_a_change_before_the_first_short_text_is_an_error() -> None:
    """The short way is made when the first short text comes."""
    encoder = loud()
    session = Session(encoder)
    fused_step(encoder)
    with pytest.raises(RuntimeError, match="make a new one"):
        session(text(5))
    model = ColBERT.default()
    session = Session(model)
    model.dense[0].linear.weight.data.mul_(2)
    tokens = model.tokenize_queries(["one", "two"])
    with pytest.raises(RuntimeError, match="make a new one"):
        session.encode_tokens(tokens)
    with pytest.raises(ValueError, match="leave autocast"), torch.autocast("cpu", torch.bfloat16):
        Session(model).encode_tokens(tokens)


def test_plain_modules_are_never_stale() -> None:
    """No weight is remembered outside of a Session: passes without gradients see a fused optimizer's step."""
    encoder, batch = loud().train(), text(12)
    with torch.no_grad():
        before = encoder(batch)
    fused_step(encoder)
    with torch.no_grad():
        after = encoder(batch)
    assert (before - after).abs().max() > 1e-3
    torch.testing.assert_close(after, encoder(batch).detach(), rtol=0, atol=2e-5)


class Adapted(nn.Module):
    """A linear layer with something added, as adapters do it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5


@pytest.mark.parametrize("norm", ["parametrized", "weight_norm", "pruned"])
def test_weights_that_are_computed_from_others(norm: str) -> None:
    encoder = loud()
    if norm == "parametrized":
        nn.utils.parametrizations.weight_norm(layer(encoder).mlp.Wi)
    elif norm == "weight_norm":
        nn.utils.weight_norm(layer(encoder).mlp.Wi)
    else:
        prune.l1_unstructured(layer(encoder).mlp.Wi, "weight", 0.5)
    for batch in (text(5), pack(random_ids([30, 40], 100))):
        compare(encoder, batch)


def test_a_hook_that_comes_later_runs() -> None:
    encoder, batch = loud(), text(5)
    session = Session(encoder)
    session(batch)
    layer(encoder).mlp.Wi.register_forward_hook(lambda module, inputs, output: output + 0.5)
    compare(encoder, batch, session=session)


SUBMODULES = ["", "embeddings", "embeddings.tok_embeddings", "embeddings.norm", "layers.1.attn_norm", "final_norm"]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("name", SUBMODULES)
def test_hooks_on_any_module_run(name: str, later: bool) -> None:
    encoder, batches = loud(), [text(5), pack(random_ids([30, 40], 100))]
    session = Session(encoder) if later else None
    if session is not None:
        session(batches[0])
    wanted = encoder(batches[0])
    encoder.get_submodule(name).register_forward_hook(lambda module, inputs, output: output.abs())
    assert (encoder(batches[0]) - wanted).abs().max() > 1e-2
    for batch in batches:
        compare(encoder, batch, session=session)


def test_a_hook_on_all_modules_runs() -> None:
    session, batch, seen = Session(loud()), text(5), []
    session(batch)
    handle = register_module_forward_hook(lambda module, inputs, output: seen.append(type(module)) or None)
    try:
        session(batch)
    finally:
        handle.remove()
    assert {nn.Embedding, Norm, Linear} <= set(seen)


@pytest.mark.parametrize("name", SUBMODULES[2:])
def test_replaced_modules_run(name: str, taken: list[int]) -> None:
    encoder = loud()
    parent, _, child = name.rpartition(".")
    setattr(encoder.get_submodule(parent), child, Adapted(encoder.get_submodule(name)))
    for batch in (text(5), pack(random_ids([30, 40], 100))):
        compare(encoder, batch)
    assert taken == []


def test_a_short_text_off_the_short_way_is_evaluated() -> None:
    """It ran in the mode of the model, with dropout."""
    encoder = Encoder(replace(TINY, mlp_dropout=0.5))
    session, batch = Session(encoder.train()), replace(text(5), positions=torch.arange(5) * 3 + 7)
    session(text(5))
    compare(encoder.eval(), batch, session=session)
    encoder.train()
    assert torch.equal(session(batch), session(batch))


def test_a_forward_of_its_own_is_refused() -> None:
    """A replica would run that of the original, in the mode of the original."""
    encoder = loud()
    with pytest.raises(ValueError, match="forward of its own"):
        Session(torch.compile(encoder))
    mlp = layer(encoder).mlp
    mlp.forward = lambda x, run=mlp.forward: 3 * run(x)
    with pytest.raises(ValueError, match="MLP has a forward of its own"):
        Session(encoder)


def test_copies_are_sessions_of_the_copied_model() -> None:
    session, batch = Session(loud()), text(5)
    wanted = session(batch)
    for twin in (copy.deepcopy(session), pickle.loads(pickle.dumps(session))):
        assert torch.equal(twin(batch), wanted)
        assert twin.model is not session.model


def test_nan_is_not_a_change_and_models_without_weights_are_refused() -> None:
    encoder = loud()
    with torch.no_grad():
        encoder.embeddings.tok_embeddings.weight.fill_(torch.nan)
    assert Session(encoder)(text(5)).isnan().all()
    with pytest.raises(ValueError, match="meta device"):
        Session(encoder.to("meta"))
    with pytest.raises(ValueError, match="has no encoder"):
        Session(nn.LayerNorm(2))


@pytest.mark.parametrize("kind", ["adapter", "hook", "pre-hook"])
def test_modules_of_other_makers_and_hooks_run(kind: str, taken: list[int]) -> None:
    encoder = loud()
    mlp = layer(encoder).mlp
    if kind == "adapter":
        mlp.Wi = Adapted(mlp.Wi)
    elif kind == "hook":
        mlp.Wi.register_forward_hook(lambda module, inputs, output: output + 0.5)
    else:
        mlp.Wi.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 0.5,))
    for batch in (text(5), pack(random_ids([30, 40], 100))):
        compare(encoder, batch)
    assert taken == []


def test_the_model_stays_as_it_is() -> None:
    encoder = loud()
    before = {name: id(p) for name, p in encoder.named_parameters()}
    modules = {name: id(m) for name, m in encoder.named_modules()}
    session = Session(encoder)
    session(text(5))
    session(pack(random_ids([30, 40], 100)))
    assert {name: id(p) for name, p in encoder.named_parameters()} == before
    assert {name: id(m) for name, m in encoder.named_modules()} == modules
    assert not any(isinstance(value, Session) for value in vars(encoder).values())
    copy.deepcopy(encoder).train()


def test_threads_share_a_session(taken: list[int]) -> None:
    session, batches = Session(loud()), [text(length) for length in (5, 4, 3, 5)] * 8
    batches += [pack(random_ids([30 + n, 9], 100)) for n in range(8)]
    fresh = Session(session.model)
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(session, batches))
    for mine, batch in zip(got, batches, strict=True):
        torch.testing.assert_close(mine, fresh(batch), rtol=0, atol=2e-5)


def test_a_session_keeps_nothing_alive_that_is_dropped() -> None:
    encoder = loud()
    session = Session(encoder)
    session(text(5))
    gone = weakref.ref(encoder), weakref.ref(session)
    del encoder, session
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
