"""Our encoder. Every function is a builder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import groups
from benchmarks.models import texts
from benchmarks.models.batches import Batch, cotangent, way
from benchmarks.models.case import Build, Case, Place, Way
from modernbert import Encoder, pack
from modernbert.inference.encode import plan, token_budget
from modernbert.packing import Packed

GRAPH_TOKENS = 16_384
"""The largest batch that is a graph."""


def load(place: Place) -> Encoder:
    return Encoder.from_pretrained(place.folder, dtype=place.torch_dtype, device=place.device).eval()


def packed(place: Place) -> Build:
    """Packed batches. On a GPU they lie there, where the case does not bring them from the host; else packing is timed.

    Ways: all texts at once (or the batches of the protocol), and in parts of the budget that indexing has.
    """
    encoder = load(place)

    def ways(case: Case) -> Iterator[Way]:
        whole = groups(case.lengths, case.batch or len(case.lengths))
        yield packed_way("packed", case, place, encoder, whole)
        budget = token_budget(torch.device(place.device), encoder.config.hidden_size)
        if case.batch is None and place.is_gpu and sum(case.lengths) > budget:
            cut = plan(case.lengths, budget)
            yield packed_way(f"packed, at most {budget:,} tokens at a time", case, place, encoder, cut)

    return ways


def packed_way(settings: str, case: Case, place: Place, encoder: Encoder, groups: Sequence[Sequence[int]]) -> Way:
    lies_there = place.is_gpu and not case.from_host
    batches = []
    for places in groups:
        ids = [texts.ids(one, case.lengths[one]).tolist() for one in places]
        made = cotangent(case, place, places, encoder.config.hidden_size, padded=False)
        batches.append(Batch(list(places), pack(ids).to(place.device) if lies_there else ids, made))

    def from_ids(ids: list[list[int]]) -> Tensor:
        batch = pack(ids)
        return encoder(batch.to(place.device) if place.is_gpu else batch)

    forward: Callable[[Any], Tensor] = encoder if lies_there else from_ids
    note = "" if lies_there else "; packing is timed"
    return way(settings + note, case, encoder, batches, forward)


def graphed(place: Place) -> Build:
    """CUDA graphs over buckets of tokens. They take batches from the host: packing and the copy are timed."""
    encoder = load(place)
    replay = encoder.graphed(max_tokens=GRAPH_TOKENS)  # pyright: ignore

    def ways(case: Case) -> Iterator[Way]:
        groups = [list(range(len(case.lengths)))]
        if sum(case.lengths) > GRAPH_TOKENS:
            groups = plan(case.lengths, GRAPH_TOKENS)
        batches = []
        for places in groups:
            ids = [texts.ids(one, case.lengths[one]).tolist() for one in places]
            batches.append(Batch(places, ids if case.from_host else pack(ids)))

        def forward(batch: Packed | list[list[int]]) -> Tensor:
            hidden = replay(batch if isinstance(batch, Packed) else pack(batch))
            # The next replay overwrites it: who keeps more than one batch has to copy.
            return hidden if len(groups) == 1 else hidden.clone()

        most = f", at most {GRAPH_TOKENS:,} tokens at a time" if len(groups) > 1 else ""
        yield way(f"packed, CUDA graphs{most}", case, encoder, batches, forward)

    return ways
