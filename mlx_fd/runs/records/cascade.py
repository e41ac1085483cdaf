"""What a cascade was calibrated to: ``cascade.json``."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from mlx_fd.runs.records.parts import EstimateRow


class CascadePromiseRow(TypedDict):
    """What a cascade's threshold promises.

    Attributes:
        kind: ``risk``: of wrong answers among those that the student keeps; ``accuracy``: of all
            answers; ``cost``: the share of requests that the expert is asked.
        target: at most this risk or cost, at least this accuracy.
        level: the probability with which it holds on problems like the calibration's.
        threshold: answers with at least this score stay the student's; null: all are passed on.
        against: problems that count against it: wrong ones, for a cost those passed on.
        of: of how many.
        bound: what the promised share surely does not pass; null where nothing is known.
        kept: whether a threshold keeps it.
        least_risk: of a risk for which nothing can be kept: the least one, in whole per cent, that
            these problems allow to promise; null: none.
        problems_needed: likewise: about how many problems it takes, if others come out as these
            did; null: more than ten times as many.
    """

    kind: str
    target: float
    level: float
    threshold: float | None
    against: int
    of: int
    bound: float | None
    kept: bool
    least_risk: NotRequired[float | None]
    problems_needed: NotRequired[int | None]


class CascadeStepRow(TypedDict):
    """What scores mean, from one score to the next.

    Attributes:
        score: the lowest of the step.
        right: the share of right answers in it.
        n: answers in it.
    """

    score: float
    right: float
    n: int


class CascadePointRow(TypedDict):
    """A cascade that passes on a share of problems: those of the lowest scores.

    Attributes:
        passed_on: the share.
        threshold: of the score; null where all are passed on.
        accuracy: of all answers.
        random: the accuracy where as many are passed on by lot.
        oracle: the best accuracy with as many.
        expert_tokens: that the expert writes, per problem.
    """

    passed_on: float
    threshold: float | None
    accuracy: float
    random: float
    oracle: float
    expert_tokens: float


class CascadeSystemRow(TypedDict):
    """A cascade at its threshold, or what it is held against.

    Attributes:
        name: ``student`` (never asks), ``cascade``, ``random`` and ``oracle`` (ask as often), and
            ``expert`` (is always asked).
        accuracy: of all answers.
        passed_on: the share of problems that the expert is asked.
        expert_tokens: that the expert writes, per problem.
    """

    name: str
    accuracy: EstimateRow
    passed_on: float
    expert_tokens: EstimateRow


class CascadeMeasuredRow(TypedDict):
    """A cascade on some problems.

    Attributes:
        problems: source and split.
        n: how many.
        created: when, in UTC.
        against: problems that count against the promise.
        of: of how many.
        above_random: area between accuracy and that of a lottery, over all shares passed on.
        systems: at the threshold.
        curve: over all thresholds.
        left_out: of an evaluation: problems of the source that it leaves out, since the threshold
            was set on their questions.
    """

    problems: str
    n: int
    created: str
    against: int
    of: int
    above_random: EstimateRow
    systems: list[CascadeSystemRow]
    curve: list[CascadePointRow]
    left_out: NotRequired[int]


class CascadeFile(TypedDict):
    """``cascade.json``.

    Attributes:
        format: of this file.
        models: name and digest of student, adapter and expert.
        score: what the student's answers were scored by: ``answer``, 1 / (1 - log p) of the answer,
            or ``head``, the score head's.
        promise: what its threshold promises.
        confidence: what scores mean, from the lowest on.
        ids: of the calibration's problems.
        questions: SHA-256 of each question of the calibration, runs of white space as one space: no
            evaluation uses it, under any id. Absent in calibrations of older versions.
        calibration: on those.
        evaluation: on others; null before ``mlx-fd cascade eval``.
    """

    format: int
    models: dict[str, dict[str, str]]
    score: str
    promise: CascadePromiseRow
    confidence: list[CascadeStepRow]
    ids: list[str]
    questions: NotRequired[list[str]]
    calibration: CascadeMeasuredRow
    evaluation: CascadeMeasuredRow | None
