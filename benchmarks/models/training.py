"""Training: forward and backward of the encoder, with AdamW, with the loss of masked tokens and of late interaction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import model_work
from benchmarks.harness import Result
from benchmarks.models import texts
from benchmarks.models.case import Case
from benchmarks.models.implementations import (
    EAGER,
    FLASH,
    FLASH_COMPILED,
    IMPLEMENTATIONS,
    OURS,
    SDPA,
    SDPA_COMPILED,
    Implementation,
)
from benchmarks.models.measure import Bench, Table, bench

BACKWARD, ADAMW = "forward + backward", "forward + backward + AdamW"
WORKLOADS = {
    "encoder": "tokens per second forward and backward, texts of 512 tokens, weights and activations in one dtype",
    "adamw": "forward, backward and AdamW, float32 weights under bfloat16 autocast",
    "masked-lm": "forward and backward with the loss of 30 % masked tokens over the whole vocabulary",
    "contrastive": "forward and backward of a late-interaction batch: every query against every document by MaxSim",
}
MODELS = ("modernbert-base", "ettin-17m")
TOKENS = 16_384
"""Of a call on a GPU."""

PAIRS, QUERY, DOCUMENT = 64, 32, 180
SHARE = 0.45
"""Of the matrix product's rate, that we mean to reach with ModernBERT-base on an H200."""

_LEARNING = "benchmarks.models.learning"


def learning(function: str, who: str) -> Implementation:
    template = IMPLEMENTATIONS[{"ours": OURS, "sdpa": SDPA, "flash": FLASH}[who]]
    return Implementation(f"{_LEARNING}:{function}", template.applies, template.package, {"who": who})


def those(function: str) -> dict[str, Implementation]:
    return {name: learning(function, who) for name, who in ((OURS, "ours"), (SDPA, "sdpa"), (FLASH, "flash"))}


NAMES: dict[str, dict[str, Implementation]] = {
    "encoder": {name: IMPLEMENTATIONS[name] for name in (OURS, SDPA, FLASH, SDPA_COMPILED, FLASH_COMPILED, EAGER)},
    "adamw": those("encoder"),
    "masked-lm": those("masked_lm"),
    "contrastive": those("contrastive"),
}


def run(*, quick: bool, only: Sequence[str], minutes: float | None = None) -> Iterator[Result]:
    """ModernBERT-base and Ettin-17m in bfloat16 on a GPU, Ettin-17m in float32 on a CPU."""
    with bench("training", quick=quick, minutes=minutes) as here:
        dtype = "bfloat16" if here.is_gpu else "float32"
        for model in MODELS if here.is_gpu else MODELS[1:]:
            for workload in [name for name in WORKLOADS if not only or name in only]:
                if here.late():
                    yield here.rest(workload)
                    return
                names = NAMES[workload]
                if quick:
                    names = {name: names[name] for name in (OURS, SDPA, FLASH)}
                known: dict[str, Any] = {}
                if workload in ("masked-lm", "contrastive"):
                    known["reference"] = names[SDPA]
                with here.team(model, dtype, names, **known) as team:
                    yield team.measure(table(here, model, dtype, workload))


def table(here: Bench, model: str, dtype: str, workload: str) -> Table:
    lengths, name = sizes(here, workload)
    case = Case(lengths, (), backward=True, options={"optimizer": True} if workload == "adamw" else {})
    texts_in_words = f"{len(lengths)} texts of {lengths[-1]} tokens"
    pairs = f"{len(lengths) // 2} queries of {lengths[0]} tokens against as many documents of at most {max(lengths)}"
    what = {
        "encoder": f"{model}, {dtype}, {texts_in_words}, forward and backward",
        "adamw": f"{model}, float32 weights, passes in {dtype}, {texts_in_words}, with AdamW",
        "masked-lm": f"{model}, {dtype}, {texts_in_words}, loss of 30 % masked tokens",
        "contrastive": f"{model}, {dtype}, {pairs}, contrastive loss",
    }[workload]
    return Table(
        workload,
        what,
        name,
        case,
        model_pass=workload in ("encoder", "adamw"),  # heads and losses are no part of the roofline
        passes=ADAMW if workload == "adamw" else BACKWARD,
        goal=goal(here, model, dtype, lengths) if workload == "encoder" else {},
    )


def sizes(here: Bench, workload: str) -> tuple[tuple[int, ...], str]:
    """The lengths of a call, and the name of their set."""
    if workload == "contrastive":
        pairs = PAIRS if here.is_gpu else 3 if here.quick else 8
        # Half a text each: queries first, then documents of varied lengths, cut as ColBERT cuts them.
        documents = tuple(min(DOCUMENT, one) for one in texts.in_set("variable short", pairs))
        return (QUERY,) * pairs + tuple(one // 4 if here.tries else one for one in documents), "pairs"
    length = 64 if here.tries else 512
    count = TOKENS // length if here.is_gpu else 2 if here.quick else 8
    return (length,) * count, f"fixed {length}"


def goal(here: Bench, model: str, dtype: str, lengths: Sequence[int]) -> dict[str, float | None]:
    """The tokens per second that are `SHARE` of the matrix product's rate."""
    if not here.is_gpu or model != MODELS[0]:
        return {}
    operations = model_work.flops(here.config(model), lengths, backward=True) / sum(lengths)
    return {OURS: SHARE * here.rates(dtype).matmul / operations}
