"""Checkpoints of FlexBERT in Composer, both ways: the same bits, and the traps of its config.

The names and settings were compared with the code of AnswerDotAI/ModernBERT, branch pretraining_documentation: its
three classes load what `convert` writes with `strict=True`, and give our numbers.
"""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modernbert import Encoder, EncoderConfig, MaskedLM, Tokenizer
from modernbert.config import FULL, SLIDING
from modernbert.heads.classes import CLASSES
from modernbert.heads.convert import convert
from modernbert.heads.flexbert_config import from_flexbert
from modernbert.pretrained import Pretrained

BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
CONFIG = EncoderConfig(
    vocab_size=104,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=2,
    local_attention=16,
    **dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id"), 3),
)
# What Composer 0.24 saves of the config of modernbert-base-context-extension.yaml, in a small shape.
TRAINED: dict[str, Any] = {
    "_name_or_path": "bert-base-uncased",
    "architectures": ["BertForMaskedLM"],
    "attention_layer": "rope",
    "attention_probs_dropout_prob": 0.0,
    "attn_out_bias": False,
    "attn_out_dropout_prob": 0.1,
    "attn_qkv_bias": False,
    "bert_layer": "prenorm",
    "compile_model": True,
    "decoder_bias": True,
    "embed_dropout_prob": 0.0,
    "embed_norm": True,
    "embedding_layer": "sans_pos",
    "encoder_layer": "base",
    "final_norm": True,
    "global_attn_every_n_layers": 3,
    "head_class_act": "silu",
    "head_class_bias": False,
    "head_class_norm": False,
    "head_pred_act": "gelu",
    "head_pred_bias": False,
    "head_pred_norm": True,
    "hidden_act": "gelu",
    "hidden_size": 32,
    "init_cutoff_factor": 2.0,
    "init_method": "full_megatron",
    "initial_attention_layer": None,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "layer_norm_eps": 1e-12,
    "local_attn_rotary_emb_base": 10000.0,
    "local_attn_rotary_emb_dim": None,
    "loss_function": "fa_cross_entropy",
    "max_position_embeddings": 512,
    "mlp_dropout_prob": 0.0,
    "mlp_in_bias": False,
    "mlp_layer": "glu",
    "mlp_out_bias": False,
    "model_type": "bert",
    "norm_kwargs": {"bias": False, "eps": 1e-05},
    "normalization": "layernorm",
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "pad_token_id": 0,
    "padding": "unpadded",
    "pooling_type": "cls",
    "rotary_emb_base": 160000.0,
    "rotary_emb_dim": 16,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "skip_first_prenorm": True,
    "sliding_window": 128,
    "vocab_size": 520,
}


def make(kind: str, config: EncoderConfig = CONFIG) -> Pretrained:
    torch.manual_seed(0)
    options = {"labels": ["no", "yes", "maybe"]} if kind == "SequenceClassifier" else {}
    return CLASSES[kind](Encoder(config), **options).eval()  # pyright: ignore[reportCallIssue]


def saved(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=True)["state"]


def assert_same_bits(got: Pretrained, wanted: Pretrained) -> None:
    ours, theirs = got.state_dict(), wanted.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, torch.equal(ours[name], tensor)) == (tensor.dtype, True), name


@pytest.mark.parametrize("kind", ["MaskedLM", "SequenceClassifier", "MultipleChoice"])
@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, classifier_activation="silu", hidden_activation="silu", max_position_embeddings=7999),
        replace(CONFIG, tie_word_embeddings=False, norm_bias=True, attention_bias=True, mlp_bias=True),
        replace(
            CONFIG, classifier_bias=True, classifier_pooling="mean", local_rope_theta=160_000.0, layer_pattern=(FULL,)
        ),
    ],
    ids=["silu", "untied, biases", "one theta"],
)
def test_to_composer_and_back(kind: str, config: EncoderConfig, tmp_path: Path) -> None:
    model = make(kind, config).bfloat16()
    model.save_pretrained(tmp_path / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BACKBONE / name, tmp_path / "hf")
    assert convert(tmp_path / "hf", tmp_path / "model.pt", to="composer") == kind
    assert convert(tmp_path / "model.pt", tmp_path / "back", to="transformers") == kind
    loaded = type(model).from_pretrained(tmp_path / "back", dtype="auto")
    assert_same_bits(loaded, model)
    assert loaded.base_model.config == model.base_model.config
    assert loaded.base_model.config.others.get("id2label") == model.base_model.config.others.get("id2label")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        before, after = (json.loads((folder / name).read_text()) for folder in (BACKBONE, tmp_path / "back"))
        assert after == before


def test_what_a_checkpoint_for_composer_holds(tmp_path: Path) -> None:
    """The names of FlexBERT's classes below those of Composer's `HuggingFaceModel`, without either library."""
    config = replace(CONFIG, local_rope_theta=160_000.0, attention_dropout=0.1, num_hidden_layers=1)
    model = make("MaskedLM", config)
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "model.pt", to="composer")
    state = saved(tmp_path / "model.pt")
    assert set(state["model"]) == {
        "model.bert.embeddings.norm.weight",
        "model.bert.embeddings.tok_embeddings.weight",
        "model.bert.encoder.layers.0.attn.Wo.weight",
        "model.bert.encoder.layers.0.attn.Wqkv.weight",
        "model.bert.encoder.layers.0.mlp.Wi.weight",
        "model.bert.encoder.layers.0.mlp.Wo.weight",
        "model.bert.encoder.layers.0.mlp_norm.weight",
        "model.bert.final_norm.weight",
        "model.decoder.bias",
        "model.decoder.weight",  # tied, and there nevertheless
        "model.head.dense.weight",
        "model.head.norm.weight",
    }
    written = state["integrations"]["huggingface"]["model"]["config"]
    assert written["class"] == "src.bert_layers.model.FlexBertForMaskedLM"
    content = written["content"]
    wanted = {
        "attn_out_dropout_prob": 0.1,
        "global_attn_every_n_layers": 3,
        "head_class_norm": "layernorm",
        "head_pred_act": "gelu",
        "local_attn_rotary_emb_base": 160_000.0,
        "rotary_emb_base": 160_000.0,
        "sliding_window": 16,
        "skip_first_prenorm": True,
        "model_type": "bert",
    }
    assert wanted.items() <= content.items()


def checkpoint(file: Path, changes: dict[str, Any] | None = None, **others: Any) -> dict[str, Tensor]:
    """A file as Composer writes it while a FlexBERT is trained, and the tensors of its model under our names."""
    model = make("MaskedLM", replace(CONFIG, vocab_size=520))
    tensors = {"bert." + name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    tensors = {
        "model." + name.removeprefix("bert.")
        if name.startswith(("bert.head", "bert.decoder"))
        else "model." + name.replace("bert.layers.", "bert.encoder.layers."): tensor
        for name, tensor in tensors.items()
    }
    backend = json.loads((BACKBONE / "tokenizer.json").read_text())
    integration = {
        "model": {
            "config": {"content": TRAINED | (changes or {}), "class": "src.bert_layers.model.FlexBertForMaskedLM"}
        },
        "tokenizer": {"tokenizer": {"file_extension": ".json", "content": backend}},  # names as in old versions
    }
    state = {
        "model": tensors,
        "integrations": {"huggingface": integration},
        "optimizers": {
            "DecoupledStableAdamW": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]}
        },
        "timestamp": {"Timestamp": {"total_wct": np.timedelta64(3, "s"), "batch": 7}},
        "train_metrics": {"LanguageCrossEntropy": replace(CONFIG)},  # an object of some class
    }
    rng = [{"numpy": np.random.RandomState(0).get_state(), "torch": torch.get_rng_state()}]
    torch.save({"state": state | others, "rng": rng}, file)
    return model.state_dict()


def test_a_training_checkpoint_becomes_a_masked_lm(tmp_path: Path) -> None:
    """As FlexBERT computes it, and not as its own converter says, which takes the activation of another head."""
    state = checkpoint(tmp_path / "latest-rank0.pt")
    with pytest.warns(UserWarning, match=r"attn_out_dropout_prob 0\.1 is left out"):
        convert(tmp_path / "latest-rank0.pt", tmp_path / "hf", to="transformers")
    model, tokenizer = MaskedLM.from_pretrained(tmp_path / "hf"), Tokenizer.from_pretrained(tmp_path / "hf")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    config = model.config
    assert (config.classifier_activation, config.max_position_embeddings, config.window) == ("gelu", 8192, 64)
    assert (config.pad_token_id, config.cls_token_id) == (tokenizer.pad_token_id, tokenizer.cls_token_id)
    hf = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (hf["architectures"], hf["global_rope_theta"], hf["local_rope_theta"]) == (
        ["ModernBertForMaskedLM"],
        160_000.0,
        10_000.0,
    )


@pytest.mark.filterwarnings("ignore:FlexBERT's attn_out_dropout_prob")
@pytest.mark.parametrize(
    ("changes", "thetas"),
    [
        ({"local_attn_rotary_emb_base": -1}, [160_000.0] * 4),
        ({"local_attn_rotary_emb_base": None}, [160_000.0] * 4),
        ({"local_attn_rotary_emb_base": -1, "rotary_emb_base": 10_000}, [10_000.0] * 4),
        ({}, [160_000.0, 10_000.0, 10_000.0, 160_000.0]),
        # No window: every layer is global, and has the theta of global layers.
        (
            {"sliding_window": -1, "global_attn_every_n_layers": -1, "local_attn_rotary_emb_base": -1},
            [160_000.0] * 4,
        ),
        # No global layer.
        ({"global_attn_every_n_layers": -1}, [10_000.0] * 4),
    ],
)
def test_the_theta_of_each_layer(changes: dict[str, Any], thetas: list[float]) -> None:
    """AnswerDotAI/ModernBERT#215: its converter wrote -1, which means "as global layers", and all numbers were NaN."""
    config = from_flexbert(TRAINED | changes, "MaskedLM")
    assert [config.rope_theta(layer) for layer in range(4)] == thetas
    hf = config.to_hf()
    assert -1 not in (hf["global_rope_theta"], hf["local_rope_theta"])
    again = EncoderConfig.from_hf(hf)
    assert [again.rope_theta(layer) for layer in range(4)] == thetas
    if changes.get("sliding_window") == -1:
        assert config.layer_types == [FULL] * 4
    elif changes.get("global_attn_every_n_layers") == -1:
        assert config.layer_types == [SLIDING] * 4


NOT_MODERNBERT = {
    "attention_layer": "rope_parallel",
    "bert_layer": "postnorm",
    "embedding_layer": "absolute_pos",
    "embed_norm": False,
    "final_norm": False,
    "head_pred_norm": False,
    "hidden_act": "gelu_tanh",
    "initial_mlp_layer": "mlp",
    "local_attn_rotary_emb_dim": 8,
    "mlp_layer": "parallel_glu",
    "attn_out_bias": True,
    "normalization": "rmsnorm",
    "rotary_emb_dim": 8,
    "rotary_emb_interleaved": True,
    "rotary_emb_scale_base": 512,
    "skip_first_prenorm": False,
    "local_attn_rotary_emb_base": 0,
    "pooling_type": "max",
}


@pytest.mark.parametrize("name", NOT_MODERNBERT)
def test_another_model_of_flexbert_is_refused_by_its_setting(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=rf"{name}|hidden_activation|local_rope_theta|classifier_pooling"):
            from_flexbert(TRAINED | {name: NOT_MODERNBERT[name]}, "MaskedLM")
    without = {key: value for key, value in TRAINED.items() if key != "attention_layer"}
    with pytest.raises(ValueError, match="attention_layer is 'base'"):
        from_flexbert(without, "MaskedLM")


@pytest.mark.filterwarnings("ignore:FlexBERT's attn_out_dropout_prob")
def test_a_classifier_needs_a_norm_in_its_head() -> None:
    with pytest.raises(ValueError, match="head_class_norm is off"):
        from_flexbert(TRAINED, "SequenceClassifier")
    assert (
        from_flexbert(TRAINED | {"head_class_norm": "layernorm"}, "SequenceClassifier").classifier_activation == "silu"
    )


CANNOT_BE_WRITTEN = {
    "vocabulary": (replace(CONFIG, vocab_size=102), r"resize_token_embeddings\(102, pad_to_multiple_of=8\) first"),
    "last layer local": (replace(CONFIG, num_hidden_layers=3), "the first and the last one are"),
    "pattern": (replace(CONFIG, layer_pattern=(SLIDING, FULL)), "every n-th layer is global"),
    "odd window": (replace(CONFIG, local_attention=129), "only even windows"),
}


@pytest.mark.parametrize("name", CANNOT_BE_WRITTEN)
def test_what_flexbert_cannot_say_is_refused(name: str, tmp_path: Path) -> None:
    config, words = CANNOT_BE_WRITTEN[name]
    MaskedLM(Encoder(config)).save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match=words):
        convert(tmp_path / "hf", tmp_path / "model.pt", to="composer")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


class Bomb:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.file, "it ran"))


def test_no_code_of_a_checkpoint_runs(tmp_path: Path) -> None:
    checkpoint(tmp_path / "model.pt", callbacks={"x": Bomb(tmp_path / "ran"), "y": [Bomb(tmp_path / "ran")]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert(tmp_path / "model.pt", tmp_path / "hf", to="transformers")
    assert not (tmp_path / "ran").exists()


def rewrite(source: Path, target: Path, pickled: bytes) -> None:
    """The file with another pickle inside."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as new:
        for entry in old.namelist():
            new.writestr(entry, pickled if entry.endswith("data.pkl") else old.read(entry))


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    checkpoint(tmp_path / "good.pt")
    good = torch.load(tmp_path / "good.pt", weights_only=False)
    flat, other, mixed = good["state"]["model"], copy.deepcopy(good), copy.deepcopy(good)
    other["state"]["integrations"]["huggingface"]["model"]["config"]["class"] = "src.bert_layers.model.BertForMaskedLM"
    mixed["state"]["model"]["model.bert.extra.weight"] = torch.ones(2)
    torch.save(flat, tmp_path / "flat.pt")
    torch.save(other, tmp_path / "other.pt")
    torch.save(mixed, tmp_path / "mixed.pt")
    torch.save({"state": {"model": flat}}, tmp_path / "weights alone.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:-1000])
    (tmp_path / "text.pt").write_text("no checkpoint")
    # Stores at a place of its memory that takes 30 GB.
    rewrite(tmp_path / "good.pt", tmp_path / "memory.pt", pickle.PROTO + b"\x02]r\xff\xff\xff\xef.")
    words = {
        "flat": "it has no state",
        "weights alone": "it has no integrations > huggingface",
        "other": r"holds a BertForMaskedLM; FlexBertForMaskedLM, .* are read",
        "mixed": r"unexpected \(1\): model\.extra\.weight",
        "cut": "is damaged",
        "text": "is damaged",
        "memory": "but has not so many objects",
    }
    for name, problem in words.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError, match=problem):
                convert(tmp_path / f"{name}.pt", tmp_path / "hf", to="transformers")
        assert not (tmp_path / "hf").exists()
