"""When the student's answer stands, and when the expert is asked; pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_fd.serve.models import EXPERT, STUDENT

if TYPE_CHECKING:
    from mlx_fd.serve.engine import Written


@dataclass(frozen=True)
class Rule:
    """When the expert is asked.

    Attributes:
        threshold: of the student's score; at least that much, and its answer stands; ``None``:
            everything is passed on.
        confidence: the share of right answers at a score; ``None``: not calibrated.
        source: who says so, in words.
    """

    threshold: float | None
    confidence: Callable[[float], float] | None
    source: str


@dataclass(frozen=True)
class Decision:
    """Who answers a request, and why.

    Attributes:
        by: ``"student"`` or ``"expert"``.
        reason: in words.
        score: the student's of its own answer; ``None``: it was not judged.
        confidence: what that means, where it is calibrated.
        threshold: what it was compared with.
        answer: the student's answer; ``None`` where it was not asked.
    """

    by: str
    reason: str
    score: float | None = None
    confidence: float | None = None
    threshold: float | None = None
    answer: Written | None = None

    def headers(self) -> dict[str, str]:
        """The headers that say it."""
        numbers = {
            "score": self.score,
            "confidence": self.confidence,
            "threshold": self.threshold,
        }
        return {
            "x-mlx-fd-answered-by": self.by,
            "x-mlx-fd-reason": self.reason,
            **{f"x-mlx-fd-{name}": f"{v:.4f}" for name, v in numbers.items() if v is not None},
        }

    def field(self) -> dict[str, Any]:
        """The field ``mlx_fd`` of a reply that says it."""
        return {
            "answered_by": self.by,
            "reason": self.reason,
            "score": _rounded(self.score),
            "confidence": _rounded(self.confidence),
            "threshold": self.threshold,
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def decided(rule: Rule, score: float, answer: Written, *, has_expert: bool) -> Decision:
    """Whether an answer of a score stands."""
    confidence = None if rule.confidence is None else rule.confidence(score)
    threshold = rule.threshold
    stands = threshold is not None and score >= threshold
    if threshold is None:
        reason = "no score is high enough, by the calibration"
    elif stands:
        reason = f"the student's score {score:.2f} is at least {threshold:.2f}"
    else:
        reason = f"the student's score {score:.2f} is below {threshold:.2f}"
    if not stands and not has_expert:
        reason += ", and there is no expert"
    by = EXPERT if has_expert and not stands else STUDENT
    return Decision(by, reason, score, confidence, threshold, answer)
