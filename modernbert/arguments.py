"""The arguments of transformers' `from_pretrained` and `save_pretrained`: each works, or is refused with what to do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import weights

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ANY = None


class Known(NamedTuple):
    """An argument that needs nothing to be done: the values that are taken (None always is), and what to do instead."""

    taken: tuple[object, ...] | None
    instead: str = ""


BOTH = Known((True, False))
LOADING: dict[str, Known] = {
    "trust_remote_code": BOTH,  # code of a repository is never run
    "low_cpu_mem_usage": BOTH,  # never two copies of the weights
    "weights_only": BOTH,  # always
    "reference_compile": BOTH,  # of transformers 4: torch.compile of parts of ModernBERT
    "attn_implementation": Known((), "the fastest attention of the device is always used; leave it out"),
    "config": Known((), "give the fields that change, such as attention_dropout=0.1"),
    "force_download": Known((False,), "delete the repository from the cache of the hub first"),
    "gradient_checkpointing": Known((False,), "call gradient_checkpointing_enable() of the loaded model"),
    "ignore_mismatched_sizes": Known((False,), "weights that do not fit are always refused; leave it out"),
    "output_attentions": Known((False,), "attention probabilities are never materialised here; leave it out"),
    "output_hidden_states": Known(
        (False,), "wrap the encoder in integrations.transformers.TransformersEncoder, and pass it to the call"
    ),
    "output_loading_info": Known(
        (False,), "an error lists what does not fit, a warning what is left out; leave it out"
    ),
    "return_dict": Known((True,), "the output is a named tuple; index it"),
    "state_dict": Known((), "make the model with from_config, and call its load_state_dict"),
    "use_auth_token": Known((), "pass token"),
    "use_safetensors": Known((True,), "pickles are read where there are no safetensors, and run no code; leave it out"),
    "variant": Known((), "only files without a variant in their name are read; rename them"),
} | {
    name: Known((False,), instead)
    for names, instead in {
        "load_in_4bit load_in_8bit quantization_config": "load the plain weights; `Session` has int8 engines",
        "max_memory offload_buffers offload_folder offload_state_dict": "the model is on one device; pass device",
        "device_mesh distributed_config tp_plan tp_size": "load the model, and then shard it with torch.distributed",
        "from_flax from_tf gguf_file": "save the weights as safetensors with transformers first",
    }.items()
    for name in names.split()
}
SAVING: dict[str, Known] = {
    "save_function": Known(ANY),  # accelerate passes one for files that safetensors writes here
    "save_original_format": BOTH,
    "save_peft_format": BOTH,
    "push_to_hub": Known((False,), "upload the saved folder with huggingface_hub.upload_folder"),
    "safe_serialization": Known((True,), "weights are written as safetensors only; leave it out"),
    "token": Known((), "nothing is uploaded; leave it out"),
    "variant": Known((), "files have no variant in their name; leave it out"),
}
CHECKPOINTING: dict[str, Known] = {
    "use_reentrant": Known((False,), "layers are recomputed without reentrance; leave it out"),
    "preserve_rng_state": Known((True,), "dropout is always replayed; leave it out"),
    "every_n_layers": Known((1,), "every layer is recomputed; leave it out"),
    "offload": Known((False,), "what is saved stays on the device; leave it out"),
}


def check(known: Mapping[str, Known], given: Mapping[str, object]) -> None:
    """Raise an error that names an argument and says what to do.

    Raises:
        TypeError: an argument that is not known. ValueError: a value that is not taken.
    """
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"{name}={value!r:.80} is not an argument here; known are {', '.join(known)}")
        taken, instead = known[name]
        if value is not None and taken is not None and not any(value is each for each in taken):
            raise ValueError(f"{name}={value!r:.80} is not supported: {instead}")


def dtype_of(asked: torch.dtype | str | None, written: Mapping[str, Any], folder: Path) -> torch.dtype:
    """The dtype of parameters: a dtype or its name; "auto", that of the file; or None, float32.

    Args:
        written: config.json. It decides about "auto", and the weights where it does not.
    """
    if asked is None:
        return torch.float32
    if asked == "auto":
        stored = (each.like.dtype for each in weights.find(folder).values())
        asked = written.get("dtype") or written.get("torch_dtype") or next(filter(_floats, stored), DTYPES[0])
    found = getattr(torch, asked.removeprefix("torch."), None) if isinstance(asked, str) else asked
    if not isinstance(found, torch.dtype) or found not in DTYPES:
        names = ", ".join(str(each).removeprefix("torch.") for each in DTYPES)
        raise ValueError(f"dtype is {asked!r:.80}, but must be 'auto' or one of {names}")
    return found


def _floats(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point


def device_of(device: torch.device | str | None, device_map: object) -> torch.device:
    """The device of a model, from either argument."""
    whole = device_map[""] if isinstance(device_map, Mapping) and set(device_map) == {""} else device_map
    if whole is None:
        return torch.device(device or "cpu")
    try:
        found = torch.device(whole)  # pyright: ignore[reportArgumentType]
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device_map={device_map!r:.80}: the model is on one device; pass device='cuda:0'") from error
    if device is not None and torch.device(device) != found:
        raise ValueError(f"device is {device} and device_map {device_map}: pass one of them")
    return found
