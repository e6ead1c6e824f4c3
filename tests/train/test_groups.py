"""Which parameters get which learning rate and weight decay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hf_twin import BIASES, TINY
from torch import nn
from transformers import ModernBertConfig, ModernBertForMaskedLM, ModernBertModel

from modernbert import Encoder
from modernbert.train.groups import hidden_matrices, parameter_groups
from modernbert.train.muon import MuonAdamW
from modernbert.train.optim import StableAdamW


class Head(nn.Module):
    """An encoder with a classifier whose weights may be tied to the embeddings."""

    def __init__(self, encoder: nn.Module, tied: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(TINY.hidden_size, TINY.vocab_size)
        if tied:
            self.classifier.weight = encoder.get_input_embeddings().weight


def settings(model: nn.Module, **options) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter by name; each is in exactly one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, learning_rate=1.0, weight_decay=0.1, **options)
    found = [(names[id(x)], (group["lr"], group["weight_decay"])) for group in groups for x in group["params"]]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize("biases", [{}, BIASES], ids=["plain", "biases"])
def test_norms_and_biases_have_no_weight_decay(biases):
    model = Head(Encoder(replace(TINY, **biases)))
    found = settings(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, value in found.items():
        assert value == (1.0, 0.0 if "norm" in name or name.endswith("bias") else 0.1), name


def test_embeddings_decay_where_the_recipe_says_so():
    model = Head(Encoder(TINY))
    found = settings(model, decay_embeddings=False)
    without = {name for name, (_, decay) in found.items() if not decay and "norm" not in name}
    assert without == {"encoder.embeddings.tok_embeddings.weight", "classifier.bias"}


def test_layers_further_down_learn_less():
    found = settings(Head(Encoder(TINY)), layer_decay=0.5)
    for name, (rate, _) in found.items():
        if "embeddings" in name:
            below = 5
        elif ".layers." in name:
            below = 4 - int(name.split(".")[2])
        else:
            below = 0  # the final norm and the head
        assert rate == 0.5**below, name


def test_tied_weights_are_in_one_group_as_embeddings():
    model = Head(Encoder(TINY), tied=True)
    found = settings(model, layer_decay=0.5, decay_embeddings=False)
    assert found["encoder.embeddings.tok_embeddings.weight"] == (0.5**5, 0.0)
    assert "classifier.weight" not in found


def test_frozen_parameters_are_left_out_and_do_not_move_the_others():
    model = Head(Encoder(TINY))
    whole = settings(model, layer_decay=0.5)
    frozen = [model.encoder.embeddings, model.encoder.layers[3]]
    for part in frozen:
        part.requires_grad_(False)
    rest = settings(model, layer_decay=0.5)
    assert rest.items() < whole.items()
    assert not any("embeddings" in name or ".layers.3." in name for name in rest)
    model.encoder.requires_grad_(False)
    assert settings(model, layer_decay=0.5) == {"classifier.weight": (1.0, 0.1), "classifier.bias": (1.0, 0.0)}


class InOtherModules(nn.Module):
    """What a wrapper with another name than `torch.compile`'s looks like: peft's, around a head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model


WRAPPERS = {
    "compiled": torch.compile,
    "compiled inside": lambda model: Head(torch.compile(model.encoder)),
    "peft": InOtherModules,
    "encoder alone": lambda model: model.encoder,
    "transformers": lambda _: ModernBertModel(ModernBertConfig(**hf_shape())),
    "transformers with a head": lambda _: ModernBertForMaskedLM(ModernBertConfig(**hf_shape())),
}


def hf_shape() -> dict[str, int | None]:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    ids = dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"), 0)
    return {name: getattr(TINY, name) for name in names} | ids


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_layers_are_found_whatever_wraps_them(wrap):
    model = wrap(Head(Encoder(TINY)))
    for name, (rate, _) in settings(model, layer_decay=0.5).items():
        for layer in range(4):
            assert f"layers.{layer}." not in name or rate == 0.5 ** (4 - layer), name
        assert "embeddings" not in name or rate == 0.5**5, name
    assert len(hidden_matrices(model)) == 4 * 4


def test_layers_of_a_head_are_not_those_of_the_encoder():
    model = Head(Encoder(TINY))
    model.head = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)]), "embeddings": nn.Linear(2, 2)})
    found = settings(model, layer_decay=0.5, decay_embeddings=False)
    assert {found["head.layers.0.weight"], found["head.embeddings.weight"]} == {(1.0, 0.1)}
    assert len(hidden_matrices(model)) == 4 * 4


def test_what_would_be_ignored_is_refused():
    with pytest.raises(ValueError, match=r"layer_decay is 0\.9, but Linear has no parameter named layers"):
        parameter_groups(nn.Linear(2, 2), learning_rate=1.0, layer_decay=0.9)
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), learning_rate=1.0)


def test_every_optimizer_takes_the_groups():
    model = Head(Encoder(TINY))
    groups = parameter_groups(model, learning_rate=0.1, weight_decay=0.01, layer_decay=0.9)
    for optimizer in (torch.optim.AdamW(groups), StableAdamW(groups), MuonAdamW(groups, hidden_matrices(model))):
        rates = {id(x): group["lr"] for group in optimizer.param_groups for x in group["params"]}
        assert rates == {id(x): group["lr"] for group in groups for x in group["params"]}
