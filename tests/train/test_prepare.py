"""Recomputed and compiled layers give the loss and the gradients of plain ones."""

import pytest
import torch
from torch import nn
from worker_runs import Rows, rows_loss, texts

from modernbert.train.prepare import prepare


def gradients(model):
    part = rows_loss(model, texts(0))
    part.loss.backward()
    return part.loss, {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def test_recomputed_layers_give_the_same_bits():
    plain, recomputed = Rows(), Rows()
    prepare(recomputed, gradient_checkpointing=True)
    assert recomputed.encoder.gradient_checkpointing
    loss, wanted = gradients(plain)
    again, got = gradients(recomputed)
    assert torch.equal(loss, again)
    assert wanted.keys() == got.keys()
    for name in wanted:
        assert torch.equal(wanted[name], got[name]), name


def test_compiled_layers_serve_batches_of_all_lengths(monkeypatch):
    """One graph for each kind of layer, whatever the number of texts and tokens; names and methods stay."""
    graphs = []

    def counter(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled, plain = Rows(), Rows()
    names = list(compiled.state_dict())
    compile_of = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, **how: compile_of(module, backend=counter, **how))
    torch.compiler.reset()
    prepare(compiled, compile=True)
    for index in range(6):
        for model in (compiled, plain):
            model.zero_grad()
        torch.testing.assert_close(
            rows_loss(compiled, texts(index)).loss, rows_loss(plain, texts(index)).loss, rtol=1e-12, atol=0
        )
    assert list(compiled.state_dict()) == names
    assert 0 < len(graphs) <= 4


def test_a_model_of_others_can_be_compiled_but_not_recomputed(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **how: compiled.append((module, how)))
    model = nn.Linear(2, 2)
    prepare(model, compile=True)
    assert compiled == [(model, {"dynamic": True})]
    with pytest.raises(ValueError, match="needs a model with an Encoder"):
        prepare(model, gradient_checkpointing=True)
