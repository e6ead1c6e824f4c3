"""The routes: each turns its request into tokens, waits for their rows, and turns these into its response."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from ..heads.colbert import ColBERT
from ..heads.embedder import Embedder
from ..heads.reranker import Reranker
from . import answers
from .asked import embedding_tokens, rerank_documents, rerank_tokens, vector_tokens
from .gate import Gate, Limits, error_response
from .metrics import Metrics
from .models import ROUTES, Served, pick
from .refused import Refused
from .schemas import EmbeddingsRequest, MultiVectorRequest, RerankRequest, SearchRequest
from .search import Searcher

T = TypeVar("T")

THREADS = 4
"""Threads that tokenise and write responses, so that a large request does not hold up small ones."""


def create_app(
    models: Sequence[Served],
    searcher: Searcher | None = None,
    *,
    limits: Limits | None = None,
    key: str | None = None,
    hosts: Collection[str] | None = None,
) -> FastAPI:
    """The application. When it ends it closes the models' batchers and the searcher, after what they are answering.

    Args:
        key, hosts: as in `Gate`.
    """
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="texts")
    metrics = Metrics({*ROUTES, "/", "/v1/models", "/v1/search", "/health", "/metrics"})
    for served in models:
        served.batcher.on_batch = partial(metrics.encoded, served.name)
        metrics.watch(served.name, lambda served=served: served.batcher.waiting_tokens)

    @asynccontextmanager
    async def until_closed(_: FastAPI) -> AsyncIterator[None]:
        yield
        for served in models:
            served.batcher.close()
        if searcher:
            searcher.close()
        threads.shutdown()

    app = FastAPI(title="modernbert", docs_url=None, redoc_url=None, lifespan=until_closed)
    app.add_middleware(Gate, limits=limits or Limits(), key=key, hosts=hosts, on_answer=metrics.answered)
    _add_errors(app)

    async def work(function: Callable[..., T], *arguments: object, **named: object) -> T:
        call = partial(function, *arguments, **named)
        return await asyncio.get_running_loop().run_in_executor(threads, call)

    def search() -> Searcher:
        if searcher is None:
            raise Refused(404, "this server has no store: start it with --index STORE")
        return searcher

    @app.post("/v1/embeddings")
    async def embeddings(request: EmbeddingsRequest) -> Response:
        served = pick(models, "/v1/embeddings", request.model)
        model = cast(Embedder, served.model)
        tokens = await work(embedding_tokens, model, request)
        rows = await served.encode(tokens)
        return await work(answers.embeddings, served.name, model, request, tokens, rows)

    @app.post("/v1/multi-vector")
    async def multi_vector(request: MultiVectorRequest) -> Response:
        served = pick(models, "/v1/multi-vector", request.model)
        tokens = await work(vector_tokens, cast(ColBERT, served.model), request)
        rows = await served.encode(tokens)
        return await work(answers.multi_vectors, served.name, request, tokens, rows)

    @app.post("/v1/rerank")
    async def rerank_1(request: RerankRequest) -> Response:
        return await rerank(request, version=1)

    @app.post("/v2/rerank")
    async def rerank_2(request: RerankRequest) -> Response:
        return await rerank(request, version=2)

    async def rerank(request: RerankRequest, version: int) -> Response:
        served = pick(models, f"/v{version}/rerank", request.model)
        model = cast(Reranker | ColBERT, served.model)
        documents = rerank_documents(request)
        tokens = await work(rerank_tokens, model, request, documents)
        rows = await served.encode(tokens)
        return await work(answers.rerank, served.name, model, request, documents, tokens, rows, version=version)

    @app.post("/v1/search")
    async def search_store(request: SearchRequest) -> Response:
        return await work(answers.json_response, await search().rows(request))

    @app.get("/")
    async def page(q: str = "") -> Response:
        return HTMLResponse((await search().page(q)).encode(errors="replace"))

    @app.get("/v1/models")
    async def list_models() -> Response:
        return answers.json_response({"object": "list", "data": list(map(_described, models))})

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> Response:
        for served in models:
            if served.name == name:
                return answers.json_response(_described(served))
        raise Refused(404, f"there is no model {name!r:.80}", "model", "model_not_found")

    @app.get("/health")
    async def health() -> Response:
        return answers.json_response({"status": "ok", "models": [served.name for served in models]})

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


def _described(served: Served) -> dict[str, object]:
    routes = [route for route, kinds in ROUTES.items() if isinstance(served.model, kinds)]
    known = {"object": "model", "created": served.created, "owned_by": "modernbert"}
    return {"id": served.name, **known, "class": served.kind, "routes": routes}


def _add_errors(app: FastAPI) -> None:
    """Every error has the form that the clients of its route read."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return error_response(request.url.path, error)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        headers = dict(error.headers or {})
        return error_response(request.url.path, Refused(error.status_code, message, headers=headers))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"][1:]))
        if first["type"] == "json_invalid":
            message, place = f"the body is not JSON: {first['ctx']['error']} at character {place}", ""
        elif first["type"] == "extra_forbidden":
            message = f"{place}: {request.url.path} has no such field"
        elif not place:
            message = "the body must be a JSON object, with the header Content-Type: application/json"
        else:
            message = f"{place}: {first['msg']}"
        return error_response(request.url.path, Refused(400, message, place or None))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        message = f"the server could not answer ({type(error).__name__}): its log has the reason"
        return error_response(request.url.path, Refused(500, message))
