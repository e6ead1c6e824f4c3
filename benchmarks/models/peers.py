"""transformers and what is built on it, each the way its users run it fastest. Every function is a builder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.inputs import ASSETS, groups
from benchmarks.models import flash, texts
from benchmarks.models.batches import Batch, cotangent, way
from benchmarks.models.case import Build, Case, Place, Way

Inputs = dict[str, Any]
Forward = Callable[..., Tensor]


def load(place: Place, attention: str) -> Any:
    """The ModernBertModel of transformers in evaluation mode, without dropout."""
    from transformers import AutoModel

    found = AutoModel.from_pretrained(place.folder, attn_implementation=attention, dtype=place.torch_dtype)
    return found.to(place.device).eval()


def alone(place: Place) -> Build:
    """The reference: sdpa, every text by itself, so that nothing is padded. Forward only the checked texts are run."""
    model = load(place, "sdpa")

    def ways(case: Case) -> Iterator[Way]:
        wanted = range(len(case.lengths)) if case.backward else case.checked
        yield padded_way("every text by itself", case, place, model, [[one] for one in wanted], forward_of(model))

    return ways


def transformers(place: Place, attention: str) -> Build:
    """Padded batches, as they come and length-sorted, of several sizes."""
    model = load(place, attention)
    return lambda case: batchings(attention, case, place, model, forward_of(model))


def transformers_flash(place: Place) -> Build:
    """torch's FlashAttention: all texts in one row, which is the fastest that transformers can do, and padded; only
    padded if the case has the option `padded`.
    """
    model = load(place, flash.register())
    forward = forward_of(model)

    def ways(case: Case) -> Iterator[Way]:
        if not case.options.get("padded"):
            yield flattened_way("FlashAttention of torch, flattened", case, place, model, forward)
        yield from batchings("FlashAttention of torch", case, place, model, forward)

    return ways


def compiled(place: Place, attention: str) -> Build:
    """torch.compile of the whole model: flattened for FlashAttention, in padded batches for sdpa.

    Queries from the host are compiled with CUDA graphs, all else without; where lengths do not vary, and so nothing is
    dynamic, the products are tuned too. GPU only.
    """
    name = flash.register() if attention == "flash" else attention
    model = load(place, name)

    def ways(case: Case) -> Iterator[Way]:
        torch._dynamo.reset()
        tuned = [] if varies(case) or place.quick else ["max-autotune-no-cudagraphs"]
        for mode in ["reduce-overhead"] if case.from_host else ["default", *tuned]:
            forward = forward_of(torch.compile(model, mode=mode, dynamic=None if case.from_host else varies(case)))
            settings = f"{'FlashAttention of torch' if attention == 'flash' else attention}, torch.compile, {mode}"
            if attention == "flash":
                yield flattened_way(f"{settings}, flattened", case, place, model, forward)
            else:
                # Length-sorted where that makes a difference; one size, because each is compiled for a minute.
                offered = sizes(case, place)
                chosen = next((one for one in offered if one[1]), offered[0])
                yield from batchings(settings, case, place, model, forward, [chosen])

    return ways


def sentence_transformers(place: Place) -> Build:
    """Its Transformer module on token ids, so that its tokenizer is not measured.

    With FlashAttention it flattens a batch into one row by transformers' collator. It looks for a package by name; here
    torch's kernel stands for it where a GPU computes in half precision, in the same form. Else batches are padded.
    """
    flattens = place.is_gpu and place.dtype != "float32"
    attention = flash.register() if flattens else "sdpa"
    for file in ("tokenizer.json", "tokenizer_config.json"):  # asked for, and not used
        shutil.copy(ASSETS / "default" / file, place.folder)
    module = import_module("sentence_transformers.sentence_transformer.modules").Transformer
    body = module(place.folder, model_kwargs={"attn_implementation": attention, "dtype": place.torch_dtype})
    body = body.to(place.device).eval()
    if body.model_forward_params is not None:  # as it does itself where it flattens
        body.model_forward_params |= {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}

    def forward(inputs: Inputs) -> Tensor:
        given = {name: x for name, x in onto(inputs, place).items() if x is not None}
        found = body(given)["token_embeddings"]
        return found[0] if "cu_seq_lens_q" in inputs else found

    def ways(case: Case) -> Iterator[Way]:
        if flattens:
            yield flattened_way("FlashAttention of torch, flattened", case, place, body.model, forward)
        # Its `encode` sorts by length.
        offered = sizes(case, place)
        by_length = [one for one in offered if one[1] or one[0] == 1]
        chosen = by_length if varies(case) and case.batch is None and by_length else offered
        yield from batchings("sdpa", case, place, body.model, forward, chosen)

    return ways


def packed_encoders(place: Place) -> Build:
    """The package's kernels in a live model of transformers, with CUDA graphs where it uses them (short batches)."""
    model = load(place, "sdpa")
    import_module("packed_encoders").pack(model, cuda_graph=True)
    return lambda case: batchings("packed_encoders.pack, cuda_graph=True", case, place, model, forward_of(model))


def forward_of(model: Any) -> Forward:
    """Inputs on any device to hidden states; flattened ones lose the dimension that they do not need."""
    device = next(model.parameters()).device

    def forward(inputs: Inputs) -> Tensor:
        moved = {name: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        hidden = model(**moved).last_hidden_state
        return hidden[0] if "cu_seq_lens_q" in inputs else hidden

    return forward


def batchings(
    settings: str,
    case: Case,
    place: Place,
    model: nn.Module,
    forward: Forward,
    chosen: Sequence[tuple[int, bool]] | None = None,
) -> Iterator[Way]:
    """Padded ways, one for each of `sizes` or of those that are chosen."""
    for size, by_length in sizes(case, place) if chosen is None else chosen:
        places = groups(case.lengths, size, by_length=by_length)
        note = ", length-sorted" if by_length else ""
        yield padded_way(f"{settings}, batches of {size}{note}", case, place, model, places, forward)


def sizes(case: Case, place: Place) -> list[tuple[int, bool]]:
    """Batch sizes, and whether to sort by length: the protocol's and its halves, or several as they come and sorted."""
    count = len(case.lengths)
    if case.batch is not None:
        first = min(case.batch, count)
        return [(first >> halved, False) for halved in range(first.bit_length())]
    chosen = [count, count // 4, count // 16, *([1] if count <= 16 else [])]
    if not place.is_gpu:
        chosen = [min(8, count)] if place.quick else [16, 8, 4, 2, 1]
    chosen = list(dict.fromkeys(size for size in chosen if 1 <= size <= count)) or [count]
    orders = (False, True) if varies(case) else (False,)
    return [(size, order) for size in chosen for order in orders if not order or 1 < size < count]


def varies(case: Case) -> bool:
    return len(set(case.lengths)) > 1


def padded_way(
    settings: str, case: Case, place: Place, model: nn.Module, groups: Iterable[Sequence[int]], forward: Forward
) -> Way:
    """Right-padded batches, ready on the device, or in pinned memory of the host."""
    batches = []
    for places in groups:
        ids_BS, mask_BS = texts.padded(case.lengths, places)
        inputs = {"input_ids": ids_BS, "attention_mask": mask_BS}
        made = cotangent(case, place, places, model.config.hidden_size, padded=True)  # pyright: ignore
        batches.append(Batch(list(places), ready(inputs, case, place), made))
    return way(settings, case, model, batches, forward)


def flattened_way(settings: str, case: Case, place: Place, model: nn.Module, forward: Forward) -> Way:
    """All texts of a batch in one row, with positions that restart, as sentence-transformers makes them."""
    batches = []
    for places in groups(case.lengths, case.batch or len(case.lengths)):
        lengths = [case.lengths[one] for one in places]
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        inputs = {
            "input_ids": torch.cat([texts.ids(one, case.lengths[one]) for one in places])[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
        made = cotangent(case, place, places, model.config.hidden_size, padded=False)  # pyright: ignore
        batches.append(Batch(list(places), ready(inputs, case, place), made))
    return way(settings, case, model, batches, forward)


def ready(inputs: Inputs, case: Case, place: Place) -> Inputs:
    """Where the clock finds them."""
    if not case.from_host:
        return onto(inputs, place)
    if not place.is_gpu:
        return inputs
    return {name: x.pin_memory() if isinstance(x, Tensor) else x for name, x in inputs.items()}


def onto(inputs: Inputs, place: Place) -> Inputs:
    return {name: x.to(place.device, non_blocking=True) if isinstance(x, Tensor) else x for name, x in inputs.items()}
