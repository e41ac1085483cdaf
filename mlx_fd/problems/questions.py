"""What makes two questions the same."""

from __future__ import annotations

import hashlib


def question_key(question: str) -> str:
    """What questions that differ in their white space alone have in common."""
    return " ".join(question.split())


def question_digest(question: str) -> str:
    """SHA-256 of a question's key, in hexadecimal digits."""
    return hashlib.sha256(question_key(question).encode(errors="surrogatepass")).hexdigest()
