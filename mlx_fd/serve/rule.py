"""When the student's answer stands, and when the expert is asked; pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_fd.evaluation.cascade.scores import Score
from mlx_fd.serve.models import EXPERT, STUDENT

if TYPE_CHECKING:
    from mlx_fd.models.writing import Sampling
    from mlx_fd.serve.engine import Written


@dataclass(frozen=True)
class Rule:
    """When the expert is asked.

    Attributes:
        score: what the student's answer is scored by.
        threshold: of that score; at least that much, and the answer stands; ``None``: everything
            is passed on.
        confidence: the share of right answers at a score; ``None``: not calibrated.
        source: who says so, in words.
        max_tokens: at which the answers were cut that it is calibrated on; 0: it is not.
    """

    score: Score
    threshold: float | None
    confidence: Callable[[float], float] | None
    source: str
    max_tokens: int = 0


@dataclass(frozen=True)
class Decision:
    """Who answers a request, and why.

    Attributes:
        by: ``"student"`` or ``"expert"``.
        reason: in words.
        score: of the student's answer; ``None``: it was not scored.
        scored_by: the name of that score; empty likewise.
        confidence: what that means, where it is calibrated.
        threshold: what it was compared with.
        answer: the student's answer; ``None`` where it was not asked.
        judging: tokens of the feedback that the student wrote for its score.
    """

    by: str
    reason: str
    score: float | None = None
    scored_by: str = ""
    confidence: float | None = None
    threshold: float | None = None
    answer: Written | None = None
    judging: int = 0

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
            **({"x-mlx-fd-scored-by": self.scored_by} if self.scored_by else {}),
            **{f"x-mlx-fd-{name}": f"{v:.4f}" for name, v in numbers.items() if v is not None},
        }

    def field(self) -> dict[str, Any]:
        """The field ``mlx_fd`` of a reply that says it."""
        return {
            "answered_by": self.by,
            "reason": self.reason,
            "score": _rounded(self.score),
            "scored_by": self.scored_by or None,
            "confidence": _rounded(self.confidence),
            "threshold": self.threshold,
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def unmeasured(rule: Rule, sampling: Sampling, answer: Written, *, in_form: bool) -> str:
    """Which answers a calibrated rule was not measured on, where one of them came; else empty.

    It is of likeliest answers to single questions in the form of the training.

    Args:
        rule: the rule.
        sampling: how the answer was asked for.
        answer: the student's.
        in_form: whether the question was put in that form.
    """
    if not in_form:
        return "questions that are not in the form of the training"
    if sampling.temperature or sampling.repetition_penalty != 1:
        return "answers that are drawn at a temperature, or with a repetition penalty"
    if answer.cut:
        return "answers that a stop text ends"
    shorter = answer.reason == "length" and sampling.max_tokens < rule.max_tokens
    if shorter or len(answer.tokens) > rule.max_tokens:
        return f"answers that are not cut at {rule.max_tokens} tokens"
    return ""


def decided(rule: Rule, score: float, answer: Written, *, has_expert: bool) -> Decision:
    """Whether an answer of a score stands."""
    confidence = None if rule.confidence is None else rule.confidence(score)
    threshold = rule.threshold
    stands = threshold is not None and score >= threshold
    if threshold is None:
        reason = f"no score is high enough: {rule.source}"
    elif stands:
        reason = f"the student's score {score:.4g} is at least {threshold:g}"
    else:
        reason = f"the student's score {score:.4g} is below {threshold:g}"
    if not stands and not has_expert:
        reason += ", and there is no expert"
    by = EXPERT if has_expert and not stands else STUDENT
    return Decision(by, reason, score, rule.score.name, confidence, threshold, answer)
