"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BATCH_TOKENS = tuple(2**power for power in range(4, 18))


class Metrics:
    """Counts of one server, in a registry of its own.

    Args:
        routes: the paths that have figures of their own; others share "other", so that no client can add rows.
    """

    def __init__(self, routes: set[str]) -> None:
        self.registry, self._routes = CollectorRegistry(), routes
        own = {"registry": self.registry, "namespace": "modernbert"}
        self._answers = Counter("requests", "Answers, by route and status.", ("route", "status"), **own)
        self._seconds = Histogram("request_seconds", "Time of an answer.", ("route",), buckets=SECONDS, **own)
        self._texts = Counter("texts", "Texts that were encoded.", ("model",), **own)
        self._tokens = Counter("tokens", "Tokens that were encoded.", ("model",), **own)
        self._busy = Counter("encoding_seconds", "Time spent encoding.", ("model",), **own)
        self._batch = Histogram("batch_tokens", "Tokens of a batch.", ("model",), buckets=BATCH_TOKENS, **own)
        self._waiting = Gauge("queue_tokens", "Tokens that wait for a batch.", ("model",), **own)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count an answer."""
        route = path if path in self._routes else "other"
        self._answers.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def encoded(self, model: str, texts: int, tokens: int, seconds: float) -> None:
        """Count a batch of a model."""
        self._texts.labels(model).inc(texts)
        self._tokens.labels(model).inc(tokens)
        self._busy.labels(model).inc(seconds)
        self._batch.labels(model).observe(tokens)

    def watch(self, model: str, waiting_tokens: Callable[[], int]) -> None:
        """Show how much waits for a model."""
        self._waiting.labels(model).set_function(waiting_tokens)

    def text(self) -> bytes:
        return generate_latest(self.registry)
