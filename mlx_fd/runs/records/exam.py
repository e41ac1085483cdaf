"""The examination's files."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class ExamResultRow(TypedDict):
    """What the student made of one question of the examination.

    Attributes:
        wrong: whether the answer to judge had an error.
        score_error: abs(head score - the score it deserves).
        written_error: abs(written score - the score it deserves).
        readable: whether a score and a verdict on the steps could be read.
        found: whether the first wrong step it names is the truth.
        solved: whether its own solution is right.
    """

    wrong: bool
    score_error: float
    written_error: float
    readable: bool
    found: bool
    solved: bool


class ExamFile(TypedDict):
    """``exam_before.json`` and ``exam_after.json``.

    Attributes:
        seconds: what the examination took.
        results: one for each question.
        exam_sha256: of the questions, the token limits, and who took it; absent in older versions.
    """

    seconds: float
    results: list[ExamResultRow]
    exam_sha256: NotRequired[str]
