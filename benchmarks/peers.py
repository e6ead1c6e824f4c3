"""Every implementation of the encoder: a row of `PEERS` each, and the builders that the rows name.

A builder loads a model in its worker and returns the variants of a job: several batchings and settings, of which the
fastest is taken. Padded batches are ready before the clock starts; our packing is timed where ids start on the host.
With `width`, hidden states are projected and normalised, as for late interaction.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modernbert
import modernbert_kernels as ops
from benchmarks import inputs, runtimes
from benchmarks.inputs import groups
from benchmarks.worker import OURS, SESSION, Build, Job, Peer, Setup, Variant
from modernbert import Encoder, Packed, pack

Inputs = dict[str, Any]
Forward = Callable[[Any], Tensor]

GRAPHS, BUDGET = 16_384, 65_536
"""Tokens above which a `Session` has no CUDA graphs, and of a packed batch on a GPU, offered beside all texts."""

GRADIENT = "layers.0.attn.Wo.weight"
"""The gradient that is compared after a backward pass: it depends on all layers, and has one name everywhere."""


@dataclass(frozen=True)
class Batch:
    """Texts that run together: their indices, what the model takes, and the gradient of its hidden states."""

    indices: Sequence[int]
    inputs: Any
    cotangent: Tensor | None = None


def of_batches(
    settings: str,
    job: Job,
    batches: Sequence[Batch],
    forward: Forward,
    *,
    model: nn.Module | None = None,
    together: Callable[[list[Any]], list[Tensor]] | None = None,
) -> Variant:
    """A variant that calls `forward` on each batch. What is timed and what is compared are the same calls.

    With the option `adamw` of the job, weights are stepped.

    Args:
        forward: to hidden states, `[T, D]` of all texts in a row, or right-padded `[B, S, D]`.
        model: holds the parameters, under the names of the checkpoint; for a backward pass.
        together: all batches at once, in place of `forward`.
    """
    trained = model if job.backward else None
    # It does all of its work and leaves the weights as they are, so that all calls do the same.
    adamw = (
        trained is not None and "adamw" in job.options and torch.optim.AdamW(trained.parameters(), lr=0.0, fused=True)
    )

    def step(batch: Batch) -> Tensor:
        if batch.cotangent is None:
            with torch.inference_mode():
                return forward(batch.inputs)
        hidden = forward(batch.inputs)
        torch.autograd.backward(hidden, batch.cotangent)
        return hidden.detach()

    def run() -> None:
        if together is not None:
            together([batch.inputs for batch in batches])
            return
        if trained is not None:
            trained.zero_grad(set_to_none=True)
        for batch in batches:
            step(batch)
        if adamw:
            adamw.step()

    def answer() -> Tensor:
        if trained is not None:
            run()
            return gradient_of(trained)
        wanted = [batch for batch in batches if set(job.checked) & set(batch.indices)]
        outputs = map(step, wanted) if together is None else together([batch.inputs for batch in wanted])
        found: dict[int, Tensor] = {}
        for batch, hidden in zip(wanted, outputs, strict=True):
            lengths = [job.lengths[index] for index in batch.indices]
            each = hidden.split(lengths) if hidden.dim() == 2 else [x[:n] for x, n in zip(hidden, lengths, strict=True)]
            found |= {index: of_text.float().cpu() for index, of_text in zip(batch.indices, each, strict=True)}
        return torch.cat([found[index] for index in sorted(job.checked)])

    largest = max(batches, key=lambda batch: sum(job.lengths[index] for index in batch.indices))
    # Beside many batches one is enough to warm up.
    return Variant(settings, run, answer, (lambda: step(largest)) if len(batches) > 4 and not job.backward else None)


def gradient_of(model: nn.Module) -> Tensor:
    weight = next(weight for name, weight in model.named_parameters() if name.endswith(GRADIENT))
    assert weight.grad is not None
    return weight.grad.float().cpu()


def ids_of(job: Job, indices: Iterable[int]) -> list[Tensor]:
    """The token ids of these texts."""
    return [inputs.ids(index, job.lengths[index]) for index in indices]


def cotangent(job: Job, setup: Setup, indices: Sequence[int], width: int, *, padded: bool) -> Tensor | None:
    """The gradients of the hidden states of these texts, in a row or right-padded; None without a backward pass."""
    if not job.backward:
        return None
    pieces = [inputs.cotangent(index, job.lengths[index], width) for index in indices]
    whole = nn.utils.rnn.pad_sequence(pieces, batch_first=True) if padded else torch.cat(pieces)
    return whole.to(setup.device, setup.torch_dtype)


def with_autocast(model: Any, setup: Setup) -> Any:
    """float32 weights, both passes under autocast to the dtype of the setup."""
    if setup.dtype != "float32":
        model.forward = torch.autocast(setup.device, setup.torch_dtype)(model.forward)
    return model


# Ours.


def load_ours(setup: Setup) -> Encoder:
    return Encoder.from_pretrained(setup.folder, dtype=setup.torch_dtype, device=setup.device).eval()


def session_of(model: Any) -> Any:
    """A `Session`; in a checkout that has none, the model."""
    return modernbert.Session(model) if hasattr(modernbert, "Session") else model


class Projected(nn.Module):
    """Our encoder, its rows projected to `width` and normalised."""

    def __init__(self, encoder: Encoder, width: int) -> None:
        super().__init__()
        self.encoder, self.config = encoder, encoder.config
        weight = encoder.embeddings.tok_embeddings.weight
        self.register_buffer("weight_ED", inputs.projection(encoder.config.hidden_size, width).to(weight))
        self.weight_ED: Tensor

    def forward(self, batch: Packed, *, rows: Tensor | None = None) -> Tensor:
        return ops.project_normalize(self.encoder(batch, rows=rows), self.weight_ED)


def packed(
    setup: Setup, *, session: bool = False, int8: bool = False, adamw: bool = False, width: int | None = None
) -> Build:
    """Packed batches: the plain modules, or a `Session`, which copies its batches to a GPU and has CUDA graphs there.

    Args:
        int8: the products of `runtimes.with_int8`. adamw: float32 weights under autocast.
    """
    model: Any = load_ours(replace(setup, dtype="float32") if adamw else setup)
    model = with_autocast(model, setup) if adamw else runtimes.with_int8(model) if int8 else model
    model = model if width is None else Projected(model, width).eval()
    called, name = (session_of(model), "Session") if session else (model, "plain modules")
    name, budget = "int8, scales per channel" if int8 else name, GRAPHS if session else BUDGET
    packs, device = not setup.is_gpu, "cpu" if session else setup.device

    def variants(job: Job) -> Iterator[Variant]:
        yield variant(name, job, groups(job.lengths, job.batch or len(job.lengths)))
        if job.batch is None and setup.is_gpu and sum(job.lengths) > budget:
            yield variant(f"{name}, at most {budget:,} tokens at a time", job, inputs.within(job.lengths, budget))

    def variant(settings: str, job: Job, batches: Sequence[Sequence[int]]) -> Variant:
        from_ids, made = packs or job.from_host, []
        for indices in batches:
            ids = [text.tolist() for text in ids_of(job, indices)]
            gradient = cotangent(job, setup, indices, model.config.hidden_size, padded=False)
            made.append(Batch(indices, ids if from_ids else pack(ids).to(device), gradient))

        def forward(one: Any) -> Tensor:
            batch = pack(one) if from_ids else one
            return called(batch.to(device) if setup.is_gpu else batch)

        return of_batches(settings + "; packing is timed" * from_ids, job, made, forward, model=model)

    return variants


# transformers, and what is built on it.


def load_theirs(setup: Setup, attention: str) -> Any:
    """The ModernBertModel of transformers in evaluation mode, without dropout."""
    from transformers import AutoModel

    name = register_flash() if attention == "flash" else attention
    model = AutoModel.from_pretrained(setup.folder, attn_implementation=name, dtype=setup.torch_dtype)
    return model.to(setup.device).eval()


def forward_of(model: Any, width: int | None = None) -> Forward:
    """Inputs on any device to hidden states; flattened ones lose the dimension that they do not need."""
    parameter = next(model.parameters())
    weight_ED = None if width is None else inputs.projection(model.config.hidden_size, width).to(parameter)

    def forward(given: Inputs) -> Tensor:
        hidden = model(**onto(given, parameter.device)).last_hidden_state
        hidden = hidden[0] if "cu_seq_lens_q" in given else hidden
        return hidden if weight_ED is None else F.normalize(F.linear(hidden, weight_ED), dim=-1)

    return forward


def alone(setup: Setup, *, width: int | None = None) -> Build:
    """The reference: sdpa, every text alone, so that nothing is padded. Forward only the checked texts run."""
    model = load_theirs(setup, "sdpa")

    def variants(job: Job) -> Iterator[Variant]:
        wanted = [[index] for index in (range(len(job.lengths)) if job.backward else job.checked)]
        yield padded_variant("every text alone", job, setup, model, wanted, forward_of(model, width))

    return variants


def transformers(setup: Setup, *, attention: str, width: int | None = None, adamw: bool = False) -> Build:
    """Padded batches of several sizes, in order and sorted by length; with FlashAttention all texts in one row."""
    model = load_theirs(replace(setup, dtype="float32") if adamw else setup, attention)
    model = with_autocast(model, setup) if adamw else model

    def variants(job: Job) -> Iterator[Variant]:
        forward = forward_of(model, width)
        if attention == "flash":
            yield flattened_variant("FlashAttention of torch, flattened", job, setup, model, forward)
        else:
            yield from batchings(attention, job, setup, model, forward)

    return variants


def compiled(setup: Setup, *, attention: str) -> Build:
    """torch.compile of the whole model: flattened for FlashAttention, in padded batches for sdpa.

    On a GPU, queries from the host are compiled with CUDA graphs, everything else without; where lengths do not vary,
    and so nothing is dynamic, the products are tuned too. On a CPU weights are constants of the compiled code.
    """
    model = load_theirs(setup, attention)

    def variants(job: Job) -> Iterator[Variant]:
        torch._dynamo.reset()
        if not setup.is_gpu:
            forward = forward_of(torch.compile(model, dynamic=False, options={"freezing": True}))
            yield from batchings(f"{attention}, torch.compile, freezing", job, setup, model, forward)
            return
        tuned = [] if varies(job) or setup.quick else ["max-autotune-no-cudagraphs"]
        for mode in ["reduce-overhead"] if job.from_host else ["default", *tuned]:
            forward = forward_of(torch.compile(model, mode=mode, dynamic=None if job.from_host else varies(job)))
            settings = f"{attention}, torch.compile, {mode}"
            if attention == "flash":
                yield flattened_variant(f"{settings}, flattened", job, setup, model, forward)
            else:
                # The last is sorted by length where that makes a difference; one, because each takes a minute.
                yield from batchings(settings, job, setup, model, forward, sizes(job, setup)[-1:])

    return variants


def packed_encoders(setup: Setup) -> Build:
    """The package's kernels in a model of transformers, with CUDA graphs where it uses them (short batches)."""
    model = load_theirs(setup, "sdpa")
    import_module("packed_encoders").pack(model, cuda_graph=True)
    return lambda job: batchings("packed_encoders.pack, cuda_graph=True", job, setup, model, forward_of(model))


def batchings(
    settings: str,
    job: Job,
    setup: Setup,
    model: Any,
    forward: Forward,
    chosen: Sequence[tuple[int, bool]] | None = None,
) -> Iterator[Variant]:
    """Padded variants, one for each of `sizes`, or of those that are chosen."""
    for size, by_length in sizes(job, setup) if chosen is None else chosen:
        indices = groups(job.lengths, size, by_length=by_length)
        note = ", length-sorted" if by_length else ""
        yield padded_variant(f"{settings}, batches of {size}{note}", job, setup, model, indices, forward)


def sizes(job: Job, setup: Setup) -> list[tuple[int, bool]]:
    """Batch sizes, and whether to sort by length: the protocol's and its halves, or several in order and sorted."""
    count = len(job.lengths)
    if job.batch is not None:
        first = min(job.batch, count)
        return [(first >> halved, False) for halved in range(first.bit_length())]
    offered = [count, count // 4, count // 16, *([1] if count <= 16 else [])]
    if not setup.is_gpu:
        offered = [min(8, count)] if setup.quick else [32, 16, 8, 4, 2, 1]
    offered = [size for size in dict.fromkeys(offered) if 1 <= size <= count] or [count]
    by_length = [(size, True) for size in offered if varies(job) and 1 < size < count]
    return [(size, False) for size in offered] + by_length


def varies(job: Job) -> bool:
    return len(set(job.lengths)) > 1


def padded_variant(
    settings: str, job: Job, setup: Setup, model: Any, batches: Iterable[Sequence[int]], forward: Forward
) -> Variant:
    """Right-padded batches, ready on the device, or in pinned memory of the host."""
    made = []
    for indices in batches:
        given = ready(inputs.padded(ids_of(job, indices)), job, setup)
        made.append(Batch(indices, given, cotangent(job, setup, indices, model.config.hidden_size, padded=True)))
    return of_batches(settings, job, made, forward, model=model)


def flattened_variant(settings: str, job: Job, setup: Setup, model: Any, forward: Forward) -> Variant:
    """All texts of a batch in one row, with positions that restart, as sentence-transformers makes them."""
    made = []
    for indices in groups(job.lengths, job.batch or len(job.lengths)):
        lengths = [job.lengths[index] for index in indices]
        given = {
            "input_ids": torch.cat(ids_of(job, indices))[None],
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        }
        given |= dict.fromkeys(
            ("cu_seq_lens_q", "cu_seq_lens_k"), torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        )
        given |= dict.fromkeys(("max_length_q", "max_length_k"), max(lengths))
        gradient = cotangent(job, setup, indices, model.config.hidden_size, padded=False)
        made.append(Batch(indices, ready(given, job, setup), gradient))
    return of_batches(settings, job, made, forward, model=model)


def ready(given: Mapping[str, Any], job: Job, setup: Setup) -> Inputs:
    """Where the clock finds them."""
    if not job.from_host:
        return onto(given, setup.device)
    return {name: x.pin_memory() if setup.is_gpu and isinstance(x, Tensor) else x for name, x in given.items()}


def onto(given: Mapping[str, Any], device: torch.device | str) -> Inputs:
    return {name: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for name, x in given.items()}


# torch's FlashAttention behind transformers' attention interface, so that no package has to be built for it.

FLASH_NAME = "varlen_of_torch"  # without the word "flash", by which transformers would look for a package


def flash_of_torch(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, cu_seqlens: Tensor, longest: int, window: int | None, scale: float
) -> Tensor:
    """The kernel that comes with torch for CUDA, in float16 and bfloat16; `window` is neighbours per side."""
    bounds = (cu_seqlens, cu_seqlens, longest, longest)
    switches = {"dropout_p": 0.0, "is_causal": False, "return_debug_mask": False}
    windows = {"window_size_left": window, "window_size_right": window}
    return torch.ops.aten._flash_attention_forward(q_THK, k_THK, v_THK, *bounds, **switches, scale=scale, **windows)[0]


def varlen_attention(kernel: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """The attention function around a kernel, for texts in a row. transformers' `sliding_window` counts the token."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        *,
        scaling: float,
        cu_seq_lens_q: Tensor,
        max_length_q: int,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        window = None if sliding_window is None else sliding_window - 1
        return kernel(q, k, v, cu_seq_lens_q, max_length_q, window, scaling)[None], None

    return attend


def register_flash(kernel: Callable[..., Tensor] = flash_of_torch) -> str:
    """Make it known to transformers; the name for `attn_implementation`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(FLASH_NAME, varlen_attention(kernel))
    AttentionMaskInterface.register(FLASH_NAME, lambda *_, **__: None)
    return FLASH_NAME


# Compiled graphs on a CPU.


def onnx_runtime(setup: Setup, *, int8: bool = False) -> Build:
    """Both exports that torch has, as neither is always the fastest, with threads that spin between runs or sleep."""

    def variants(job: Job) -> Iterator[Variant]:
        for exporter in runtimes.EXPORTERS[:1] if setup.quick else runtimes.EXPORTERS:
            for spins in (True,) if setup.quick else (True, False):
                run = runtimes.onnx_session(setup, exporter, spins=spins, int8=int8)
                settings = f"{exporter} export, {'' if spins else 'no '}spinning{', scales per channel' * int8}"
                yield from fed(settings, job, setup, run)

    return variants


def openvino(setup: Setup) -> Build:
    """Made from the ONNX file, for latency and, with several batches, for throughput.

    What OpenVINO makes of the torch model returns NaN around a token whose whole window is padding.
    """

    def variants(job: Job) -> Iterator[Variant]:
        for hint in ("latency", "throughput")[: len(job.lengths)]:
            run, together = runtimes.openvino_model(setup, hint)
            yield from fed(f"from onnx, {hint} hint", job, setup, run, together=together)

    return variants


def fed(
    settings: str,
    job: Job,
    setup: Setup,
    run: Forward,
    *,
    together: Callable[[list[Any]], list[Tensor]] | None = None,
) -> Iterator[Variant]:
    """A compiled graph on each text alone, and on length-sorted batches of 4 where lengths vary."""
    for size in (1, 4) if varies(job) and not setup.quick else (1,):
        words = f"length-sorted batches of {size}" if size > 1 else "one by one" if len(job.lengths) > 1 else "one text"
        made = []
        for indices in groups(job.lengths, size, by_length=True):
            given = inputs.padded(ids_of(job, indices), masked=True)
            made.append(Batch(indices, {name: x.numpy() for name, x in given.items()}))
        yield of_batches(f"{settings}, {words}", job, made, run, together=together)


# Which implementation takes part where. A new peer is a builder above and a row here.


def on_gpu(setup: Setup) -> bool:
    return setup.is_gpu


def on_cpu(setup: Setup) -> bool:
    return not setup.is_gpu


def half_on_gpu(setup: Setup) -> bool:
    """FlashAttention has no float32."""
    return setup.is_gpu and setup.dtype != "float32"


def can_compile(setup: Setup) -> bool:
    """torch.compile needs a C++ compiler on a CPU."""
    return setup.is_gpu or shutil.which("g++") is not None


INT8, TRANSFORMERS = "modernbert, int8", "transformers"
SDPA, EAGER, FLASH = (f"{TRANSFORMERS}, {attention}" for attention in ("sdpa", "eager", "flash"))
COMPILED = SDPA_COMPILED, FLASH_COMPILED = f"{SDPA}, compiled", f"{FLASH}, compiled"
PACKED_ENCODERS, ONNX_RUNTIME, OPENVINO = "packed-encoders", "ONNX Runtime", "OpenVINO"

REFERENCE = Peer(alone, package="transformers")

PEERS: dict[str, Peer] = {
    OURS: Peer(packed),
    SESSION: Peer(packed, {"session": True}),
    INT8: Peer(packed, {"int8": True}, on_cpu, exact=False),
    SDPA: Peer(transformers, {"attention": "sdpa"}, package="transformers"),
    EAGER: Peer(transformers, {"attention": "eager"}, package="transformers"),
    FLASH: Peer(transformers, {"attention": "flash"}, half_on_gpu, "transformers"),
    SDPA_COMPILED: Peer(compiled, {"attention": "sdpa"}, can_compile, "transformers", slow=True),
    FLASH_COMPILED: Peer(compiled, {"attention": "flash"}, half_on_gpu, "transformers", slow=True),
    PACKED_ENCODERS: Peer(packed_encoders, {}, half_on_gpu, "packed_encoders"),
    ONNX_RUNTIME: Peer(onnx_runtime, {}, on_cpu, "onnxruntime"),
    OPENVINO: Peer(openvino, {}, on_cpu, "openvino"),
    f"{ONNX_RUNTIME}, int8": Peer(onnx_runtime, {"int8": True}, on_cpu, "onnxruntime", exact=False),
}


def those(*names: str, **options: Any) -> dict[str, Peer]:
    """Rows of `PEERS`, with further options of their builders."""
    return {name: PEERS[name]._replace(options={**PEERS[name].options, **options}) for name in names}
