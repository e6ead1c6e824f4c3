"""The config of FlexBERT, the code that ModernBERT and Ettin were trained with, from and to `EncoderConfig`.

As in src/bert_layers/configuration_bert.py of github.com/AnswerDotAI/ModernBERT.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ..config import FULL, OBJECT, SIZE, SLIDING, TASK, EncoderConfig

# Our classes and FlexBERT's.
CLASSES = {
    "MaskedLM": "FlexBertForMaskedLM",
    "SequenceClassifier": "FlexBertForSequenceClassification",
    "MultipleChoice": "FlexBertForMultipleChoice",
}
# Settings that mean the same in both: FlexBERT's name, Hugging Face's, and FlexBERT's default.
SAME: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 30522),
    "hidden_size": ("hidden_size", 768),
    "intermediate_size": ("intermediate_size", 3072),
    "num_hidden_layers": ("num_hidden_layers", 12),
    "num_attention_heads": ("num_attention_heads", 12),
    "hidden_act": ("hidden_activation", "gelu"),
    "attn_qkv_bias": ("attention_bias", False),
    "mlp_in_bias": ("mlp_bias", False),
    "embed_dropout_prob": ("embedding_dropout", 0.0),
    "attention_probs_dropout_prob": ("attention_dropout", 0.0),
    "mlp_dropout_prob": ("mlp_dropout", 0.0),
    "rotary_emb_base": ("global_rope_theta", 10_000.0),
    "decoder_bias": ("decoder_bias", True),
    "tie_word_embeddings": ("tie_word_embeddings", True),
    "initializer_range": ("initializer_range", 0.02),
    "init_cutoff_factor": ("initializer_cutoff_factor", 2.0),
    "pooling_type": ("classifier_pooling", "cls"),
    "head_class_dropout": ("classifier_dropout", 0.0),
}
# What makes a FlexBERT a ModernBERT: the values that are taken, the first of which is written, and FlexBERT's default.
BUILT: dict[str, tuple[tuple[Any, ...], Any]] = {
    "attention_layer": (("rope", "unpadded_rope", "padded_rope"), "base"),
    "bert_layer": (("prenorm", "unpadded_prenorm", "padded_prenorm", "unpadded_compile_prenorm"), "prenorm"),
    "encoder_layer": (("base", "unpadded_base", "padded_base"), "base"),
    "embedding_layer": (("sans_pos",), "absolute_pos"),
    "mlp_layer": (("glu",), "mlp"),
    "normalization": (("layernorm", "triton_layernorm"), "rmsnorm"),
    "embed_norm": ((True,), True),
    "final_norm": ((True,), False),
    "skip_first_prenorm": ((True,), False),
    "rotary_emb_scale_base": ((None,), None),
    "rotary_emb_interleaved": ((False,), False),
    "initial_attention_layer": ((None,), None),
    "initial_bert_layer": ((None,), None),
    "initial_mlp_layer": ((None,), None),
}
# Two settings of FlexBERT for one of Hugging Face.
TWINS = {"attn_out_bias": "attn_qkv_bias", "mlp_out_bias": "mlp_in_bias"}
IDS = ("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id", "eos_token_id")
BERT_POSITIONS = 512  # what FlexBERT's configs inherit from BERT; FlexBERT has no positions and does not read it
DIVISOR = 8  # FlexBERT rounds the vocabulary up to a multiple of it


def from_flexbert(written: Mapping[str, Any], kind: str) -> EncoderConfig:
    """The config of a FlexBERT model of the class `kind`, one of our `CLASSES`.

    Local layers without a theta of their own, which FlexBERT writes as -1, have the global one. A text has at most as
    many tokens as the config says, or 8,192 where it says 512 as that of BERT.

    Raises:
        ValueError: a model that is not a ModernBERT, with the setting.
    """
    head = "head_pred" if kind == "MaskedLM" else "head_class"
    get = {name: default for name, (_, default) in SAME.items()} | dict(written)
    for name, (taken, default) in BUILT.items():
        _check(name, get.get(name, default), taken)
    width, heads = (SIZE.check(f"FlexBERT's {name}", get[name]) for name in ("hidden_size", "num_attention_heads"))
    for name in ("rotary_emb_dim", "local_attn_rotary_emb_dim"):
        _check(name, get.get(name), (None, width // heads))
    for name, twin in TWINS.items():
        _check(name, get.get(name, False), (get[twin],))
    if not get.get(f"{head}_norm", head == "head_pred"):
        raise ValueError(f"FlexBERT's {head}_norm is off, but the head of a ModernBERT has a norm")
    if (out := get.get("attn_out_dropout_prob", 0.0)) != get["attention_probs_dropout_prob"]:
        warnings.warn(
            f"FlexBERT's attn_out_dropout_prob {out} is left out: attention_dropout, which is "
            f"attention_probs_dropout_prob {get['attention_probs_dropout_prob']}, is one rate for both",
            stacklevel=2,
        )
    hf = {theirs: get[name] for name, (theirs, _) in SAME.items()}
    norm, local = OBJECT.check("FlexBERT's norm_kwargs", get.get("norm_kwargs")), get.get("local_attn_rotary_emb_base")
    positions = get.get("max_position_embeddings", BERT_POSITIONS)
    return EncoderConfig.from_hf(
        {
            **{name: get[name] for name in TASK.split() if name in get},
            # BERT's config has only the pad token, of another vocabulary.
            **({name: get.get(name) for name in IDS} if get.get("cls_token_id") is not None else {}),
            **hf,
            "hidden_activation": _activation(get["hidden_act"]),
            "classifier_activation": _activation(get.get(f"{head}_act", "silu")),
            "classifier_bias": get.get(f"{head}_bias", False),
            "norm_eps": norm.get("eps", 1e-5),
            "norm_bias": norm.get("bias", True),
            "local_rope_theta": hf["global_rope_theta"] if local in (None, -1) else local,
            "max_position_embeddings": 8192 if positions == BERT_POSITIONS else positions,
            "model_type": "modernbert",
            **_layers(get, hf["num_hidden_layers"]),
        }
    )


def to_flexbert(config: EncoderConfig, kind: str) -> dict[str, Any]:
    """The config of a FlexBERT model of the class `kind`, one of our `CLASSES`.

    Raises:
        ValueError: what FlexBERT has no setting for, or would change.
    """
    hf, layers = config.to_hf(), config.num_hidden_layers
    every = hf["global_attn_every_n_layers"]
    if every is None or (layers - 1) % every:
        pattern = "every n-th layer is global, and the first and the last one are"
        raise ValueError(f"FlexBERT has only models in which {pattern}; this one has {', '.join(config.layer_types)}")
    if config.local_attention % 2:
        raise ValueError(f"local_attention is {config.local_attention}, but FlexBERT takes only even windows")
    if config.vocab_size % DIVISOR:
        todo = f"call resize_token_embeddings({config.vocab_size}, pad_to_multiple_of={DIVISOR}) first"
        raise ValueError(f"vocab_size is {config.vocab_size}, but FlexBERT takes only multiples of {DIVISOR}: {todo}")
    content = {name: hf[theirs] for name, (theirs, _) in SAME.items()}
    return {
        **{name: config.others[name] for name in TASK.split() if name in config.others},
        "_name_or_path": "bert-base-uncased",
        "architectures": [CLASSES[kind]],
        "model_type": "bert",
        **content,
        **{name: taken[0] for name, (taken, _) in BUILT.items()},
        **{name: content[twin] for name, twin in TWINS.items()},
        **{name: hf[name] for name in IDS},
        "attn_out_dropout_prob": config.attention_dropout,
        "global_attn_every_n_layers": every,
        "head_class_act": config.classifier_activation,
        "head_class_bias": config.classifier_bias,
        "head_class_norm": "layernorm",
        "head_pred_act": config.classifier_activation,
        "head_pred_bias": config.classifier_bias,
        "head_pred_norm": True,
        "init_method": "full_megatron",
        "local_attn_rotary_emb_base": config.local_rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "norm_kwargs": {"eps": config.norm_eps, "bias": config.norm_bias},
        "sliding_window": config.local_attention,
    }


def _layers(get: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Which layers are local, and their window. -1 is FlexBERT's "no window", and "no layer is another kind"."""
    window, every = get.get("sliding_window", -1), get.get("global_attn_every_n_layers", -1)
    if window == -1:
        return {"layer_types": [FULL] * layers}
    return {"local_attention": window} | (
        {"layer_types": [SLIDING] * layers} if every == -1 else {"global_attn_every_n_layers": every}
    )


def _activation(name: object) -> object:
    return "silu" if name == "swish" else name


def _check(name: str, value: object, taken: tuple[Any, ...]) -> None:
    if not any(type(value) is type(each) and value == each for each in taken):
        wanted = " or ".join(repr(each) for each in dict.fromkeys(taken))
        raise ValueError(f"FlexBERT's {name} is {value!r:.80}, but that of a ModernBERT is {wanted}")
