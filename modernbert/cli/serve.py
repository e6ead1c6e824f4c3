"""`modernbert serve`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from .options import EngineOption
from .show import note

PORT = 8000
LOOPBACK = {"127.0.0.1", "localhost", "::1"}


def serve(
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            metavar="MODEL",
            help="Embedder, ColBERT or Reranker, folder or hub id; repeatable.",
            show_default="the model of the store, or the built-in one",
        ),
    ] = None,
    index: Annotated[
        Path | None, typer.Option(metavar="STORE", help="A store made by `modernbert index`, to search in.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 is all of this machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = PORT,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file with the key that clients must send.")
    ] = None,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests at a time; more get the status 429.")] = 256,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for an answer; then it gets the status 504.")] = 60.0,
    engine: EngineOption = None,
) -> None:
    """Answer HTTP requests: embeddings as OpenAI's API, rerank as Cohere's and Jina's, multi-vectors, and search.

    The class of a model decides which routes it serves. A store has a page to ask questions, at /.
    """
    try:
        import uvicorn

        from ..serving.app import create_app
        from ..serving.gate import Limits
        from ..serving.start import bind, serve_models
    except ModuleNotFoundError as error:
        if error.name not in {"uvicorn", "fastapi", "pydantic", "starlette", "prometheus_client"}:
            raise
        raise ModuleNotFoundError('serving needs an extra: pip install "modernbert[serve]"') from error

    key = None if api_key_file is None else _read_key(api_key_file)
    listening = bind(host, port)  # fails before models are loaded
    limits = Limits(requests=max_requests, seconds=timeout)
    on_loopback = host in LOOPBACK
    with listening:
        served, searcher = serve_models(models or [], index, engine)
        hosts = {"localhost", "127.0.0.1", "[::1]"} if on_loopback and key is None else None
        app = create_app(served, searcher, limits=limits, key=key, hosts=hosts)
        address, number = listening.getsockname()[:2]
        if not on_loopback and key is None:
            note(f"{host} can be reached from other machines, and there is no key: --api-key-file FILE asks for one")
        for each in served:
            note(f"{each.name} is a {each.kind}")
        note(f"http://{f'[{address}]' if ':' in address else address}:{number}")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
        with suppress(KeyboardInterrupt):  # after the requests that were there are answered
            server.run(sockets=[listening])


def _read_key(file: Path) -> str:
    key = file.read_text(encoding="utf-8").strip()
    if not key or any(character.isspace() for character in key):
        raise ValueError(f"--api-key-file is {file}, but a key is one word: the file must have it, and nothing else")
    return key
