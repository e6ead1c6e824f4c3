"""MaskedLM: the tie of the decoder to the table, resizing, `sparse_prediction`, and losses without logits."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from folders import check_refused
from head_twin import CONFIGS, SMALL, head_twins, some_labels
from hf_twin import pad, random_ids
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from modernbert import Encoder, EncoderConfig, MaskedLM, Tokenizer, pack
from modernbert.heads.fill_mask import fill_mask

TEXTS = random_ids([3, 40, 17], 100)
IDS, MASK = pad(TEXTS)
LABELS = some_labels("MaskedLM", MASK, 100)
TIED, UNTIED = CONFIGS["tied"], CONFIGS["untied"]


def make(config: EncoderConfig = TIED, **settings: object) -> MaskedLM:
    model = head_twins("MaskedLM", config, **settings)[1]
    assert isinstance(model, MaskedLM)
    return model


def is_tied(model: MaskedLM) -> bool:
    return model.decoder.weight is model.get_input_embeddings().weight


# The tie


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_the_tie_lasts(config: EncoderConfig, tmp_path: Path) -> None:
    """Through loading, copies, a move, a cast, a training step, and a resize."""
    model = make(config)
    model.save_pretrained(tmp_path)
    wanted = config.tie_word_embeddings
    assert ("decoder.weight" in load_file(tmp_path / "model.safetensors")) is not wanted
    for other in (model, MaskedLM.from_pretrained(tmp_path), copy.deepcopy(model), make(config).double()):
        assert is_tied(other) is wanted
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(pack(TEXTS), labels=LABELS[MASK.bool()]).loss.backward()
    optimizer.step()
    assert is_tied(model) is wanted
    model.resize_token_embeddings(120)
    assert is_tied(model) is wanted
    model.load_state_dict(make(replace(config, vocab_size=120)).state_dict())
    assert is_tied(model) is wanted
    assert torch.equal(model.decoder.weight, model.get_input_embeddings().weight) is wanted


def test_a_state_dict_can_be_written_by_safetensors(tmp_path: Path) -> None:
    """transformers' Trainer does so, and safetensors refuses tensors that share memory."""
    from safetensors.torch import save_file

    model = make()
    state = model.state_dict()
    save_file(state, tmp_path / "model.safetensors")
    assert torch.equal(state["decoder.weight"], state["model.embeddings.tok_embeddings.weight"])
    kept = model.state_dict(keep_vars=True)
    assert kept["decoder.weight"] is kept["model.embeddings.tok_embeddings.weight"]
    outer = nn.ModuleDict({"mlm": model}).state_dict()
    save_file(outer, tmp_path / "outer.safetensors")
    other = make()
    with torch.no_grad():
        other.get_input_embeddings().weight.zero_()
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert torch.equal(other(pack(TEXTS)), model(pack(TEXTS)))


def test_a_broken_tie_is_not_saved_as_one(tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "model")
    model.decoder.weight = nn.Parameter(model.decoder.weight + 1)
    check_refused(model, tmp_path / "model", r"decoder\.weight \(tied to .*different from it in the file\)")
    state = make().state_dict()
    state["decoder.weight"] = state["decoder.weight"] + 1
    with pytest.raises(ValueError, match="different from it in the file"):
        make().save_pretrained(tmp_path / "model", state_dict=state)
    make().save_pretrained(tmp_path / "model", state_dict=make().state_dict())


# The vocabulary


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", [130, 90])
def test_resized_as_a_whole(name: str, rows: int, tmp_path: Path) -> None:
    model = make(CONFIGS[name])
    before = model(pack([[5, 6, 7]]))
    table = model.resize_token_embeddings(rows)
    assert table is model.get_input_embeddings()
    kept = min(rows, 100)
    after = model(pack([[5, 6, 7]]))
    assert after.shape == (3, rows)
    torch.testing.assert_close(after[:, :kept], before[:, :kept], rtol=0, atol=1e-5)
    assert model.config.vocab_size == model.decoder.out_features == rows
    model(pack([[rows - 1]]), labels=torch.tensor([rows - 1])).loss.backward()
    assert model.decoder.weight.grad is not None
    model.save_pretrained(tmp_path)
    assert torch.equal(MaskedLM.from_pretrained(tmp_path)(pack([[5, 6, 7]])), after)


def test_another_table_is_the_decoder_too() -> None:
    model = make()
    model.set_input_embeddings(nn.Embedding(70, 64))
    assert is_tied(model)
    assert model(pack([[69]])).shape == (1, 70)
    assert model.get_output_embeddings() is model.decoder
    model.decoder = nn.Sequential(model.decoder)
    with pytest.raises(ValueError, match="the decoder is a Sequential that was replaced"):
        model.resize_token_embeddings(80)
    assert model.config.vocab_size == 70


# Losses


def test_sparse_prediction_is_the_loss_alone(tmp_path: Path) -> None:
    """The setting of transformers, written and read; its loss is that of all logits."""
    plain, sparse = make(), make(sparse_prediction=True)
    wanted, got = (model(IDS, MASK, labels=LABELS) for model in (plain, sparse))
    torch.testing.assert_close(got.loss, wanted.loss)
    assert (wanted.logits.shape, got.logits) == ((3, 40, 100), None)
    assert sparse(IDS, MASK).logits.shape == (3, 40, 100)
    plain.save_pretrained(tmp_path)
    loaded = MaskedLM.from_pretrained(tmp_path, sparse_prediction=True)
    assert loaded(IDS, MASK, labels=LABELS).logits is None
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["sparse_prediction"] is True


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_of_rows(reduction: str) -> None:
    """In each reduction it is that of the logits, whether the decoder is plain or has a hook."""
    model, packed = make(), LABELS[MASK.bool()]
    rows = (packed >= 0).nonzero().squeeze(1)
    logits = model(pack(TEXTS), rows=rows)
    wanted = nn.functional.cross_entropy(logits, packed[rows], reduction=reduction)
    torch.testing.assert_close(model.loss(pack(TEXTS), packed, reduction=reduction), wanted)
    torch.testing.assert_close(model.loss(pack(TEXTS), packed[rows], rows, reduction=reduction), wanted)
    calls: list[int] = []
    model.decoder.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(model.loss(pack(TEXTS), packed[rows], rows, reduction=reduction), wanted)
    assert calls == [1]


def test_a_hook_on_the_decoder_counts() -> None:
    """Such as an adapter's: its output is what the loss is of."""
    model, labels = make(), LABELS[MASK.bool()]
    before = model(pack(TEXTS), labels=labels).loss
    model.decoder.register_forward_hook(lambda _, __, logits: logits / 2)
    assert model(pack(TEXTS), labels=labels).loss < before


def test_parts_of_a_batch_are_its_mean() -> None:
    """`num_items_in_batch`, as transformers' Trainer passes it with gradient accumulation."""
    model = make()
    wanted = model(IDS, MASK, labels=LABELS).loss
    count = (LABELS >= 0).sum()
    for kind in (int(count), count):
        parts = [
            model(IDS[i : i + 1], MASK[i : i + 1], labels=LABELS[i : i + 1], num_items_in_batch=kind).loss
            for i in range(3)
        ]
        torch.testing.assert_close(torch.stack(parts).sum(), wanted)
    packed = model(pack(TEXTS), labels=LABELS[MASK.bool()], num_items_in_batch=2 * count).loss
    torch.testing.assert_close(2 * packed, wanted)


class Largest(TorchDispatchMode):
    """The largest number of elements of a tensor that a call makes."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.size = max([self.size, *(x.numel() for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor))])
        return result


def test_no_logits_of_tokens_without_a_label() -> None:
    model = MaskedLM.from_config(replace(SMALL, vocab_size=5000))
    texts = random_ids([200, 300], 5000)
    labels = torch.full((500,), -100)
    labels[::50] = 3
    with Largest() as seen:
        model(pack(texts), labels=labels).loss.backward()
    assert seen.size <= 5000 * 64  # the table and its gradient; the logits of all tokens are 5000 * 500


# Making one


def test_made_from_a_preset_or_a_config() -> None:
    with torch.device("meta"):
        model = MaskedLM.from_config("ettin-17m")
    assert model.num_parameters() == 16_797_440 + 256 * 256 + 256 + 50_368
    assert isinstance(MaskedLM(Encoder(SMALL)).model, Encoder)
    loss = MaskedLM.from_config(SMALL)(pack(TEXTS), labels=LABELS[MASK.bool()]).loss
    assert abs(loss.item() - torch.tensor(100.0).log().item()) < 0.2, "a new model knows nothing"


# [MASK]


def test_fill_mask_is_the_pipeline_of_transformers(modernbert_tokenizer_file: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, pipeline

    tokenizer = Tokenizer.from_pretrained(modernbert_tokenizer_file.parent)
    theirs, ours = head_twins("MaskedLM", replace(SMALL, vocab_size=tokenizer.vocab_size))
    tokenizer.save_pretrained(tmp_path)
    host = pipeline("fill-mask", model=theirs, tokenizer=AutoTokenizer.from_pretrained(tmp_path), device="cpu")
    texts = ["The owl hunts [MASK] at night.", "[MASK] and hail", "a [MASK] of [MASK]"]
    assert isinstance(ours, MaskedLM)
    got = fill_mask(ours.train(), tokenizer, texts, top_k=3)
    assert ours.training
    for text, guesses in zip(texts, got, strict=True):
        wanted = host(text, top_k=3)
        wanted = [wanted] if isinstance(wanted[0], dict) else wanted
        assert len(guesses) == len(wanted) == text.count("[MASK]")
        for mine, yours in zip(guesses, wanted, strict=True):
            assert [guess.id for guess in mine] == [guess["token"] for guess in yours]
            assert [guess.text for guess in mine] == [tokenizer.decode([guess["token"]]) for guess in yours]
            assert [guess.probability for guess in mine] == pytest.approx([guess["score"] for guess in yours], rel=1e-3)
    with pytest.raises(ValueError, match=r"texts\[1\] has no \[MASK\]"):
        fill_mask(ours, tokenizer, ["a [MASK]", "b"])
    with pytest.raises(ValueError, match="top_k"):
        fill_mask(ours, tokenizer, ["a [MASK]"], top_k=0)
