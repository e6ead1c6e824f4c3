"""The settings and the projection of an `Embedder`: folders of sentence-transformers with one vector for each text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..checkpoint import Content
from ..config import FLAG, NAME, OBJECT, SIZE_OR_NULL, TEXT, EncoderConfig
from ..settings import Settings
from ..tokenizer import Tokenizer
from . import module_files
from .dense import Dense
from .module_files import SETTINGS, TRANSFORMER, File, get, read_if_there
from .pooling import POOLINGS

READ = ("Transformer", "Pooling", "Dense", "Normalize")
VECTOR = "sentence_embedding"  # what sentence-transformers' modules after the pooling take and give
# The name of each pooling in files of sentence-transformers before 6, which later ones read too.
FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


@dataclass
class EmbedderConfig(Settings):
    """How a text becomes a vector; the names are those of sentence-transformers.

    Attributes:
        pooling: "cls", "mean", "max", "lasttoken", "weightedmean" or "mean_sqrt_len_tokens", or several of them, whose
            vectors are put side by side.
        normalize: vectors have length one.
        width: only the first numbers of a vector, of a model trained for it (Matryoshka, arXiv 2205.13147); None: all.
            They have length one again, if `normalize` is set.
        max_length: tokens of a text that are read, with special tokens; None: as many as the tokenizer and the encoder
            allow.
        prompts: by its name, what is put in front of a text. "query" and "document" are there, if only as "".
        default_prompt: the name of the prompt of `encode`, or None.
        similarity: what compares two vectors, for the reader of the folder: "cosine", "dot", ...
    """

    pooling: str | tuple[str, ...] = "mean"
    normalize: bool = True
    width: int | None = None
    max_length: int | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    similarity: str = "cosine"

    def __post_init__(self) -> None:
        super().__post_init__()
        modes = (self.pooling,) if isinstance(self.pooling, str) else tuple(self.pooling)
        if not modes or not set(modes) <= POOLINGS.keys():
            raise ValueError(f"pooling is {self.pooling!r:.80}, but must be of {', '.join(POOLINGS)}")
        prompts = {"query": "", "document": "", **self.prompts}
        for name, prompt in prompts.items():
            TEXT.check(f"prompts: {name}", prompt)
        if self.default_prompt is not None and self.default_prompt not in prompts:
            raise ValueError(f"default_prompt is {self.default_prompt!r:.80}, but prompts has {', '.join(prompts)}")
        for name in ("width", "max_length"):
            SIZE_OR_NULL.check(name, getattr(self, name))
        object.__setattr__(self, "pooling", modes[0] if len(modes) == 1 else modes)
        object.__setattr__(self, "prompts", prompts)

    @property
    def poolings(self) -> tuple[str, ...]:
        return (self.pooling,) if isinstance(self.pooling, str) else self.pooling


def read(
    folder: Path, encoder: EncoderConfig, tokenizer: Tokenizer, *, device: torch.device | str, dtype: torch.dtype
) -> tuple[EmbedderConfig, list[Dense]]:
    """The settings and the projection. Raises a ValueError where they do not fit `encoder` and `tokenizer`."""
    where = folder / "modules.json"
    if not checkpoint.has_file(where):
        raise ValueError(
            f"{folder} has no modules.json, and so no pooling: choose one with Embedder(Encoder.from_pretrained(...), "
            "Tokenizer.from_pretrained(...), config=EmbedderConfig(pooling=...))"
        )
    modules = module_files.read_modules(folder, READ)
    kinds = [module.kind for module in modules]
    dense = [path for kind, path in modules if kind == "Dense"]
    normalized = kinds[-1:] == ["Normalize"]
    if kinds != ["Transformer", "Pooling", *["Dense"] * len(dense), *["Normalize"] * normalized]:
        order = "Transformer, Pooling, any number of Dense, and a Normalize or none"
        raise ValueError(f"{where} lists {', '.join(kinds)}; supported are {order}, in this order")
    for path in dense:
        _check_names(path)
    layers = [module_files.read_dense(path, device, dtype, activation="Tanh") for path in dense]
    settings, transformer = read_if_there(folder, SETTINGS), read_if_there(folder, TRANSFORMER)
    where = folder / SETTINGS
    prompts = {name: prompt or "" for name, prompt in get(where, settings, OBJECT, "prompts").items()}
    config = EmbedderConfig(
        pooling=_pooling(modules[1].path, encoder.hidden_size),
        normalize=normalized,
        width=get(where, settings, SIZE_OR_NULL, "truncate_dim"),
        max_length=get(folder / TRANSFORMER, transformer, SIZE_OR_NULL, "max_seq_length"),
        prompts=prompts,
        default_prompt=get(where, settings, NAME, "default_prompt_name"),
        similarity=get(where, settings, NAME, "similarity_fn_name") or "cosine",
    )
    module_files.check_widths(layers, encoder.hidden_size * len(config.poolings), folder)
    module_files.check_vocabulary(folder, tokenizer, encoder)
    return config, layers


def _pooling(folder: Path, width: int) -> tuple[str, ...]:
    where, config = folder / "config.json", checkpoint.read_json(folder, "config.json")
    for key in ("embedding_dimension", "word_embedding_dimension"):
        if config.get(key, width) != width:
            raise ValueError(f"{where}: {key} is {config[key]!r:.80}, but the encoder has width {width}")
    if not get(where, config, FLAG, "include_prompt", True):
        raise ValueError(f"{where}: include_prompt is false, but a pooling without the prompt is not supported")
    named = config.get("pooling_mode")
    if named is None:
        named = [mode for mode, flag in FLAGS.items() if get(where, config, FLAG, flag, False)] or ["mean"]
    modes = (named,) if isinstance(named, str) else tuple(named) if isinstance(named, list) else ()
    if not modes or not all(isinstance(mode, str) and mode in POOLINGS for mode in modes):
        raise ValueError(f"{where}: pooling_mode is {named!r:.80}, but must be of {', '.join(POOLINGS)}")
    return modes


def _check_names(folder: Path) -> None:
    """Raise a ValueError for a layer of something else than the vector of a text."""
    config = checkpoint.read_json(folder, "config.json")
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, VECTOR):
            raise ValueError(f"{folder / 'config.json'}: {key} is {config[key]!r:.80}; only {VECTOR!r} is supported")


def content(
    backbone: EncoderConfig,
    encoder: nn.Module,
    tokenizer: Tokenizer,
    dense: Sequence[nn.Module],
    config: EmbedderConfig,
    state: Mapping[str, Tensor] | None = None,
) -> Content:
    """What a folder of sentence-transformers holds, which version 5 reads too.

    Args:
        state: the tensors, under the names of `Embedder.state_dict`; None: those of `encoder` and `dense`.
    """
    home = "sentence_transformers.models"
    files: dict[str, File] = dict(tokenizer.files())
    modules = [module_files.transformer_entry(), module_files.entry(1, "1_Pooling", f"{home}.Pooling")]
    pooling: dict[str, Any] = {"word_embedding_dimension": backbone.hidden_size, "include_prompt": True}
    pooling |= {flag: mode in config.poolings for mode, flag in FLAGS.items()}
    if len(config.poolings) > 1:
        pooling["pooling_mode"] = [*config.poolings]  # their order, which flags do not have
    files["1_Pooling/config.json"] = pooling
    layers = {f"projection.{index}.": layer for index, layer in enumerate(dense)}
    parts = module_files.parts_of("an Embedder", encoder, layers, state)
    for place, (layer, tensors) in enumerate(zip(dense, parts.layers, strict=True), 2):
        modules.append(module_files.entry(place, f"{place}_Dense", f"{home}.Dense"))
        files |= module_files.dense_files(f"{place}_Dense", place - 1, layer, tensors)
    if config.normalize:
        place = len(modules)
        modules.append(module_files.entry(place, f"{place}_Normalize", f"{home}.Normalize"))
    files["modules.json"] = modules
    files[TRANSFORMER] = {"max_seq_length": config.max_length, "do_lower_case": tokenizer.do_lower_case}
    files[SETTINGS] = {
        "__version__": {"pytorch": torch.__version__},
        "model_type": "SentenceTransformer",
        "prompts": dict(config.prompts),
        "default_prompt_name": config.default_prompt,
        "similarity_fn_name": config.similarity,
        **({} if config.width is None else {"truncate_dim": config.width}),
    }
    return Content(backbone.to_hf(), parts.encoder, files)
