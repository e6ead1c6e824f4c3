"""What users of transformers' `PreTrainedModel` expect of a model, for every model here: load, save, ask, adjust."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn

from . import arguments, checkpoint
from .config import EncoderConfig

if TYPE_CHECKING:
    from typing_extensions import Self


class Backbone(Protocol):
    """What this file needs of an `Encoder`."""

    config: EncoderConfig
    gradient_checkpointing: bool

    def get_submodule(self, target: str) -> nn.Module: ...
    def set_submodule(self, target: str, module: nn.Module) -> None: ...
    def resize_token_embeddings(self, vocab_size: int, *, pad_to_multiple_of: int | None = None) -> nn.Module: ...


class Pretrained(nn.Module):
    """The base of `Encoder` and of every model that has one.

    A model adds how it is read from a folder, `_read`, and what it writes: `_content`, or for formats `_content_in`.

    Attributes:
        base_model_prefix: the name of the attribute that is the encoder, as transformers calls it.
        formats: the libraries whose folders `save_pretrained` writes, the usual one first.
    """

    base_model_prefix = "model"
    formats: ClassVar[tuple[str, ...]] = ("transformers",)

    @classmethod
    def _read(cls, folder: Path, config: EncoderConfig, *, device: torch.device, dtype: torch.dtype) -> Self:
        """The model of a folder, with this config of its encoder."""
        raise NotImplementedError

    def _content(self, state: Mapping[str, Tensor] | None) -> checkpoint.Content:
        """What to write, with the tensors of `state` in place of its own; for sharded ones all ranks call this."""
        raise NotImplementedError

    def _content_in(self, format: str, state: Mapping[str, Tensor] | None) -> checkpoint.Content:
        """What to write in one of `formats`. A class with several overrides this."""
        return self._content(state)

    # Load and save

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        subfolder: str = "",
        torch_dtype: torch.dtype | str | None = None,
        device_map: object = None,
        **options: object,
    ) -> Self:
        """Load a checkpoint, in evaluation mode.

        Args:
            folder_or_hub_id: a local folder, or the id of a repository on the Hugging Face hub.
            dtype: of the parameters, or its name; "auto": that of the file; None: float32, whatever the file holds,
                with a warning on a GPU, which is fast in `torch.bfloat16`.
            device: where the parameters go; None means the CPU.
            revision, token, cache_dir, local_files_only: passed to `huggingface_hub`.
            subfolder: of the folder or of the repository, in which the checkpoint is.
            torch_dtype, device_map: other names of `dtype` and `device`. The model is on one device.
            options: fields of `EncoderConfig` that change, such as `attention_dropout=0.1`. All other arguments of
                transformers are taken too where they change nothing here, or refused by name.

        Raises:
            ValueError: a config value that is not supported, weights that do not match the config, all listed, or an
                argument that is not supported.
            TypeError: an unknown argument.
        """
        settings = {name: value for name, value in options.items() if name not in arguments.LOADING}
        arguments.check(arguments.LOADING, {name: options[name] for name in options.keys() - settings.keys()})
        if None not in (dtype, torch_dtype) and dtype != torch_dtype:
            raise ValueError(f"dtype is {dtype} and torch_dtype {torch_dtype}: pass one of them")
        where, asked = arguments.device_of(device, device_map), dtype if torch_dtype is None else torch_dtype
        if asked is None and where.type == "cuda":
            warnings.warn(
                "the parameters are float32, which leaves the tensor cores of a GPU idle: pass dtype=torch.bfloat16 to "
                "infer, or dtype=torch.float32 to train under autocast or to keep float32",
                stacklevel=2,
            )
        folder = checkpoint.locate(
            folder_or_hub_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            subfolder=subfolder,
        )
        if options.get("use_safetensors") and not any(folder.glob("*.safetensors")):
            raise FileNotFoundError(f"{folder} has no safetensors, which use_safetensors=True asks for")
        return cls._load(folder, asked, where, settings)

    @classmethod
    def _load(
        cls, folder: Path, dtype: torch.dtype | str | None, device: torch.device, settings: Mapping[str, object]
    ) -> Self:
        hf = checkpoint.read_json(folder, "config.json")
        config = EncoderConfig.from_hf(hf).changed(settings)
        return cls._read(folder, config, device=device, dtype=arguments.dtype_of(dtype, hf, folder)).eval()

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        format: str | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str | None = None,
        is_main_process: bool = True,
        **options: object,
    ) -> None:
        """Write a folder that transformers reads, and for a head the library that made its kind. Atomic.

        The new folder is loaded before it replaces the old one. Tensors that are sharded over ranks (FSDP2, tensor
        parallelism) are gathered: all ranks call this, the first one writes, and the others wait for it.

        Args:
            format: one of `formats`, such as "stanford" for a ColBERT; None: the usual one.
            state_dict: the tensors to write, under the names of `self.state_dict()`, in place of the model's own.
            max_shard_size: the largest weight file, in bytes or such as "20GB"; None: 5 GB.
            is_main_process: whether to write at all, for tensors that are not sharded.
            options: other arguments of transformers, taken where they change nothing here, or refused by name.

        Raises:
            ValueError: a model that would not load again, such as one with an adapter or with NaN, or a `format` that
                this class lacks or that cannot say how this model works; nothing is written.
            NotADirectoryError: `folder` is a file, or a link that leads nowhere.
            RuntimeError: on the other ranks, if the first one could not write.
        """
        arguments.check(arguments.SAVING, options)
        if format is not None and format not in self.formats:
            known = f"models of {type(self).__name__} are written for {', '.join(self.formats)}"
            raise ValueError(f"format is {format!r:.80}, but {known}")
        state = None if state_dict is None else checkpoint.plain_names(state_dict)
        sharded = checkpoint.is_sharded(self.state_dict() if state is None else state)
        if not (sharded or is_main_process):
            return
        if state is not None and not state:
            raise ValueError("state_dict is empty: processes without the tensors pass is_main_process=False")
        self._write(folder, self._content_in(format or self.formats[0], state), state, max_shard_size, sharded)

    def _write(
        self,
        folder: str | os.PathLike[str],
        content: checkpoint.Content,
        state: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str | None = None,
        sharded: bool = False,
    ) -> None:
        """Write a folder of what `_content_in` gave, and load it before it replaces an old one."""
        # The class that defines how to read: sharding makes a subclass of a model's class.
        home = next(each for each in type(self).__mro__ if "_read" in vars(each))

        def check(new: Path) -> None:
            loaded = cast("type[Pretrained]", home)._load(new, "auto", torch.device("cpu"), {})
            if state is None:
                checkpoint.check_same(self, loaded)

        write = partial(
            checkpoint.save,
            folder,
            config=content.config,
            state=content.state,
            files=content.files,
            check=check,
            max_shard_size=max_shard_size,
        )
        if sharded:
            checkpoint.on_first_rank(write)
        else:
            write()

    # Ask and adjust

    @property
    def base_model(self) -> Backbone:
        """The encoder: `self`, or what it has, without wrappers such as that of `torch.compile`."""
        return cast("Backbone", checkpoint.unwrapped(getattr(self, self.base_model_prefix, self)))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        tables = {id(each) for each in self.get_input_embeddings().parameters()} if exclude_embeddings else set()
        counted = (each for each in self.parameters() if id(each) not in tables)
        return sum(each.numel() for each in counted if each.requires_grad or not only_trainable)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding table of tokens, an `nn.Embedding` unless it was replaced."""
        return self.base_model.get_submodule("embeddings.tok_embeddings")

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding table; `config.vocab_size` becomes the number of its rows."""
        encoder = self.base_model
        if isinstance(value, nn.Embedding):
            if value.embedding_dim != encoder.config.hidden_size:
                raise ValueError(f"the table has width {value.embedding_dim}, the model {encoder.config.hidden_size}")
            encoder.config = encoder.config.changed({"vocab_size": value.num_embeddings})
        encoder.set_submodule("embeddings.tok_embeddings", value)

    def resize_token_embeddings(self, vocab_size: int, *, pad_to_multiple_of: int | None = None) -> nn.Module:
        """Grow or cut the vocabulary in place, as `Encoder.resize_token_embeddings` does."""
        return self.base_model.resize_token_embeddings(vocab_size, pad_to_multiple_of=pad_to_multiple_of)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, object] | None = None, **options: object
    ) -> None:
        """Recompute each layer in the backward pass instead of keeping it. ValueError: an option that changes how."""
        arguments.check(arguments.CHECKPOINTING, {**(activation_checkpointing_kwargs or {}), **options})
        self.base_model.gradient_checkpointing = True

    def activation_checkpointing_disable(self) -> None:
        self.base_model.gradient_checkpointing = False

    @property
    def is_activation_checkpointing(self) -> bool:
        return self.base_model.gradient_checkpointing

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, object] | None = None, **options: object
    ) -> None:
        """The name of `activation_checkpointing_enable` until transformers 5."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        self.activation_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.is_activation_checkpointing
