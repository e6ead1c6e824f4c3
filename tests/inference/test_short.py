"""The way of one short text on a CPU gives what the modules give, and is left when they could give anything else."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hf_twin import TINY, random_ids, twins
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import modernbert_kernels as ops
from modernbert import Encoder, Packed, pack
from modernbert.encoder import Layer
from modernbert.inference import short

pytestmark = pytest.mark.skipif("onednn" not in ops.linear.backends, reason="this PyTorch has no oneDNN")

CONFIGS = {
    "plain": TINY,
    "biases": replace(TINY, norm_bias=True, attention_bias=True, mlp_bias=True),
    "silu": replace(TINY, hidden_activation="silu"),
    "one head": replace(TINY, num_attention_heads=1),
    "wide window": replace(TINY, local_attention=128),
}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of each batch that went this way."""
    tokens: list[int] = []
    run = short.Plan.run

    def counted(plan: short.Plan, batch: Packed, rows_Q: Tensor | None) -> Tensor:
        tokens.append(batch.num_tokens)
        return run(plan, batch, rows_Q)

    monkeypatch.setattr(short.Plan, "run", counted)
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


@torch.inference_mode()
def compare(encoder: Encoder, batch: Packed, rows: Tensor | None = None) -> None:
    """With the reference: different arithmetic, the same numbers but for rounding."""
    with ops.backend("reference"):
        wanted = encoder(batch, rows=rows)
    torch.testing.assert_close(encoder(batch, rows=rows), wanted, rtol=1e-5, atol=2e-5)


# What is computed


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_reference(name: str, length: int, taken: list[int]) -> None:
    compare(loud(name), text(length))
    assert taken == [length]


@pytest.mark.parametrize("length", [16, 63, 64])
def test_up_to_the_longest(length: int, taken: list[int]) -> None:
    compare(loud("wide window"), text(length))
    assert taken == [length]


@pytest.mark.parametrize("keys", [0, 1, 9, 20])
@pytest.mark.parametrize("rows", [None, [], [0], [3, 4, 19]])
def test_query_rows_positions_and_chosen_rows(keys: int, rows: list[int] | None, taken: list[int]) -> None:
    batch = text(20)
    batch = replace(batch, key_lengths=torch.tensor([keys], dtype=torch.int32), positions=batch.positions * 3 + 7)
    compare(loud("wide window"), batch, None if rows is None else torch.tensor(rows, dtype=torch.int64))
    assert taken == [20]


def test_a_second_text_of_other_tokens_and_positions(taken: list[int]) -> None:
    """Nothing of the first text is left in the plan."""
    encoder = loud()
    for batch in (text(5), text(3), replace(text(5), positions=torch.arange(5) * 2), text(5)):
        compare(encoder, batch)
    assert taken == [5, 3, 5, 5]


def test_the_result_is_the_callers(taken: list[int]) -> None:
    encoder, batch = loud(), text(5)
    with torch.no_grad():
        first = encoder(batch)
        kept = first.clone()
        encoder(pack([[1, 2, 3, 4, 5]])).zero_()
        assert torch.equal(first, kept)
        first.zero_()
        assert torch.equal(encoder(batch), kept)
    assert len(taken) == 3


# Who goes this way


def test_a_window_that_cuts_is_for_the_modules(taken: list[int]) -> None:
    encoder = twins(replace(TINY, local_attention=8))[1].eval()  # four neighbours on each side
    for length in (5, 6):
        compare(encoder, text(length))
    assert taken == [5]


@torch.no_grad()
def test_other_calls_are_for_the_modules(taken: list[int]) -> None:
    encoder = loud("wide window")
    encoder(text(0))
    encoder(text(65))
    encoder(pack(random_ids([3, 4], TINY.vocab_size)))
    encoder(text(5), output_hidden_states=True)
    encoder(text(5), inputs_embeds=torch.randn(5, TINY.hidden_size))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        encoder(text(5))
    with torch.enable_grad():
        assert encoder(text(5)).requires_grad
    with ops.backend("reference"):
        encoder(text(5))
    copy.deepcopy(encoder).bfloat16()(text(5))
    copy.deepcopy(encoder).double()(text(5))
    with torch.inference_mode():
        copy.deepcopy(encoder)(text(5))  # its parameters are inference tensors, which count no versions
    assert taken == []
    encoder(text(5))
    assert taken == [5]


def test_padded_input_goes_this_way_too(taken: list[int]) -> None:
    encoder, ids = loud(), torch.tensor([[3, 4, 5, 0, 0]])
    with torch.inference_mode():
        output = encoder(ids, torch.tensor([[1, 1, 1, 0, 0]])).last_hidden_state
        torch.testing.assert_close(output[0, :3], encoder(pack([[3, 4, 5]])))
    assert taken == [3, 3]


# What changes after the first text


def layer(encoder: Encoder) -> Layer:
    last = encoder.layers[-1]
    assert isinstance(last, Layer)
    return last


def data(encoder: Encoder) -> None:
    layer(encoder).mlp.Wi.weight.data = layer(encoder).mlp.Wi.weight.data * 1.5


def assigned(encoder: Encoder) -> None:
    encoder.load_state_dict({name: value * 1.1 for name, value in encoder.state_dict().items()}, assign=True)


def unseen_write(encoder: Encoder) -> None:
    encoder.train()
    layer(encoder).attn.Wqkv.weight.data.mul_(1.5)  # bumps no version, as writes of FSDP do not
    encoder.eval()


def resized(encoder: Encoder) -> None:
    encoder.resize_token_embeddings(TINY.vocab_size + 8)
    encoder.embeddings.tok_embeddings.weight.neg_()


def without_last_layer(encoder: Encoder) -> None:
    encoder.layers, encoder.thetas = encoder.layers[:-1], encoder.thetas[:-1]


CHANGES: dict[str, Callable[[Encoder], object]] = {
    "in place": lambda encoder: layer(encoder).attn.Wqkv.weight.mul_(1.5),
    "bias in place": lambda encoder: layer(encoder).attn.Wqkv.bias.add_(1.5),
    "norm in place": lambda encoder: encoder.final_norm.weight.mul_(1.5),
    "data": data,
    "new parameter": lambda encoder: setattr(
        layer(encoder).attn.Wo, "weight", nn.Parameter(torch.eye(TINY.hidden_size))
    ),
    "assigned": assigned,
    "unseen write": unseen_write,
    "eps": lambda encoder: setattr(encoder.final_norm, "eps", 0.5),
    "activation": lambda encoder: setattr(layer(encoder).mlp, "activation", "silu"),
    "resized": resized,
    "thetas": lambda encoder: setattr(encoder, "thetas", (7.0,) * TINY.num_hidden_layers),
    "without the last layer": without_last_layer,
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_is_seen(change: str, taken: list[int]) -> None:
    encoder, batch = loud("biases"), text(5)
    before = encoder(batch)
    CHANGES[change](encoder)
    compare(encoder, batch)
    assert not torch.allclose(encoder(batch), before, atol=1e-3)
    assert taken == [5] * 3


class Negated(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return -super().forward(input)


def exchanged(encoder: Encoder) -> None:
    old = layer(encoder).mlp.Wo
    layer(encoder).mlp.Wo = Negated(old.in_features, old.out_features, bias=False)  # pyright: ignore


def patched(encoder: Encoder) -> None:
    module = layer(encoder).mlp
    forward = module.forward
    module.forward = lambda x_TD: -forward(x_TD)


DEPARTURES: dict[str, Callable[[Encoder], object]] = {
    "hook": lambda encoder: layer(encoder).mlp.register_forward_hook(lambda module, inputs, output: -output),
    "pre-hook": lambda encoder: layer(encoder).mlp.register_forward_pre_hook(lambda module, inputs: (-inputs[0],)),
    "another module": exchanged,
    "another forward": patched,
    "narrower window": lambda encoder: setattr(layer(encoder).attn, "window", 1),
}


@pytest.mark.parametrize("departure", DEPARTURES)
@torch.no_grad()
def test_after_some_changes_the_modules_run(departure: str, taken: list[int]) -> None:
    encoder, batch = twins(replace(TINY, num_hidden_layers=2))[1].eval(), text(5)
    before = encoder(batch)
    DEPARTURES[departure](encoder)
    compare(encoder, batch)
    assert not torch.allclose(encoder(batch), before, atol=1e-3)
    assert taken == [5]


@torch.no_grad()
def test_back_again(taken: list[int]) -> None:
    """What was hooked, exchanged or in training goes this way when it is not any more."""
    encoder = loud()
    mlp, Wo = layer(encoder).mlp, layer(encoder).mlp.Wo
    with mlp.register_forward_hook(lambda module, inputs, output: -output):
        encoder(text(5))
        encoder(text(5))
    encoder(text(5))
    exchanged(encoder)
    encoder(text(5))
    mlp.Wo = Wo
    encoder(text(5))
    encoder.train()
    encoder(text(5))
    encoder.eval()
    encoder(text(5))
    assert len(taken) == 3


def test_a_subclass_runs_its_own_code(taken: list[int]) -> None:
    class Doubled(Encoder):
        def _forward(self, *arguments):
            x_TD, states = super()._forward(*arguments)
            return 2 * x_TD, states

    encoder = loud()
    doubled = Doubled(encoder.config).eval()
    doubled.load_state_dict(encoder.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(doubled(text(5)), 2 * encoder(text(5)))
    assert taken == [5]


@torch.no_grad()
def test_hooks_on_all_modules_run(taken: list[int]) -> None:
    encoder, seen = loud(), []
    encoder(text(5))
    with register_module_forward_hook(lambda module, inputs, output: seen.append(module)):
        encoder(text(5))
    assert set(encoder.layers) < set(seen)
    assert taken == [5]


@torch.no_grad()
def test_dropout_of_one_module_in_training(taken: list[int]) -> None:
    encoder = twins(replace(TINY, mlp_dropout=0.5))[1].eval()
    first = encoder(text(5))
    layer(encoder).mlp.train()
    assert not torch.allclose(encoder(text(5)), first, atol=1e-3)
    layer(encoder).mlp.eval()
    assert torch.equal(encoder(text(5)), first)
    assert taken == [5, 5]


# Copies, threads, memory


@torch.no_grad()
def test_copies_have_plans_of_their_own(taken: list[int]) -> None:
    encoder = loud()
    before = encoder(text(5))
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(other(text(5)), before)
        for parameter in other.parameters():
            parameter.zero_()
        assert not other(text(5)).any()
    assert torch.equal(encoder(text(5)), before)
    assert len(taken) == 6


def test_threads_share_a_plan(taken: list[int]) -> None:
    encoder, batches = loud(), [text(length) for length in (5, 4, 3, 5)] * 8

    def encode(batch: Packed) -> Tensor:
        with torch.inference_mode():
            return encoder(batch)

    wanted = [encode(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for mine, exact in zip(pool.map(encode, batches), wanted, strict=True):
            assert torch.equal(mine, exact)
    assert len(taken) == 64


def test_plans_keep_no_encoder_alive(taken: list[int]) -> None:
    encoder = loud()
    with torch.no_grad():
        encoder(text(5))
    gone = weakref.ref(encoder), weakref.ref(encoder.embeddings)
    del encoder
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert taken == [5]


# What a reader found: modules that were changed in ways that nobody had thought of


def drop_the_first_layer(encoder: Encoder) -> None:
    encoder.layers, encoder.thetas = encoder.layers[1:], encoder.thetas[1:]


def add_a_bias(encoder: Encoder) -> None:
    layer = encoder.layers[1]
    assert isinstance(layer, Layer)
    layer.mlp.Wo.bias = nn.Parameter(torch.randn(TINY.hidden_size))


def add_a_bias_to_a_norm(encoder: Encoder) -> None:
    encoder.final_norm.bias = nn.Parameter(torch.ones(TINY.hidden_size))


def add_the_first_norm(encoder: Encoder) -> None:
    first, second = encoder.layers[0], encoder.layers[1]
    assert isinstance(first, Layer)
    assert isinstance(second, Layer)
    first.attn_norm = second.attn_norm


class Negative(nn.Module):
    def forward(self, x_TD: Tensor) -> Tensor:
        return -x_TD


def exchange_a_class(encoder: Encoder) -> None:
    layer = encoder.layers[1]
    assert isinstance(layer, Layer)
    layer.mlp.__class__ = Negative  # pyright: ignore


def prune_heads(encoder: Encoder) -> None:
    layer = encoder.layers[1]
    assert isinstance(layer, Layer)
    width, head = TINY.hidden_size, layer.attn.head_dim
    layer.attn.heads = 1
    layer.attn.Wqkv, layer.attn.Wo = (
        type(layer.attn.Wo)(*shape, bias=False) for shape in ((width, 3 * head), (head, width))
    )


@pytest.mark.parametrize(
    "change",
    [drop_the_first_layer, add_a_bias, add_a_bias_to_a_norm, add_the_first_norm, exchange_a_class, prune_heads],
)
@pytest.mark.parametrize("used_before", [True, False])
def test_changed_modules_are_seen(change: Callable[[Encoder], None], used_before: bool) -> None:
    encoder = loud()
    if used_before:
        compare(encoder, text(5))
    change(encoder)
    encoder.eval().requires_grad_(False)
    compare(encoder, text(5))


def test_new_memory_at_an_old_address_is_seen() -> None:
    """As when weights are offloaded and brought back: no version counts that."""
    encoder, other = loud(), loud("wide window")
    for _ in range(3):
        compare(encoder, text(5))
        values = [p.detach().clone() for p in other.parameters()]
        for parameter in encoder.parameters():
            parameter.data = torch.empty(0)
        for parameter, value in zip(encoder.parameters(), values, strict=True):
            parameter.data = value.clone() * torch.rand(())
        compare(encoder, text(5))


def test_defaults_of_the_process_are_no_matter(taken: list[int]) -> None:
    encoder, batch = loud(), text(7)
    with torch.inference_mode():
        wanted = encoder(batch)
    for fresh in (copy.deepcopy(encoder), copy.deepcopy(encoder)):
        torch.set_default_dtype(torch.float64)
        try:
            with torch.inference_mode(), torch.device("meta"):
                got = fresh(batch)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(got, wanted)
    assert taken == [7] * 3


def test_vmap_takes_the_modules(taken: list[int]) -> None:
    encoder, batch = loud(), text(5)
    ids = torch.stack([batch.input_ids, batch.input_ids.flip(0)])
    with torch.no_grad(), ops.backend("reference"):
        wanted = torch.stack([encoder(replace(batch, input_ids=row)) for row in ids])
    with torch.no_grad():
        got = torch.func.vmap(lambda row: encoder(replace(batch, input_ids=row)))(ids)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
    assert not taken
