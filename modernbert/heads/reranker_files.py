"""The settings of a `Reranker`: folders of a `CrossEncoder` of sentence-transformers, with or without modules.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint
from ..checkpoint import Content
from ..config import NAME, OBJECT, SIZE_OR_NULL, TEXT, EncoderConfig
from ..settings import Settings
from ..tokenizer import Tokenizer
from . import module_files
from .module_files import ACTIVATIONS, SETTINGS, TRANSFORMER, File, get, read_if_there

HOST = "sentence_transformers"  # the key of config.json that has the activation
OLD_KEY = "sbert_ce_default_activation_function"  # of sentence-transformers before 4
# What changes a score in sentence-transformers, and not here.
REFUSED = ("processing_kwargs", "keep_in_fp32_modules", "query_expansion")


@dataclass
class RerankerConfig(Settings):
    """How a logit becomes a score; the names are those of sentence-transformers.

    Attributes:
        activation: the class of `torch.nn` that makes the score of a logit, such as "Sigmoid" or "Identity".
        max_length: tokens of a pair that are read, with special tokens; None: as many as the tokenizer and the encoder
            allow.
        prompts: by its name, what is put in front of a query. default_prompt: the name of the one that is, or None.
    """

    activation: str = "Sigmoid"
    max_length: int | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activation not in ACTIVATIONS.split():
            raise ValueError(f"activation is {self.activation!r:.80}, but must be one of {ACTIVATIONS}")
        SIZE_OR_NULL.check("max_length", self.max_length)
        for name, prompt in self.prompts.items():
            TEXT.check(f"prompts: {name}", prompt)
        if self.default_prompt is not None and self.default_prompt not in self.prompts:
            raise ValueError(
                f"default_prompt is {self.default_prompt!r:.80}, but prompts has {', '.join(self.prompts)}"
            )
        object.__setattr__(self, "prompts", dict(self.prompts))

    @property
    def prompt(self) -> str:
        """What is put in front of every query."""
        return "" if self.default_prompt is None else self.prompts[self.default_prompt]


def read(folder: Path, encoder: EncoderConfig, tokenizer: Tokenizer) -> RerankerConfig:
    """The settings. Raises a ValueError for those that are not supported, or a tokenizer that does not fit."""
    settings: dict[str, Any] = {}
    transformer: dict[str, Any] = {}
    if checkpoint.has_file(folder / "modules.json"):  # sentence-transformers reads the others only beside it
        module_files.read_modules(folder, ("Transformer",))
        settings, transformer = read_if_there(folder, SETTINGS), read_if_there(folder, TRANSFORMER)
    for name, content in ((SETTINGS, settings), (TRANSFORMER, transformer)):
        if found := next((key for key in REFUSED if content.get(key)), None):
            raise ValueError(f"{folder / name}: {found} is not supported: remove it, and the scores may change")
    module_files.check_vocabulary(folder, tokenizer, encoder)
    where = folder / SETTINGS
    return RerankerConfig(
        activation=_activation(folder, settings, encoder),
        max_length=get(folder / TRANSFORMER, transformer, SIZE_OR_NULL, "max_seq_length"),
        prompts={name: prompt or "" for name, prompt in get(where, settings, OBJECT, "prompts").items()},
        default_prompt=get(where, settings, NAME, "default_prompt_name"),
    )


def _activation(folder: Path, settings: Mapping[str, Any], encoder: EncoderConfig) -> str:
    """The first of the places in which sentence-transformers looks for it; without one, its default."""
    config, where = encoder.others, folder / "config.json"
    places = (
        (f"{folder / SETTINGS}: activation_fn", settings.get("activation_fn")),
        (f"{where}: {HOST}: activation_fn", get(where, config, OBJECT, HOST).get("activation_fn")),
        (f"{where}: {OLD_KEY}", config.get(OLD_KEY)),
    )
    for place, value in places:
        if value is not None:
            package, _, name = TEXT.check(place, value).rpartition(".")
            if not package.startswith("torch.nn") or name not in ACTIVATIONS.split():
                raise ValueError(f"{place} is {value!r:.80}, but must be a class of torch.nn: one of {ACTIVATIONS}")
            return name
    return "Sigmoid"


def content(classifier: Content, tokenizer: Tokenizer, config: RerankerConfig) -> Content:
    """What a folder holds that sentence-transformers and transformers read: a classifier with files beside it."""
    kind = getattr(torch.nn, config.activation)
    host = {**(classifier.config.get(HOST) or {}), "activation_fn": f"{kind.__module__}.{kind.__qualname__}"}
    files: dict[str, File] = {
        **tokenizer.files(),
        "modules.json": [module_files.transformer_entry()],
        TRANSFORMER: {
            "transformer_task": "sequence-classification",
            "max_seq_length": config.max_length,
            "do_lower_case": tokenizer.do_lower_case,
        },
        SETTINGS: {
            "__version__": {"pytorch": torch.__version__},
            "model_type": "CrossEncoder",
            "prompts": dict(config.prompts),
            "default_prompt_name": config.default_prompt,
        },
    }
    return Content({**classifier.config, HOST: host}, classifier.state, files)
