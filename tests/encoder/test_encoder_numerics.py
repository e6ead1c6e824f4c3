"""Half precision, autocast, dropout and initialisation are those of transformers, or closer to float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accuracy import assert_accurate
from hf_twin import BIASES, TINY, exact_rotary, hf_dict, pad, random_ids, twins
from torch import Tensor
from transformers import ModernBertConfig, ModernBertModel
from transformers.models.modernbert import modeling_modernbert

from modernbert import Encoder, pack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_model_in_another_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """No worse than twice transformers in the same dtype, against float64 on the same rounded weights."""
    theirs, ours = twins(replace(TINY, **BIASES))
    texts = random_ids([1, 40, 17, 66], 100)
    ids, mask = pad(texts)
    real = mask.bool()
    # Theirs are the same ones; theirs.to(dtype) would round their RoPE frequencies too.
    for parameter in ours.parameters():
        parameter.data = parameter.data.to(dtype)
    with torch.inference_mode():
        got, plain = ours(pack(texts)), theirs(ids, attention_mask=mask).last_hidden_state[real]
        theirs.double(), ours.double()
        monkeypatch.setattr(modeling_modernbert, "apply_rotary_pos_emb", exact_rotary)
        truth = theirs(ids, attention_mask=mask).last_hidden_state[real]
        assert_accurate(got, plain, truth)
        torch.testing.assert_close(ours(pack(texts)), truth, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and gradients of float32 parameters under autocast, no worse than twice transformers' own."""
    theirs, ours = twins(replace(TINY, **BIASES))
    texts = random_ids([1, 40, 17, 66], 100)
    ids, mask = pad(texts)
    names, parameters = zip(*ours.named_parameters(), strict=True)
    runs = {
        "got": lambda: ours(pack(texts)),
        "plain": lambda: theirs(ids, attention_mask=mask).last_hidden_state[mask.bool()],
    }
    cotangent = torch.randn(sum(map(len, texts)), 64)
    found = {}
    for who, run in runs.items():
        with torch.autocast("cpu", dtype):
            rows = run()
        grads = torch.autograd.grad((rows * cotangent).sum(), parameters)
        found[who] = {"rows": rows.detach(), **dict(zip(names, grads, strict=True))}
    with torch.inference_mode(), torch.autocast("cpu", dtype):
        assert_accurate(ours(pack(texts)), found["plain"]["rows"], found["got"]["rows"].double(), "inference")
    theirs.double(), ours.double()
    monkeypatch.setattr(modeling_modernbert, "apply_rotary_pos_emb", exact_rotary)
    rows = runs["plain"]()
    grads = torch.autograd.grad((rows * cotangent).sum(), list(ours.parameters()))
    truth = {"rows": rows.detach(), **dict(zip(names, grads, strict=True))}
    for name, value in truth.items():
        assert_accurate(found["got"][name], found["plain"][name], value, name)
    assert (found["got"]["rows"].double() - truth["rows"]).abs().max() > 1e-3, "autocast did nothing"


@pytest.mark.parametrize("which", ["embedding_dropout", "attention_dropout", "mlp_dropout", "all"])
def test_dropout_is_that_of_transformers(which: str) -> None:
    """In training the same seed drops the same numbers as in transformers: same places, same order."""
    names = ["embedding_dropout", "attention_dropout", "mlp_dropout"]
    rates = {name: 0.3 for name in names if which in (name, "all")}
    theirs, ours = twins(replace(TINY, **rates))
    ids = torch.tensor(random_ids([40], 100))
    quiet = ours(ids).last_hidden_state
    assert torch.equal(quiet, ours(ids).last_hidden_state), "evaluation is not deterministic"
    theirs.train(), ours.train()

    def run(call, seed: int = 7) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        rows = call()
        return rows, torch.autograd.grad(rows.square().sum(), ours.layers[0].attn.Wqkv.weight)[0]

    wanted = run(lambda: theirs(ids).last_hidden_state)
    for call in (lambda: ours(ids).last_hidden_state, lambda: ours(pack(ids))[None]):
        rows, gradient = run(call)
        torch.testing.assert_close(rows, wanted[0], rtol=0, atol=2e-5)
        torch.testing.assert_close(gradient, wanted[1], rtol=0, atol=1e-4 * wanted[1].abs().max().item())
    assert (rows - quiet).abs().max() > 0.1
    assert not torch.allclose(run(lambda: ours(pack(ids)), seed=8)[0], rows[0], atol=0.1)
    ours.gradient_checkpointing = True
    again = run(lambda: ours(pack(ids)))
    assert torch.equal(again[0], rows[0])
    assert torch.equal(again[1], gradient), "recomputing dropped other numbers"
    with torch.no_grad():
        large = ours(pack([ids[0].tolist()] * 60))  # in parts, and still with dropout
    first, second = large[:40], large[40:80]
    assert not torch.allclose(first, second, atol=0.1)


def test_a_new_encoder_is_initialised_as_transformers_does_it() -> None:
    """Deviations and bounds of every parameter: outputs of a block start smaller by the root of 2 N."""
    config = replace(TINY, hidden_size=256, vocab_size=500, **BIASES)
    ours, theirs = Encoder(config), ModernBertModel(ModernBertConfig.from_dict(hf_dict(config, 5)))
    for (name, mine), yours in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if mine.dim() == 1:
            assert torch.equal(mine, yours), name
        else:
            assert abs(mine.std() / yours.std() - 1) < 0.02, name
            assert abs(mine.abs().max() / yours.abs().max() - 1) < 0.02, name
            assert abs(mine.mean()) < 0.01 * mine.std() + 1e-4, name
