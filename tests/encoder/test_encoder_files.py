"""Folders of transformers load into our encoder, ours into transformers, and outputs are equal both ways."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hf_twin import BIASES, TINY, hf_dict, make_loud, pad, random_ids, twins
from transformers import ModernBertConfig, ModernBertModel

from modernbert import Encoder, EncoderConfig, pack
from modernbert.config import FULL, SLIDING

CONFIG = replace(TINY, **BIASES)
TEXTS = random_ids([3, 40, 17], 100)
TASKS = ["MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"]


def made_by_transformers(head: str, folder: Path, **options: object) -> ModernBertModel:
    """Save a model of theirs with this head; gives its encoder."""
    config = ModernBertConfig.from_dict(hf_dict(CONFIG, 5))
    model = getattr(transformers, f"ModernBert{head}")(config).eval()
    make_loud(model)
    model.save_pretrained(folder, **options)
    return getattr(model, "model", model)


@torch.inference_mode()
def assert_same(ours: Encoder, theirs: ModernBertModel) -> None:
    ids, mask = pad(TEXTS, "left")
    wanted = theirs(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    torch.testing.assert_close(ours(pack(TEXTS)), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("head", ["Model", *[f"For{task}" for task in TASKS]])
def test_a_folder_saved_by_transformers(head: str, tmp_path: Path) -> None:
    theirs = made_by_transformers(head, tmp_path)
    ours = Encoder.from_pretrained(tmp_path)
    assert_same(ours, theirs)
    assert not ours.training
    assert all(p.dtype == torch.float32 and p.requires_grad and not p.is_meta for p in ours.parameters())
    ours(pack(TEXTS)).sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


def test_shards_of_transformers(tmp_path: Path) -> None:
    theirs = made_by_transformers("ForMaskedLM", tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same(Encoder.from_pretrained(str(tmp_path)), theirs)


@pytest.mark.parametrize("pattern", [(FULL, SLIDING, SLIDING), (SLIDING, FULL, FULL, SLIDING)])
def test_transformers_loads_our_folder(pattern: tuple[str, ...], tmp_path: Path) -> None:
    config = replace(CONFIG, layer_pattern=pattern, local_rope_theta=30_000.0)
    ours = twins(config)[1]
    ours.resize_token_embeddings(120)
    ours.save_pretrained(tmp_path)
    theirs, report = ModernBertModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.vocab_size == 120
    assert_same(ours, theirs.eval())
    again = Encoder.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


def test_state_dicts_are_one_format() -> None:
    """Strict both ways, for any shape: the names and shapes of one are those of the other."""
    for config in (TINY, CONFIG):
        theirs, ours = ModernBertModel(ModernBertConfig.from_dict(hf_dict(config, 5))), Encoder(config)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        make_loud(ours)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        assert_same(ours.eval(), theirs.eval())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """Of the parameters, whatever the file holds; None means float32, also for a bfloat16 file."""
    theirs = made_by_transformers("Model", tmp_path / "float32")
    theirs.bfloat16().save_pretrained(tmp_path / "bfloat16")
    for name in ("float32", "bfloat16"):
        ours = Encoder.from_pretrained(tmp_path / name, dtype=dtype)
        assert {p.dtype for p in ours.parameters()} == {dtype}
        assert ours(pack(TEXTS)).dtype == dtype
        plain = Encoder.from_pretrained(tmp_path / name)
        assert {p.dtype for p in plain.parameters()} == {torch.float32}
        for wanted, got in zip(plain.parameters(), ours.parameters(), strict=True):
            assert torch.equal(wanted.to(dtype), got)
    ours.save_pretrained(tmp_path / "ours")
    again = Encoder.from_pretrained(tmp_path / "ours", dtype=dtype)
    assert torch.equal(again(pack(TEXTS)), ours(pack(TEXTS)))


def test_weights_that_do_not_fit_the_config_are_listed(tmp_path: Path) -> None:
    made_by_transformers("Model", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"mlp_bias": true', '"mlp_bias": false'))
    words = r"(?s)do not fit this Encoder.*unexpected \(8\).*layers\.3\.mlp\.Wo\.bias"
    with pytest.raises(ValueError, match=words):
        Encoder.from_pretrained(tmp_path)


def test_a_loaded_encoder_can_be_saved_over_its_own_folder(tmp_path: Path) -> None:
    made_by_transformers("ForMaskedLM", tmp_path)
    ours = Encoder.from_pretrained(tmp_path)
    wanted = ours(pack(TEXTS))
    ours.save_pretrained(tmp_path)
    assert torch.equal(ours(pack(TEXTS)), wanted)
    assert torch.equal(Encoder.from_pretrained(tmp_path)(pack(TEXTS)), wanted)
    assert Encoder.from_pretrained(tmp_path).config == EncoderConfig.from_hf(hf_dict(CONFIG, 5))


def test_loading_does_not_import_the_compiler():
    """It takes a second, and PyTorch does so where a parameter on the meta device is drawn from a normal one."""
    code = "import sys; from modernbert import ColBERT; ColBERT.default(); print('torch._dynamo' in sys.modules)"
    where = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=where, capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("False\n", "")
