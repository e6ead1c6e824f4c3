"""EncoderConfig against the published config files, and against transformers reading the same files."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from pathlib import Path

import pytest
import torch

from modernbert.config import FULL, PRESETS, SLIDING, EncoderConfig

FIXTURES = Path(__file__).parents[1] / "fixtures" / "configs"
FILES = {path.stem: json.loads(path.read_text()) for path in sorted(FIXTURES.glob("*.json"))}
ETTIN = FILES.pop("ettin-encoders")
ETTIN.pop("_source")

OLD = {  # a small model as transformers 4 writes it; NEW is the same as transformers 5 does
    "model_type": "modernbert",
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 7,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 80000.0,
    "local_rope_theta": 20000.0,
}
LEGACY = ("global_attn_every_n_layers", "global_rope_theta", "local_rope_theta")
NEW = {key: value for key, value in OLD.items() if key not in LEGACY} | {
    "layer_types": [FULL, SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL],
    "rope_parameters": {
        FULL: {"rope_type": "default", "rope_theta": 80000.0},
        SLIDING: {"rope_type": "default", "rope_theta": 20000.0},
    },
}
# What is known of checkpoints whose file is not at hand, in the generation that their makers wrote.
VARIANTS = {
    "granite-embedding-97m-multilingual-r2": OLD
    | {"num_hidden_layers": 12, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
    | {"hidden_activation": "silu", "global_rope_theta": 150000.0, "local_rope_theta": 160000.0}
    | {"vocab_size": 180000, "max_position_embeddings": 32768},
    "mmBERT-base": NEW
    | {"vocab_size": 256000, "hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 22}
    | {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "cls_token_id": 1, "sep_token_id": 1}
    | {"position_embedding_type": "sans_pos", "global_attn_every_n_layers": 3}
    | {"layer_types": [SLIDING if i % 3 else FULL for i in range(22)]}
    | {"rope_parameters": {t: {"rope_theta": 160000, "rope_type": "default"} for t in (FULL, SLIDING)}},
    "modernbert-ja-30m": OLD
    | {"vocab_size": 102400, "hidden_size": 256, "num_hidden_layers": 10, "num_attention_heads": 4}
    | {"intermediate_size": 1024, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0},
    "irregular": NEW | {"layer_types": [SLIDING, FULL, FULL, SLIDING, SLIDING, FULL, SLIDING]},
    "every layer global": OLD | {"global_attn_every_n_layers": 1},
    "odd span": OLD | {"local_attention": 33},
}
# Width and vocabulary have no part in what is compared, so that even the largest preset builds in no time.
NARROW = {"vocab_size": 64, "intermediate_size": 8, "num_attention_heads": 2, "pad_token_id": None}


def narrow(config: EncoderConfig) -> EncoderConfig:
    return dataclasses.replace(config, hidden_size=2 * config.head_dim, **NARROW)


def assert_same_layers(config: EncoderConfig, hf: dict) -> None:
    """Transformers builds the model of `hf` with our kind, RoPE frequencies and window in every layer."""
    from transformers import ModernBertConfig, ModernBertModel

    model = ModernBertModel(ModernBertConfig.from_dict(hf)).eval()
    assert len(model.layers) == config.num_hidden_layers
    for i, layer in enumerate(model.layers):
        kind = model.config.layer_types[i]
        assert config.is_global(i) == (kind == FULL)
        exponents = -torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        theirs = getattr(model.rotary_emb, f"{kind}_inv_freq")
        torch.testing.assert_close(theirs.double(), config.rope_theta(i) ** exponents, rtol=1e-6, atol=0)
        # Their mask functions take the window with the token itself.
        assert layer.attn.sliding_window == (None if config.is_global(i) else config.window + 1)
    assert (
        type(model.layers[0].mlp.act).__name__
        == {"gelu": "GELUActivation", "silu": "SiLUActivation"}[config.hidden_activation]
    )


@pytest.mark.parametrize("name", PRESETS)
def test_transformers_reads_what_we_write(name: str) -> None:
    config = narrow(PRESETS[name])
    assert_same_layers(config, config.to_hf())


@pytest.mark.parametrize("name", [*FILES, *VARIANTS])
def test_reads_as_transformers_reads(name: str) -> None:
    hf = {**FILES, **VARIANTS}[name]
    config = narrow(EncoderConfig.from_hf(hf))
    assert_same_layers(config, hf | NARROW | {"hidden_size": config.hidden_size})
    assert_same_layers(config, config.to_hf())
    assert EncoderConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("name", [*PRESETS, *FILES, *VARIANTS])
def test_survives_a_save_by_transformers(name: str) -> None:
    from transformers import ModernBertConfig

    config = PRESETS[name] if name in PRESETS else EncoderConfig.from_hf({**FILES, **VARIANTS}[name])
    saved = ModernBertConfig.from_dict(config.to_hf())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert EncoderConfig.from_hf(config.to_hf()) == config
        assert EncoderConfig.from_hf(json.loads(saved.to_json_string())) == config
        assert EncoderConfig.from_hf(json.loads(saved.to_json_string(use_diff=False))) == config


@pytest.mark.parametrize("size", ETTIN)
def test_ettin_presets_are_the_published_fields(size: str) -> None:
    published = ETTIN[size]
    theirs = EncoderConfig.from_hf(published)
    ours = EncoderConfig.preset(f"ettin-{size}")
    assert {key: getattr(ours, key) for key in published if hasattr(ours, key)} == {
        key: getattr(theirs, key) for key in published if hasattr(theirs, key)
    }
    assert {ours.rope_theta(i) for i in range(ours.num_hidden_layers)} == {160_000.0}


def test_modernbert_base_preset_is_the_published_file() -> None:
    assert EncoderConfig.from_hf(FILES["modernbert-base-classifier-v5"]) == PRESETS["modernbert-base"]


PUBLISHED_MILLIONS = zip(PRESETS, (149.0, 394.8, 16.8, 31.9, 68.1, 149.0, 394.8, 1028), strict=True)


@pytest.mark.parametrize(("name", "millions"), list(PUBLISHED_MILLIONS))
def test_presets_have_the_published_size(name: str, millions: float) -> None:
    c = PRESETS[name]
    layer = 4 * c.hidden_size**2 + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    # Layer 0 has no attn_norm; there are the norms of the embeddings and of the end.
    count = c.vocab_size * c.hidden_size + c.num_hidden_layers * layer + c.hidden_size
    assert count / 1e6 == pytest.approx(millions, rel=2e-3)


@pytest.mark.parametrize(
    ("name", "thetas", "head_dim", "last_is_global"),
    [
        ("modernbert-base-classifier-v5", (160e3, 10e3), 64, True),
        ("LateOn", (160e3, 10e3), 64, True),
        ("granite-embedding-english-r2", (80e3, 10e3), 64, True),
        ("granite-embedding-small-english-r2", (80e3, 10e3), 32, False),
        ("granite-embedding-97m-multilingual-r2", (150e3, 160e3), 32, False),
        ("mmBERT-base", (160e3, 160e3), 64, True),
        ("modernbert-ja-30m", (160e3, 10e3), 64, True),
    ],
)
def test_known_facts_of_real_checkpoints(name, thetas, head_dim, last_is_global) -> None:
    config = EncoderConfig.from_hf({**FILES, **VARIANTS}[name])
    assert (config.rope_theta(0), config.rope_theta(1)) == thetas
    assert config.head_dim == head_dim
    assert config.window == 64
    assert config.is_global(config.num_hidden_layers - 1) == last_is_global


def test_fields_of_heads_survive() -> None:
    hf = OLD | {"classifier_dropout": 0.1, "classifier_bias": True, "classifier_pooling": "mean"}
    hf |= {"classifier_activation": "silu", "decoder_bias": False, "tie_word_embeddings": False}
    written = EncoderConfig.from_hf(hf).to_hf()
    assert {key: written[key] for key in hf} == hf


def test_both_generations_say_the_same() -> None:
    """AnswerDotAI/ModernBERT#215: the theta of local layers was another one after a conversion."""
    assert EncoderConfig.from_hf(OLD) == EncoderConfig.from_hf(NEW) == EncoderConfig.from_hf(OLD | NEW)
    written = EncoderConfig.from_hf(OLD).to_hf()
    assert {key: written[key] for key in OLD | NEW} == OLD | NEW


def rope(full: object = 80000.0, sliding: object = 20000.0) -> dict:
    return {"rope_parameters": {FULL: {"rope_theta": full}, SLIDING: {"rope_theta": sliding}}}


@pytest.mark.parametrize(
    ("fields", "local"),
    [
        ({"local_rope_theta": None}, 80000.0),
        ({"local_rope_theta": -1}, 80000.0),
        ({"local_rope_theta": -1.0}, 80000.0),
        (rope(sliding=None) | {"local_rope_theta": None}, 80000.0),
        ({"rope_parameters": {FULL: {"rope_theta": 80000}, SLIDING: None}, "local_rope_theta": -1}, 80000.0),
        # A legacy null or -1 beside rope_parameters counts as absent.
        (rope(sliding=30000.0) | {"local_rope_theta": None}, 30000.0),
        (rope(sliding=30000.0) | {"local_rope_theta": -1}, 30000.0),
        (rope(sliding=30000.0) | {"local_rope_theta": 30000, "global_rope_theta": None}, 30000.0),
        # What rope_parameters leaves open, the legacy field says.
        ({"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 80000.0}}}, 20000.0),
        ({"rope_parameters": None}, 20000.0),
    ],
)
def test_local_theta(fields: dict, local: float) -> None:
    config = EncoderConfig.from_hf(OLD | fields)
    assert (config.global_rope_theta, config.local_rope_theta) == (80000.0, local)


@pytest.mark.parametrize("key", ["global_rope_theta", "local_rope_theta"])
def test_a_missing_theta_is_never_guessed(key: str) -> None:
    """A loader that fell back to 10000 for the local layers of Ettin was silently wrong."""
    with pytest.raises(ValueError, match=f"no RoPE theta.*{key}"):
        EncoderConfig.from_hf({k: v for k, v in OLD.items() if k != key})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (rope(full=160000.0), ("global_rope_theta", "80000.0", "160000.0")),
        (rope(sliding=160000.0), ("local_rope_theta", "20000.0", "160000.0")),
        ({"layer_types": [FULL] * 7}, ("layer_types", "full_attention", "sliding_attention")),
        ({"layer_types": NEW["layer_types"][:6]}, ("layer_types", "full_attention")),
        ({"local_attention": 128, "sliding_window": 128}, ("sliding_window is 128", "64")),
        ({"head_dim": 64}, ("head_dim is 64", "32")),
        ({"rope_theta": 10000.0}, ("rope_theta is 10000.0", "80000.0")),
    ],
)
def test_contradictions_raise(fields: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="config: ") as error:
        EncoderConfig.from_hf(OLD | fields)
    assert all(word in str(error.value) for word in words)


def test_equal_restatements_are_accepted() -> None:
    config = EncoderConfig.from_hf(OLD | {"head_dim": 32, "rope_theta": 80000, "sliding_window": 64})
    assert config == EncoderConfig.from_hf(OLD)


def test_sliding_window_is_the_half_width() -> None:
    from transformers import ModernBertConfig

    config = EncoderConfig.from_hf(OLD | {"sliding_window": 32})
    assert config.window == ModernBertConfig.from_dict(OLD | {"sliding_window": 32}).sliding_window == 32
    assert config.local_attention == 64


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "bert"),
        ("model_type", "modernbert-decoder"),
        ("model_type", None),
        ("hidden_activation", "gelu_new"),
        ("hidden_activation", ["gelu"]),
        ("classifier_pooling", "max"),
        ("classifier_activation", "relu"),
        ("num_attention_heads", 3),  # does not divide the width
        ("num_attention_heads", 64),  # heads of width 1 have no pairs to turn
        ("num_attention_heads", 0),
        ("hidden_size", -64),
        ("hidden_size", "64"),
        ("hidden_size", 64.0),
        ("num_hidden_layers", True),
        ("vocab_size", None),
        ("local_attention", -1),
        ("global_attn_every_n_layers", 0),
        ("norm_eps", 0),
        ("norm_bias", 1),
        ("mlp_dropout", 1.0),
        ("attention_dropout", -0.1),
        ("global_rope_theta", 0),
        ("local_rope_theta", -2),
        ("local_rope_theta", "10000"),
        ("local_rope_theta", float("nan")),
        ("global_rope_theta", float("inf")),
        ("pad_token_id", 50368),
        ("pad_token_id", -1),
        ("eos_token_id", [1, 2]),
        ("sliding_window", "64"),
        ("layer_types", "full_attention"),
        ("rope_parameters", [FULL]),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 80000.0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}),
        ("per_layer_config", {"0": {"local_attention": 64}}),
        ("quantization_config", {"load_in_8bit": True}),
    ],
)
def test_unsupported_values_raise_with_field_and_value(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{field} is {value!r}, but must be ")):
        EncoderConfig.from_hf(OLD | {field: value})


@pytest.mark.parametrize(
    ("rope_parameters", "message"),
    [
        ({FULL: {"rope_type": "yarn"}}, "rope_parameters.full_attention.rope_type is 'yarn'"),
        ({SLIDING: {"type": "linear"}}, "rope_parameters.sliding_attention.type is 'linear'"),
        ({SLIDING: {"factor": 2.0}}, "rope_parameters.sliding_attention.factor is 2.0"),
        ({SLIDING: 10000.0}, "rope_parameters.sliding_attention is 10000.0"),
        ({FULL: {"rope_theta": "1"}}, "rope_parameters.full_attention.rope_theta is '1'"),
    ],
)
def test_unsupported_rope_raises(rope_parameters: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        EncoderConfig.from_hf(OLD | {"rope_parameters": rope_parameters})


@pytest.mark.parametrize("types", [["chunked_attention"] * 7, [], [["full_attention"]] * 7])
def test_unknown_layer_types_raise(types: list) -> None:
    with pytest.raises(ValueError, match="layer_types is "):
        EncoderConfig.from_hf(NEW | {"layer_types": types})


def test_not_an_object_raises() -> None:
    with pytest.raises(ValueError, match=re.escape("config.json is ['modernbert'], but must be a JSON object")):
        EncoderConfig.from_hf(["modernbert"])  # pyright: ignore[reportArgumentType]


def test_unknown_keys_warn_once_by_name() -> None:
    with pytest.warns(UserWarning, match="ignored unknown keys: no_such_field, qk_norm$") as caught:
        assert EncoderConfig.from_hf(OLD | {"qk_norm": True, "no_such_field": 1}) == EncoderConfig.from_hf(OLD)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", [*FILES, *VARIANTS])
def test_real_files_do_not_warn(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EncoderConfig.from_hf({**FILES, **VARIANTS}[name])


def test_layers_are_cut_and_grown_by_replace() -> None:
    config = EncoderConfig.preset("modernbert-base")
    cut = dataclasses.replace(config, num_hidden_layers=4)
    assert cut.layer_types == [FULL, SLIDING, SLIDING, FULL]
    assert EncoderConfig.from_hf(cut.to_hf()) == cut
    assert dataclasses.replace(cut, num_hidden_layers=22) == config
    # The same for a file that has only the list of its layers.
    cut = dataclasses.replace(EncoderConfig.from_hf(NEW), num_hidden_layers=4)
    assert cut.layer_types == [FULL, SLIDING, SLIDING, FULL]


def test_transformers_4_must_not_misread_an_irregular_pattern() -> None:
    """It knows only every n-th layer: null raises there (seen in 4.48.0 and 4.57.6), 3 would be silent."""
    written = EncoderConfig.from_hf(VARIANTS["irregular"]).to_hf()
    assert written["global_attn_every_n_layers"] is None
    assert written["layer_types"] == VARIANTS["irregular"]["layer_types"]


def test_a_layer_out_of_range_raises() -> None:
    with pytest.raises(IndexError):
        EncoderConfig.preset("ettin-17m").rope_theta(7)


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"preset is 'bert', but must be one of modernbert-base, .*ettin-1b"):
        EncoderConfig.preset("bert")
