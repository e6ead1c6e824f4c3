"""`modernbert serve` as a process: the clients of OpenAI and Cohere, many at a time, and its end."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch
from small_models import save_embedder

pytest.importorskip("fastapi", reason='needs pip install "modernbert[serve]"')
pytest.importorskip("prometheus_client")
pytest.importorskip("uvicorn")

from modernbert import ColBERT, Embedder, maxsim

ROOT = Path(__file__).parents[2]
ATOL = 2e-6
QUERY, DOCUMENTS = (
    "what is hail?",
    ["A bank lends money.", "Hail forms in strong thunderstorm clouds.", "Rain is water."],
)
KEY = "open-sesame"


def start(*arguments: object) -> tuple[subprocess.Popen[str], str]:
    """A server and its address."""
    paths = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "modernbert", "serve", "--port", "0", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    shown = []
    for line in process.stderr:
        shown.append(line)
        if found := re.search(r"http://\S+", line):
            return process, found[0]
    raise AssertionError("".join(shown))


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple[subprocess.Popen[str], str, Embedder]]:
    folder = tmp_path_factory.mktemp("server")
    save_embedder(folder / "embedder")
    (folder / "key").write_text(KEY + "\n")
    builtin = ROOT / "modernbert" / "assets" / "default"
    process, address = start(
        "--model", folder / "embedder", "--model", builtin, "--api-key-file", folder / "key", "--max-requests", 8
    )
    yield process, address, Embedder.from_pretrained(folder / "embedder")
    process.kill()
    process.communicate()


def test_the_client_of_openai(server):
    openai = pytest.importorskip("openai")
    _, address, model = server
    with openai.OpenAI(base_url=f"{address}/v1", api_key=KEY) as client:
        texts = ["the river", "a violin was seen"]
        wanted = model.encode(texts)
        for options in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
            found = client.embeddings.create(model="embedder", input=texts, **options)
            vectors = [row.embedding for row in found.data]  # base64 that was asked for comes as it is
            if options == {"encoding_format": "base64"}:
                vectors = [list(struct.unpack(f"<{model.dim}f", base64.b64decode(vector))) for vector in vectors]
            torch.testing.assert_close(torch.tensor(vectors), wanted, rtol=0, atol=ATOL)
            assert found.usage.prompt_tokens == found.usage.total_tokens > 0
        short = client.embeddings.create(model="embedder", input=texts, dimensions=8)
        assert len(short.data[0].embedding) == 8
        assert [each.id for each in client.models.list()] == ["embedder", "default"]
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'") as error:
            client.embeddings.create(model="gpt", input=texts)
        assert (error.value.code, error.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError, match=r"input\[1\] is empty"):
            client.embeddings.create(model="embedder", input=["a", ""])
        with pytest.raises(openai.BadRequestError, match="needs an Embedder"):
            client.embeddings.create(model="default", input=texts)
    with openai.OpenAI(base_url=f"{address}/v1", api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.embeddings.create(model="embedder", input=texts)


@pytest.mark.parametrize("version", [1, 2])
def test_the_client_of_cohere(server, version):
    cohere = pytest.importorskip("cohere")
    _, address, _ = server
    client = {1: cohere.Client, 2: cohere.ClientV2}[version](api_key=KEY, base_url=address)
    model = ColBERT.default()
    wanted = maxsim(model.encode_queries([QUERY]), model.encode_documents(DOCUMENTS))[0]
    found = client.rerank(model="default", query=QUERY, documents=DOCUMENTS, top_n=2)
    order = wanted.argsort(descending=True).tolist()[:2]
    assert [row.index for row in found.results] == order
    scores = torch.tensor([row.relevance_score for row in found.results])
    torch.testing.assert_close(scores, wanted[order], rtol=0, atol=1e-5)
    assert found.meta.tokens.input_tokens > 0
    with pytest.raises(cohere.errors.BadRequestError) as error:
        client.rerank(model="default", query=QUERY, documents=["a", ""])
    assert error.value.body["message"] == "documents[1] is empty: leave it out"


def test_under_overload_every_answer_is_its_own_and_none_is_lost(server):
    """Of 20 requests at a time, 8 have a place: the others get 429, and come back."""
    _, address, model = server
    texts = [f"the people number {i} " + "seen by the river " * (i % 5) for i in range(80)]
    wanted, refused = model.encode(texts), []
    headers = {"Authorization": f"Bearer {KEY}"}

    def ask(number: int) -> None:
        while True:
            body = {"model": "embedder", "input": texts[number]}
            if number % 10 == 3:  # a client that goes away
                with pytest.raises(httpx.TimeoutException):
                    client.post("/v1/embeddings", json=body, timeout=httpx.Timeout(10, read=1e-4))
                return
            response = client.post("/v1/embeddings", json=body)
            if response.status_code == 200:
                found = torch.tensor(response.json()["data"][0]["embedding"])
                torch.testing.assert_close(found, wanted[number], rtol=0, atol=ATOL)
                return
            refused.append(number)
            assert response.status_code == 429
            threading.Event().wait(0.1 * float(response.headers["Retry-After"]))

    with httpx.Client(base_url=address, headers=headers, timeout=60, limits=httpx.Limits(max_connections=20)) as client:
        with ThreadPoolExecutor(20) as pool:
            list(pool.map(ask, range(80)))
        figures = client.get("/metrics").text
    assert 'modernbert_queue_tokens{model="embedder"} 0.0' in figures


def test_it_ends_after_the_requests_that_it_has(server):
    """The last test: SIGTERM comes while a request is on its way."""
    process, address, _ = server
    texts = ["the river " * 20] * 400
    sent = threading.Event()

    def body() -> Iterator[bytes]:
        content = json.dumps({"model": "embedder", "input": texts, "encoding_format": "base64"}).encode()
        yield content[:-1]
        sent.set()
        yield content[-1:]

    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with ThreadPoolExecutor(1) as pool:
        request = pool.submit(httpx.post, f"{address}/v1/embeddings", content=body(), headers=headers, timeout=60)
        assert sent.wait(30)
        process.send_signal(signal.SIGTERM)
        assert len(request.result().json()["data"]) == 400
    assert process.wait(30) == 128 + signal.SIGTERM
    assert "Traceback" not in process.stderr.read()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health")


def test_what_stops_it_from_starting(capsys, tmp_path, monkeypatch):
    from modernbert.cli import main

    def message(*arguments: object) -> str:
        with pytest.raises(SystemExit) as end:
            main(["serve", *map(str, arguments)])
        assert end.value.code == 2
        return capsys.readouterr().err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "Address already in use" in message("--port", taken.getsockname()[1])
    assert "cannot listen on 203.0.113.7" in message("--host", "203.0.113.7", "--port", 0)
    (tmp_path / "key").write_text("two words\n")
    assert "a key is one word" in message("--api-key-file", tmp_path / "key", "--port", 0)
    assert "No such file" in message("--api-key-file", tmp_path / "none", "--port", 0)
    assert "holds no store" in message("--index", tmp_path, "--port", 0)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert 'pip install "modernbert[serve]"' in message()
