"""What a cascade brings at each share that it passes on, beside what luck and an oracle would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from mlx_fd.evaluation.cascade.outcome import Outcome
from mlx_fd.evaluation.measures import Measure
from mlx_fd.evaluation.statistics import Rows, bootstrap, mean
from mlx_fd.runs.records.cascade import CascadePointRow, CascadeSystemRow
from mlx_fd.runs.records.parts import EstimateRow
from mlx_fd.runs.summary import wilson

STUDENT, CASCADE, RANDOM, ORACLE, EXPERT = "student", "cascade", "random", "oracle", "expert"
# Points of a curve that are kept; more cannot be told apart in a picture.
_POINTS = 101


def columns(found: Sequence[Outcome]) -> dict[str, Rows]:
    """Outcomes as columns of numbers."""
    names = ("score", "student", "expert", "student_tokens", "expert_tokens")
    return {name: np.array([float(getattr(one, name)) for one in found]) for name in names}


def curve(found: Sequence[Outcome]) -> list[CascadePointRow]:
    """Accuracy and cost where the k lowest scores are passed on, for k from none to all.

    Of problems with one score none comes before the other: between two scores the line is
    straight, as if it were drawn by lot.

    Args:
        found: at least one.
    """
    data = columns(found)
    n, order = len(found), np.argsort(data["score"], kind="stable")
    scores = data["score"][order]
    gain = _shared_within(data["expert"][order] - data["student"][order], scores)
    tokens = _shared_within(data["expert_tokens"][order], scores)
    right = np.concatenate([[0.0], np.cumsum(gain)]) + data["student"].sum()
    cost = np.concatenate([[0.0], np.cumsum(tokens)])
    shown = np.unique(np.linspace(0, n, min(_POINTS, n + 1)).round().astype(int))
    return [
        {
            "passed_on": k / n,
            "threshold": float(scores[k]) if k < n else None,
            "accuracy": float(right[k] / n),
            "random": float((data["student"].mean() * (n - k) + data["expert"].mean() * k) / n),
            "oracle": oracle_accuracy(data["student"], data["expert"], k / n),
            "expert_tokens": float(cost[k] / n),
        }
        for k in map(int, shown)
    ]


def _shared_within(values: Rows, scores: Rows) -> Rows:
    """Values, each the mean of those with the same score."""
    _, inverse, count = np.unique(scores, return_inverse=True, return_counts=True)
    return (np.bincount(inverse, weights=values) / count)[inverse]


def oracle_accuracy(student: Rows, expert: Rows, share: float) -> float:
    """The best accuracy when a share is passed on: first where it helps, last where it harms.

    Args:
        student: 1 where the student is right, else 0.
        expert: likewise.
        share: in [0, 1].
    """
    helps = float(((student == 0) & (expert == 1)).mean())
    harms = float(((student == 1) & (expert == 0)).mean())
    return float(student.mean()) + min(share, helps) - max(0.0, share - (1 - harms))


def above_random(scores: Rows, student: Rows, expert: Rows) -> float:
    """The area between the cascade's accuracy and that of a lottery, over all shares passed on.

    It is 0 where scores say nothing of where the expert helps.

    Args:
        scores: the student's.
        student: 1 where it is right, else 0.
        expert: likewise.
    """
    order = np.argsort(scores, kind="stable")
    gain = _shared_within((expert - student)[order], scores[order])
    n = len(gain)
    along = np.concatenate([[0.0], np.cumsum(gain)]) / n
    straight = np.linspace(0.0, float(gain.sum()) / n, n + 1)
    above = along - straight
    return float((above[1:] + above[:-1]).mean() / 2)


def systems(found: Sequence[Outcome], threshold: float | None) -> list[CascadeSystemRow]:
    """Accuracy and cost of the cascade at a threshold, and of those it is held against.

    Args:
        found: at least one.
        threshold: of the score; ``None``: everything is passed on.
    """
    data = columns(found)
    student, expert = data["student"], data["expert"]
    passed: Rows = np.ones(len(found))
    if threshold is not None:
        passed = (data["score"] < threshold).astype(np.float64)
    share = float(passed.mean())
    cascade = np.where(passed == 1, expert, student)

    def row(name: str, accuracy: EstimateRow, share: float, asked: Rows) -> CascadeSystemRow:
        tokens = bootstrap([asked * data["expert_tokens"]], mean)
        return {
            "name": name,
            "accuracy": accuracy,
            "passed_on": share,
            "expert_tokens": tokens.to_json(),
        }

    def lottery(student: Rows, expert: Rows, passed: Rows) -> float:
        part = passed.mean()
        return float((1 - part) * student.mean() + part * expert.mean())

    def best(student: Rows, expert: Rows, passed: Rows) -> float:
        return oracle_accuracy(student, expert, float(passed.mean()))

    three = [student, expert, passed]
    none, every = np.zeros(len(found)), np.ones(len(found))
    return [
        row(STUDENT, _share(student), 0.0, none),
        row(CASCADE, _share(cascade), share, passed),
        # Of these two only the number of problems passed on is known, not which.
        row(RANDOM, _accuracy(three, lottery), share, every * share),
        row(ORACLE, _accuracy(three, best), share, every * share),
        row(EXPERT, _share(expert), 1.0, every),
    ]


def _accuracy(columns: Sequence[Rows], statistic: Callable[..., float]) -> EstimateRow:
    """An accuracy that no single problem has.

    Where its resamples are all alike every problem comes out right, or every one wrong, so that
    it has Wilson's interval of a share.
    """
    found = bootstrap(columns, statistic)
    if found.low < found.high:
        return found.to_json()
    low, high = wilson(found.value * found.n, found.n)
    return replace(found, low=low, high=high).to_json()


def _share(column: Rows) -> EstimateRow:
    return Measure("accuracy", list(column)).estimate().to_json()
