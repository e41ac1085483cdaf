"""What Prometheus reads."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from mlx_fd.serve.engine import Written
from mlx_fd.serve.rule import Decision

# When a counter began is of no use here, and doubles the text.
disable_created_metrics()  # type: ignore[no-untyped-call]

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_SCORES = tuple(step / 5 for step in range(-5, 6))


class Metrics:
    """A server's counters, of a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "mlx_fd_requests",
            "Requests, by route and status",
            ("route", "status"),
            registry=registry,
        )
        self.seconds = Histogram(
            "mlx_fd_request_seconds",
            "Seconds from a request to the end of its reply",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.first = Histogram(
            "mlx_fd_first_token_seconds",
            "Seconds from a job to its first token",
            ("model",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.tokens = Counter(
            "mlx_fd_tokens",
            "Tokens read and written, and those written that the draft had proposed (accepted)",
            ("model", "kind"),
            registry=registry,
        )
        self.answers = Counter(
            "mlx_fd_answers",
            "Chats, by who was asked and who answered",
            ("asked", "by"),
            registry=registry,
        )
        self.scores = Histogram(
            "mlx_fd_score",
            "Scores of the student's own answers, by which the expert is asked",
            buckets=_SCORES,
            registry=registry,
        )
        self.inside = Gauge(
            "mlx_fd_requests_inside", "Requests that run or wait", registry=registry
        )
        self.reloads = Counter(
            "mlx_fd_reloads", "New weights taken, by outcome", ("outcome",), registry=registry
        )

    def wrote(self, model: str, written: Written) -> None:
        """Count a text."""
        self.tokens.labels(model, "read").inc(written.read)
        self.tokens.labels(model, "written").inc(written.drawn)
        if written.accepted:
            self.tokens.labels(model, "accepted").inc(written.accepted)
        self.first.labels(model).observe(written.first)

    def decided(self, asked: str, decision: Decision) -> None:
        """Count an answer."""
        self.answers.labels(asked, decision.by).inc()
        if decision.score is not None:
            self.scores.observe(decision.score)

    def exposition(self) -> bytes:
        """All of them in Prometheus' text form."""
        return generate_latest(self._registry)
