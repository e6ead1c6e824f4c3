"""Drift: how far everybody is from float64 in float32, bfloat16 and float16, and what a search feels of it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cpu import int8, int8_retrieval
from benchmarks.gpu_state import identity
from benchmarks.harness import Failed, Result
from benchmarks.models.case import Case, some_places
from benchmarks.models.comparison import RELATIVE, Error, Taken, rms
from benchmarks.models.implementations import (
    EAGER,
    FLASH,
    GRAPHS,
    IMPLEMENTATIONS,
    OURS,
    PACKED_ENCODERS,
    SDPA,
    SENTENCE_TRANSFORMERS,
)
from benchmarks.models.measure import LOADING, Bench, Table, Team, bench
from benchmarks.models.rows import model_row
from benchmarks.models.workers import Worker
from modernbert import ColBERT

DTYPES = ("bfloat16", "float32", "float16")
SETS = {512: "fixed 512", 8192: "fixed 8192"}
TOP = "top-10"
WORKLOADS = {
    **{
        f"{dtype}-{length}": f"hidden states of texts of {length} tokens in {dtype}: relative error, worst cosine"
        for length in SETS
        for dtype in DTYPES
    },
    TOP: "the default model on the demo corpus: how much of float32's top 10 each dtype finds",
}
NAMES = (OURS, GRAPHS, SDPA, FLASH, EAGER, SENTENCE_TRANSFORMERS, PACKED_ENCODERS)
EXACT = 1e-12
"""Errors below it say nothing beyond float64's own."""


def run(*, quick: bool, only: Sequence[str], minutes: float | None = None) -> Iterator[Result]:
    """ModernBERT-base and Ettin-17m on a GPU, Ettin-17m on a CPU. Nobody is refused for an error: it is the figure."""
    with bench("accuracy", quick=quick, minutes=minutes) as here:
        models = ("modernbert-base", "ettin-17m") if here.is_gpu else ("ettin-17m",)
        # A try-out tries one length: the other takes the same way.
        known = [name for name in WORKLOADS if not (here.tries and name.endswith("-8192"))]
        for workload in [name for name in WORKLOADS if name in (only or known)]:
            for model in models[:1] if quick or workload == TOP else models:
                if here.late():
                    yield here.rest(workload)
                    return
                if workload == TOP:
                    yield top_ten(here)
                    continue
                dtype, _, length = workload.rpartition("-")
                names = {name: IMPLEMENTATIONS[name] for name in (NAMES[:4] if quick else NAMES)}
                with here.team(model, dtype, names) as team:
                    yield drift(team, workload, int(length))


def drift(team: Team, workload: str, length: int) -> Result:
    """Two rows for everybody who can run at all."""
    here = team.here
    cut = length // (16 if here.tries else 1)
    count = 8 if here.is_gpu and length == 512 else 2 if length == 512 else 1
    lengths = (cut,) * count
    case = Case(lengths, some_places(lengths, 1 << 20))
    what = f"{team.model}, {team.place.dtype}, {count} texts of {cut} tokens, beside transformers in float64"
    made = Table(workload, what, SETS[length], case, "rms error", "", lambda cost: cost, model_pass=False)
    refused = team.start()
    try:
        exact = team.asked(team.judge("float64"), "answer", timeout=LOADING, case=case)
        plain = team.asked(team.judge(team.place.dtype), "answer", timeout=LOADING, case=case)
    except Failed as reason:
        return Result(workload, [], team.reasons(made, {"every implementation": f"has no reference: {reason}"}))
    done = []
    cosines: dict[str, float] = {}
    for name, one in team.names.items():
        try:
            got, settings = prepared(team, team.worker(name, one), case)
        except Failed as reason:
            refused[name] = str(reason)
            continue
        if got.shape != exact.shape or not bool(got.isfinite().all()):
            refused[name] = f"returns {tuple(got.shape)}, in part no finite numbers"
            continue
        allowed = RELATIVE if team.place.dtype == "float32" else 2 * rms(plain, exact) + torch.finfo(torch.bfloat16).eps
        error = max(EXACT, rms(got, exact))
        done.append(Taken(name, settings, Error(error, allowed), costs=[error]))
        cosines[name] = F.cosine_similarity(got.double(), exact.double(), dim=-1).min().item()
    worst = replace(made, figure="cosine", value=lambda cost: 1 - cost)
    far = [replace(one, costs=[max(EXACT, 1 - cosines[one.name])]) for one in done]
    return Result(workload, team.rows(made, done) + team.rows(worst, far), team.reasons(made, refused))


def prepared(team: Team, worker: Worker, case: Case) -> tuple[Tensor, str]:
    """The answer of the first of its ways, and its settings."""
    file = team.file()
    told = worker.ask("prepare", timeout=LOADING, case=case, file=str(file), window=0.0, seconds=0.0)
    found = torch.load(file, weights_only=True)
    file.unlink()
    return found, told["settings"]


def top_ten(here: Bench) -> Result:
    """Of everything the default model's float32 finds first, what the same model finds in another dtype."""
    one = int8_retrieval.demo(passages=100 if here.quick else 2_000)
    exact = ColBERT.default().to(here.device)
    wanted = int8_retrieval.top_ten(exact, one)
    vectors = exact.encode_documents([*one.documents.values()], progress=False).values
    lengths = tuple(exact.tokenize_documents([*one.documents.values()]).batch.lengths)
    ways: dict[str, ColBERT] = {"float32": exact}
    for dtype in ("bfloat16", "float16"):
        ways[dtype] = copy.deepcopy(exact).to(getattr(torch, dtype))
    if not here.is_gpu:
        ways["int8"] = int8_retrieval.with_encoder(exact, int8.with_int8(exact.encoder))
    rows = []
    what = f"the default model, {len(one.documents):,} passages and {len(one.queries)} queries of the demo corpus"
    for dtype, model in ways.items():
        shares = int8_retrieval.agreement(int8_retrieval.top_ten(model, one), wanted)
        got = model.encode_documents([*one.documents.values()], progress=False).values
        taken = Taken(OURS, f"{dtype}, exact search", Error(rms(got, vectors), 1.0), costs=[sum(shares) / len(shares)])
        made = Table(
            TOP,
            f"{what}, {dtype}: the part of float32's top 10 that is found",
            "demo",
            Case(lengths, ()),
            "recall@10",
            "",
            lambda cost: cost,
            model_pass=False,
        )
        circumstances = (here.suite, "default", dtype, exact.encoder.config, identity(torch.device(here.device)))
        row = model_row(made, taken, [taken], here.rates("float32"), *circumstances)
        rows.append(row | {"tolerance": None})
    return Result(TOP, rows, {})
