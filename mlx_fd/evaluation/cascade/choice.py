"""The threshold that keeps a promise, with exact binomial tests.

For a risk any score of the calibration's answers may become the threshold
(:mod:`mlx_fd.evaluation.cascade.keeping`). For an accuracy or a cost, of which every problem tells
something at every threshold, a sequence of thresholds is fixed beforehand, as shares of a score's
range, and tested until one fails.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlx_fd.evaluation.cascade import keeping
from mlx_fd.evaluation.cascade.outcome import Outcome
from mlx_fd.evaluation.cascade.scores import Score
from mlx_fd.feedback.risk import LEVEL, THRESHOLDS, upper_bound
from mlx_fd.runs.records.cascade import CascadePromiseRow

RISK, ACCURACY, COST = "risk", "accuracy", "cost"
PROMISES = {
    RISK: "the share of wrong answers among those that the student keeps",
    ACCURACY: "the accuracy of all answers",
    COST: "the share of requests that the expert is asked",
}


def promised(kind: str, target: float, level: float, threshold: float | None, score: str) -> str:
    """A promise in words; arguments as in ``cascade.json``."""
    most = "at least" if kind == ACCURACY else "at most"
    stands = (
        "every request is passed on"
        if threshold is None
        else f"answers with a score ({score}) of at least {threshold:g} stay the student's"
    )
    return f"promise, with {level:.0%}: {PROMISES[kind]} is {most} {target:.1%}; {stands}"


def choose(found: Sequence[Outcome], score: Score, kind: str, target: float) -> CascadePromiseRow:
    """The threshold by which least is passed on, of those that surely keep a promise.

    For a cost it is the one by which most is passed on. "Surely" is with probability
    :data:`mlx_fd.feedback.risk.LEVEL` over the calibration's problems, if those to come are drawn
    as they were.

    Args:
        found: what came of the calibration's problems.
        score: what their scores are.
        kind: ``"risk"``, ``"accuracy"`` or ``"cost"``.
        target: at most this risk or cost, at least this accuracy; in (0, 1).

    Returns:
        The promise, with the threshold of the score: ``None`` where all is passed on, and where no
        threshold keeps it (then ``kept`` is false).
    """
    if kind == RISK:
        return _least_kept(found, target)
    best: CascadePromiseRow | None = None
    # Strictest first for accuracy, where all is passed on at the start; for cost the other way.
    tried: list[float | None] = [None, *map(score.of_share, THRESHOLDS)]
    for threshold in tried if kind == ACCURACY else reversed(tried):
        k, n = _against(found, kind, threshold), len(found)
        bound = upper_bound(k, n)
        limit = 1 - target if kind == ACCURACY else target
        if bound > limit:
            break
        best = _row(kind, target, threshold, k, n, bound, True)
    if best is not None:
        return best
    return _row(kind, target, None, 0, len(found), math.nan, False)


def _least_kept(found: Sequence[Outcome], target: float) -> CascadePromiseRow:
    """The promise of a risk. Who keeps nothing has no wrong answer among what is kept."""
    scores, right = [one.score for one in found], [one.student for one in found]
    kept = keeping.keep(scores, right, target)
    if kept is None:
        return {
            **_row(RISK, target, None, 0, 0, math.nan, True),
            "least_risk": keeping.least_risk(scores, right, target),
            "problems_needed": keeping.problems_needed(scores, right, target),
        }
    bound = upper_bound(kept.wrong, kept.of, 1 - kept.level)
    return _row(RISK, target, kept.threshold, kept.wrong, kept.of, bound, True)


def ways_out(promise: CascadePromiseRow) -> str:
    """What would help where no threshold keeps a promised risk; empty: nobody computed it."""
    if "least_risk" not in promise:  # of an older version
        return ""
    ways = []
    if (risk := promise["least_risk"]) is not None:
        ways.append(f"--risk {risk:.2f} can be promised on these problems")
    if (needed := promise["problems_needed"]) is not None:
        ways.append(f"about {needed} problems would do (--limit), if others come out like these")
    else:
        ways.append("its best-scored answers are wrong too often for more problems to help")
    return "; ".join(ways)


def _against(found: Sequence[Outcome], kind: str, threshold: float | None) -> int:
    """How many problems count against the promise: wrong in the end, or passed on."""
    passed = [threshold is None or one.score < threshold for one in found]
    if kind == COST:
        return sum(passed)
    return sum(
        not (one.expert if asked else one.student) for one, asked in zip(found, passed, strict=True)
    )


def observed(found: Sequence[Outcome], kind: str, threshold: float | None) -> tuple[int, int]:
    """What counts against a promise on other problems, and of how many."""
    if kind != RISK:
        return _against(found, kind, threshold), len(found)
    kept = [one for one in found if threshold is not None and one.score >= threshold]
    return sum(not one.student for one in kept), len(kept)


def _row(
    kind: str, target: float, threshold: float | None, k: int, n: int, bound: float, kept: bool
) -> CascadePromiseRow:
    if kind == ACCURACY:
        bound = 1 - bound
    return {
        "kind": kind,
        "target": target,
        "level": LEVEL,
        "threshold": threshold,
        "against": k,
        "of": n,
        "bound": None if math.isnan(bound) else bound,
        "kept": kept,
    }
