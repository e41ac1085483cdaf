"""What came of one problem."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """One problem.

    Attributes:
        id: the problem's.
        score: of the student's answer, as :mod:`mlx_fd.evaluation.cascade.scores` has it.
        student: whether the student's answer is right.
        expert: whether the expert's is.
        student_tokens: that the student wrote.
        expert_tokens: that the expert wrote.
    """

    id: str
    score: float
    student: bool
    expert: bool
    student_tokens: int
    expert_tokens: int
