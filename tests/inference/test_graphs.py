"""A batch in a graph's bucket gives the rows that it has alone.

Without a GPU a stand-in takes the place of the graph: it runs the captured function again on the same memory, which is
all that a replay does. Captures of real graphs are marked `gpu`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hf_twin import TINY, random_ids, twins
from torch import Tensor, nn

from modernbert import ColBERT, Encoder, Packed, Session, pack
from modernbert.inference import graphs
from modernbert.inference.graphs import LONG, Bucket, Graphs, bucket_sizes, fill

MIXES = {
    "one query": [7],
    "a full bucket": [16, 16],
    "a full bucket, all places taken": [8, 8, 8, 8],
    "ragged": [5, 70, 3, 129, 1],
    "many short": [1] * 40,
    "with an empty one": [0, 9, 0],
    "nothing": [],
}


def stand_in(captures: list[Any]) -> Callable[[Callable[[], Tensor]], tuple[Callable[[], Any], Tensor]]:
    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        output = run().clone()
        captures.append(output)
        return lambda: output.copy_(run()), output

    return capture


@pytest.fixture
def encoder() -> Encoder:
    return twins(TINY)[1].eval()


def replays(model: nn.Module, captures: list[Any] | None = None) -> Graphs:
    return Graphs(model, torch.device("cpu"), capture=stand_in([] if captures is None else captures))


@torch.no_grad()
def replay(made: Graphs, batch: Packed, rows: Tensor | None = None) -> Tensor:
    bucket = made.bucket(batch)
    assert bucket is not None
    return made.replay(bucket, batch, rows)


def batch_of(lengths: list[int]) -> Packed:
    return pack(random_ids(lengths, TINY.vocab_size))


def expanded(lengths: list[int]) -> Packed:
    """Half of every sequence are query-only rows."""
    ids = torch.tensor(random_ids([max(lengths)] * len(lengths), TINY.vocab_size))
    place, length = torch.arange(max(lengths)), torch.tensor(lengths)[:, None]
    keys = place < (length + 1) // 2
    return pack(ids, keys, query_mask=(place < length) & ~keys)


@pytest.mark.parametrize("name", MIXES)
def test_a_graph_gives_the_rows_of_the_batch_alone(encoder: Encoder, name: str) -> None:
    made = replays(encoder)
    # What another batch left in the bucket must not be seen.
    replay(made, batch_of([4, 17, 9]))
    batch = batch_of(MIXES[name])
    with torch.no_grad():
        wanted = encoder(batch)
    got = replay(made, batch)
    assert got.shape == wanted.shape
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
    rows = torch.arange(0, batch.num_tokens, 3)
    torch.testing.assert_close(replay(made, batch, rows), wanted[rows], rtol=0, atol=2e-5)


def test_query_rows_have_graphs_of_their_own(encoder: Encoder) -> None:
    made = replays(encoder)
    for lengths in ([5, 30, 80], [9], [64, 2]):
        batch = expanded(lengths)
        with torch.no_grad():
            wanted = encoder(batch)
        torch.testing.assert_close(replay(made, batch), wanted, rtol=0, atol=2e-5)
    assert replay(made, batch_of([9])).shape == (9, TINY.hidden_size)
    assert {bucket.keys for bucket in made._graphs} == {True, False}


def test_a_bucket_is_captured_once(encoder: Encoder) -> None:
    captures: list[Any] = []
    made = replays(encoder, captures)
    for length in (3, 20, 32):
        replay(made, batch_of([length]))
    assert len(captures) == 1
    replay(made, batch_of([33]))
    assert len(captures) == 2


def test_the_result_is_the_callers(encoder: Encoder) -> None:
    """The next replay overwrites the memory of the graph, not what was returned before."""
    made = replays(encoder)
    first = replay(made, batch_of([20]))
    kept = first.clone()
    replay(made, batch_of([21]))
    assert torch.equal(first, kept)


def test_a_graph_made_in_inference_mode_serves_outside_of_it(encoder: Encoder) -> None:
    made = replays(encoder)
    with torch.inference_mode():
        wanted = replay(made, batch_of([9])).clone()
    got = replay(made, batch_of([9]))
    assert not got.is_inference()
    assert not got.requires_grad
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_a_bucket_longer_than_the_model_does_not_warn() -> None:
    encoder = twins(replace(TINY, max_position_embeddings=1100))[1].eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert replay(replays(encoder), batch_of([1099])).shape[0] == 1099


def test_threads_take_turns(encoder: Encoder) -> None:
    made, batches = replays(encoder), [batch_of([length, 3]) for length in (5, 9, 12, 20)] * 4
    wanted = [replay(made, batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for got, exact in zip(pool.map(lambda batch: replay(made, batch), batches), wanted, strict=True):
            assert torch.equal(got, exact)


def test_bucket_sizes() -> None:
    sizes = bucket_sizes(1000)
    assert sizes[:9] == [32, 40, 48, 56, 64, 80, 96, 112, 128]
    assert sizes[-2:] == [896, 1000]
    assert bucket_sizes(64)[-2:] == [56, 64]
    for smaller, larger in pairwise(sizes):
        assert smaller < larger <= 1.25 * smaller


def test_a_bucket_has_room_for_tokens_and_texts_and_knows_long_ones(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MAX_TOKENS", 8192)
    made = replays(encoder)
    assert made.bucket(batch_of([32])) == Bucket(32, 32, False)
    assert made.bucket(batch_of([8] * 4)) == Bucket(32, 32, False)
    assert made.bucket(batch_of([1] * 4)) == Bucket(40, 40, False)  # what is left over needs a place
    assert made.bucket(batch_of([500] * 4)) == Bucket(2048, LONG, False)
    assert made.bucket(batch_of([LONG, LONG])) == Bucket(2048, LONG, False)
    assert made.bucket(batch_of([LONG + 1, 5000])) == Bucket(6144, 6144, False)
    assert made.bucket(batch_of([LONG + 1] * 5)) == Bucket(6144, 2048, False)
    assert made.bucket(batch_of([8193])) is None
    # One free place of 5,120 // 8 would have to take 3,203 tokens.
    assert made.bucket(batch_of([3] * 639)) == Bucket(6144, LONG, False)


@pytest.mark.parametrize("lengths", [[], [3], [10, 20], [32], [1, 1, 1], [0, 5, 0]])
def test_what_is_left_over_is_one_sequence(lengths: list[int]) -> None:
    """It was spread over all free places, which every program of attention had to walk."""
    bucket = Bucket(32, 32, False)
    host = torch.full((sum(bucket.sizes),), 7, dtype=torch.int32)
    fill(host, batch_of(lengths), bucket)
    cu_seqlens = host.split(bucket.sizes)[2]
    assert cu_seqlens[: len(lengths) + 1].tolist() == batch_of(lengths).cu_seqlens.tolist()
    fillers = cu_seqlens[len(lengths) :].diff().tolist()
    assert fillers[:1] in ([], [32 - sum(lengths)])
    assert not any(fillers[1:])


def test_what_is_left_over_is_no_longer_than_the_longest() -> None:
    bucket = Bucket(80, 30, False)
    host = torch.zeros(sum(bucket.sizes), dtype=torch.int32)
    fill(host, batch_of([5]), bucket)
    assert host.split(bucket.sizes)[2].diff().tolist() == [5, 30, 30, 15, 0, 0, 0, 0, 0, 0]


def test_what_fills_up_sees_itself_alone() -> None:
    """Key lengths that an earlier batch left there would reach beyond the last token."""
    bucket = Bucket(32, 32, True)
    host = torch.full((sum(bucket.sizes),), 30, dtype=torch.int32)
    batch = expanded([9, 4])
    fill(host, batch, bucket)
    _, _, cu_seqlens, key_lengths, _ = host.split(bucket.sizes)
    assert key_lengths[:2].tolist() == batch.key_lengths.tolist()
    assert key_lengths[2:].tolist() == cu_seqlens.diff()[2:].tolist()


@pytest.mark.parametrize(("tokens", "longest"), [(16_384, 2048), (16_384, 8192), (6144, 6144), (2048, 2048)])
def test_places_of_long_sequences_are_few(tokens: int, longest: int) -> None:
    """FlashAttention starts programs for the longest sequence in each: 2,048 places were 393,216 a layer."""
    bucket = Bucket(tokens, longest, False)
    assert bucket.places * longest <= 2 * tokens + graphs.SPARE_PLACES * longest
    assert bucket.places >= tokens // (longest // 2 + 1), "a full bucket of the shortest that belong here"
    assert Bucket(tokens, LONG, False).places == tokens // 8


class Machine:
    """Stand-ins for the streams, events and graphs of torch, and for its allocator, which counts tokens.

    As in PyTorch, a block belongs to the stream on which it was made, and a free one may be cut.
    """

    def __init__(self) -> None:
        self.stream, self.capturing, self.log = "default", False, []
        self.free: dict[object, list[int]] = {}
        self.reserved = 0

    def allocate(self, size: int) -> None:
        """What a captured forward pass makes and frees again."""
        if not self.capturing:
            return
        free = self.free.setdefault(self.stream, [])
        if not any(block >= size for block in free):
            self.reserved += size
            free.append(size)

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        machine = self

        class Stream:
            device = torch.device("cuda", 0)

            def __init__(self, device: object = None) -> None: ...
            def wait_stream(self, other: object) -> None: ...

        class Event:
            def record(self) -> None:
                machine.log.append(("record", self, machine.stream))

            def wait(self) -> None:
                machine.log.append(("wait", self, machine.stream))

            def synchronize(self) -> None: ...

        class CUDAGraph:
            def replay(self) -> None:
                machine.log.append(("replay", None, machine.stream))

        @contextmanager
        def on(stream: object) -> Iterator[None]:
            before, machine.stream = machine.stream, stream
            yield
            machine.stream = before

        @contextmanager
        def graph(_: object, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
            machine.capturing = True
            with on(stream):
                yield
            machine.capturing = False

        parts = {
            "Stream": Stream,
            "CUDAGraph": CUDAGraph,
            "graph": graph,
            "stream": on,
            "device": lambda _: nullcontext(),
        }
        parts |= {"graph_pool_handle": lambda: "pool", "current_stream": Stream}
        for name, part in parts.items():
            monkeypatch.setattr(torch.cuda, name, part)
        monkeypatch.setattr(graphs, "NoEvent", Event)


@pytest.mark.parametrize("order", [(256, 128), (128, 256), (40, 80, 160, 256)])
def test_memory_is_that_of_the_largest_bucket(order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each capture had a stream of its own, to which the allocator gives no block of another one."""
    machine = Machine()
    machine.patch(monkeypatch)
    monkeypatch.setattr(graphs, "MAX_TOKENS", 256)

    class Model(nn.Module):
        def forward(self, batch: Packed) -> Tensor:
            machine.allocate(batch.num_tokens)
            return torch.zeros(batch.num_tokens, 3)

    made = Graphs(Model(), torch.device("cpu"), capture=graphs.capture_on(torch.device("cuda")))
    made._largest_first = True  # as on a GPU
    for length in order:
        replay(made, batch_of([length]))
    assert machine.reserved == 256
    assert len(machine.free) == 1, "one stream"


def test_a_replay_waits_for_the_one_before_it_on_any_stream(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays on two streams raced for the inputs and for the memory of the pool."""
    machine = Machine()
    machine.patch(monkeypatch)
    made = replays(encoder)
    for stream in ("first", "second"):
        machine.stream = stream
        replay(made, batch_of([20]))
    events = [event for event in machine.log if event[1] is made._replayed]
    assert [(kind, stream) for kind, _, stream in events] == [
        ("wait", "first"), ("record", "first"), ("wait", "second"), ("record", "second"),
    ]  # fmt: skip
    assert machine.log[-1] == events[-1], "after the result is copied"


@pytest.mark.parametrize("count", [1, 9, 20])
def test_rows_come_with_the_inputs(encoder: Encoder, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of rows in pageable memory behind the replay waited for it: nothing else is moved to the GPU."""
    made, batch, rows = replays(encoder), batch_of([20]), torch.arange(count)
    wanted = replay(made, batch, rows)
    moved: list[Any] = []
    monkeypatch.setattr(Tensor, "to", lambda self, *args, **options: moved.append(args) or self)
    bucket = made.bucket(batch)
    assert bucket is not None
    with torch.no_grad():
        graph = made._graphs[bucket]
        monkeypatch.setattr(graph, "replay", lambda: None)
        assert torch.equal(made.replay(bucket, batch, rows), wanted)
    assert not moved


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", MIXES)
def test_a_session_on_a_gpu_gives_the_rows_of_the_batch_alone(encoder: Encoder, name: str) -> None:
    encoder.to("cuda")
    session = Session(encoder)
    for lengths in ([4, 17, 9], MIXES[name], [200, 3], [9000, 9000], MIXES[name]):
        batch = batch_of(lengths)
        with torch.no_grad():
            wanted = encoder(batch.to("cuda"))
        torch.testing.assert_close(session(batch), wanted, rtol=0, atol=2e-4)


@pytest.mark.gpu
def test_a_gpu_encodes_texts_as_a_cpu_does() -> None:
    """Pinned copies, results fetched one batch later, a thread that tokenises, graphs for what fits."""
    texts = [f"text {n} " + "of some more words, " * (n % 40) for n in range(1500)]
    model = ColBERT.default()
    wanted = model.encode_documents(texts)
    model.to("cuda")
    session = Session(model)
    plain = model.encode_documents(texts, batch_tokens=4000)
    for got in (plain, session.encode_documents(texts, batch_tokens=4000), session.encode_documents(texts)):
        assert torch.equal(got.offsets, wanted.offsets)
        torch.testing.assert_close(got.values, wanted.values, rtol=0, atol=1e-3)


@pytest.mark.gpu
def test_graphs_share_their_memory_on_a_gpu(encoder: Encoder) -> None:
    made = Graphs(encoder.to("cuda"), torch.device("cuda"))
    replay(made, batch_of([32]))
    before = torch.cuda.memory_reserved()
    for size in (4096, 1024, 10_000):
        replay(made, batch_of([32] * (size // 32)))
    # Their inputs and outputs are their own; of the rest, nothing is new.
    assert torch.cuda.memory_reserved() - before < 32 << 20
