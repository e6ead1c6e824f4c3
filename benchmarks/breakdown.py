"""Suite `breakdown`: every kernel of a model's forward pass and of a training step, next to the whole pass.

What their sum leaves of the whole pass is launches, gaps between kernels, and copies that no kernel here makes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

import modernbert_kernels as ops
from benchmarks import clock, inputs
from benchmarks.clock import Machine
from benchmarks.encoder import models
from benchmarks.harness import Difference, Measured, Result, Run, Suite
from benchmarks.ops import (
    BACKWARD,
    BOTH,
    CACHES,
    COLD,
    FORWARD,
    TRAINING,
    WARM,
    Task,
    Way,
    caches_of,
    checked,
    measured,
    randn,
)
from benchmarks.rows import Row, rounded
from benchmarks.tasks import FEW, FEWEST, ROUNDS, SWEEP, TOKENS, attention_task, masked_targets, ragged
from benchmarks.work import kernels, reached
from modernbert import Encoder, EncoderConfig, pack

EXACT, WHOLE = Difference(0.0, None), "whole"
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
        x, table, targets = randn(T, D, **exact), randn(V, D, scale=D**-0.5, **exact), masked_targets(T, V, at.device)
        product_flops = 2 * int((targets >= 0).sum()) * V * D
        moved = 2 * x.nbytes + 2 * table.nbytes
        known |= {"flops": (3 * product_flops, 0), "moved": (moved, moved)}
        yield Task("loss", ops.linear_cross_entropy, (x, table, None, targets), **known), [1, 1]


def wholes(config: EncoderConfig, lengths: Sequence[int], of: Sizes, training: bool) -> Iterator[Task]:
    """The whole pass; of a step under autocast, also what it does beside both passes of the encoder."""
    ids = [(inputs.ids(at, length) % config.vocab_size).tolist() for at, length in enumerate(lengths)]
    encoder, batch = Encoder.from_config(config).to(of["device"]), pack(ids).to(of["device"])
    if not training:
        forward = encoder.to(of["dtype"]).eval()
        yield Task(WHOLE, ops.Op(lambda: forward(batch)), moved=(0, 0))
        return
    parameters = [*encoder.train().parameters()]
    targets = masked_targets(len(batch.input_ids), config.vocab_size, of["device"])
    table, on_gpu = encoder.embeddings.tok_embeddings.weight, of["device"].type == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True, capturable=on_gpu)

    @torch.enable_grad()
    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(of["device"].type, of["dtype"]):
            loss = ops.linear_cross_entropy(encoder(batch), table, None, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    yield Task(WHOLE, ops.Op(step), moved=(0, 0))
    # The norm reads a gradient, the product with a factor reads and writes it. AdamW reads four numbers, writes three.
    numbers = sum(one.numel() for one in parameters)
    yield Task("clipping", ops.Op(lambda: nn.utils.clip_grad_norm_(parameters, 1.0)), moved=(12 * numbers, 0))
    yield Task("AdamW", ops.Op(lambda: optimizer.step()), moved=(28 * numbers, 0))


def table(here: Run, machine: Machine, workload: str, model: str, lengths: Sequence[int], name: str) -> Result:
    """A row for each kernel; for the whole; and for the sum, with cold and warm caches, with factors over the whole."""
    training, config, rounds = workload == "step", EncoderConfig.preset(model), 2 if here.quick else ROUNDS
    of: Sizes = {"dtype": torch.bfloat16, "device": machine.device}
    rates = clock.rates(machine.device, torch.bfloat16, quick=here.quick)
    what = f"{model}, {'step of training' if training else 'forward'}, {name}, {sum(lengths):,} tokens: every kernel"
    known: Row = {"suite": here.suite, "workload": workload, "what": what, "dtype": "bfloat16", "model": model}
    known |= {"unit": "us", "device": machine.device.type, "pass": BOTH if training else FORWARD}
    rows, refused, last = [], {}, []
    sums = {cache: [0.0] * rounds for cache in CACHES}
    each = chain(((one, [1]) for one in wholes(config, lengths, of, training)), tasks(config, lengths, of, training))
    for task, counts in each:
        passes = (TRAINING, BACKWARD) if training and BACKWARD in task.passes else (FORWARD,)
        for which, count in zip(passes, counts, strict=True):
            part = f"{task.what}, {which}" if len(passes) > 1 else task.what
            right, failed = [(Way("", task.op.reference), EXACT)], {}
            if task.args:
                right, failed = checked(task, [next(task.ways())], which)
            found: dict[str, Measured] = {}
            caches = caches_of(task, which, machine)
            # What has memory of its own is timed once.
            for cache in (caches if task.args else caches[-1:]) if right else ():
                done, more = measured(task, right, which, machine, cache, rounds)
                found.update((cache, replace(one, name=part)) for one in done)
                failed |= more
            if failed:
                refused[part] = ", ".join(failed.values())
            elif task.what == WHOLE:
                last.extend(found.values())
            else:
                warm = found.get(WARM) or found[COLD]
                cold = found.get(COLD) or warm
                for cache, one in ((WARM, warm), (COLD, cold)):
                    sums[cache] = [cost + count * mine for cost, mine in zip(sums[cache], one.costs, strict=True)]
                known_too = {"launches": count, "cold_us": rounded(cold.median, 1e6)}
                known_too |= {"us_of_pass": rounded(count * warm.median, 1e6)}
                # The roofline is that of the memory.
                known_too |= reached(cold.median, rates, *task.work(which))
                known_too |= {} if COLD in found else {"percent_of_roofline": None}
                rows.append(warm.row([], lambda seconds: 1e6 * seconds, **known, **known_too))
    whole = last[0].median if last else None
    lacking = f"without {', '.join(refused)}" if refused else ""
    last += [Measured(f"sum of the kernels, {cache}", lacking, EXACT, costs=costs) for cache, costs in sums.items()]
    for one in last:
        rows.append(one.row(last, lambda seconds: 1e6 * seconds, us_of_pass=rounded(one.median, 1e6), **known))
    for row in rows:
        row["percent_of_pass"] = rounded(row["us_of_pass"], 1e-4 / whole) if whole else None
    return Result(workload, rows, {f"{what}: {name}": reason for name, reason in refused.items()})


def measure(here: Run, names: Sequence[str]) -> Iterator[Result]:
    """Tables of the models. A CPU takes --quick only: those figures are not results."""
    machine = clock.this_machine()
    tokens = (FEW if machine.is_gpu else FEWEST // 4) if here.quick else TOKENS
    sizes = [(min(512, count), max(1, count // 512)) for count in (tokens, *(() if here.quick else SWEEP))]
    equal = {f"{count:,} x {length:,}": (length,) * count for length, count in sizes}
    sets = {"forward": equal, "ragged": ragged(tokens), "step": dict(list(equal.items())[:1])}
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
