"""Counters of a server in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from embedgrad.serve.answers import Usage
from embedgrad.serve.scheduler import Scheduler

MEDIA_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counters of one server."""

    def __init__(self, scheduler: Scheduler) -> None:
        registry = self._registry = CollectorRegistry()
        self._requests = Counter(
            "embedgrad_requests", "Requests by model and status.", ["model", "status"], registry=registry
        )
        self._tokens = Counter("embedgrad_tokens", "Tokens by model and kind.", ["model", "kind"], registry=registry)
        self._seconds = Histogram(
            "embedgrad_request_seconds", "Time of a request.", ["model"], buckets=_SECONDS, registry=registry
        )
        self._first = Histogram(
            "embedgrad_first_token_seconds", "Time until the first token of a streamed answer.", ["model"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        for name, text, value in (
            ("embedgrad_answers_running", "Answers that are being written.", lambda: scheduler.running),
            ("embedgrad_answers_waiting", "Answers that wait for a slot.", lambda: scheduler.waiting),
        ):
            Gauge(name, text, registry=registry).set_function(value)

    def ended(self, model: str, status: str, seconds: float, usage: Usage) -> None:
        """Counts a request. model: a served model's name. status: the HTTP status, or "gone" for a client that left."""
        self._requests.labels(model, status).inc()
        self._seconds.labels(model).observe(seconds)
        counts = {"prompt": usage.prompt, "cached": usage.cached, "completion": usage.completion}
        for kind, count in counts.items():
            self._tokens.labels(model, kind).inc(count)

    def first_token(self, model: str, seconds: float) -> None:
        """Notes the time until the first token."""
        self._first.labels(model).observe(seconds)

    def text(self) -> bytes:
        """All counters, for `GET /metrics`."""
        return generate_latest(self._registry)
