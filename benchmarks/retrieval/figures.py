"""What makes one figure of what a search returned: percentiles, recall, and whether the scores are right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.retrieval.synthetic import model
from modernbert.retrieval import Store

Found = Sequence[Sequence[tuple[int, float]]]
"""What each query found, best first: pairs of the key of a passage and its score."""


def percentiles(passes: Sequence[dict[str, Any]], percent: float) -> list[float]:
    """Of each pass the percentile of its queries, in ms."""
    return [1000 * float(np.percentile(one["seconds"], percent)) for one in passes]


def recall(exact: Found, found: Found) -> float:
    """The mean share of what exact search finds for a query that was found."""
    shares = []
    for wanted, got in zip(exact, found, strict=True):
        keys = {key for key, _ in wanted}
        shares.append(len(keys & {key for key, _ in got}) / len(keys))
    return sum(shares) / len(shares)


def score_difference(exact: Found, found: Found) -> float:
    """The largest difference between the scores of passages that both have found."""
    largest = 0.0
    for wanted, got in zip(exact, found, strict=True):
        scores = dict(wanted)
        largest = max([largest, *(abs(scores[key] - score) for key, score in got if key in scores)])
    return largest


def float64_difference(folder: Path, width: int | None, queries: Sequence[str], found: Found) -> float:
    """The largest difference between the scores found and the best of the whole store, computed in float64."""
    with Store(folder, model(width)) as store:
        asked = [query_QE.double() for query_QE in store.colbert.encode_queries(queries)]
        best = [torch.empty(0, dtype=torch.float64)] * len(asked)
        for _, _, vectors in store.batches():
            values_NE, lengths = vectors.values.double(), vectors.offsets.diff()
            for i, query_QE in enumerate(asked):
                most = torch.segment_reduce(values_NE @ query_QE.T, "max", lengths=lengths)
                scores = torch.cat([best[i], most.sum(1)])
                best[i] = scores.topk(min(len(found[i]), len(scores))).values
    scores = torch.tensor([[score for _, score in hits] for hits in found], dtype=torch.float64)
    return (scores - torch.stack(best)).abs().max().item()
