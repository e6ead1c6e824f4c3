"""Hidden states of chosen layers, and maps of attention, are those of transformers' eager model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hf_twin import BIASES, TINY, hf_dict, pad, random_ids, twins
from transformers import ModernBertConfig, ModernBertModel

from modernbert import Encoder, pack
from modernbert.config import FULL, SLIDING
from modernbert.integrations.states import MOST_TOKENS, attention_maps, hidden_states
from modernbert.integrations.transformers import TransformersEncoder
from modernbert.outputs import AttentionOutput, EncoderOutput

CONFIG = replace(TINY, num_hidden_layers=4, layer_pattern=(FULL, SLIDING, SLIDING), local_attention=8, **BIASES)
TEXTS = random_ids([3, 40, 1, 17], 100)


@pytest.fixture(scope="module")
def eager() -> tuple[ModernBertModel, Encoder]:
    theirs, ours = twins(CONFIG)
    written = ModernBertConfig.from_dict(hf_dict(CONFIG, 5))
    model = ModernBertModel._from_config(written, attn_implementation="eager").eval()
    model.load_state_dict(theirs.state_dict())
    return model, ours


# Hidden states


@pytest.mark.parametrize("layers", [[0], [1], [4], [-1], [2, 3], [3, 0, 3], [-5, -2], []])
def test_states_of_chosen_layers(layers: list[int], eager: tuple[ModernBertModel, Encoder]) -> None:
    theirs, ours = eager
    ids, mask = pad(TEXTS)
    rows = torch.tensor([0, 5, 42, 60])
    with torch.inference_mode():
        wanted = theirs(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        got = hidden_states(ours, pack(TEXTS), layers=layers)
        of_rows = hidden_states(ours, pack(TEXTS), layers=layers, rows=rows)
    assert len(got) == len(of_rows) == len(layers)
    for place, state, few in zip(layers, got, of_rows, strict=True):
        torch.testing.assert_close(state, wanted[place][mask.bool()], rtol=0, atol=1e-4)
        torch.testing.assert_close(few, state[rows], rtol=0, atol=1e-5)


def test_no_layer_behind_the_last_one_is_computed(eager: tuple[ModernBertModel, Encoder]) -> None:
    _, ours = eager
    seen: list[tuple[int, int]] = []
    hooks = [
        layer.mlp.Wi.register_forward_pre_hook(lambda _, inputs, place=place: seen.append((place, len(inputs[0]))))
        for place, layer in enumerate(ours.layers)
    ]
    with torch.inference_mode():
        hidden_states(ours, pack(TEXTS), layers=[0])
        assert seen == []
        hidden_states(ours, pack(TEXTS), layers=[1, 2], rows=torch.tensor([3, 8]))
        assert seen == [(0, 61), (1, 2)]
        seen.clear()
        hidden_states(ours, pack(TEXTS), layers=[-1], rows=torch.tensor([3]))
        assert seen == [(0, 61), (1, 61), (2, 61), (3, 1)]
    for hook in hooks:
        hook.remove()


def test_states_have_gradients_and_take_embeddings(eager: tuple[ModernBertModel, Encoder]) -> None:
    _, ours = eager
    embeds = ours.embeddings.tok_embeddings.weight.detach()[pack(TEXTS).input_ids].requires_grad_()
    (state,) = hidden_states(ours, pack(TEXTS), embeds, layers=[2])
    (grad,) = torch.autograd.grad(state.square().sum(), embeds)
    assert grad.abs().sum() > 0
    torch.testing.assert_close(state, hidden_states(ours, pack(TEXTS), layers=[2])[0], rtol=0, atol=1e-5)


def test_wrong_layers_and_rows(eager: tuple[ModernBertModel, Encoder]) -> None:
    _, ours = eager
    for layers, words in (
        ([5], "layers has 5, but this encoder has 0 to 4"),
        ([0, -6], "has -6"),
        ([True], "has True"),
    ):
        with pytest.raises(ValueError, match=words):
            hidden_states(ours, pack(TEXTS), layers=layers)
    with pytest.raises(ValueError, match="layers has 4, but this encoder has 0 to 3"):
        attention_maps(ours, pack(TEXTS), layers=[4])
    with pytest.raises(ValueError, match="rows"):
        hidden_states(ours, pack(TEXTS), layers=[0], rows=torch.tensor([99]))


# Maps of attention


@pytest.mark.parametrize("side", ["left", "right"])
def test_maps_are_those_of_transformers(side: str, eager: tuple[ModernBertModel, Encoder]) -> None:
    theirs, ours = eager
    ids, mask = pad(TEXTS, side, extra=2)
    with torch.inference_mode():
        wanted = theirs(ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
        got = TransformersEncoder(ours)(ids, mask, output_attentions=True, output_hidden_states=True)
        packed = attention_maps(ours, pack(TEXTS))
    assert isinstance(got, AttentionOutput)
    assert got.keys() == ["last_hidden_state", "hidden_states", "attentions"] == list(wanted.keys())
    assert len(got.attentions) == len(wanted.attentions) == len(packed) == 4
    real = mask.bool()
    for mine, yours, maps in zip(got.attentions, wanted.attentions, packed, strict=True):
        assert mine.shape == yours.shape
        both = (real[:, None, :, None] & real[:, None, None, :]).expand_as(yours)
        torch.testing.assert_close(mine[both], yours[both], rtol=0, atol=1e-5)
        assert mine[~both].eq(0).all()
        for text, (map_Hnn, length) in enumerate(zip(maps, map(len, TEXTS), strict=True)):
            assert map_Hnn.shape == (2, length, length)
            torch.testing.assert_close(map_Hnn.sum(-1), torch.ones(2, length), rtol=0, atol=1e-5)
            torch.testing.assert_close(mine[text][both[text]], map_Hnn.flatten(), rtol=0, atol=1e-5)
    assert packed[1][1][0, 0, 5] == 0 < packed[1][1][0, 0, 4], "a window of 8 has 4 neighbours on each side"
    torch.testing.assert_close(got.hidden_states[2][real], wanted.hidden_states[2][real], rtol=0, atol=1e-4)
    chosen = attention_maps(ours, pack(TEXTS), layers=[-1, 0])
    assert torch.equal(chosen[1][1], packed[0][1])
    torch.testing.assert_close(chosen[0][1], packed[3][1], rtol=0, atol=1e-6)


def test_rows_that_only_query_and_rows_that_see_nothing(eager: tuple[ModernBertModel, Encoder]) -> None:
    """Rows beyond the window of every key have zeros, not NaN, and no row reads them."""
    _, ours = eager
    ids = torch.tensor(random_ids([20], 100))
    keys = (torch.arange(20) < 3).long()[None]
    maps = attention_maps(ours, pack(ids, keys, query_mask=1 - keys))
    assert all(map_[0].isfinite().all() for map_ in maps)
    assert maps[0][0][:, :, 3:].eq(0).all()
    assert maps[0][0].sum(-1).allclose(torch.ones(2, 20))
    assert maps[1][0][:, 7:].eq(0).all()


def test_long_batches_are_refused_with_the_number(eager: tuple[ModernBertModel, Encoder]) -> None:
    _, ours = eager
    assert MOST_TOKENS == 1024
    with pytest.raises(ValueError, match="at most 1,024 tokens, padding included, got 1,025: pass fewer or shorter"):
        attention_maps(ours, pack([[1] * 1000, [1] * 25]))
    ids, mask = pad([[1] * 600, [1]])
    with pytest.raises(ValueError, match="got 1,200"):
        TransformersEncoder(ours)(ids, mask, output_attentions=True)
    with torch.inference_mode():
        assert attention_maps(ours, pack([[1] * 1024]), layers=[1])[0][0].shape == (2, 1024, 1024)


def test_maps_are_not_recorded_and_plain_calls_are_as_before(eager: tuple[ModernBertModel, Encoder]) -> None:
    _, ours = eager
    model = TransformersEncoder(ours)
    ids = torch.tensor([[1, 2, 3]])
    assert isinstance(model(ids), EncoderOutput)
    with pytest.raises(ValueError, match="output_attentions: maps are not made where a program is recorded"):
        torch.export.export(model, (ids,), {"output_attentions": True})
    for texts in (0, 2):
        empty = model(torch.zeros(texts, 0, dtype=torch.int64), output_attentions=True)
        assert empty.attentions[0].shape == (texts, 2, 0, 0)
    embeds = ours.embeddings.tok_embeddings.weight[ids]
    given, wanted = (model(*each, output_attentions=True) for each in ((None, None, None, embeds), (ids,)))
    torch.testing.assert_close(given.attentions, wanted.attentions, rtol=0, atol=1e-6)
    given.attentions[1].square().sum().backward()
    assert ours.layers[0].attn.Wqkv.weight.grad.abs().sum() > 0
    none = attention_maps(ours.bfloat16(), pack([[1, 2], []]))[0]
    assert (none[0].dtype, none[1].shape) == (torch.bfloat16, (2, 0, 0))
    ours.float()
