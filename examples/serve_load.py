"""Load on loopback: `modernbert serve` against sentence-transformers behind the same framework (FastAPI and uvicorn).

    python examples/serve_load.py [REQUESTS] [CLIENTS] [EMBEDDER]

Each client sends one text after another, and every answer is compared with the model's own `encode`. The servers are
ours, `SentenceTransformer.encode` for each request, and the same for whatever came within 5 ms. Then ours has more
clients than places, and one request in ten is broken off: the others must still get their own answer. Without EMBEDDER
the model is the mean of the built-in model's tokens. With 400 requests it takes a minute or two on two cores.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import httpx
import numpy as np
import uvicorn
from fastapi import FastAPI

from modernbert import ColBERT, Embedder

PLACES, OVERLOAD, SECONDS, TOLERANCE = 32, 160, 120.0, 1e-5


def our_app(folder: str) -> FastAPI:
    from modernbert.serving.app import create_app
    from modernbert.serving.gate import Limits
    from modernbert.serving.start import serve_models

    return create_app(serve_models([folder])[0], limits=Limits(requests=PLACES))


def answer_of(vector: np.ndarray) -> dict[str, object]:
    return {"data": [{"embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode()}]}


def app_for_each_request(folder: str) -> FastAPI:
    from sentence_transformers import SentenceTransformer

    app, model = FastAPI(), SentenceTransformer(folder, device="cpu")

    @app.post("/v1/embeddings")
    def embeddings(body: dict) -> dict[str, object]:  # in a thread of the framework
        return answer_of(model.encode([body["input"]])[0])

    return app


def app_with_batches(folder: str) -> FastAPI:
    from sentence_transformers import SentenceTransformer

    app, model = FastAPI(), SentenceTransformer(folder, device="cpu")
    waiting: list[tuple[str, asyncio.Future[np.ndarray]]] = []
    lock = asyncio.Lock()

    @app.post("/v1/embeddings")
    async def embeddings(body: dict) -> dict[str, object]:
        future: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        waiting.append((body["input"], future))
        await asyncio.sleep(0.005)
        async with lock:
            batch, waiting[:] = waiting[:32], waiting[32:]
            if batch:
                vectors = await asyncio.to_thread(model.encode, [text for text, _ in batch])
                for (_, each), vector in zip(batch, vectors, strict=True):
                    each.set_result(vector)
        return answer_of(await future)

    return app


APPS = {
    "modernbert serve": our_app,
    "sentence-transformers, each request": app_for_each_request,
    "sentence-transformers, batches": app_with_batches,
}


@contextmanager
def server(name: str, folder: str):
    """The address of a server in a process of its own."""
    command = [sys.executable, __file__, "--serve", name, folder]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def serve(name: str, folder: str) -> None:
    config = uvicorn.Config(APPS[name](folder), port=0, log_level="warning")
    listening = config.bind_socket()
    print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    uvicorn.Server(config).run(sockets=[listening])


async def load(address: str, texts: list[str], wanted: np.ndarray, clients: int, break_off: bool = False):
    """Seconds of the whole, milliseconds of each answer, counts, and the largest difference of an answer."""
    numbers, times, counts, worst = iter(range(len(texts))), [], Counter(), 0.0
    started = time.perf_counter()

    async def client(http: httpx.AsyncClient) -> None:
        nonlocal worst
        for number in numbers:
            body = {"input": texts[number], "encoding_format": "base64"}
            begun = time.perf_counter()
            while time.perf_counter() - started < SECONDS:
                asked = http.post("/v1/embeddings", json=body)
                try:
                    response = await asyncio.wait_for(asked, 0.05 if break_off and number % 10 == 0 else SECONDS)
                except asyncio.TimeoutError:
                    counts["broken off"] += 1
                    break
                if response.status_code == 429:
                    counts["told to come back"] += 1
                    await asyncio.sleep(random.uniform(0.1, 0.3))
                    continue
                counts["answered"] += response.raise_for_status().status_code == 200
                times.append(1000 * (time.perf_counter() - begun))
                vector = np.frombuffer(base64.b64decode(response.json()["data"][0]["embedding"]), "<f4")
                difference = float(np.abs(vector - wanted[number]).max())
                worst, counts["changed"] = max(worst, difference), counts["changed"] + (difference > TOLERANCE)
                break

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=address, timeout=SECONDS, limits=limits) as http:
        await http.post("/v1/embeddings", json={"input": "warm up", "encoding_format": "base64"})
        started = time.perf_counter()
        await asyncio.gather(*[client(http) for _ in range(clients)])
    counts["lost"] = len(texts) - counts["answered"] - counts["broken off"]
    return time.perf_counter() - started, times, counts, worst


def report(name: str, result: tuple[float, list[float], Counter, float]) -> None:
    seconds, times, counts, worst = result
    p50, p99 = np.percentile(times, [50, 99])
    kinds = ", ".join(f"{counts[kind]} {kind}" for kind in ("told to come back", "broken off", "lost", "changed"))
    rate = f"{counts['answered'] / seconds:.1f} requests/s, p50 {p50:.0f} ms, p99 {p99:.0f} ms"
    print(f"{name}: {rate}; {kinds}; largest difference {worst:.1e}", flush=True)
    assert counts["lost"] == counts["changed"] == 0, name


def main(requests: str = "400", clients: str = "16", folder: str | None = None) -> None:
    random.seed(0)
    corpus = gzip.decompress(files("modernbert").joinpath("assets/demo/corpus.jsonl.gz").read_bytes()).decode()
    paragraphs = [json.loads(line)["text"] for line in corpus.splitlines()]
    texts = [random.choice(paragraphs)[: random.choice((40, 200, 800))] for _ in range(int(requests))]
    with tempfile.TemporaryDirectory() as scratch:
        if folder is None:
            folder, colbert = str(Path(scratch) / "model"), ColBERT.default()
            Embedder(colbert.encoder, colbert.tokenizer).save_pretrained(folder)
        wanted = Embedder.from_pretrained(folder).encode(texts).numpy()
        for name in APPS:
            with server(name, folder) as address:
                report(name, asyncio.run(load(address, texts, wanted, int(clients))))
        with server("modernbert serve", folder) as address:
            result = asyncio.run(load(address, texts, wanted, OVERLOAD, break_off=True))
            report(f"modernbert serve, {OVERLOAD} clients for {PLACES} places", result)


if __name__ == "__main__":
    serve(*sys.argv[2:]) if sys.argv[1:2] == ["--serve"] else main(*sys.argv[1:])
