"""What makes two questions the same."""

from __future__ import annotations


def question_key(question: str) -> str:
    """What questions that differ in their white space alone have in common."""
    return " ".join(question.split())
