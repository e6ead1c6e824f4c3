"""Late interaction: documents and queries a second to unit vectors, from ids and from text, and pairs a second."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.harness import Result
from benchmarks.models import texts
from benchmarks.models.case import Case, some_places
from benchmarks.models.implementations import (
    FLASH,
    GRAPHS,
    IMPLEMENTATIONS,
    OURS,
    SDPA,
    SENTENCE_TRANSFORMERS,
    Implementation,
)
from benchmarks.models.measure import Bench, Table, bench

WORKLOADS = {
    "documents-128": "documents of at most 180 tokens a second, ids to unit vectors of width 128",
    "queries-128": "one query of 32 tokens at a time, ids to unit vectors of width 128",
    "maxsim-128": "pairs of a query of 32 vectors and a document of 16 to 300 a second, width 128",
    "documents-48": "as documents-128, width 48",
    "maxsim-48": "as maxsim-128, width 48",
    "from-text": "passages of the demo corpus a second, text to vectors of width 128 on the CPU, tokenising timed",
}
PYLATE = "PyLate"
PADDED, COMPILED = "padded einsum, as PyLate", "padded einsum, compiled"
_LATE = "benchmarks.models.late_interaction"


def vectors(who: str, width: int, like: str) -> Implementation:
    template = IMPLEMENTATIONS[like]
    return Implementation(f"{_LATE}:vectors", template.applies, template.package, {"who": who, "width": width})


def names(workload: str) -> tuple[dict[str, Implementation], Implementation]:
    """Who takes part, and the reference."""
    kind, _, width_in_words = workload.rpartition("-")
    if workload == "from-text":
        with_text = {
            OURS: Implementation(f"{_LATE}:from_text", options={"who": "ours"}),
            SENTENCE_TRANSFORMERS: Implementation(
                f"{_LATE}:from_text", package="sentence_transformers", options={"who": "theirs"}
            ),
        }
        return with_text, with_text[SENTENCE_TRANSFORMERS]
    width = int(width_in_words)
    if kind == "maxsim":
        who = {OURS: "ours", PADDED: "einsum", COMPILED: "compiled"}
        made = {
            name: Implementation(f"{_LATE}:maxsim", options={"who": one, "width": width}, slow=name == COMPILED)
            for name, one in who.items()
        }
        return made, Implementation(f"{_LATE}:maxsim", options={"who": "reference", "width": width})
    made = {
        OURS: vectors("ours", width, OURS),
        GRAPHS: vectors("graphs", width, GRAPHS),
        SDPA: vectors("sdpa", width, SDPA),
        FLASH: vectors("flash", width, FLASH),
        SENTENCE_TRANSFORMERS: Implementation(
            f"{_LATE}:sentence_transformers", package="sentence_transformers", options={"width": width}
        ),
        PYLATE: Implementation(f"{_LATE}:pylate", package="pylate", options={"width": width}),
    }
    if kind == "documents":
        del made[GRAPHS]
    return made, vectors("alone", width, SDPA)


def run(*, quick: bool, only: Sequence[str], minutes: float | None = None) -> Iterator[Result]:
    """Ettin-17m and ModernBERT-base in bfloat16 on a GPU, Ettin-17m in float32 on a CPU."""
    with bench("colbert", quick=quick, minutes=minutes) as here:
        dtype = "bfloat16" if here.is_gpu else "float32"
        # A try-out tries one width: the other takes the same way.
        known = [name for name in WORKLOADS if not (here.tries and name.endswith("-48"))]
        for workload in [name for name in WORKLOADS if name in (only or known)]:
            encodes = workload.startswith(("documents", "queries"))
            for model in ("ettin-17m", "modernbert-base") if here.is_gpu and encodes and not quick else ("ettin-17m",):
                if here.late():
                    yield here.rest(workload)
                    return
                those, reference = names(workload)
                with here.team(model, dtype, those, reference=reference) as team:
                    yield team.measure(table(here, model, workload))


def table(here: Bench, model: str, workload: str) -> Table:
    kind, _, width = workload.rpartition("-")
    if kind == "maxsim":
        queries, count = (32, 1000) if here.is_gpu else (2, 50) if here.quick else (4, 1000)
        documents = texts.variable(count, mean=181, spread=64, longest=300)
        case = Case((32,) * queries + documents, (), options={"queries": queries})
        what = f"MaxSim, {queries} queries of 32 x {count:,} documents ({sum(documents):,} tokens), width {width}"
        pairs = queries * count
        return Table(workload, what, "pairs", case, "pairs", "pairs/s", lambda cost: pairs / cost, model_pass=False)
    if kind == "queries":
        lengths = (32,)
        what = f"{model}, one query of 32 tokens, ids on the host to vectors of width {width}"
        case = Case(lengths, (0,), from_host=True)
        return Table(workload, what, "fixed 32", case, "queries", "queries/s", lambda cost: 1 / cost)
    count = 1024 if here.is_gpu else 4 if here.quick else 32
    lengths = tuple(min(180, one) for one in texts.in_set("variable short", count))
    case = Case(lengths, some_places(lengths, here.checked))
    if workload == "from-text":
        # Only their number counts: the texts have lengths of their own.
        what = f"{model}, {count:,} passages of the demo corpus, text to vectors of width 128"
        return Table(
            workload, what, "demo", case, "documents", "documents/s", lambda cost: count / cost, model_pass=False
        )
    what = f"{model}, {count:,} documents of at most 180 tokens, ids to vectors of width {width}"
    return Table(workload, what, "documents", case, "documents", "documents/s", lambda cost: count / cost)
