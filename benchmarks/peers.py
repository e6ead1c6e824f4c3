"""Every implementation of the encoder: a row of `PEERS` each, and the builders that the rows name."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import inputs, runtimes
from benchmarks.inputs import groups
from benchmarks.worker import ENGINES, OURS, SESSION, Build, Job, Peer, Setup, Variant
from modernbert import Encoder, Session, pack

Inputs = dict[str, Any]
Forward = Callable[[Any], Tensor]


def of_batches(
    settings: str,
    job: Job,
    batches: Sequence[Sequence[int]],
    make: Callable[[Sequence[int]], Any],
    forward: Forward,
    *,
    together: Callable[[list[Any]], list[Tensor]] | None = None,
) -> Variant:
    """A variant that calls `forward` on each batch. What is timed and what is compared are the same calls.

    Args:
        batches: indices of the texts that run together. make: what `forward` takes of a batch.
        forward: to hidden states, `[T, D]` of all texts in a row, or right-padded `[B, S, D]`.
        together: all batches at once, in place of `forward`.
    """
    made = [make(indices) for indices in batches]
    step = torch.inference_mode()(forward)
    outputs: Callable[[list[Any]], Iterable[Tensor]] = together or partial(map, step)

    def run() -> None:
        deque(outputs(made), maxlen=0)  # keeps none

    def answer() -> Tensor:
        wanted = [at for at, indices in enumerate(batches) if set(job.checked) & set(indices)]
        found: dict[int, Tensor] = {}
        for at, hidden in zip(wanted, outputs([made[at] for at in wanted]), strict=True):
            lengths = [job.lengths[index] for index in batches[at]]
            each = hidden.split(lengths) if hidden.dim() == 2 else [x[:n] for x, n in zip(hidden, lengths, strict=True)]
            found |= {index: of_text.float().cpu() for index, of_text in zip(batches[at], each, strict=True)}
        return torch.cat([found[index] for index in sorted(job.checked)])

    largest = max(range(len(made)), key=lambda at: sum(job.lengths[index] for index in batches[at]))
    # Beside many batches one is enough to warm up.
    return Variant(settings, run, answer, partial(step, made[largest]) if len(made) > 4 else None)


def ids_of(job: Job, indices: Iterable[int]) -> list[Tensor]:
    """The token ids of these texts."""
    return [inputs.ids(index, job.lengths[index]) for index in indices]


def packed(setup: Setup, *, session: bool = False, engine: str | None = None) -> Build:
    """Packed batches: the plain modules, or a `Session`, which copies its batches to a GPU and has graphs there."""
    model: Any = Encoder.from_pretrained(setup.folder, dtype=setup.torch_dtype, device=setup.device).eval()
    called = Session(model, engine=engine) if session else model
    name = f"Session, {engine or 'PyTorch'}" if session else "plain modules"
    device = "cpu" if session else setup.device

    def variants(job: Job) -> Iterator[Variant]:
        from_ids = job.from_host or not setup.is_gpu

        def make(indices: Sequence[int]) -> Any:
            ids = [text.tolist() for text in ids_of(job, indices)]
            return ids if from_ids else pack(ids).to(device)

        def forward(one: Any) -> Tensor:
            batch = pack(one) if from_ids else one
            return called(batch.to(device) if setup.is_gpu else batch)

        settings, batches = name + "; packing is timed" * from_ids, groups(job.lengths, job.batch or len(job.lengths))
        yield of_batches(settings, job, batches, make, forward)

    return variants


def load_theirs(setup: Setup, attention: str) -> Any:
    """The ModernBertModel of transformers in evaluation mode, without dropout."""
    from transformers import AutoModel

    name = register_flash(torch.device(setup.device)) if attention == "flash" else attention
    model = AutoModel.from_pretrained(setup.folder, attn_implementation=name, dtype=setup.torch_dtype)
    return model.to(setup.device).eval()


def packed_in_place(model: Any, wanted: bool) -> Any:
    """The model, after `pack_in_place` if that is wanted."""
    if wanted:
        from modernbert.integrations.transformers import pack_in_place  # not in every checkout that a worker may import

        return pack_in_place(model)
    return model


def forward_of(model: Any) -> Forward:
    """Inputs on any device to hidden states; flattened ones lose the dimension that they do not need."""
    device = next(model.parameters()).device

    def forward(given: Inputs) -> Tensor:
        hidden = model(**onto(given, device)).last_hidden_state
        return hidden[0] if "cu_seq_lens_q" in given else hidden

    return forward


def alone(setup: Setup) -> Build:
    """The reference: sdpa, every checked text alone, so that nothing is padded."""
    model = load_theirs(setup, "sdpa")

    def variants(job: Job) -> Iterator[Variant]:
        yield in_padded("every text alone", job, setup, [[index] for index in job.checked], forward_of(model))

    return variants


def transformers(setup: Setup, *, attention: str = "sdpa", in_place: bool = False) -> Build:
    """Padded batches of several sizes, in order and sorted by length; with FlashAttention all texts in one row."""
    model = packed_in_place(load_theirs(setup, attention), in_place)
    make = flattened if attention == "flash" else batchings
    return lambda job: make(attention, job, setup, forward_of(model))


def compiled(setup: Setup, *, attention: str) -> Build:
    """torch.compile of the whole model: flattened for FlashAttention, in padded batches for sdpa.

    On a GPU, queries from the host are compiled with CUDA graphs, everything else without; all with max-autotune. On a
    CPU weights are constants of the compiled code.
    """
    model = load_theirs(setup, attention)

    def variants(job: Job) -> Iterator[Variant]:
        torch._dynamo.reset()
        if not setup.is_gpu:
            forward = forward_of(torch.compile(model, dynamic=False, options={"freezing": True}))
            yield from batchings("sdpa, torch.compile, freezing", job, setup, forward)
            return
        mode, dynamic = "max-autotune" + "-no-cudagraphs" * (not job.from_host), None if job.from_host else varies(job)
        settings = f"{attention}, torch.compile, {mode}"
        make = flattened if attention == "flash" else partial(batchings, most=1)  # each size takes a minute
        yield from make(settings, job, setup, forward_of(torch.compile(model, mode=mode, dynamic=dynamic)))

    return variants


def packed_encoders(setup: Setup) -> Build:
    """Kernels of the package in a model of transformers: texts in a row, or padded; with CUDA graphs of short texts."""
    package, theirs = import_module("packed_encoders"), load_theirs(setup, "sdpa")
    model = package.pack(theirs, cuda_graph=package.GraphConfig(max_batch=256, max_seq=128))
    parameters = import_module("packed_encoders.config").ModernBertParams.from_hf_config(model.config)
    run = import_module("packed_encoders.forward").packed_forward

    def in_a_row(given: Inputs) -> Tensor:
        one = onto(given, setup.device)
        ids, positions = one["input_ids"][0], one["position_ids"][0]
        return run(model, parameters, ids, one["cu_seq_lens_q"], one["max_length_q"], positions)

    def variants(job: Job) -> Iterator[Variant]:
        yield from flattened("packed_forward", job, setup, in_a_row)
        yield from batchings("pack", job, setup, forward_of(model))

    return variants


def batchings(settings: str, job: Job, setup: Setup, forward: Forward, *, most: int | None = None) -> Iterator[Variant]:
    """Padded variants: length-sorted batches of several sizes, then in order; or the protocol's size and its halves."""
    count = len(job.lengths)
    if job.batch is not None:
        first = min(job.batch, count)
        sizes = [(first >> halved, False) for halved in range(first.bit_length())]
    else:
        on_cpu = [min(8, count)] if setup.quick else [32, 16, 8, 4, 2, 1]
        offered = [count, count // 4, count // 16] if setup.is_gpu else on_cpu
        offered = [size for size in offered if 1 <= size <= count] or [count]
        by_length = [(size, True) for size in offered if varies(job) and 1 < size < count]
        sizes = by_length + [(size, False) for size in offered]
    for size, sort in sizes[:most]:
        words = f"{settings}, batches of {size}{', length-sorted' if sort else ''}"
        yield in_padded(words, job, setup, groups(job.lengths, size, by_length=sort), forward)


def varies(job: Job) -> bool:
    return len(set(job.lengths)) > 1


def in_padded(settings: str, job: Job, setup: Setup, batches: Sequence[Sequence[int]], forward: Forward) -> Variant:
    """Right-padded batches, ready on the device or on the host."""

    def make(indices: Sequence[int]) -> Inputs:
        return onto(inputs.padded(ids_of(job, indices), setup.pad), "cpu" if job.from_host else setup.device)

    return of_batches(settings, job, batches, make, forward)


def flattened(settings: str, job: Job, setup: Setup, forward: Forward) -> Iterator[Variant]:
    """All texts of a batch in one row, with positions that restart, as sentence-transformers makes them."""

    def make(indices: Sequence[int]) -> Inputs:
        lengths = [job.lengths[index] for index in indices]
        ends, longest = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), max(lengths)
        given = {
            "input_ids": torch.cat(ids_of(job, indices))[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        return onto(given, "cpu" if job.from_host else setup.device)

    batches = groups(job.lengths, job.batch or len(job.lengths))
    yield of_batches(f"{settings}, flattened", job, batches, make, forward)


def onto(given: Mapping[str, Any], device: torch.device | str) -> Inputs:
    return {name: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for name, x in given.items()}


FLASH_NAME = "varlen_of_our_choice"  # without the word "flash", by which transformers would look for a package


def register_flash(device: torch.device) -> str:
    """The best FlashAttention that is here, for texts in a row; its name for `attn_implementation`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    from modernbert_kernels.flash import packages  # not in every checkout that a worker may import

    kernel = packages.PACKAGES[packages.usable(device)[0]].forward

    def attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, **known: Any) -> tuple[Tensor, None]:
        ends, window = known["cu_seq_lens_q"], known.get("sliding_window")
        # Its window counts the token itself.
        at = packages.Varlen(ends, ends, known["max_length_q"], None if window is None else window - 1)
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return kernel(q, k, v, at)[0][None], None

    AttentionInterface.register(FLASH_NAME, attend)
    AttentionMaskInterface.register(FLASH_NAME, lambda *_, **__: None)
    return FLASH_NAME


def onnx_runtime(setup: Setup) -> Build:
    """With threads that spin between runs or sleep, as neither is always faster."""

    def variants(job: Job) -> Iterator[Variant]:
        for spins in (True,) if setup.quick else (True, False):
            run = runtimes.onnx_session(setup, spins=spins)
            yield from fed("spinning" if spins else "no spinning", job, setup, run)

    return variants


def openvino(setup: Setup) -> Build:
    """Made from the ONNX file, for latency and, with several batches, for throughput.

    What OpenVINO makes of the torch model returns NaN around a token whose whole window is padding.
    """

    def variants(job: Job) -> Iterator[Variant]:
        for hint in ("latency", "throughput")[: len(job.lengths)]:
            run, together = runtimes.openvino_model(setup, hint)
            yield from fed(f"from onnx, {hint} hint", job, setup, run, together)

    return variants


def fed(
    settings: str, job: Job, setup: Setup, run: Forward, together: Callable[[list[Any]], list[Tensor]] | None = None
) -> Iterator[Variant]:
    """A compiled graph on each text alone, and on length-sorted batches of 4 where lengths vary."""

    def make(indices: Sequence[int]) -> Inputs:
        given = inputs.padded(ids_of(job, indices), setup.pad, masked=True)
        return {name: x.numpy() for name, x in given.items()}

    for size in (1, 4) if varies(job) and not setup.quick else (1,):
        batches = groups(job.lengths, size, by_length=True)
        yield of_batches(f"{settings}, batches of {size}", job, batches, make, run, together=together)


def on_cpu(setup: Setup) -> bool:
    return not setup.is_gpu


def half_on_gpu(setup: Setup) -> bool:
    """FlashAttention has no float32."""
    return setup.is_gpu and setup.dtype != "float32"


def can_compile(setup: Setup) -> bool:
    """torch.compile needs a C++ compiler on a CPU."""
    return setup.is_gpu or shutil.which("g++") is not None


TRANSFORMERS = "transformers"
SDPA, FLASH = f"{TRANSFORMERS}, sdpa", f"{TRANSFORMERS}, flash"
COMPILED = SDPA_COMPILED, FLASH_COMPILED = f"{SDPA}, compiled", f"{FLASH}, compiled"
PACKED_ENCODERS, ONNX_RUNTIME, OPENVINO = "packed-encoders", "ONNX Runtime", "OpenVINO"

REFERENCE = Peer(alone, package="transformers")

PEERS: dict[str, Peer] = {
    OURS: Peer(packed),
    SESSION: Peer(packed, {"session": True}),
    **{name: Peer(packed, options, on_cpu, exact="int8" not in name) for name, options in ENGINES.items()},
    SDPA: Peer(transformers, {"attention": "sdpa"}, package="transformers"),
    FLASH: Peer(transformers, {"attention": "flash"}, half_on_gpu, "transformers"),
    SDPA_COMPILED: Peer(compiled, {"attention": "sdpa"}, can_compile, "transformers", slow=True),
    FLASH_COMPILED: Peer(compiled, {"attention": "flash"}, half_on_gpu, "transformers", slow=True),
    PACKED_ENCODERS: Peer(packed_encoders, {}, half_on_gpu, "packed_encoders"),
    ONNX_RUNTIME: Peer(onnx_runtime, {}, on_cpu, "onnxruntime"),
    OPENVINO: Peer(openvino, {}, on_cpu, "openvino"),
}


def those(*names: str) -> dict[str, Peer]:
    return {name: PEERS[name] for name in names}
