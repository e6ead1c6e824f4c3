"""EncoderConfig: what makes one ModernBERT encoder differ from another, and how config.json spells it."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

from .settings import Settings

T = TypeVar("T")

FULL, SLIDING = "full_attention", "sliding_attention"

# Far beyond any model, and small enough that a config without weights costs no memory and no time.
LARGEST, DEEPEST = 2**24, 1000


@dataclass(frozen=True)
class Kind(Generic[T]):
    """What a setting may be. A field of `EncoderConfig` has its kind in its type: `Annotated[int, SIZE]`."""

    wanted: str
    accepts: Callable[[Any], bool]
    convert: Callable[[Any], T]

    def check(self, name: str, value: object) -> T:
        """The value in its stored type. Raises a ValueError with the name, the value and what is wanted."""
        if not self.accepts(value):
            raise ValueError(f"{name} is {value!r:.80}, but must be {self.wanted}")
        return self.convert(value)


def _is_text(value: object) -> bool:
    """Whether it can be put in front of every text: short, and without half a surrogate pair, which JSON allows."""
    return isinstance(value, str) and len(value) <= 10_000 and not re.search(r"[\ud800-\udfff]", value)


SIZE = Kind(f"a whole number from 1 to {LARGEST:,}", lambda v: type(v) is int and 1 <= v <= LARGEST, int)
DEPTH = Kind(f"a whole number from 1 to {DEEPEST:,}", lambda v: type(v) is int and 1 <= v <= DEEPEST, int)
SIZE_OR_NULL = Kind[int | None](f"{SIZE.wanted}, or null", lambda v: v is None or SIZE.accepts(v), lambda v: v)
TOKEN_ID = Kind[int | None](
    f"a token id, from 0 to {LARGEST:,}, or null",
    lambda v: v is None or (type(v) is int and 0 <= v <= LARGEST),
    lambda v: v,
)
# JSON has whole numbers of any length, which no float can hold.
POSITIVE = Kind("a finite number above 0", lambda v: type(v) in (int, float) and 0 < v <= sys.float_info.max, float)
THETA = Kind("a finite number, 1 or more", lambda v: type(v) in (int, float) and 1 <= v <= sys.float_info.max, float)
RATE = Kind("a probability below 1", lambda v: type(v) in (int, float) and 0 <= v < 1, float)
FLAG = Kind("true or false", lambda v: type(v) is bool, bool)
FLAG_OR_NULL = Kind[bool | None]("true, false or null", lambda v: v is None or type(v) is bool, lambda v: v)
ACTIVATION = Kind("gelu (by erf) or silu; no other is implemented", lambda v: v in ("gelu", "silu"), str)
POOLING = Kind("cls or mean", lambda v: v in ("cls", "mean"), str)
PATTERN = Kind[tuple[str, ...]](
    f"a list of 1 to {DEEPEST:,} times {FULL!r} or {SLIDING!r}",
    lambda v: type(v) in (list, tuple) and 0 < len(v) <= DEEPEST and all(t in (FULL, SLIDING) for t in v),
    tuple,
)
OBJECT = Kind[Mapping[str, Any]](
    "a JSON object or null", lambda v: v is None or isinstance(v, Mapping), lambda v: v or {}
)
# In the files of tokenizers and heads:
TEXT = Kind("a text of at most 10,000 characters", _is_text, str)
NAME = Kind[str | None]("a short text or null", lambda v: v is None or _is_text(v), lambda v: v)
SIDE = Kind("left or right", lambda v: v in ("left", "right"), str)
WORDS = Kind[tuple[str, ...]]("a list of texts", lambda v: type(v) in (list, tuple) and all(map(_is_text, v)), tuple)


@dataclass(unsafe_hash=True)
class EncoderConfig(Settings):
    """The degrees of freedom of the encoder, plus the fields of heads and of others that a save must keep.

    Names and defaults are Hugging Face's, with two exceptions. `layer_pattern` is the attention of the first layers,
    repeated for the others, so that `dataclasses.replace(config, num_hidden_layers=4)` works; the full list is
    `layer_types`. Token ids default to None, because they belong to a tokenizer. A wrong value raises a ValueError
    with the field, the value and what is wanted instead.
    """

    vocab_size: Annotated[int, SIZE] = 50368
    hidden_size: Annotated[int, SIZE] = 768
    intermediate_size: Annotated[int, SIZE] = 1152
    num_hidden_layers: Annotated[int, DEPTH] = 22
    num_attention_heads: Annotated[int, SIZE] = 12
    hidden_activation: Annotated[Literal["gelu", "silu"], ACTIVATION] = "gelu"
    max_position_embeddings: Annotated[int, SIZE] = 8192
    norm_eps: Annotated[float, POSITIVE] = 1e-5
    norm_bias: Annotated[bool, FLAG] = False
    attention_bias: Annotated[bool, FLAG] = False
    mlp_bias: Annotated[bool, FLAG] = False
    layer_pattern: Annotated[tuple[str, ...], PATTERN] = (FULL, SLIDING, SLIDING)
    local_attention: Annotated[int, SIZE] = 128  # the whole span; `window` is the number of neighbours on each side
    global_rope_theta: Annotated[float, THETA] = 160_000.0
    local_rope_theta: Annotated[float, THETA] = 10_000.0
    embedding_dropout: Annotated[float, RATE] = 0.0
    attention_dropout: Annotated[float, RATE] = 0.0  # of the probabilities and of the output, as in Hugging Face
    mlp_dropout: Annotated[float, RATE] = 0.0
    initializer_range: Annotated[float, POSITIVE] = 0.02
    initializer_cutoff_factor: Annotated[float, POSITIVE] = 2.0
    # transformers' Trainer sets these to those of its tokenizer.
    pad_token_id: Annotated[int | None, TOKEN_ID] = field(default=None, hash=False)
    cls_token_id: Annotated[int | None, TOKEN_ID] = field(default=None, hash=False)
    sep_token_id: Annotated[int | None, TOKEN_ID] = field(default=None, hash=False)
    bos_token_id: Annotated[int | None, TOKEN_ID] = field(default=None, hash=False)
    eos_token_id: Annotated[int | None, TOKEN_ID] = field(default=None, hash=False)
    # For the heads:
    decoder_bias: Annotated[bool, FLAG] = True
    tie_word_embeddings: Annotated[bool, FLAG] = True
    classifier_pooling: Annotated[Literal["cls", "mean"], POOLING] = "cls"
    classifier_activation: Annotated[Literal["gelu", "silu"], ACTIVATION] = "gelu"
    classifier_bias: Annotated[bool, FLAG] = False
    classifier_dropout: Annotated[float, RATE] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in _kinds().items():
            object.__setattr__(self, name, kind.check(f"config: {name}", getattr(self, name)))
        if self.hidden_size % (2 * self.num_attention_heads):
            wanted = f"a number that cuts hidden_size {self.hidden_size} into heads of one even width"
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
    def layer_types(self) -> list[str]:
        return [self.layer_pattern[i % len(self.layer_pattern)] for i in range(self.num_hidden_layers)]

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
        """Read the config.json of transformers 4.48 or later, of either generation or with both in one file.

        Keys that repeat each other must agree, or a ValueError is raised, as for what is not implemented. Keys that do
        not change the encoder go to `others`; one warning names those that are unknown.
        """
        hf = OBJECT.check("config: config.json", hf)
        _refuse_unsupported(hf)
        names = set(_kinds()) - {"layer_pattern"}
        others = set(hf) - names - DERIVED - set(ONLY) - set(RESTATED) - {"architectures"}
        if unknown := others - set(" ".join(NOISE).split()):
            warnings.warn(f"config.json: ignored unknown keys: {', '.join(sorted(unknown))}", stacklevel=2)

        values = {name: hf[name] for name in names & set(hf)}
        values["global_rope_theta"] = theta = _rope_theta(hf, FULL, "global_rope_theta")
        values["local_rope_theta"] = _rope_theta(hf, SLIDING, "local_rope_theta", null_means=theta)
        if hf.get("sliding_window") is not None:
            values.setdefault("local_attention", 2 * SIZE.check("config: sliding_window", hf["sliding_window"]))
        values["others"] = {name: hf[name] for name in hf if name in others}
        config = cls(**values, layer_pattern=_layer_pattern(hf))
        for key, name in RESTATED.items():
            if hf.get(key) not in (None, getattr(config, name)):
                raise _refusal(key, hf[key], f"{getattr(config, name)} as the other fields say, or removed")
        return config

    def changed(self, settings: Mapping[str, object]) -> EncoderConfig:
        """This config with other values of fields, or of a head's settings in `TASK`.

        Raises:
            TypeError: a name that is neither. ValueError: a wrong value.
        """
        own = _kinds()
        if unknown := sorted(settings.keys() - own.keys() - set(TASK.split())):
            raise TypeError(f"{', '.join(unknown)}: not a field of EncoderConfig, which has {', '.join(own)}")
        others = self.others | {name: value for name, value in settings.items() if name not in own}
        values: dict[str, Any] = {name: value for name, value in settings.items() if name in own}
        return replace(self, others=others, **values)

    def to_dict(self) -> dict[str, Any]:
        """`to_hf`, under the name of transformers."""
        return self.to_hf()

    def to_hf(self) -> dict[str, Any]:
        """A config.json that transformers 4.48 to 5.x all read correctly: it has the keys of both generations."""
        hf = asdict(self)
        kept = hf.pop("others")
        first, *rest = hf.pop("layer_pattern")
        every_n = 1 + len(rest) if first == FULL and FULL not in rest else None
        thetas = {FULL: self.global_rope_theta, SLIDING: self.local_rope_theta}
        return {
            **kept,
            "architectures": ["ModernBertModel"],
            "model_type": "modernbert",
            **hf,
            # transformers 4 cannot express an irregular pattern: null makes it fail, a number would be silently wrong.
            "global_attn_every_n_layers": every_n,
            "layer_types": self.layer_types,
            "rope_parameters": {k: {"rope_type": "default", "rope_theta": v} for k, v in thetas.items()},
        }


@cache
def _kinds() -> dict[str, Kind[Any]]:
    """The kind of each field."""
    hints = get_type_hints(EncoderConfig, include_extras=True)
    return {name: get_args(hint)[1] for name, hint in hints.items() if get_origin(hint) is Annotated}


# The keys of config.json that are not fields, by how they are handled. From these, fields are derived:
DERIVED = {"global_attn_every_n_layers", "rope_parameters"}
# These would change the model, so they must be empty or what is implemented:
ONLY: dict[str, Any] = {
    "model_type": "modernbert",
    "per_layer_config": {},
    "quantization_config": {},
    "rope_scaling": {},
}
PLAIN_ROPE = {"rope_type": "default", "type": "default"}
# These repeat a field or a property, so they must agree with it:
RESTATED = {
    "layer_types": "layer_types",
    "head_dim": "head_dim",
    "sliding_window": "window",  # the half width in transformers 5
    "rope_theta": "global_rope_theta",  # an alias in transformers 4
}
# These do not change the encoder, so they are kept, and are ignored otherwise. The settings of the task of a head:
TASK = "id2label label2id num_labels problem_type finetuning_task task_specific_params sparse_prediction"
# All others: bookkeeping, switches of Hugging Face's code, and in the last line keys of decoders and BERT that no
# version of ModernBERT reads.
NOISE = (
    TASK,
    "architectures _name_or_path name_or_path transformers_version transformers.js_config dtype",
    "torch_dtype attn_implementation _attn_implementation _attn_implementation_autoset reference_compile",
    "deterministic_flash_attn gradient_checkpointing sparse_pred_ignore_index use_cache",
    "repad_logits_with_grad chunk_size_feed_forward return_dict output_attentions output_hidden_states",
    "tie_last_hidden_states sentence_transformers sbert_ce_default_activation_function",
    "is_decoder is_encoder_decoder pruned_heads layer_norm_eps position_embedding_type hidden_act",
)


def _refusal(name: str, value: Any, wanted: str) -> ValueError:
    return ValueError(f"config: {name} is {value!r}, but must be {wanted}")


def _refuse_unsupported(hf: Mapping[str, Any]) -> None:
    for key, only in ONLY.items():
        value = hf.get(key)
        if value != only and (value, only) != (None, {}):
            raise _refusal(key, hf.get(key), f"{only!r}; nothing else is implemented")
    ropes = OBJECT.check("config: rope_parameters", hf.get("rope_parameters"))
    if not set(ropes) <= {FULL, SLIDING}:
        raise _refusal("rope_parameters", ropes, f"one object under {FULL} and one under {SLIDING}")
    for kind, rope in ropes.items():
        for key, value in OBJECT.check(f"config: rope_parameters.{kind}", rope).items():
            if key != "rope_theta" and value not in (None, PLAIN_ROPE.get(key)):
                wanted = f"{PLAIN_ROPE.get(key)!r}; only plain RoPE is implemented"
                raise _refusal(f"rope_parameters.{kind}.{key}", value, wanted)


def _rope_theta(hf: Mapping[str, Any], kind: str, legacy: str, *, null_means: float | None = None) -> float:
    """The theta of one kind of layer. It has no default: models differ, and a wrong theta raises no error."""
    ropes: Mapping[str, Any] = hf.get("rope_parameters") or {}
    rope: Mapping[str, Any] = ropes.get(kind) or {}
    spelled = {f"rope_parameters.{kind}.rope_theta": rope.get("rope_theta"), legacy: hf.get(legacy)}
    # transformers 4 writes null, and FlexBERT's converter -1, for local layers that use the global theta.
    thetas = {key: THETA.check(f"config: {key}", v) for key, v in spelled.items() if v not in (None, -1)}
    if len(set(thetas.values())) > 1:
        raise ValueError(f"config: {thetas} contradict each other; keep the one the model was trained with")
    if thetas:
        return next(iter(thetas.values()))
    if null_means is not None and ("rope_theta" in rope or legacy in hf):
        return null_means
    raise ValueError(f"config: no RoPE theta for {kind} layers, got {spelled}; write the trained one")


def _layer_pattern(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """Every n-th layer global if the file has that number, else the shortest pattern that repeats to `layer_types`."""
    n, types = hf.get("global_attn_every_n_layers"), hf.get("layer_types")
    if n is not None:
        return (FULL, *[SLIDING] * (DEPTH.check("config: global_attn_every_n_layers", n) - 1))
    types = EncoderConfig.layer_pattern if types is None else PATTERN.check("config: layer_types", types)
    periods = range(1, len(types) + 1)
    return next(types[:p] for p in periods if all(t == types[i % p] for i, t in enumerate(types)))


_IDS = EncoderConfig(pad_token_id=50283, cls_token_id=50281, sep_token_id=50282, bos_token_id=50281, eos_token_id=50282)
_MODERNBERT = replace(_IDS, classifier_pooling="mean")
_SANS_POS = {"position_embedding_type": "sans_pos"}
_ETTIN = replace(_MODERNBERT, max_position_embeddings=7999, local_rope_theta=160_000.0, others=_SANS_POS)
_SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
PRESETS: dict[str, EncoderConfig] = {
    name: replace(family, **dict(zip(_SHAPE, shape, strict=True)))
    for name, family, *shape in (
        ("modernbert-base", _MODERNBERT, 768, 1152, 22, 12),
        ("modernbert-large", _MODERNBERT, 1024, 2624, 28, 16),
        ("ettin-17m", _ETTIN, 256, 384, 7, 4),
        ("ettin-32m", _ETTIN, 384, 576, 10, 6),
        ("ettin-68m", _ETTIN, 512, 768, 19, 8),
        ("ettin-150m", _ETTIN, 768, 1152, 22, 12),
        ("ettin-400m", _ETTIN, 1024, 2624, 28, 16),
        ("ettin-1b", _ETTIN, 1792, 3840, 28, 28),
    )
}
