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
        threshold: of the confidence where it is calibrated, else of the score; at least that much,
            and the student's answer stands.
        confidence: the probability that an answer is right, by its score; ``None``: not calibrated.
        source: who says so, in words.
    """

    threshold: float
    confidence: Callable[[float], float] | None
    source: str

    @property
    def measure(self) -> str:
        """What is compared with the threshold."""
        return "score" if self.confidence is None else "confidence"


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
    value = score if confidence is None else confidence
    stands = value >= rule.threshold
    measured = f"{rule.measure} {value:.2f}"
    if stands:
        reason = f"the student's {measured} is at least {rule.threshold:.2f}"
    elif has_expert:
        reason = f"the student's {measured} is below {rule.threshold:.2f}"
    else:
        reason = f"the student's {measured} is below {rule.threshold:.2f}, and there is no expert"
    by = EXPERT if has_expert and not stands else STUDENT
    return Decision(by, reason, score, confidence, rule.threshold, answer)
