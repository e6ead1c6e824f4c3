"""Suite `breakdown`: every kernel of a model's forward pass and of a training step, next to the whole pass.

Each kernel is timed alone at the shapes of the model, with its data in the caches and not, as often as the model calls
it. What their sum leaves of the whole pass is launches, gaps between kernels, and copies that no kernel here makes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import modernbert_kernels as ops
from benchmarks import clock, inputs
from benchmarks.clock import Call, Loop, Machine
from benchmarks.encoder import models
from benchmarks.harness import Difference, Measured, Result, Run, Suite, in_turns
from benchmarks.ops import BACKWARD, CACHES, COLD, FORWARD, TRAINING, WARM, Task, checked, measured, randn, reason_of
from benchmarks.rows import Row, rounded
from benchmarks.tasks import FEW, FEWEST, ROUNDS, SWEEP, TOKENS, attention_task, ragged
from benchmarks.work import kernels, reached
from modernbert import Encoder, EncoderConfig, pack

EXACT = Difference(0.0, None)
Sizes = dict[str, Any]


@ops.Op
def add_product(into_TD: Tensor, x_TF: Tensor, weight_DF: Tensor) -> Tensor:
    """A product that is added to the residual stream, as the encoder does it in inference."""
    return into_TD.addmm_(x_TF, weight_DF.T)


def tasks(config: EncoderConfig, lengths: Sequence[int], of: Sizes, training: bool) -> Iterator[tuple[Task, list[int]]]:
    """Each kernel with its work, and how often each pass calls it; `of` has the dtype and the device."""
    T, D, F, V, K = sum(lengths), config.hidden_size, config.intermediate_size, config.vocab_size, config.head_dim
    exact: Sizes = of | {"dtype": torch.float32} if training else of  # parameters and the stream
    cast = (of["dtype"],) if training else ()
    at = torch.cat([torch.arange(length, device=of["device"]) for length in lengths])
    cu_seqlens = torch.tensor([0, *lengths], device=of["device"]).cumsum(0, dtype=torch.int32)
    norm = (randn(D, **exact), None, config.norm_eps)
    attend = partial(attention_task, lengths, config.num_attention_heads, K, **of)

    def product(inner: int, outer: int) -> Task:
        return Task("", ops.linear, (randn(T, inner, **of), randn(outer, inner, scale=inner**-0.5, **exact)))

    def added(inner: int) -> Task:
        return Task("", add_product, (randn(T, D, **of), *product(inner, D).args))

    made: dict[str, Callable[[], Task]] = {
        "token_ranges": lambda: Task("", ops.token_ranges, (cu_seqlens, None, T)),
        "rotary_table": lambda: Task("", ops.rotary_table, (at, config.global_rope_theta, K)),
        "embed_layer_norm": lambda: Task("", ops.embed_layer_norm, (at * 7919 % V, randn(V, D, **exact), *norm)),
        "layer_norm": lambda: Task("", ops.layer_norm, (randn(T, D, **exact), *norm)),
        "add_layer_norm": lambda: Task("", ops.add_layer_norm, (randn(T, D, **exact), randn(T, D, **of), *norm, *cast)),
        "local attention": lambda: attend(config.window),
        "global attention": lambda: attend(None),
        "Wqkv": lambda: product(D, 3 * D),
        "attention Wo": lambda: product(D, D),
        "attention Wo, added": lambda: added(D),
        "Wi": lambda: product(D, 2 * F),
        "geglu": lambda: Task("", ops.geglu, (randn(T, 2 * F, **of), config.hidden_activation)),
        "MLP Wo": lambda: product(F, D),
        "MLP Wo, added": lambda: added(F),
    }
    known: Any = {"around": partial(torch.autocast, of["device"].type, of["dtype"]) if training else nullcontext}
    counted = Counter(kernels(config, lengths, of["dtype"].itemsize, training=training))
    for name in dict.fromkeys(kernel.name for kernel in counted):
        passes = [kernel for kernel in counted if kernel.name == name]  # forward first
        known["flops"] = (passes[0].flops, passes[-1].flops)
        known["moved"] = (passes[0].bytes, passes[-1].bytes)
        yield replace(made[name](), what=name, **known), [counted[one] for one in passes]
    if training:
        # The gradients of the masked tokens' loss are computed in the forward pass.
        x, table, targets = randn(T, D, **exact), randn(V, D, scale=D**-0.5, **exact), targets_of(at, V)
        product_flops = 2 * int((targets >= 0).sum()) * V * D
        moved = 2 * x.nbytes + 2 * table.nbytes
        known |= {"flops": (3 * product_flops, 0), "moved": (moved, moved)}
        yield Task("loss", ops.linear_cross_entropy, (x, table, None, targets), **known), [1, 1]


def targets_of(at: Tensor, classes: int) -> Tensor:
    """Of 30 percent of the tokens."""
    row = torch.arange(len(at), device=at.device)
    return (row * 7919 % classes).masked_fill(row % 10 >= 3, -100)


def batch_of(lengths: Sequence[int], of: Sizes, config: EncoderConfig) -> Any:
    ids = [(inputs.ids(at, length) % config.vocab_size).tolist() for at, length in enumerate(lengths)]
    return pack(ids).to(of["device"])


def forward_of(config: EncoderConfig, lengths: Sequence[int], of: Sizes) -> dict[str, tuple[Call, int]]:
    encoder, batch = Encoder.from_config(config).to(**of).eval(), batch_of(lengths, of, config)
    return {"whole": (torch.inference_mode()(lambda: encoder(batch)), 0)}


def step_of(config: EncoderConfig, lengths: Sequence[int], of: Sizes) -> dict[str, tuple[Call, int]]:
    """The whole step under autocast, and what it does beside both passes, with the bytes that this must move."""
    encoder, batch = Encoder.from_config(config).to(of["device"]).train(), batch_of(lengths, of, config)
    parameters, targets = [*encoder.parameters()], targets_of(batch.input_ids, config.vocab_size)
    table, is_gpu = encoder.embeddings.tok_embeddings.weight, of["device"].type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True, capturable=is_gpu)

    def passes() -> None:
        optimizer.zero_grad()
        with torch.autocast(of["device"].type, of["dtype"]):
            loss = ops.linear_cross_entropy(encoder(batch), table, None, targets)
        loss.backward()

    clip, numbers = partial(nn.utils.clip_grad_norm_, parameters, 1.0), sum(one.numel() for one in parameters)

    def step() -> None:
        passes()
        clip()
        optimizer.step()

    passes()  # so that there are gradients
    # The norm reads a gradient, the product with a factor reads and writes it. AdamW reads four numbers, writes three.
    return {"whole": (step, 0), "clipping": (clip, 12 * numbers), "AdamW": (optimizer.step, 28 * numbers)}


class Part(NamedTuple):
    """A kernel: its seconds by what the caches hold, how often a pass calls it, its operations and bytes."""

    found: dict[str, Measured]
    count: int
    work: tuple[int, int]
    sensors: Row


def whole_of(call: Call, machine: Machine, rounds: int) -> list[Measured]:
    """As replays of a graph where one can be captured, and as Python calls it."""
    loops = [clock.loop([call], machine)]
    if loops[0].how != clock.SINGLE:
        times = clock.repeats_for(machine.window, machine.read(call).seconds)
        loops.append(Loop(partial(clock.repeat, times, call), times, clock.SINGLE))
    taken, _ = in_turns({loop.how: partial(machine.read, loop.run) for loop in loops}, rounds)
    costs = [[one.seconds / loop.calls for one in taken[loop.how]] for loop in loops]
    return [Measured(f"whole, {a.how}", "", EXACT, a.calls, b) for a, b in zip(loops, costs, strict=True)]


def parts_of(
    config: EncoderConfig, lengths: Sequence[int], of: Sizes, training: bool, machine: Machine, rounds: int
) -> Iterator[tuple[str, Part | str]]:
    """The kernels that are right, by name, or why one is refused."""
    for task, counts in tasks(config, lengths, of, training):
        passes = (TRAINING, BACKWARD) if training and BACKWARD in task.passes else (FORWARD,)
        for which, count in zip(passes, counts, strict=True):
            name = f"{task.what}, {which}" if training else task.what
            right, refused = checked(task, [next(task.ways())], which)
            found: dict[str, Measured] = {}
            sensors: Row = {}
            for cache in CACHES if right else ():
                done, failed, sensors = measured(task, right, which, machine, cache, rounds)
                found.update((cache, replace(one, name=name)) for one in done)
                refused |= failed
            yield name, ", ".join(refused.values()) or Part(found, count, task.work(which), sensors)


def table(here: Run, machine: Machine, workload: str, model: str, lengths: Sequence[int], name: str) -> Result:
    """A row for each kernel; for the sum, with cold and warm caches; and for the whole, with factors over the sums."""
    training, config, rounds = workload == "step", EncoderConfig.preset(model), 2 if here.quick else ROUNDS
    of = {"dtype": torch.bfloat16, "device": machine.device}
    parts: dict[str, Part | str] = {}
    last: list[Measured] = []
    for part, (call, moved) in (step_of if training else forward_of)(config, lengths, of).items():
        try:
            done = whole_of(call, machine, rounds)
            if moved:
                parts[part] = Part(dict.fromkeys(CACHES, replace(done[0], name=part)), 1, (0, moved), {})
            else:
                last += done
        except Exception as error:
            parts[part] = reason_of(error)
    del call  # with the model
    parts |= dict(parts_of(config, lengths, of, training, machine, rounds))
    refused = {name: part for name, part in parts.items() if isinstance(part, str)}
    known: Row = {"suite": here.suite, "workload": workload, "unit": "us", "dtype": "bfloat16", "model": model}
    known |= {"device": machine.device.type, "pass": "forward + backward" if training else "forward"}
    what = f"{model}, {'step of training' if training else 'forward'}, {name}, {sum(lengths):,} tokens: every kernel"
    known["what"], whole = what, min((one.median for one in last), default=None)
    rates = clock.rates(machine.device, torch.bfloat16, quick=here.quick)
    rows, timed = [], [part for part in parts.values() if isinstance(part, Part)]
    for part in timed:
        one, of_pass = part.found[WARM], part.count * part.found[WARM].median
        more = {"launches": part.count, "cold_us": rounded(part.found[COLD].median, 1e6), "sensors": part.sensors}
        more |= {
            "us_of_pass": rounded(of_pass, 1e6),
            "percent_of_pass": rounded(of_pass / whole, 100) if whole else None,
        }
        rows.append(
            one.row([], lambda seconds: 1e6 * seconds, **known, **more, **reached(one.median, rates, *part.work))
        )
    for cache in CACHES:
        costs = [sum(part.count * part.found[cache].costs[at] for part in timed) for at in range(rounds)]
        settings = f"{cache}{', without ' if refused else ''}{', '.join(refused)}"
        last.append(Measured(f"sum of the kernels, {cache}", settings, EXACT, costs=costs))
    rows += [one.row(last, lambda seconds: 1e6 * seconds, **known) for one in last]
    return Result(workload, rows, {f"{what}: {name}": reason for name, reason in refused.items()})


def measure(here: Run, names: Sequence[str]) -> Iterator[Result]:
    """Tables of the models. A CPU takes --quick only: those figures are not results."""
    machine = clock.this_machine()
    tokens = (FEW if machine.is_gpu else FEWEST // 4) if here.quick else TOKENS
    equal = [(min(512, count),) * max(1, count // 512) for count in (tokens, *(() if here.quick else SWEEP))]
    fixed = {f"{len(one):,} x {one[0]:,}": one for one in equal}
    sets = {"forward": fixed, "ragged": ragged(tokens), "step": dict(list(fixed.items())[:1])}
    for model in models(here, "modernbert-base", "ettin-17m", "modernbert-large"):
        for workload in names:
            for name, lengths in sets[workload].items():
                if here.left() <= 0:
                    yield here.rest(workload)
                    return
                yield table(here, machine, workload, model, lengths, name)


SUITES = {
    "breakdown": Suite(
        "every kernel of a forward pass and of a training step, products included, and their sum next to the whole",
        {
            "forward": "inference in bfloat16, 32 to 65,536 tokens",
            "ragged": "the same of the paper's lengths, of queries, and of one long text beside many short ones",
            "step": "both passes under autocast, the loss of masked tokens, clipping and AdamW",
        },
        "the roofline of a copy and a product in the same run",
        measure,
        on="needs a GPU; about ten minutes",
        needs_gpu=True,
        weight=14,
    )
}
