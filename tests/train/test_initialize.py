"""Tiling against the rule of FlexBERT, and a change of positions against a new encoder."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hf_twin import BIASES, TINY, make_loud, random_ids
from torch import Tensor, nn

from modernbert import Encoder, pack
from modernbert.pretrained import Pretrained
from modernbert.train.initialize import set_context, tile_from

SMALL = replace(TINY, hidden_size=64, num_attention_heads=4, intermediate_size=20, num_hidden_layers=5)
LARGE = replace(SMALL, hidden_size=96, num_attention_heads=6, intermediate_size=33, num_hidden_layers=7)


def encoder(config, seed: int) -> Encoder:
    torch.manual_seed(seed)
    made = Encoder(config)
    make_loud(made)
    return made


def wrapped(old: Tensor, size: int) -> Tensor:
    """Along the first axis: the old values in the middle, then copies outwards from both of its ends."""
    offset = (size - len(old)) // 2
    new = old.new_empty(size, *old.shape[1:])
    new[offset : offset + len(old)] = old
    for i in range(offset):
        new[offset - 1 - i] = old[len(old) - 1 - i % len(old)]
    for i in range(offset + len(old), size):
        new[i] = old[(i - offset) % len(old)]
    return new


def flexbert(name: str, old: Tensor, shape: torch.Size) -> Tensor:
    """`tile_weights_from_middle`, with the parts of fused matrices tiled one by one: first columns, then rows."""
    if old.ndim == 2:
        old = wrapped(old.T, shape[1]).T
    parts = 3 if "Wqkv" in name else 2 if "Wi" in name else 1
    return torch.cat([wrapped(part, shape[0] // parts) for part in old.chunk(parts)])


@pytest.mark.parametrize("biases", [{}, BIASES], ids=["plain", "biases"])
def test_tiles_are_those_of_flexbert(biases):
    """At sizes as in ModernBERT, where the number of new heads is even."""
    small, large = encoder(replace(SMALL, **biases), 1), encoder(replace(LARGE, **biases), 2)
    untouched = {name: value.clone() for name, value in large.state_dict().items()}
    tile_from(large, small)
    old = small.state_dict()
    sources = [round(i * 5 / 7) for i in range(7)]
    assert sources == [0, 1, 1, 2, 3, 4, 4]
    for name, got in large.state_dict().items():
        source = name
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            source = f"layers.{sources[int(layer)]}.{rest}"
        wanted = flexbert(name, old[source], got.shape) if source in old else untouched[name]
        assert torch.equal(got, wanted), name


def test_a_tiled_head_is_a_head_of_the_smaller_model():
    """Also where the middle would cut heads in two: rotary positions would then meet other rows than in training."""
    small = encoder(SMALL, 1)
    large = encoder(replace(SMALL, hidden_size=80, num_attention_heads=5), 2)
    tile_from(large, small)
    for layer, source in zip(large.layers, small.layers, strict=True):
        heads = [
            (layer.attn.Wqkv.weight.view(3, 5, 16, 80), source.attn.Wqkv.weight.view(3, 4, 16, 64), (1, 3)),
            (layer.attn.Wo.weight.view(80, 5, 16), source.attn.Wo.weight.view(64, 4, 16), (1, 0)),
        ]
        for new, old, (axis, width) in heads:
            middle = new.narrow(width, 8, 64)  # the 64 columns of the stream in the middle of 80
            for head, of in enumerate((0, 1, 2, 3, 0)):
                assert torch.equal(middle.select(axis, head), old.select(axis, of))


def test_many_more_layers_than_before():
    """FlexBERT's rounding gives layer 2 of 2 here, which is not there."""
    small, deep = encoder(replace(SMALL, num_hidden_layers=2), 1), encoder(replace(SMALL, num_hidden_layers=5), 2)
    norm = deep.layers[1].attn_norm.weight.clone()
    tile_from(deep, small)
    for layer, source in zip(deep.layers, (0, 0, 1, 1, 1), strict=True):
        assert torch.equal(layer.mlp.Wi.weight, small.layers[source].mlp.Wi.weight)
    assert torch.equal(deep.layers[1].attn_norm.weight, norm)  # layer 0 of the smaller model has none to give


def test_a_model_of_the_same_size_becomes_the_same():
    one, other = encoder(SMALL, 1), encoder(SMALL, 2)
    tile_from(other, one)
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


class Head(Pretrained):
    """A head as heads are: an encoder, a dense layer, a norm and a decoder."""

    base_model_prefix = "encoder"

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        width = encoder.config.hidden_size
        self.encoder, self.dense, self.norm = encoder, nn.Linear(width, width, bias=False), nn.LayerNorm(width)
        self.decoder = nn.Linear(width, encoder.config.vocab_size)
        self.decoder.weight = encoder.embeddings.tok_embeddings.weight


def test_heads_are_tiled_too():
    small, large = Head(encoder(SMALL, 1)), Head(encoder(LARGE, 2))
    nn.init.normal_(small.norm.weight)
    tile_from(large, small)
    for name in ("dense.weight", "norm.weight", "norm.bias", "decoder.weight", "decoder.bias"):
        got, old = large.state_dict()[name], small.state_dict()[name]
        assert torch.equal(got, flexbert(name, old, got.shape)), name
    assert large.decoder.weight is large.encoder.embeddings.tok_embeddings.weight


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 32, "num_attention_heads": 2}, "hidden_size is 32, but 64 in the smaller model"),
        ({"intermediate_size": 16}, "intermediate_size is 16"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3"),
        ({"hidden_size": 128}, "head_dim is 32, but must be 16"),
        ({"vocab_size": 101}, "vocab_size is 101, but must be 100"),
        ({"mlp_bias": True}, r"differ in layers\.0\.mlp\.Wi\.bias"),
    ],
    ids=str,
)
def test_models_that_cannot_be_tiled_are_named_and_left(change, words):
    model, smaller = encoder(replace(SMALL, **change), 1), encoder(SMALL, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        tile_from(model, smaller)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_biases_of_the_smaller_model_are_not_dropped_silently():
    with pytest.raises(ValueError, match=r"differ in layers\.0\.attn\.Wo\.bias"):
        tile_from(encoder(SMALL, 1), encoder(replace(SMALL, attention_bias=True), 2))


@pytest.mark.parametrize("make", [lambda x: x, Head], ids=["encoder", "head"])
def test_another_context_is_that_of_a_new_encoder(make, tmp_path):
    old = replace(TINY, global_rope_theta=1e4, local_rope_theta=1e4, max_position_embeddings=32)
    new = replace(TINY, global_rope_theta=160e3, local_rope_theta=1e4, max_position_embeddings=128)
    changed, wanted = encoder(old, 1).eval(), encoder(new, 1).eval()
    batch = pack(random_ids([100, 3], TINY.vocab_size))
    with pytest.warns(UserWarning, match="longer than max_position_embeddings"):
        before = changed(batch)
    set_context(make(changed), length=128, global_rope_theta=160e3, local_rope_theta=1e4)
    assert changed.config == new
    assert torch.equal(changed(batch), wanted(batch))
    assert not torch.allclose(changed(batch), before, atol=1e-3)
    changed.save_pretrained(tmp_path / "model")
    assert torch.equal(Encoder.from_pretrained(tmp_path / "model")(batch), wanted(batch))


def test_a_context_that_cannot_be_is_refused_and_nothing_changes():
    model = encoder(TINY, 1)
    for wrong in ({"length": 0}, {"global_rope_theta": -1.0}, {"local_rope_theta": float("nan")}):
        with pytest.raises(ValueError, match="must be"):
            set_context(model, **({"length": 64, "global_rope_theta": 1e4, "local_rope_theta": 1e4} | wrong))
    assert model.config == TINY
    assert model.thetas == tuple(map(TINY.rope_theta, range(4)))
