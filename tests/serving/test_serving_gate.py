"""The gate in front of the routes: keys, names, free places, sizes, slow clients and those that go away."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json

import pytest

pytest.importorskip("fastapi", reason='needs pip install "modernbert[serve]"')

from modernbert.serving.gate import Gate, Limits


class Route:
    """An application that answers when it may, and remembers what became of each request."""

    def __init__(self) -> None:
        self.go, self.bodies, self.cancelled = asyncio.Event(), [], 0

    async def __call__(self, scope, receive, send) -> None:
        self.bodies.append((await receive())["body"])
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})


class Client:
    """One request. What the client sends is put into `sent`."""

    def __init__(self, gate: Gate, *parts: bytes, path: str = "/v1/embeddings", whole: bool = True, **headers: str):
        self.sent: asyncio.Queue[dict] = asyncio.Queue()
        for number, part in enumerate(parts or (b"",), start=1):
            more = not whole or number < max(1, len(parts))
            self.sent.put_nowait({"type": "http.request", "body": part, "more_body": more})
        pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        self.messages: list[dict] = []
        scope = {"type": "http", "path": path, "headers": pairs}
        self.task = asyncio.ensure_future(gate(scope, self.sent.get, self._receive))

    async def _receive(self, message: dict) -> None:
        self.messages.append(message)

    def leave(self) -> None:
        self.sent.put_nowait({"type": "http.disconnect"})

    async def status(self) -> int:
        await asyncio.wait_for(self.task, 10)
        return self.messages[0]["status"]

    @property
    def error(self) -> dict:
        return json.loads(self.messages[1]["body"])["error"]

    def header(self, name: bytes) -> str:
        return dict(self.messages[0]["headers"])[name].decode()


def run(test, *, key=None, hosts=None, **limits):
    """Run a test with a gate, its route, and a list of the answers that the gate has counted."""

    async def main() -> None:
        route, answers = Route(), []
        gate = Gate(route, Limits(**limits), key, hosts, lambda *row: answers.append(row[:2]))
        await asyncio.wait_for(test(gate, route, answers), 20)
        assert gate.in_flight == 0

    asyncio.run(main())


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0)


def test_a_body_in_parts_reaches_the_route():
    async def test(gate, route, answers):
        route.go.set()
        assert await Client(gate, b"ab", b"", b"c").status() == 200
        assert route.bodies == [b"abc"]
        assert answers == [("/v1/embeddings", 200)]

    run(test)


def test_more_requests_than_places_get_429_and_the_others_their_answer():
    async def test(gate, route, answers):
        first = [Client(gate) for _ in range(2)]
        await until(lambda: len(route.bodies) == 2)
        late = Client(gate, b"x" * 50, whole=False)
        late.sent.put_nowait({"type": "http.request", "body": b"y"})
        assert await late.status() == 429
        assert late.header(b"retry-after") == "1"
        assert late.error["type"] == "rate_limit_error"
        assert late.sent.empty()  # the rest of the request was read, so that the client can read the answer
        route.go.set()
        assert [await client.status() for client in first] == [200, 200]
        assert await Client(gate).status() == 200

    run(test, requests=2)


def test_health_and_metrics_are_answered_when_there_is_no_place():
    async def test(gate, route, answers):
        busy = Client(gate)
        await until(lambda: len(route.bodies) == 1)
        free = [Client(gate, path=path) for path in ("/health", "/metrics")]
        await until(lambda: len(route.bodies) == 3)
        route.go.set()
        assert [await client.status() for client in (busy, *free)] == [200] * 3

    run(test, requests=1)


@pytest.mark.parametrize("leaves", ["while it waits", "while it sends"])
def test_a_client_that_goes_away_ends_its_request(leaves):
    async def test(gate, route, answers):
        client = Client(gate, b"a", whole=leaves == "while it waits")
        await until(lambda: gate.in_flight == 1 and (leaves == "while it sends" or route.bodies))
        client.leave()
        await asyncio.wait_for(client.task, 10)
        assert client.messages == []
        assert route.cancelled == (leaves == "while it waits")
        assert answers == [("/v1/embeddings", 499)]

    run(test)


def test_an_answer_that_takes_too_long_is_ended():
    async def test(gate, route, answers):
        client = Client(gate)
        assert await client.status() == 504
        assert client.error["type"] == "server_error"
        assert "no answer in 0.05 s" in client.error["message"]
        assert route.cancelled == 1

    run(test, seconds=0.05)


def test_a_client_that_is_slow_to_send_does_not_keep_its_place():
    async def test(gate, route, answers):
        slow = Client(gate, b"a", whole=False)
        assert await slow.status() == 408
        route.go.set()
        assert await Client(gate).status() == 200

    run(test, requests=1, body_seconds=0.05)


def test_a_request_that_is_too_large_is_refused_with_and_without_its_length():
    async def test(gate, route, answers):
        announced = Client(gate, b"x" * 60, b"x" * 60, content_length="120")
        in_parts = Client(gate, *[b"x" * 30] * 4)
        for client in (announced, in_parts):
            assert await client.status() == 413
            assert "at most 100 bytes" in client.error["message"]
            assert client.sent.empty()
        assert route.bodies == []

    run(test, body_bytes=100)


def test_a_key_is_compared_in_constant_time(monkeypatch):
    compared = []
    plain = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda *pair: compared.append(pair) or plain(*pair))

    async def test(gate, route, answers):
        route.go.set()
        basic = base64.b64encode("anyone:sésame".encode()).decode()
        assert await Client(gate, authorization="Bearer sésame").status() == 200
        assert await Client(gate, authorization="bearer sésame").status() == 200
        assert await Client(gate, authorization=f"Basic {basic}").status() == 200
        for headers in (
            {},
            {"authorization": "Bearer "},
            {"authorization": "Bearer sésam"},
            {"authorization": "Bearer sésame2"},
            {"authorization": "sésame"},
            {"authorization": "Basic sésame"},
            {"authorization": "Basic " + base64.b64encode("sésame:".encode()).decode()},
        ):
            client = Client(gate, **headers)
            assert await client.status() == 401, headers
            assert client.error["code"] == "invalid_api_key"
            assert client.header(b"www-authenticate") == 'Basic realm="modernbert"'
        assert await Client(gate, path="/metrics").status() == 401
        assert await Client(gate, path="/health").status() == 200
        assert len(route.bodies) == 4
        assert len(compared) == 7

    run(test, key="sésame")


def test_a_page_of_another_site_cannot_call_the_server_by_its_own_name():
    async def test(gate, route, answers):
        route.go.set()
        for host, status in (
            ("localhost:8000", 200),
            ("127.0.0.1:8000", 200),
            ("[::1]:8000", 200),
            ("[::1]", 200),
            ("LOCALHOST", 200),
            ("evil.example:8000", 421),
            ("localhost.evil.example", 421),
            ("", 421),
        ):
            assert await Client(gate, host=host).status() == status, host

    run(test, hosts={"localhost", "127.0.0.1", "[::1]"})


def test_an_answer_that_has_begun_is_not_followed_by_an_error():
    async def test(gate, route, answers):
        async def slow(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await asyncio.sleep(60)

        gate.app = slow
        client = Client(gate)
        assert await client.status() == 200
        assert len(client.messages) == 1

    run(test, seconds=0.05)
