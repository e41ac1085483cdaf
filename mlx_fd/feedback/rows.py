"""Episodes as lines of ``episodes.jsonl``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mlx_fd.feedback.stages import Finished, Judged, StudentFeedback
from mlx_fd.problems.prompts import Answer
from mlx_fd.runs.records.episodes import (
    AnswerRow,
    EpisodeRow,
    ExpertFeedbackRow,
    GateRow,
    SolutionColumns,
    StudentFeedbackRow,
    VerdictRow,
    accepted_columns,
)
from mlx_fd.runs.records.parts import thought_columns


def episode_row(
    finished: Finished, index: int, gate: GateRow, verdict: VerdictRow | None
) -> EpisodeRow:
    """An episode as one line of ``episodes.jsonl``.

    Args:
        finished: the episode.
        index: its place in the run, from 0.
        gate: what the gate decided, and the losses before and after the update.
        verdict: the expert's score against the right answer.
    """
    judged, usage = finished.judged, finished.usage
    answered, student = judged.answered, judged.before or judged.student
    return {
        "episode": index,
        "id": finished.problem.id,
        "question": finished.problem.question,
        "reference": finished.problem.answer or None,
        "answer": _answer_row(answered.answer),
        "expert_feedback": _expert_row(judged),
        "student_feedback": _feedback_row(student),
        "student_feedback_again": _feedback_row(judged.student) if judged.before else None,
        "gate": gate,
        "verdict": verdict,
        "score": finished.score,
        "merged": finished.merged,
        "revised": finished.revised,
        "critique": finished.critique,
        "final": _answer_row(finished.final),
        "correct_before": answered.is_correct,
        "correct_after": finished.is_correct,
        "second": None,
        "tokens": usage.tokens,
        "prefilled": usage.prefilled,
        "capped": list(usage.capped),
        "seconds": {step: round(value, 3) for step, value in usage.seconds.items()},
        **_solution_columns(finished.solution),
        **thought_columns(usage.thoughts, usage.closed),
        **accepted_columns(usage.accepted),
    }


def with_second(
    row: EpisodeRow, judged: Judged, gate: GateRow, verdict: VerdictRow | None
) -> EpisodeRow:
    """An episode's row with the student's answer beside the expert's (``answers_by`` ``both``).

    What it took, thought and was cut is in the row's other columns, each step's name after
    ``second_``.
    """
    usage = judged.usage

    def named(values: Mapping[str, Any]) -> dict[str, Any]:
        return {f"second_{step}": value for step, value in values.items()}

    def listed(steps: Iterable[str]) -> list[str]:
        return [f"second_{step}" for step in steps]

    return {
        **row,
        **accepted_columns({**row.get("accepted", {}), **named(usage.accepted)}),
        **thought_columns(
            {**row.get("thoughts", {}), **named(usage.thoughts)},
            [*row.get("closed_thoughts", ()), *listed(usage.closed)],
        ),
        "capped": [*row["capped"], *listed(usage.capped)],
        "tokens": {**row["tokens"], **named(usage.tokens)},
        "prefilled": {**row["prefilled"], **named(usage.prefilled)},
        "seconds": {
            **row["seconds"],
            **named({step: round(value, 3) for step, value in usage.seconds.items()}),
        },
        "second": {
            "answer": _answer_row(judged.answered.answer),
            "correct": judged.answered.is_correct,
            "expert_feedback": _expert_row(judged),
            "student_feedback": _feedback_row(judged.student),
            "gate": gate,
            "verdict": verdict,
        },
    }


def _solution_columns(solution: Answer | None) -> SolutionColumns:
    return {"expert_solution": _answer_row(solution)} if solution else {}


def _answer_row(given: Answer) -> AnswerRow:
    return {"text": given.text, "final": given.final}


def _expert_row(judged: Judged) -> ExpertFeedbackRow | None:
    if judged.expert is None:
        return None
    feedback = judged.expert.feedback
    return {"text": feedback.text, "written_score": feedback.written_score}


def _feedback_row(student: StudentFeedback) -> StudentFeedbackRow:
    return {
        "text": student.feedback.text,
        "head_score": student.head_score,
        "written_score": student.feedback.written_score,
        "solves_alike": student.solves_alike,
        "confidence": student.confidence,
    }
