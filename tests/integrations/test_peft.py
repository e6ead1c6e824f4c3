"""LoRA of PEFT on `Wqkv`, `Wo` and `Wi`: on packed models of transformers, and on our encoder and heads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folders import tree
from head_twin import LABELLED, SMALL, head_twins, some_labels, written
from hf_twin import make_loud, pad, random_ids, twins
from torch import Tensor, nn
from transformers import ModernBertConfig
from transformers.initialization import no_init_weights

from modernbert import ColBERT, Embedder, Encoder, Tokenizer, pack
from modernbert.integrations.transformers import pack_in_place, unpack_in_place

peft = pytest.importorskip("peft")

IDS, MASK = pad(random_ids([3, 40, 17, 1], 100))
BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
TARGETS = ["Wqkv", "Wo", "Wi"]
TOLERANCE = 1e-5


def lora(**options: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **options})


@torch.no_grad()
def train(model: nn.Module) -> nn.Module:
    """In the place of training: adapters whose part is not zero."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(0, 0.05)
    return model


def hf_model(name: str = "ModernBertForTokenClassification") -> Any:
    torch.manual_seed(0)
    config = ModernBertConfig.from_dict(written(SMALL, pad_token_id=0))
    with no_init_weights():
        model = getattr(transformers, name)._from_config(config, attn_implementation="sdpa").eval()
    make_loud(model)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK)[0][MASK.bool()]


def assert_close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=TOLERANCE * max(1.0, wanted.abs().max().item()))


# Packed models of transformers


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    labels = some_labels("TokenClassification", MASK, 3)
    model(input_ids=IDS, attention_mask=MASK, labels=labels).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"Wi": 2}}])
@pytest.mark.parametrize("packed_first", [False, True])
def test_lora_before_or_after_packing(options: dict[str, Any], packed_first: bool) -> None:
    """An adapter of later was ignored where the weights were looked up once."""
    plain = train(peft.get_peft_model(hf_model(), lora(**options)))
    if packed_first:
        model = train(peft.get_peft_model(pack_in_place(hf_model()), lora(**options)))
    else:
        model = pack_in_place(train(peft.get_peft_model(hf_model(), lora(**options))))
    wanted, bare = logits(plain), logits(hf_model())
    assert (wanted - bare).abs().max() > 0.1
    assert_close(logits(model), wanted)
    with model.disable_adapter():
        assert_close(logits(model), bare)
    got, expected = gradients(model), gradients(plain)
    assert got.keys() == expected.keys()
    assert all("lora" in name for name in got)
    for name, value in expected.items():
        assert_close(got[name], value)
    merged = model.merge_and_unload()
    assert_close(logits(merged), wanted)
    unmerged = plain.merge_and_unload().state_dict()
    assert merged.state_dict().keys() == unmerged.keys()
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(value, unmerged[name], rtol=0, atol=1e-6)
    assert_close(logits(unpack_in_place(merged)), wanted)


@pytest.mark.parametrize("name", ["ModernBertModel", "ModernBertForTokenClassification"])
def test_a_saved_adapter_is_that_of_an_ordinary_model(name: str, tmp_path: Path) -> None:
    """PEFT writes the class of the model and the package of it, from which it is loaded again."""
    plain = train(peft.get_peft_model(hf_model(name), lora()))
    plain.save_pretrained(tmp_path / "plain")
    model = train(peft.get_peft_model(pack_in_place(hf_model(name)), lora()))
    model.save_pretrained(tmp_path / "packed")
    assert tree(tmp_path / "plain") == tree(tmp_path / "packed")
    loaded = peft.PeftModel.from_pretrained(hf_model(name), tmp_path / "packed").eval()
    assert_close(logits(model), logits(loaded))
    assert_close(logits(pack_in_place(loaded)), logits(model))


def test_transformers_own_adapters_and_copies() -> None:
    model = pack_in_place(hf_model())
    before = logits(model)
    model.add_adapter(lora())
    train(model)
    adapted = logits(model)
    assert (adapted - before).abs().max() > 0.1
    assert_close(logits(unpack_in_place(copy.deepcopy(model))), adapted)
    model.disable_adapters()
    assert_close(logits(model), before)


def test_gradient_checkpointing_of_a_frozen_model() -> None:
    """Only adapters are trained, so the input of the first layer has no gradient unless PEFT asks for it."""
    model = train(peft.get_peft_model(pack_in_place(hf_model()), lora())).train()
    wanted = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    for name, value in gradients(model).items():
        assert_close(value, wanted[name])


def test_trained_prompts() -> None:
    """They become rows in front of the text, as embeddings."""
    config = peft.PromptTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=4)
    torch.manual_seed(1)
    plain = peft.get_peft_model(hf_model(), config).eval()
    model = pack_in_place(copy.deepcopy(plain))
    wanted, got = (each(input_ids=IDS, attention_mask=MASK)[0] for each in (plain, model))
    rows = torch.cat([torch.ones(len(MASK), got.shape[1] - MASK.shape[1]), MASK], 1).bool()
    assert_close(got[rows], wanted[rows])


# Our encoder and heads


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"rank_pattern": {"Wqkv": 8, "layers.0.attn.Wo": 1}}])
def test_lora_of_our_encoder(options: dict[str, Any]) -> None:
    theirs, ours = twins(SMALL)
    plain, model = (train(peft.get_peft_model(copy.deepcopy(each), lora(**options))) for each in (theirs, ours))
    assert plain.peft_config["default"].r == 4
    wanted = logits(plain)
    assert_close(logits(model), wanted)
    packed = pack(random_ids([3, 40, 17, 1], 100))
    assert_close(model(packed).detach(), wanted)
    merged = model.merge_and_unload()
    assert_close(logits(merged), wanted)
    for name, value in plain.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], value, rtol=0, atol=1e-6)
    assert type(merged.layers[0].attn.Wqkv) is type(ours.layers[0].attn.Wqkv)


@pytest.mark.parametrize("task", LABELLED)
def test_lora_of_our_heads(task: str) -> None:
    theirs, ours = head_twins(task)
    plain, model = (train(peft.get_peft_model(each, lora())) for each in (theirs, ours))
    labels = some_labels(task, MASK, SMALL.vocab_size if task == "MaskedLM" else 3)
    got, wanted = (each(input_ids=IDS, attention_mask=MASK, labels=labels) for each in (model, plain))
    assert_close(got.loss.detach(), wanted.loss.detach())
    for each in (got, wanted):
        each.loss.backward()
    grads = [{name: p.grad for name, p in each.named_parameters() if p.grad is not None} for each in (model, plain)]
    assert grads[0].keys() == grads[1].keys()
    assert {name.split(".")[-4] for name in grads[0]} >= set(TARGETS)
    for name, value in grads[1].items():
        assert_close(grads[0][name], value)
    again = model.merge_and_unload()(input_ids=IDS, attention_mask=MASK, labels=labels)
    assert_close(again.loss.detach(), wanted.loss.detach())


def vectors(model: Any, tokens: Any) -> Tensor:
    output = model(tokens)
    return (output if isinstance(output, Tensor) else output.values).detach()


@pytest.mark.parametrize("make", [ColBERT.from_encoder, Embedder], ids=["ColBERT", "Embedder"])
def test_lora_of_our_retrievers(make: Callable[..., Any], tmp_path: Path) -> None:
    """Adapted, merged, saved and loaded."""
    torch.manual_seed(0)
    model = make(Encoder.from_pretrained(BACKBONE), Tokenizer.from_pretrained(BACKBONE)).eval()
    texts = ["what moves downhill?", "x"]
    tokens = model.tokenize(texts) if isinstance(model, Embedder) else model.tokenize_queries(texts)
    before = vectors(model, tokens)
    adapted = train(peft.get_peft_model(model, lora()))
    wanted = vectors(adapted, tokens)
    assert (before - wanted).abs().max() > 1e-3
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path)
    for each in (merged, type(model).from_pretrained(tmp_path)):
        assert_close(vectors(each, tokens), wanted)


@pytest.mark.parametrize("make", [lambda: twins(SMALL)[1], lambda: pack_in_place(twins(SMALL)[0])])
def test_a_rank_for_each_projection(make: Callable[[], Any]) -> None:
    """The recipe of docs/compatibility.md: an adapter for each of q, k and v, of which the other rows stay zero."""
    torch.manual_seed(0)
    ranks, frozen = {"q": 8, "k": 2, "v": 4}, make()
    model = peft.get_peft_model(copy.deepcopy(frozen), lora(r=ranks["q"], target_modules=["Wqkv"]), adapter_name="q")
    for name in ("k", "v"):
        model.add_adapter(name, lora(r=ranks[name], target_modules=["Wqkv"]))
    model.base_model.set_adapter(list(ranks))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            place = list(ranks).index(name.split(".")[-2])
            own = torch.zeros(3, len(parameter) // 3, 1).index_fill(0, torch.tensor(place), 1).flatten(0, 1)
            parameter.register_hook(lambda grad, own=own: grad * own)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(IDS, attention_mask=MASK)[0][MASK.bool()].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    wanted = logits(model)
    merged = model.merge_and_unload()
    assert_close(logits(merged), wanted)
    for layer, before in zip(merged.layers, frozen.layers, strict=True):
        change = (layer.attn.Wqkv.weight - before.attn.Wqkv.weight).detach().unflatten(0, (3, -1))
        for part, rank in zip(change, ranks.values(), strict=True):
            size = torch.linalg.svdvals(part)
            assert int((size > 1e-4 * size.max()).sum()) == rank
