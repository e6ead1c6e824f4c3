"""One model, one Session, one tokenizer and one Store serve many threads with the numbers of one; forks are noticed."""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from stores import corpus, write_corpus
from torch import Tensor

from modernbert import ColBERT, Session, pack
from modernbert.encoder import Encoder
from modernbert.heads.colbert import ColBERTConfig
from modernbert.inference.callers import check_process, map_callers
from modernbert.retrieval import Store, index
from modernbert.tokenizer import Tokenizer

BACKBONE = Path(__file__).parents[1] / "fixtures" / "colbert" / "backbone"
TEXTS = [" ".join(["a text about glaciers,", "cells", "and wars"][: 1 + n % 3] * (1 + n % 7)) for n in range(40)]


def make() -> ColBERT:
    torch.manual_seed(0)
    encoder, tokenizer = Encoder.from_pretrained(BACKBONE), Tokenizer.from_pretrained(BACKBONE)
    return ColBERT.from_encoder(encoder, tokenizer, dim=24, config=ColBERTConfig(document_length=40)).eval()


def test_eight_threads_with_mixed_calls_get_the_numbers_of_one(tmp_path: Path) -> None:
    """In training mode with dropout, so that a mode which a call changes would be seen by the others."""
    write_corpus(tmp_path / "corpus.jsonl", corpus(30))
    colbert = make()
    index([tmp_path / "corpus.jsonl"], tmp_path / "store", colbert)
    store = Store(tmp_path / "store", colbert)
    for layer in colbert.encoder.layers:
        layer.mlp.dropout_p = layer.attn.dropout_p = 0.5  # pyright: ignore
    colbert.train()
    session = Session(colbert)
    batch = pack([[5] * length for length in (3, 70, 300)])
    calls: list[Callable[[], Tensor]] = [
        lambda: colbert.encode_documents(TEXTS).values,
        lambda: colbert.encode_queries(TEXTS[:1]).values,
        lambda: session.encode_queries(TEXTS[:1]).values,
        lambda: session.encode_documents(TEXTS, batch_tokens=200).values,
        lambda: torch.cat(list(session.stream_documents(TEXTS[:9]))),
        lambda: session(batch),
        lambda: colbert.tokenizer(TEXTS).input_ids,
        lambda: colbert.encode_documents(TEXTS[5:8], pool_factor=2).values,
        lambda: torch.tensor([hit.score for hit in store.search(["ice and storm"], top_k=5)[0]]),
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        wanted = [call() for call in calls]
        wrong: list[tuple[int, float]] = []
        start = threading.Barrier(8)

        def work(seed: int) -> None:
            start.wait()
            order = list(range(len(calls)))
            random.Random(seed).shuffle(order)
            for index in order:
                difference = (calls[index]().float() - wanted[index].float()).abs().max().item()
                if not difference < 1e-5:
                    wrong.append((index, difference))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
    finally:
        torch.set_num_threads(before)
        store.close()
    assert not wrong
    assert all(module.training for module in colbert.modules())


def test_a_thread_that_starts_while_others_encode_has_all_threads() -> None:
    """The callers' own number is PyTorch's for threads that start later, unless it is set back at once."""
    before, begun, go_on = torch.get_num_threads(), threading.Barrier(3), threading.Event()

    def call(item: int) -> int:
        begun.wait(30)
        go_on.wait(30)
        return torch.get_num_threads()

    def threads_of_a_new_thread() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1) as pool:
            encoding = pool.submit(lambda: list(map_callers(call, [1, 2], 2)))
            begun.wait(30)
            try:
                assert threads_of_a_new_thread() == 2
            finally:
                go_on.set()
            assert encoding.result() == [1, 1]
    finally:
        torch.set_num_threads(before)


def in_a_fork(work: Callable[[], object]) -> str:
    """What the work raises in a forked process, or "done"; a process that hangs is an error."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if pid == 0:
        try:
            work()
            sender.send("done")
        except BaseException as error:
            sender.send(f"{type(error).__name__}: {error}")
        finally:
            os._exit(0)
    try:
        assert receiver.poll(60), "the forked process hangs"
        return receiver.recv()
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_that_would_hang_is_an_error() -> None:
    colbert, before = make(), torch.get_num_threads()
    session = Session(colbert)

    def with_one_thread() -> None:
        torch.set_num_threads(1)
        colbert.encode_documents(TEXTS)

    def in_a_new_thread() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(check_process).result()

    def parent() -> None:
        """In a thread of its own: what a thread has done is remembered."""
        torch.get_num_threads()
        torch.set_num_threads(2)
        assert in_a_fork(check_process) == "done", "nothing was encoded before"
        colbert.encode_documents(TEXTS)
        calls: list[Callable[[], object]] = [
            lambda: colbert.encode_documents(TEXTS),
            lambda: colbert.encode_queries(TEXTS[:1]),
            lambda: colbert.stream_documents(TEXTS),
            lambda: session.encode_queries(TEXTS[:1]),
            lambda: session(pack([[5] * 300])),
        ]
        for call in calls:
            assert in_a_fork(call).startswith("RuntimeError: this process was forked after a model had encoded")
        assert in_a_fork(with_one_thread) == "done"
        assert in_a_fork(in_a_new_thread) == "done"
        colbert.encode_documents(TEXTS)  # the parent goes on

    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(parent).result()
    finally:
        torch.set_num_threads(before)


# As gunicorn with --preload does. In a process of its own, in which no thread has used OpenMP before.
PRELOADED = """
import os, signal, sys, torch
from modernbert import ColBERT, Session

torch.set_num_threads(2)
model, session = ColBERT.default(), None
texts = ["hello there, " * (number % 20 + 1) for number in range(64)]
if sys.argv[1] != "model":
    session = Session(model, engine=None if sys.argv[1] == "session" else sys.argv[1])
process = os.fork()
if process:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
signal.alarm(60)
if sys.argv[2] == "one":
    torch.set_num_threads(1)
try:
    (session or model).encode_documents(texts)
    print("done")
except RuntimeError as error:
    print(error)
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    ("made", "threads", "answer"),
    [
        ("model", "two", "done"),
        ("session", "two", "a Session was made"),
        ("onnxruntime", "one", "done"),
        ("openvino", "one", "OpenVINO does not survive a fork"),
    ],
)
def test_a_model_may_be_loaded_before_a_fork(made: str, threads: str, answer: str) -> None:
    """Loading took OpenMP's threads, so that each worker of a server that had loaded the model hung."""
    if made in ("onnxruntime", "openvino"):
        pytest.importorskip(made)
    command = [sys.executable, "-W", "ignore", "-c", PRELOADED, made, threads]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)
    assert done.returncode == 0, f"the forked process hangs, or {done.stderr}"
    assert answer in done.stdout


DROPPED = """
import gc, signal, sys, threading
from modernbert import ColBERT, Session

def use():
    sessions.append(Session(model, engine=sys.argv[1]))
    sessions[-1].encode_queries(["hello there"])

def drop():
    sessions.clear()
    gc.collect()

model, sessions = ColBERT.default(), []
for work, thread in ((use, sys.argv[2]), (drop, sys.argv[3])):
    if thread == "main":
        work()
    else:
        other = threading.Thread(target=work)
        other.start()
        other.join()
signal.signal(signal.SIGTERM, lambda *_: print("handled"))
signal.raise_signal(signal.SIGTERM)
"""


@pytest.mark.parametrize(("made", "dropped"), [("main", "other"), ("other", "main"), ("main", "main")])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_signals_are_handled_after_a_session_ends_in_another_thread(engine: str, made: str, dropped: str) -> None:
    """OpenVINO frees the stack of signal handlers in the thread in which its core is deleted."""
    pytest.importorskip(engine)
    command = [sys.executable, "-W", "ignore", "-c", DROPPED, engine, made, dropped]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_one_thread_may_fork() -> None:
    assert torch.get_num_threads() == 1
    colbert = make()
    colbert.encode_documents(TEXTS)
    assert in_a_fork(lambda: colbert.encode_documents(TEXTS)) == "done"
