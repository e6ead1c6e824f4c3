"""EncoderConfig: what distinguishes one ModernBERT encoder from another, in our words and in config.json's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"

# The annotation of a field names its row in KINDS: what it accepts, how it is stored, the words of the error.
Size = int
TokenId = int | None
Positive = float
Rate = float
LayerPattern = tuple[str, ...]

KINDS: dict[str, tuple[Callable[[Any], bool], Callable[[Any], Any], str]] = {
    "Size": (lambda v: type(v) is int and v >= 1, int, "a whole number, 1 or more"),
    "TokenId": (lambda v: v is None or (type(v) is int and v >= 0), lambda v: v, "a token id or null"),
    "Positive": (lambda v: type(v) in (int, float) and 0 < v < math.inf, float, "a finite number above 0"),
    "Rate": (lambda v: type(v) in (int, float) and 0 <= v < 1, float, "a probability below 1"),
    "bool": (lambda v: type(v) is bool, bool, "true or false"),
    "str": (lambda v: type(v) is str, str, "a string"),
    "LayerPattern": (
        lambda v: isinstance(v, list | tuple) and len(v) > 0 and all(t in (FULL, SLIDING) for t in v),
        tuple,
        f"a list of {FULL!r} and {SLIDING!r}, not empty",
    ),
    "Object": (lambda v: v is None or isinstance(v, Mapping), lambda v: v or {}, "a JSON object or null"),
}
CHOICES = {
    "hidden_activation": ("gelu", "silu"),  # gelu is the exact one, by erf; its approximations are refused
    "classifier_pooling": ("cls", "mean"),
}


@dataclass(frozen=True)
class EncoderConfig:
    """The degrees of freedom of the encoder, plus the fields of heads that a save must not lose.

    Names and defaults are Hugging Face's, but for two. `layer_pattern` is the attention of the first layers,
    repeated for the others, so that `dataclasses.replace(config, num_hidden_layers=4)` just works; the whole
    list is `layer_types`. Token ids default to None, because they belong to a tokenizer.

    Raises ValueError with the field, its value and what is wanted instead.
    """

    vocab_size: Size = 50368
    hidden_size: Size = 768
    intermediate_size: Size = 1152
    num_hidden_layers: Size = 22
    num_attention_heads: Size = 12
    hidden_activation: str = "gelu"
    max_position_embeddings: Size = 8192
    norm_eps: Positive = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    layer_pattern: LayerPattern = (FULL, SLIDING, SLIDING)
    local_attention: Size = 128  # the whole span; `window` counts the neighbours on each side
    global_rope_theta: Positive = 160_000.0
    local_rope_theta: Positive = 10_000.0
    embedding_dropout: Rate = 0.0
    attention_dropout: Rate = 0.0  # of the probabilities and of the output, as in Hugging Face
    mlp_dropout: Rate = 0.0
    initializer_range: Positive = 0.02
    initializer_cutoff_factor: Positive = 2.0
    pad_token_id: TokenId = None
    cls_token_id: TokenId = None
    sep_token_id: TokenId = None
    bos_token_id: TokenId = None
    eos_token_id: TokenId = None
    # The heads' fields.
    decoder_bias: bool = True
    tie_word_embeddings: bool = True
    classifier_pooling: str = "cls"
    classifier_activation: str = "gelu"
    classifier_bias: bool = False
    classifier_dropout: Rate = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = _checked(str(field.type), field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise _refusal(name, getattr(self, name), f"{' or '.join(choices)}, all that is implemented")
        if self.hidden_size % (2 * self.num_attention_heads):
            wanted = (
                f"a number that cuts hidden_size {self.hidden_size} into heads of one even width, for RoPE"
            )
            raise _refusal("num_attention_heads", self.num_attention_heads, wanted)
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise _refusal("pad_token_id", self.pad_token_id, f"below vocab_size {self.vocab_size}, or null")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def window(self) -> int:
        """How many neighbours a local layer sees on each side: |i - j| <= window."""
        return self.local_attention // 2

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The kind of attention of every layer."""
        return _repeated(self.layer_pattern, self.num_hidden_layers)

    def is_global(self, layer: int) -> bool:
        return self.layer_types[layer] == FULL

    def rope_theta(self, layer: int) -> float:
        return self.global_rope_theta if self.is_global(layer) else self.local_rope_theta

    @classmethod
    def preset(cls, name: str) -> EncoderConfig:
        if name not in PRESETS:
            raise _refusal("preset", name, f"one of {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> EncoderConfig:
        """Read a parsed config.json of transformers 4.48 or later: either generation, or both in one file.

        What is said twice must agree. Unknown keys are named in one warning. Whatever would change the model
        and is not implemented raises ValueError.
        """
        hf = _checked("Object", "config.json", hf)
        _refuse_unsupported(hf)
        names = {field.name for field in fields(cls)} - {"layer_pattern"}
        unknown = set(hf) - names - DERIVED - set(ONLY) - set(RESTATED) - set(" ".join(NOISE).split())
        if unknown:
            warnings.warn(f"config.json: ignored unknown keys: {', '.join(sorted(unknown))}", stacklevel=2)

        plain = names - {"global_rope_theta", "local_rope_theta"}
        given = {name: hf[name] for name in plain & set(hf)}
        if hf.get("sliding_window") is not None:
            given.setdefault("local_attention", 2 * _checked("Size", "sliding_window", hf["sliding_window"]))
        config = cls(**given)
        theta = _rope_theta(hf, FULL, "global_rope_theta")
        config = replace(
            config,
            layer_pattern=_layer_pattern(hf, config.num_hidden_layers),
            global_rope_theta=theta,
            local_rope_theta=_rope_theta(hf, SLIDING, "local_rope_theta", null_means=theta),
        )
        for key, restated in RESTATED.items():
            if hf.get(key) not in (None, restated(config)):
                raise _refusal(key, hf[key], f"{restated(config)} as other fields say; correct or remove it")
        return config

    def to_hf(self) -> dict[str, Any]:
        """The config.json that transformers 4.48 to 5.x all read right: it is written in both generations."""
        hf = asdict(self)
        period = len(hf.pop("layer_pattern"))
        return {
            "architectures": ["ModernBertModel"],
            "model_type": "modernbert",
            **hf,
            # transformers 4 has no irregular pattern: null makes it fail, where a number would be silently wrong.
            "global_attn_every_n_layers": period if self.layer_pattern == _every(period) else None,
            "layer_types": list(self.layer_types),
            "rope_parameters": {
                FULL: {"rope_type": "default", "rope_theta": self.global_rope_theta},
                SLIDING: {"rope_type": "default", "rope_theta": self.local_rope_theta},
            },
        }


# The keys of config.json that are not fields, by what is done with them: become other fields,
DERIVED = {"global_attn_every_n_layers", "layer_types", "rope_parameters", "rope_scaling"}
# would change the model, so must have the one value that is implemented,
ONLY: dict[str, Any] = {
    "model_type": "modernbert",
    "partial_rotary_factor": 1,
    "per_layer_config": {},
    "pruned_heads": {},
    "quantization_config": {},
}
ONLY_IN_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}
# say again what fields say, so must agree,
RESTATED: dict[str, Callable[[EncoderConfig], Any]] = {
    "head_dim": lambda config: config.head_dim,
    "sliding_window": lambda config: config.window,  # in transformers 5 this is the half width
    "rope_theta": lambda config: config.global_rope_theta,  # an alias in transformers 4
}
# do not change the encoder, so are ignored.
NOISE = (
    # Hugging Face's bookkeeping, and the switches of its code
    "architectures auto_map _name_or_path name_or_path transformers_version transformers.js_config dtype",
    "torch_dtype use_bfloat16 torchscript tf_legacy_loss attn_implementation _attn_implementation",
    "_attn_implementation_autoset gradient_checkpointing reference_compile deterministic_flash_attn",
    "repad_logits_with_grad sparse_prediction sparse_pred_ignore_index chunk_size_feed_forward use_cache",
    "return_dict output_attentions output_hidden_states tie_last_hidden_states tokenizer_class",
    # what the task of a head adds
    "id2label label2id num_labels problem_type finetuning_task task_specific_params prefix",
    # fields of decoders, or left over from BERT, that no version of ModernBERT reads
    "is_decoder is_encoder_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder",
    "layer_norm_eps position_embedding_type hidden_act",
)


def _refusal(name: str, value: Any, wanted: str) -> ValueError:
    return ValueError(f"config: {name} is {value!r}, but must be {wanted}")


def _checked(kind: str, name: str, value: Any) -> Any:
    accepts, stored, wanted = KINDS[kind]
    if not accepts(value):
        raise _refusal(name, value, wanted)
    return stored(value)


def _every(n: int) -> tuple[str, ...]:
    """The pattern of transformers 4: a global layer, then n - 1 local ones."""
    return (FULL,) + (SLIDING,) * (n - 1)


def _repeated(pattern: tuple[str, ...], layers: int) -> tuple[str, ...]:
    return tuple(pattern[i % len(pattern)] for i in range(layers))


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    if hf.get("model_type") is None:
        raise _refusal("model_type", None, "'modernbert'; write it if this file describes a ModernBERT")
    for key, only in ONLY.items():
        if hf.get(key) not in (None, only):
            raise _refusal(key, hf[key], f"{only!r}; nothing else is implemented")
    by_kind = _checked("Object", "rope_parameters", hf.get("rope_parameters"))
    if not set(by_kind) <= {FULL, SLIDING}:
        raise _refusal("rope_parameters", dict(by_kind), f"one object under {FULL} and one under {SLIDING}")
    ropes = {f"rope_parameters.{kind}": rope for kind, rope in by_kind.items()}
    for name, rope in {"rope_scaling": hf.get("rope_scaling"), **ropes}.items():
        for key, value in _checked("Object", name, rope).items():
            is_theta = key == "rope_theta" and name in ropes
            if not is_theta and value not in (None, ONLY_IN_ROPE.get(key)):
                wanted = f"{ONLY_IN_ROPE.get(key)!r} or absent; only plain RoPE is implemented"
                raise _refusal(f"{name}.{key}", value, wanted)


def _rope_theta(hf: Mapping[str, Any], kind: str, legacy: str, *, null_means: float | None = None) -> float:
    """The theta of one kind of layer. There is no default: the published models differ, and a wrong one is silent."""
    rope = (hf.get("rope_parameters") or {}).get(kind) or {}
    spelled = {f"rope_parameters.{kind}.rope_theta": rope.get("rope_theta"), legacy: hf.get(legacy)}
    # transformers 4 writes null, and FlexBERT's converter -1, for local layers that use the global theta.
    thetas = {key: _checked("Positive", key, v) for key, v in spelled.items() if v not in (None, -1)}
    if len(set(thetas.values())) > 1:
        raise ValueError(f"config: {thetas} contradict one another; keep the one the model was trained with")
    if thetas:
        return next(iter(thetas.values()))
    if null_means is not None and ("rope_theta" in rope or legacy in hf):
        return null_means
    raise ValueError(f"config: no RoPE theta for {kind} layers, {spelled}; write the one it was trained with")


def _layer_pattern(hf: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """The pattern behind `layer_types`, or of every n-th layer where that is given."""
    n, types = hf.get("global_attn_every_n_layers"), hf.get("layer_types")
    pattern = (
        EncoderConfig.layer_pattern
        if n is None
        else _every(_checked("Size", "global_attn_every_n_layers", n))
    )
    if types is None:
        return pattern
    types = _checked("LayerPattern", "layer_types", types)
    if len(types) != layers:
        raise _refusal("layer_types", types, f"of length num_hidden_layers {layers}")
    if n is None:
        return next(types[:n] for n in range(1, layers + 1) if _repeated(types[:n], layers) == types)
    if _repeated(pattern, layers) != types:
        raise _refusal(
            "global_attn_every_n_layers", n, f"in line with layer_types {types}; remove the wrong one"
        )
    return pattern


_MODERNBERT = EncoderConfig(
    pad_token_id=50283,
    cls_token_id=50281,
    sep_token_id=50282,
    bos_token_id=50281,
    eos_token_id=50282,
    classifier_pooling="mean",
)
_ETTIN = replace(_MODERNBERT, max_position_embeddings=7999, local_rope_theta=160_000.0)
_SHAPES = {  # hidden_size, intermediate_size, num_hidden_layers, num_attention_heads
    "modernbert-base": (_MODERNBERT, 768, 1152, 22, 12),
    "modernbert-large": (_MODERNBERT, 1024, 2624, 28, 16),
    "ettin-17m": (_ETTIN, 256, 384, 7, 4),
    "ettin-32m": (_ETTIN, 384, 576, 10, 6),
    "ettin-68m": (_ETTIN, 512, 768, 19, 8),
    "ettin-150m": (_ETTIN, 768, 1152, 22, 12),
    "ettin-400m": (_ETTIN, 1024, 2624, 28, 16),
    "ettin-1b": (_ETTIN, 1792, 3840, 28, 28),
}
PRESETS: dict[str, EncoderConfig] = {
    name: replace(
        family,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    for name, (family, hidden, intermediate, layers, heads) in _SHAPES.items()
}
