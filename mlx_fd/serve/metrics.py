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
from mlx_fd.serve.models import STUDENT
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
            "Tokens read and written, feedback and unfinished texts included; accepted: those "
            "written that the draft had proposed",
            ("model", "kind"),
            registry=registry,
        )
        self.answers = Counter(
            "mlx_fd_answers",
            "Whole answers, by who was asked and who answered",
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

    def took(self, model: str, read: int, written: int = 0, accepted: int = 0) -> None:
        """Count tokens, from any thread: what a model read and wrote, and its draft proposed."""
        self.tokens.labels(model, "read").inc(read)
        self.tokens.labels(model, "written").inc(written)
        if accepted:
            self.tokens.labels(model, "accepted").inc(accepted)

    def decided(self, decision: Decision) -> None:
        """Count the student's answer in a cascade, and its score."""
        if decision.answer is not None:
            self.first.labels(STUDENT).observe(decision.answer.first)
        if decision.score is not None:
            self.scores.observe(decision.score)

    def answered(self, asked: str, decision: Decision, written: Written) -> None:
        """Count an answer that is whole."""
        self.answers.labels(asked, decision.by).inc()
        if written is not decision.answer:
            self.first.labels(decision.by).observe(written.first)

    def exposition(self) -> bytes:
        """All of them in Prometheus' text form."""
        return generate_latest(self._registry)
