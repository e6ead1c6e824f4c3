"""What a request passes before it reaches a route: its key, a free place, its size, and the time it may take.

The gate reads the whole body, and then watches the connection. A client that goes away cancels its request, wherever it
is. A client that is slow to send is ended before it holds a place for long.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass

from fastapi import Response
from fastapi.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answers import json_response
from .refused import Refused, error_body

OPEN = ("/health",)
"""Answered without a key."""

FREE = ("/health", "/metrics")
"""Answered however many requests there are."""


@dataclass(frozen=True)
class Limits:
    """What the server takes.

    Attributes:
        requests: that are being answered at a time. body_bytes: of a request. seconds: for an answer.
        body_seconds: for a client to send its request.
    """

    requests: int = 256
    body_bytes: int = 8 << 20
    seconds: float = 60.0
    body_seconds: float = 10.0


class Gate:
    """An ASGI middleware.

    Args:
        key: that a client must send, as `Authorization: Bearer KEY`, or as the password of HTTP Basic, for which a
            browser asks; None: none.
        hosts: the names by which the server may be called; None: any. Without a key this keeps out the pages of other
            sites, which can let a name of their own point to this machine.
        on_answer: called with path, status and seconds of each answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        key: str | None,
        hosts: Collection[str] | None,
        on_answer: Callable[[str, int, float], None],
    ) -> None:
        self.app, self.limits, self.hosts, self.on_answer = app, limits, hosts, on_answer
        self.key = None if key is None else key.encode()
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, statuses = time.perf_counter(), []

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            await send(message)

        try:
            await self._pass(scope, receive, watched)
        except Refused as refused:
            if not statuses:  # of an answer that has begun, the client sees that it ends too early
                await error_response(scope["path"], refused)(scope, receive, watched)
        except Exception:
            statuses.append(500)
            raise
        finally:
            # 499: the client went away before its answer began, as in the logs of nginx
            self.on_answer(scope["path"], statuses[0] if statuses else 499, time.perf_counter() - started)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        try:
            self._check(scope["path"], headers)
            if scope["path"] in FREE:
                await self.app(scope, receive, send)
                return
            if self.in_flight >= self.limits.requests:
                message = f"the server is answering {self.in_flight} requests, as many as it takes: try again in 1 s"
                raise Refused(429, message, code="rate_limit", headers={"Retry-After": "1"})
        except Refused:
            # A client reads no answer while it sends. What it sends is read and thrown away.
            await self._drain(receive)
            raise
        self.in_flight += 1
        try:
            body = await self._read(headers, receive)
            if body is not None:
                await asyncio.wait_for(self._answer(body, scope, receive, send), self.limits.seconds)
        except asyncio.TimeoutError as error:
            message = (
                f"there was no answer in {self.limits.seconds:g} s: send fewer texts at a time, or try again later"
            )
            raise Refused(504, message, code="timeout") from error
        finally:
            self.in_flight -= 1

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self.hosts is not None:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host if host.endswith("]") else host.rsplit(":", 1)[0]
            if name.lower() not in self.hosts:
                message = f"the server is not called {name!r:.80}: call it {' or '.join(sorted(self.hosts))}"
                raise Refused(421, f"{message}, or start it with --host or --api-key-file")
        if self.key is not None and path not in OPEN:
            given = headers.get(b"authorization", b"")
            if not any(hmac.compare_digest(self.key, key) for key in _keys(given)):
                what = "the API key is wrong" if given else "the server needs an API key"
                message = f"{what}: send the header Authorization: Bearer KEY"
                raise Refused(
                    401, message, code="invalid_api_key", headers={"WWW-Authenticate": 'Basic realm="modernbert"'}
                )

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The body; None: the client went away while it sent it."""
        most, body = self.limits.body_bytes, bytearray()
        too_large = Refused(413, f"a request has at most {most:,} bytes: send fewer texts at a time")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > most:
            await self._drain(receive)
            raise too_large

        async def read() -> bytes | None:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                body.extend(message.get("body", b""))
                more = message.get("more_body", False)
                if len(body) > most:
                    if more:
                        await self._drain(receive)
                    raise too_large
            return bytes(body)

        try:
            return await asyncio.wait_for(read(), self.limits.body_seconds)
        except asyncio.TimeoutError as error:
            raise Refused(408, f"the request did not arrive in {self.limits.body_seconds:g} s") from error

    async def _drain(self, receive: Receive) -> None:
        """Read the rest of a request that is refused, for a short time, so that its client sees the answer."""

        async def read() -> None:
            left = 4 * self.limits.body_bytes
            while left > 0:
                message = await receive()
                if not message.get("more_body", False):
                    return
                left -= len(message["body"])

        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(read(), min(2.0, self.limits.body_seconds))

    async def _answer(self, body: bytes, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the route, until it has answered or the client has gone."""
        parts: Iterator[Message] = iter([{"type": "http.request", "body": body, "more_body": False}])
        gone = asyncio.ensure_future(_disconnect(receive))

        async def receive_body() -> Message:
            return next(parts, None) or await asyncio.shield(gone)

        answer = asyncio.ensure_future(self.app(scope, receive_body, send))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()
        finally:
            for task in (answer, gone):
                task.cancel()
            await asyncio.gather(answer, gone, return_exceptions=True)


def error_response(path: str, refused: Refused) -> Response:
    body = error_body(path, refused)
    response = PlainTextResponse(body) if isinstance(body, str) else json_response(body)
    response.status_code = refused.status
    response.headers.update(refused.headers)
    return response


async def _disconnect(receive: Receive) -> Message:
    while (message := await receive())["type"] != "http.disconnect":
        pass
    return message


def _keys(authorization: bytes) -> Iterator[bytes]:
    """What may be the key in a header."""
    scheme, _, value = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        yield value.strip()
    if scheme.lower() == b"basic":
        with suppress(ValueError):
            yield base64.b64decode(value, validate=True).partition(b":")[2]
